"""What generation returns, and scores of the tokens that were chosen."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.cache import KVCache


@dataclass(frozen=True)
class GenerateResult:
    """What `generate` returns; None for what was not asked for. Rows are N = B times
    num_return_sequences; arrays of steps are numpy arrays, one a token.

    Attributes:
      sequences: int32 [N, prompt width + new tokens], prompt and continuation, left-padded as the
        prompt was; finished rows end in padding.
      scores: float32 [N, V] a step, what the token was chosen by, after all processors; under
        beam search log-probabilities of the B * num_beams running beams.
      logits: float32 [N, V] a step, as the model gave them.
      sequences_scores: float32 [N], of beam search: the sum of log-probabilities over
        length ** length_penalty.
      beam_indices: int32 [N, new tokens], of beam search: the row of `scores` that each token came
        from, -1 behind the end.
      hidden_states: a step, a tuple of L + 1 arrays [N, T, D]; T is the prompt's width in the first
        step and 1 in the others.
      attentions: a step, a tuple of L arrays [N, heads, T, keys].
      cache: the KVCache of all tokens but the last, to go on from (`generate(..., cache=)`); None
        of beam search, where it is of the beams and not of these rows, and where a row went over
        the line of longrope after its end.
    """

    sequences: np.ndarray
    scores: tuple[np.ndarray, ...] | None = None
    logits: tuple[np.ndarray, ...] | None = None
    sequences_scores: np.ndarray | None = None
    beam_indices: np.ndarray | None = None
    hidden_states: tuple[tuple[np.ndarray, ...], ...] | None = None
    attentions: tuple[tuple[np.ndarray, ...], ...] | None = None
    cache: KVCache | None = field(default=None, repr=False)


def compute_transition_scores(
    sequences: Any,
    scores: Sequence[Any],
    beam_indices: Any = None,
    normalize_logits: bool = False,
) -> np.ndarray:
    """The score of every token that was chosen (`compute_transition_scores` of transformers).

    Args:
      sequences: of a GenerateResult, made with output_scores=True.
      scores: of the same.
      beam_indices: of the same.
      normalize_logits: log-softmax the scores first.

    Returns:
      float32 [N, new tokens]; 0 behind the end of a beam. The sum of a beam's over its length **
      length_penalty is its sequences_scores.

    Raises:
      ValueError: for scores that are None or of fewer steps than there are new tokens.
    """
    if scores is None:
        raise ValueError("there are no scores; generate with output_scores=True")
    sequences = np.asarray(sequences)
    stacked_SBV = np.stack([np.asarray(step) for step in scores])
    if normalize_logits:
        stacked_SBV = np.asarray(jax.nn.log_softmax(jnp.asarray(stacked_SBV), axis=-1))
    if beam_indices is None:
        steps = len(stacked_SBV)
        beam_indices = np.repeat(np.arange(len(sequences))[:, None], steps, axis=1)
    beams_NS = np.asarray(beam_indices)
    steps = int((beams_NS >= 0).sum(axis=1).max())
    if steps > len(stacked_SBV) or sequences.shape[1] < steps:
        raise ValueError(
            f"{len(stacked_SBV)} steps of scores and sequences of {sequences.shape[1]} tokens do "
            f"not belong to beams of {steps} new tokens; take all three from one result"
        )
    beams_NS = beams_NS[:, :steps]
    tokens_NS = sequences[:, sequences.shape[1] - steps :]
    chosen = stacked_SBV[np.arange(steps), np.maximum(beams_NS, 0), tokens_NS]
    return np.where(beams_NS < 0, np.float32(0), chosen)
