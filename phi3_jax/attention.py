"""Which key a query sees, and the attention itself. Letters as in model.py."""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from phi3_jax.attention_kernels import SAVED_NAME, cudnn_attention, splash_attention
from phi3_jax.cache import Quantized, Stored
from phi3_jax.sharding import Mesh


@flax.struct.dataclass
class Visible:
    """What the queries of a call see, the same in every layer.

    Attributes:
      segment_BT: int32, a query sees only new keys of its own number; 0 is padding. None: one
        document a row, without padding. For the fused implementations.
      masks: for "xla", one mask a piece of keys, as `attend` takes them.
      window: see `causal_mask`.
      implementation: "xla", "splash" or "cudnn".
    """

    segment_BT: jax.Array | None
    masks: Sequence[jax.Array]
    window: int | None = flax.struct.field(pytree_node=False)
    implementation: str = flax.struct.field(pytree_node=False)


def causal_mask(query_T: jax.Array, key_S: jax.Array, window: int | None) -> jax.Array:
    """Which columns a query may look at: those up to its own, the last `window` with its own.

    Columns, not positions: padding inside a window uses it up, as in the reference
    (`sliding_window_overlay` of transformers: q - window < kv <= q).

    Args:
      query_T, key_S: int32 column numbers; those of the keys may differ by row, [B, S].
      window: number of keys seen including the query's own, or None for all.

    Returns:
      bool [T, S], or [B, T, S].
    """
    distance = query_T[:, None] - key_S[..., None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def document_runs(ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cuts rows where an id differs from the one before.

    Returns:
      int32 [B, T], the number of each run from 0 on, and int32 [B, T], the columns since its start.
    """
    starts_BT = jnp.pad(ids_BT[:, 1:] != ids_BT[:, :-1], ((0, 0), (1, 0)))
    columns_T = jnp.arange(ids_BT.shape[1], dtype=jnp.int32)
    first_BT = jax.lax.cummax(jnp.where(starts_BT, columns_T, 0), axis=1)
    return jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32), columns_T - first_BT


def attend(
    q_BTKGH: jax.Array,
    keys: Sequence[Stored],
    values: Sequence[Stored],
    visible: Visible,
    mesh: Mesh | None = None,
    dropout: tuple[float, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Softmax attention, by the implementation that `visible` names.

    Args:
      q_BTKGH: queries, grouped by the key-value head that they share.
      keys, values: pieces [B, S, K, H], attended to as if they were one: the cached ones, and
        those of this call. Only "xla" takes more than one piece, quantised ones, or dropout.
      visible: what the queries see.
      mesh: of the model; the fused kernels are laid out on it.
      dropout: rate and key, for the probabilities.

    Returns:
      [B, T, K, G, H] in the dtype of q, and the probabilities [B, K, G, T, S] of "xla", else None.
    """
    if visible.implementation == "xla":
        out, probs = _attend_xla(q_BTKGH, keys, values, visible.masks, dropout)
        return checkpoint_name(out, SAVED_NAME), probs
    whole: Any = (*keys, *values)
    k_BTKH, v_BTKH = whole
    arguments = (q_BTKGH, k_BTKH, v_BTKH, visible.segment_BT, visible.window)
    if visible.implementation == "splash":
        return splash_attention(*arguments, mesh), None  # names its results itself
    return checkpoint_name(cudnn_attention(*arguments), SAVED_NAME), None


def _attend_xla(q_BTKGH, keys, values, masks, dropout):
    """Scores and softmax are float32; probabilities are cast to the dtype of q before they meet the
    values, as in the reference (`eager_attention_forward`).

    masks: a piece, broadcast to [B, K, G, T, S]: bool, True where a query sees a key, or float32
    to add to the scores. A query that sees nothing gets the mean of all values: finite, and of no
    consequence. The scales of quantised pieces multiply scores and probabilities, which are fewer
    than the values.
    """
    scale = q_BTKGH.shape[-1] ** -0.5
    lowest = jnp.finfo(jnp.float32).min
    scores = []
    for piece, mask in zip(keys, masks, strict=True):
        k_BSKH, scale_BKS = _unpacked(piece, q_BTKGH.dtype)
        score_BKGTS = scale * jnp.einsum(
            "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
        )
        if scale_BKS is not None:
            score_BKGTS = score_BKGTS * scale_BKS[:, :, None, None]
        if 1 < mask.shape[1] < k_BSKH.shape[2]:  # a caller's mask knows no padded heads
            more = k_BSKH.shape[2] - mask.shape[1]
            mask = jnp.pad(mask, [(0, 0), (0, more), (0, 0), (0, 0), (0, 0)])
        if mask.dtype == bool:
            score_BKGTS = jnp.where(mask, score_BKGTS, lowest)
        else:
            # Rows of nothing but -inf would be NaN.
            score_BKGTS = jnp.maximum(score_BKGTS + mask, lowest)
        scores.append(score_BKGTS)
    probs = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(q_BTKGH.dtype)
    if dropout is not None:
        probs = _drop(probs, *dropout)

    out, start = jnp.zeros((), q_BTKGH.dtype), 0
    for piece in values:
        v_BSKH, scale_BKS = _unpacked(piece, q_BTKGH.dtype)
        stop = start + v_BSKH.shape[1]
        weights = probs[..., start:stop]
        if scale_BKS is not None:
            weights = (weights * scale_BKS[:, :, None, None]).astype(q_BTKGH.dtype)
        out = out + jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH)
        start = stop
    return out, probs


def _unpacked(piece: Stored, dtype) -> tuple[jax.Array, jax.Array | None]:
    """A piece [B, S, K, H] to multiply with, and its scales [B, K, S]."""
    if isinstance(piece, Quantized):
        return piece.values.astype(dtype), jnp.swapaxes(piece.scale, 1, 2)
    return piece, None


def _drop(probs_BKGTS: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Dropout whose draw for a key-value group does not depend on how many groups are padded."""
    B, K, *rest = probs_BKGTS.shape
    keep_KB = jax.random.bernoulli(key, 1.0 - rate, (K, B, *rest))
    return jnp.where(jnp.moveaxis(keep_KB, 0, 1), probs_BKGTS / (1.0 - rate), 0)
