"""Rotary position embedding: frequencies, the precomputed tables, and when a row is long.

Longrope (LongRoPE, arXiv:2402.13753) has two sets of factors. A row uses the long set when its own
largest position + 1 exceeds original_max_position_embeddings, else the short one; `rows_are_long`
is the only place that decides it. Letters: R rotary pairs, P table rows (positions).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.config import Phi3Config


class RopeTables(NamedTuple):
    """cos and sin of every position, float32, times the attention factor.

    The short pair serves rows up to original_max_position_embeddings and has no more rows than
    that under longrope; the long pair is None where no row can be long. All are [P, R].

    long_B: bool [B], rows that are long whatever positions a call holds, as the first chunk of a
    long prompt does; None where the call's own positions tell.
    """

    short_cos_PR: jax.typing.ArrayLike
    short_sin_PR: jax.typing.ArrayLike
    long_cos_PR: jax.typing.ArrayLike | None
    long_sin_PR: jax.typing.ArrayLike | None
    long_B: jax.typing.ArrayLike | None = None


def inverse_frequencies(config: Phi3Config, long: bool = False) -> np.ndarray:
    """Radians per position of each rotary pair, float32 [R].

    Reference: `_compute_longrope_parameters` and `compute_default_rope_parameters` of
    transformers, in their float32 arithmetic.
    """
    rope = config.rope_parameters
    exponents = np.arange(0, config.rotary_dim, 2, dtype=np.float32) / np.float32(config.rotary_dim)
    periods = np.float32(rope["rope_theta"]) ** exponents
    if config.is_longrope:
        factors = rope["long_factor"] if long else rope["short_factor"]
        periods = np.asarray(factors, np.float32) * periods
    return (np.float32(1.0) / periods).astype(np.float32)


def attention_factor(config: Phi3Config) -> float:
    """What cos and sin of both tables are multiplied with.

    An explicit attention_factor wins, then `factor`, then max / original; see
    `_compute_longrope_parameters` of transformers.
    """
    rope = config.rope_parameters
    if not config.is_longrope:
        return 1.0
    if "attention_factor" in rope:
        return float(rope["attention_factor"])
    original = config.original_max_position_embeddings
    scale = rope.get("factor", config.max_position_embeddings / original)
    return 1.0 if scale <= 1.0 else math.sqrt(1.0 + math.log(scale) / math.log(original))


@functools.lru_cache(maxsize=8)
def rope_tables(config: Phi3Config, length: int) -> RopeTables:
    """Tables for the positions 0 to length - 1, as float32 numpy arrays.

    Pass them to compiled functions as arguments: at 131,072 positions they are 48 MiB, too much
    for a constant inside a program.
    """
    original = config.original_max_position_embeddings
    if not config.is_longrope or length <= original:
        return RopeTables(*_table(config, length, long=False), None, None)
    short = _table(config, original, long=False)
    return RopeTables(*short, *_table(config, length, long=True))


def _table(config: Phi3Config, length: int, long: bool) -> tuple[np.ndarray, np.ndarray]:
    positions = np.arange(length, dtype=np.float32)
    # The angle is rounded to float32 as in the reference; only its cosine is taken more exactly.
    angles = (positions[:, None] * inverse_frequencies(config, long)).astype(np.float64)
    factor = attention_factor(config)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return cos * np.float32(factor), sin * np.float32(factor)


def rows_are_long(
    config: Phi3Config,
    position_ids_BT: jax.Array,
    mask_BT: jax.Array | None = None,
    document_BT: jax.Array | None = None,
) -> jax.Array:
    """Which rows use the long factors: those whose largest unmasked position + 1 exceeds
    original_max_position_embeddings.

    Args:
      position_ids_BT: int32.
      mask_BT: bool, False for padding.
      document_BT: int32 in [0, T), the document of each token in a packed row; each document is
        then a row of its own.

    Returns:
      bool [B, 1], or [B, T] for packed rows.
    """
    if mask_BT is not None:
        position_ids_BT = jnp.where(mask_BT, position_ids_BT, 0)
    if document_BT is None:
        largest = position_ids_BT.max(axis=1, keepdims=True)
    else:
        tokens = position_ids_BT.shape[1]
        of_row = lambda x_T, d_T: jax.ops.segment_max(x_T, d_T, num_segments=tokens)[d_T]  # noqa: E731
        largest = jax.vmap(of_row)(position_ids_BT, document_BT)
    return largest + 1 > config.original_max_position_embeddings


def rope_cos_sin(
    tables: RopeTables, position_ids_BT: jax.Array, long_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """cos and sin for each token, float32 [B, T, R], from the table that its row uses.

    long_BT is what `rows_are_long` gives, [B, 1] or [B, T]; rows of `tables.long_B` are long
    besides. A position outside the table gives NaN: a clamped lookup would be wrong without a sign.
    """
    # A negative index would count from the table's end.
    rows_BT = jnp.where(position_ids_BT < 0, jnp.iinfo(jnp.int32).max, position_ids_BT)
    look_up = functools.partial(jnp.take, indices=rows_BT, axis=0, mode="fill", fill_value=jnp.nan)
    cos = look_up(jnp.asarray(tables.short_cos_PR))
    sin = look_up(jnp.asarray(tables.short_sin_PR))
    if tables.long_cos_PR is None or tables.long_sin_PR is None:
        return cos, sin
    if tables.long_B is not None:
        long_BT = long_BT | jnp.asarray(tables.long_B)[:, None]
    long_BT1 = long_BT[:, :, None]
    long_cos = look_up(jnp.asarray(tables.long_cos_PR))
    long_sin = look_up(jnp.asarray(tables.long_sin_PR))
    return jnp.where(long_BT1, long_cos, cos), jnp.where(long_BT1, long_sin, sin)


def apply_rope(x_BTKCH: jax.Array, cos_BTR: jax.Array, sin_BTR: jax.Array) -> jax.Array:
    """Rotates the first 2R dimensions of each head, first half against second half.

    cos and sin are cast to the dtype of x after their scaling, as in the reference
    (`apply_rotary_pos_emb`); the dimensions beyond 2R pass through (partial rotary).
    """
    pairs = cos_BTR.shape[-1]
    cos, sin = (t[:, :, None, None].astype(x_BTKCH.dtype) for t in (cos_BTR, sin_BTR))
    first, second, rest = jnp.split(x_BTKCH, (pairs, 2 * pairs), axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin, rest)
    return jnp.concatenate(rotated, axis=-1)
