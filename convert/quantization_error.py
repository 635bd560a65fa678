"""How far a quantised model is from the one that it was made of."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.checkpoint import from_pretrained
from phi3_jax.folder import find_folder
from phi3_jax.split_layers import decodes_split, split_layers
from phi3_jax.text.tokenizer import Tokenizer

_MOST_TOKENS = 256

# Plain English of several kinds, so that a vocabulary's common and rare words both come up.
TEXT = """\
The harbour lay quiet before dawn. A single lamp burned at the end of the pier, and under it an old
man mended a net that had already been mended a hundred times. "There will be wind by noon," he said
without looking up, "and by evening you will wish that you had stayed at home." She laughed, because
he said the same thing every morning, and because on most evenings he was right.

Water expands when it freezes, which is unusual among liquids: at 0 degrees Celsius ice takes up
about nine percent more room than the water it was made of. Lakes therefore freeze from the top, and
fish live through the winter below. In pipes the same property is a nuisance; one frost is enough to
split copper.

To sort a list, compare each pair of neighbours and swap those that stand the wrong way round. After
one pass the largest number is at the end; after n - 1 passes everything is in its place. For ten
numbers nobody will notice that there are faster ways, for ten million everybody will.

The committee met on 14 March 2019 and approved the budget of 3.2 million euros by seven votes to
two. Repairs of the northern bridge begin in May, and the road will be closed at night until the end
of the summer.
"""


@dataclass(frozen=True)
class QuantizationError:
    """What quantisation changed, on a text of a few hundred tokens.

    Attributes:
      tokens: how many.
      logits: root mean square of the logits' differences, in units of that of the logits, both
        about the mean of their token.
      perplexity, quantized_perplexity: of the text, before and after; None without a tokenizer that
        can be read, when the tokens are drawn at random.
    """

    tokens: int
    logits: float
    perplexity: float | None = None
    quantized_perplexity: float | None = None

    def __str__(self) -> str:
        if self.perplexity is None:
            what = f"on {self.tokens} random ids (the folder has no tokenizer that can be read)"
            return f"{what}: logits off by {self.logits:.2%}"
        before, after = (f"{x:.4g}" for x in (self.perplexity, self.quantized_perplexity))
        what = f"on {self.tokens} tokens of a text"
        return f"{what}: logits off by {self.logits:.2%}, perplexity {after} (was {before})"


def quantization_error(
    source: str | Path, quantized: str | Path, text: str = TEXT
) -> QuantizationError:
    """Runs both models over the text, computed as `generate` computes on this machine.

    One model is in memory at a time, in the dtype that it is stored in.

    Args:
      source: a model folder.
      quantized: one that was made of it.
      text: cut to 256 tokens.

    Raises:
      ValueError: where a folder holds no causal model.
    """
    try:
        ids = Tokenizer.from_pretrained(source).encode(text)[:_MOST_TOKENS]
    except (FileNotFoundError, ValueError):
        ids = None
    found = []
    for folder in (source, quantized):
        found.append(_logits(folder, ids))
        gc.collect()  # JAX lets go of a model's memory at a collection, or a call that comes later
    (wanted_TV, ids_T), (ours_TV, _) = found
    centred = [logits - logits.mean(-1, keepdims=True) for logits in (wanted_TV, ours_TV)]
    error = np.sqrt(np.mean((centred[1] - centred[0]) ** 2) / np.mean(centred[0] ** 2))
    before = after = None
    if ids is not None:
        before, after = (_perplexity(logits, ids_T) for logits in (wanted_TV, ours_TV))
    return QuantizationError(len(ids_T), float(error), before, after)


def _logits(folder: str | Path, ids: list[int] | None) -> tuple[np.ndarray, np.ndarray]:
    """Float32 logits [T, V] of a model, and the tokens, which are random where there are none."""
    model, params = from_pretrained(find_folder(folder), dtype=None)
    if ids is None:
        rng = np.random.default_rng(0)
        ids = rng.integers(3, model.config.vocab_size, _MOST_TOKENS).tolist()
    tokens = np.array([ids], np.int32)
    if decodes_split(params):
        params = split_layers(params)
    apply: Any = model.apply
    run = jax.jit(lambda params: apply({"params": params}, tokens).logits[0])
    return np.asarray(run(params).astype(jnp.float32)), tokens[0]


def _perplexity(logits_TV: np.ndarray, ids_T: np.ndarray) -> float:
    predicted_TV = jax.nn.log_softmax(logits_TV[:-1], axis=-1)
    return float(np.exp(-np.mean(np.asarray(predicted_TV)[np.arange(len(ids_T) - 1), ids_T[1:]])))
