"""Which token is chosen by its scores, and that a NaN chooses none."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Stands for the token of a row whose scores have a NaN.
NO_TOKEN = -1


def choose(scores_BV: jax.Array, key: jax.Array | None) -> jax.Array:
    """The token of every row, int32 [B]: the best, or with a key one drawn; NO_TOKEN where a score
    is NaN.

    Each row has a key of its own, from its number in the batch: what its neighbours hold, and how
    many there are, does not change its draws.
    """
    if key is not None:
        # With Gumbel noise the largest is a draw: jax.random.categorical.
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(scores_BV.shape[0]))
        scores_BV += jax.vmap(lambda key: jax.random.gumbel(key, scores_BV.shape[1:]))(keys)
    score_B, token_B = _best(scores_BV)
    return jnp.where(jnp.isnan(score_B), NO_TOKEN, token_B)


def _best(scores_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest score of each row and its place, the first of equals; a NaN before all others.

    What jnp.argmax compiles to keeps the score to itself: asking for it again would be one more sum
    over the devices that share the vocabulary.
    """

    def better(one, other):
        (a, i), (b, j) = one, other
        larger = (a > b) | jnp.isnan(a)
        first = larger | ((a == b) & (i < j))
        return jnp.where(larger, a, b), jnp.where(first, i, j)

    places_BV = lax.broadcasted_iota(jnp.int32, scores_BV.shape, 1)
    start = jnp.array(-jnp.inf, scores_BV.dtype), jnp.int32(0)
    return lax.reduce((scores_BV, places_BV), start, better, (1,))


def check_chosen(tokens_BS: np.ndarray, dtype: Any) -> None:
    """Refuses chosen tokens with NO_TOKEN among them, of a model that computes in this dtype.

    Raises:
      ValueError: with the first row and column.
    """
    none = np.argwhere(tokens_BS == NO_TOKEN)
    if len(none):
        row, column = none[0]
        raise ValueError(
            f"the scores for new token {column} of row {row} are NaN: the weights hold NaN, or "
            f"numbers too large for {jnp.dtype(dtype).name}; use other weights, or dtype float32 "
            "(remove_invalid_values takes NaN for 0)"
        )
