"""Which tokens may come next, decided on the host between two steps.

The compiled step takes the answer as bits: uint32 [B, W], where bit i of word w stands for token
32 w + i, W = ceil(V / 32).
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

Rows = Sequence[np.ndarray | None]


class Constraint(Protocol):
    """What says which tokens may come next."""

    def allowed(self, sequences: Rows, step: int) -> np.ndarray | None:
        """The tokens that each row may go on with: uint32 [B, W].

        None means that all rows may go on as they like, from here to their ends: nobody needs to
        ask again.

        Rows change places between calls under beam search, so that the answer must come from the
        sequences alone.

        Args:
          sequences: each row's own tokens, int32, its prompt without padding and what was chosen;
            None for rows that have ended and beams that are given up, which may be allowed all.
          step: how many of them were chosen.

        Raises:
          ValueError: where a row has no token to go on with.
        """
        ...


def allowed_bits(ids: Any, vocab_size: int) -> np.ndarray:
    """Token ids, integers in any order, as bits: uint32 [W]."""
    bits = np.zeros(-(-vocab_size // 32) * 32, bool)
    bits[ids] = True
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


class PrefixAllowed:
    """A caller's prefix_allowed_tokens_fn (PrefixConstrainedLogitsProcessor).

    Args:
      function: from a prompt's number in the batch and a row's own tokens, int32 [T] without
        padding, to the ids that may come next.
      vocab_size: ids of the model.
      copies: rows of each prompt, side by side: its beams, or num_return_sequences.
    """

    def __init__(
        self,
        function: Callable[[int, np.ndarray], Any],
        vocab_size: int,
        copies: int = 1,
    ):
        self._function, self._vocab_size, self._copies = function, vocab_size, copies

    def allowed(self, sequences: Rows, step: int) -> np.ndarray:
        """As in `Constraint`.

        Raises:
          ValueError: where the function returns no ids, or such as are none.
        """
        return np.stack([self._row(row, tokens) for row, tokens in enumerate(sequences)])

    def _row(self, row: int, tokens: np.ndarray | None) -> np.ndarray:
        if tokens is None:
            return np.full(-(-self._vocab_size // 32), 0xFFFFFFFF, np.uint32)
        batch_id = row // self._copies
        ids = np.asarray(self._function(batch_id, tokens))
        if ids.size == 0:
            raise ValueError(
                f"prefix_allowed_tokens_fn allows no token for batch id {batch_id} after "
                f"{len(tokens)} tokens; let it allow an end token where nothing else is left"
            )
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"prefix_allowed_tokens_fn returned {ids.dtype} of shape {ids.shape}, expected a "
                "list of token ids"
            )
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            bad = ids[(ids < 0) | (ids >= self._vocab_size)][0]
            raise ValueError(
                f"prefix_allowed_tokens_fn allows {bad}, outside the vocabulary of "
                f"{self._vocab_size}; let it return ids of the model's tokenizer"
            )
        return allowed_bits(ids, self._vocab_size)


class All:
    """Several constraints at once."""

    def __init__(self, constraints: Sequence[Constraint]):
        self._constraints = tuple(constraints)

    def allowed(self, sequences: Rows, step: int) -> np.ndarray | None:
        """As in `Constraint`.

        Raises:
          ValueError: where the constraints have no token in common.
        """
        answers = [constraint.allowed(sequences, step) for constraint in self._constraints]
        answers = [answer for answer in answers if answer is not None]
        if not answers:
            return None
        together = np.bitwise_and.reduce(answers)
        apart = np.logical_and.reduce([answer.any(axis=1) for answer in answers])
        if (none := apart & ~together.any(axis=1)).any():
            row = int(np.argmax(none))
            raise ValueError(
                f"the constraints have no token in common for row {row} after "
                f"{step} new tokens; use fewer of prefix_allowed_tokens_fn, grammar and "
                "token_healing at once"
            )
        return together
