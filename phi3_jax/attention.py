"""Which key a query sees, and the attention itself. Letters as in model.py."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from phi3_jax.attention_kernels import SAVED_NAME, cudnn_attention, splash_attention
from phi3_jax.sharding import Mesh, logical_spec, named_sharding
from phi3_jax.slots import Quantized, Stored

# Scores that a device holds at a time, in bytes: those of more queries are computed in pieces.
SCORE_BYTES = 2**26

# A product with fewer rows than these the TPU's compiler computes without the matrix unit, where
# the cache's bandwidth is not what binds any more.
TPU_ROWS = 8


@flax.struct.dataclass
class SeenColumns:
    """Which keys the queries see by their columns: a mask [T, S] that is made where it is used.

    Attributes:
      query_BT, key_BS: int32, the columns, [1, T] and [B or 1, S].
      query_segment_BT, key_segment_BS: int32 or bool [B or 1, ...], seen are keys of the query's
        own number; None for both: all.
      window: see `causal_mask`.
    """

    query_BT: jax.Array
    key_BS: jax.Array
    query_segment_BT: jax.Array | None
    key_segment_BS: jax.Array | None
    window: int | None = flax.struct.field(pytree_node=False)

    def array(self) -> jax.Array:
        """The mask, bool [B or 1, 1, 1, T, S]."""
        seen = causal_mask(self.query_BT[0], self.key_BS, self.window)
        if self.query_segment_BT is not None and self.key_segment_BS is not None:
            seen &= self.query_segment_BT[:, :, None] == self.key_segment_BS[:, None, :]
        return seen[:, None, None]

    def of_queries(self, start: jax.Array, number: int) -> "SeenColumns":
        """The part of some queries, side by side."""
        cut = lambda x: lax.dynamic_slice_in_dim(x, start, number, axis=1)  # noqa: E731
        query_BT, segment_BT = jax.tree.map(cut, (self.query_BT, self.query_segment_BT))
        return dataclasses.replace(self, query_BT=query_BT, query_segment_BT=segment_BT)


Mask = jax.Array | SeenColumns


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
    masks: Sequence[Mask]
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
    keys: Sequence[Any],
    values: Sequence[Any],
    visible: Visible,
    mesh: Mesh | None = None,
    dropout: tuple[float, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Softmax attention, by the implementation that `visible` names.

    Args:
      q_BTKGH: queries, grouped by the key-value head that they share.
      keys, values: pieces, attended to as if they were one: what is cached [B, K, S, H], where
        there is a cache, and that of this call [B, T, K, H], or None where the cache has it
        already. Only "xla" takes a cache, or dropout.
      visible: what the queries see.
      mesh: of the model; the fused kernels are laid out on it.
      dropout: rate and key, for the probabilities.

    Returns:
      [B, T, K, G, H] in the dtype of q, and the probabilities [B, K, G, T, S] of "xla", else None.
    """
    if visible.implementation == "xla":
        pieces = [[_by_rows(piece, mesh) for piece in cached] for *cached, _ in (keys, values)]
        for some, new_BTKH in zip(pieces, (keys[-1], values[-1]), strict=True):
            some += [] if new_BTKH is None else [new_BTKH.swapaxes(1, 2)]
        out, probs = _attend_xla(q_BTKGH, *pieces, visible.masks, mesh, dropout)
        return checkpoint_name(out, SAVED_NAME), probs
    (k_BTKH,), (v_BTKH,) = keys, values
    arguments = (q_BTKGH, k_BTKH, v_BTKH, visible.segment_BT, visible.window)
    if visible.implementation == "splash":
        return splash_attention(*arguments, mesh), None  # names its results itself
    return checkpoint_name(cudnn_attention(*arguments), SAVED_NAME), None


def _by_rows(piece: Stored, mesh: Mesh | None) -> Stored:
    """A layer of the cache as the cache is held: on a GPU row by row. Unasked, the compiler gives
    the whole cache the layout that the products would like: a copy at each token (jax 0.10.2).
    """
    if isinstance(piece, Quantized):
        values: Any = _by_rows(piece.values, mesh)
        return piece._replace(values=values)
    ask = functools.partial(with_layout_constraint, layouts=Layout((0, 1, 2, 3)))
    if mesh is not None:  # the compiler cannot cut the request, and would gather the cache for it
        spec = logical_spec(("batch", "attention_heads", None, None), piece.shape, mesh)
        ask = jax.shard_map(ask, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return lax.platform_dependent(piece, cuda=ask, default=lambda piece: piece)


def _attend_xla(q_BTKGH, keys, values, masks, mesh, dropout):
    """The attention in pieces of its queries where the scores of all are too many to hold; the
    probabilities of all are computed only if the caller uses them.
    """
    T = q_BTKGH.shape[1]
    queries = _queries_at_once(q_BTKGH, keys, mesh)
    out, probs = _mix(q_BTKGH, keys, values, masks, mesh, dropout)
    if queries >= T or dropout is not None:
        return out, probs

    @jax.checkpoint  # what a backward pass would keep of all the pieces is what is avoided here
    def piece(start):
        some = [_of_queries(mask, start, queries) for mask in masks]
        q_BtKGH = lax.dynamic_slice_in_dim(q_BTKGH, start, queries, axis=1)
        return _mix(q_BtKGH, keys, values, some, mesh, None)[0]

    # The last piece may begin inside of the one before.
    starts = jnp.minimum(jnp.arange(0, T, queries), T - queries)
    out_CBtKGH = lax.map(piece, starts)
    first_BTKGH = jnp.moveaxis(out_CBtKGH[:-1], 0, 1).reshape(len(q_BTKGH), -1, *q_BTKGH.shape[2:])
    return jnp.concatenate([first_BTKGH, out_CBtKGH[-1][:, -T % queries :]], axis=1), probs


def _queries_at_once(q_BTKGH: jax.Array, keys: Sequence[Stored], mesh: Mesh | None) -> int:
    """How many queries have no more than SCORE_BYTES of scores on a device."""
    names, shape = ("batch", None, "attention_heads", None, None), q_BTKGH.shape
    if mesh is not None:
        shape = named_sharding(names, shape, mesh).shard_shape(shape)
    rows, _, kv_heads, group, _ = shape
    columns = sum(_unpacked(piece, q_BTKGH.dtype)[0].shape[2] for piece in keys)
    return max(TPU_ROWS, SCORE_BYTES // (4 * rows * kv_heads * group * columns))


def _of_queries(mask: Mask, start: jax.Array, number: int) -> Mask:
    if isinstance(mask, SeenColumns):
        return mask.of_queries(start, number)
    return lax.dynamic_slice_in_dim(mask, start, number, axis=3)


def _mix(q_BTKGH, keys, values, masks, mesh, dropout):
    """Values mixed by the softmax of the scores, and the probabilities.

    On a TPU few queries get company, zeros: see TPU_ROWS.
    """
    masks = [mask.array() if isinstance(mask, SeenColumns) else mask for mask in masks]
    _, T, _, G, _ = q_BTKGH.shape
    more = -(-TPU_ROWS // G) - T
    if more <= 0 or dropout is not None:
        return _softmax_mix(q_BTKGH, keys, values, masks, mesh, dropout)

    def padded(q_BTKGH, keys, values, masks):
        pad = lambda x, axis: jnp.pad(x, [(0, more * (i == axis)) for i in range(x.ndim)])  # noqa: E731
        masks = [mask if mask.shape[3] == 1 else pad(mask, 3) for mask in masks]
        out, probs = _softmax_mix(pad(q_BTKGH, 1), keys, values, masks, mesh, None)
        return out[:, :T], probs[..., :T, :]

    plain = functools.partial(_softmax_mix, mesh=mesh, dropout=None)
    return lax.platform_dependent(q_BTKGH, keys, values, masks, tpu=padded, default=plain)


def _softmax_mix(q_BTKGH, keys, values, masks, mesh, dropout):
    """Scores and softmax are float32; probabilities are cast to the dtype of q before they meet the
    values, as in the reference (`eager_attention_forward`).

    masks: a piece, broadcast to [B, K, G, T, S]: bool, True where a query sees a key, or float32
    to add to the scores. A query that sees nothing gets the mean of all values: finite, and of no
    consequence. The scales of quantised pieces multiply scores and probabilities, which are fewer
    than the values. The pieces are never put together: the cache would be copied for it.
    """
    scores = [_scores(q_BTKGH, *piece, mesh) for piece in zip(keys, masks, strict=True)]
    best = [score_BKGTS.max(axis=-1, keepdims=True) for score_BKGTS in scores]
    highest = lax.stop_gradient(functools.reduce(jnp.maximum, best))
    weights = [jnp.exp(score_BKGTS - highest) for score_BKGTS in scores]
    total = sum(weight_BKGTS.sum(axis=-1, keepdims=True) for weight_BKGTS in weights)
    probs = [(weight_BKGTS / total).astype(q_BTKGH.dtype) for weight_BKGTS in weights]
    whole_BKGTS = jnp.concatenate(probs, axis=-1)
    if dropout is not None:
        whole_BKGTS = _drop(whole_BKGTS, *dropout)
        stops = list(itertools.accumulate(prob.shape[-1] for prob in probs[:-1]))
        probs = jnp.split(whole_BKGTS, stops, axis=-1)

    mixed = jnp.zeros((), jnp.float32)
    for prob_BKGTS, piece in zip(probs, values, strict=True):
        v_BKSH, scale_BKS = _unpacked(piece, q_BTKGH.dtype)
        if scale_BKS is not None:
            prob_BKGTS = (prob_BKGTS * scale_BKS[:, :, None, None]).astype(q_BTKGH.dtype)
        mixed += _sums(prob_BKGTS, v_BKSH, mesh)
    return mixed.astype(q_BTKGH.dtype), whole_BKGTS


def _scores(q_BTKGH: jax.Array, piece: Stored, mask: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Scores of one piece of keys, masked: float32 [B, K, G, T, S]."""
    k_BKSH, scale_BKS = _unpacked(piece, q_BTKGH.dtype)
    score_BKGTS = q_BTKGH.shape[-1] ** -0.5 * _products(q_BTKGH, k_BKSH, mesh)
    if scale_BKS is not None:
        score_BKGTS = score_BKGTS * scale_BKS[:, :, None, None]
    if 1 < mask.shape[1] < k_BKSH.shape[1]:  # a caller's mask knows no padded heads
        more = k_BKSH.shape[1] - mask.shape[1]
        mask = jnp.pad(mask, [(0, 0), (0, more), (0, 0), (0, 0), (0, 0)])
    lowest = jnp.finfo(jnp.float32).min
    if mask.dtype == bool:
        return jnp.where(mask, score_BKGTS, lowest)
    # Rows of nothing but -inf would be NaN.
    return jnp.maximum(score_BKGTS + mask, lowest)


def _products(q_BTKGH: jax.Array, k_BKSH: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Queries times keys, float32 [B, K, G, T, S]."""
    wide = {"preferred_element_type": jnp.float32}
    plain = functools.partial(jnp.einsum, "BTKGH,BKSH->BKGTS", **wide)
    if mesh is not None:
        return plain(q_BTKGH, k_BKSH)

    def by_head(q_BTKGH, k_BKSH):
        B, T, K, G, H = q_BTKGH.shape
        q_NMH = q_BTKGH.transpose(0, 2, 3, 1, 4).reshape(B * K, G * T, H)
        k_NSH = k_BKSH.reshape(B * K, -1, H)
        return jnp.einsum("NMH,NSH->NMS", q_NMH, k_NSH, **wide).reshape(B, K, G, T, -1)

    # With rows and heads apart, XLA's CPU compiler copies the cache into another order.
    return lax.platform_dependent(q_BTKGH, k_BKSH, cpu=by_head, default=plain)


def _sums(prob_BKGTS: jax.Array, v_BKSH: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Values mixed by probabilities, [B, T, K, G, H]; as `_products`."""
    plain = functools.partial(jnp.einsum, "BKGTS,BKSH->BTKGH")
    if mesh is not None:
        return plain(prob_BKGTS, v_BKSH)

    def by_head(prob_BKGTS, v_BKSH):
        B, K, G, T, S = prob_BKGTS.shape
        prob_NMS, v_NSH = prob_BKGTS.reshape(B * K, G * T, S), v_BKSH.reshape(B * K, S, -1)
        out_NMH = jnp.einsum("NMS,NSH->NMH", prob_NMS, v_NSH)
        return out_NMH.reshape(B, K, G, T, -1).transpose(0, 3, 1, 2, 4)

    return lax.platform_dependent(prob_BKGTS, v_BKSH, cpu=by_head, default=plain)


def _unpacked(piece: Stored, dtype) -> tuple[jax.Array, jax.Array | None]:
    """A piece [B, K, S, H] to multiply with, and its scales [B, K, S]."""
    if isinstance(piece, Quantized):
        return piece.values.astype(dtype), piece.scale
    return piece, None


def _drop(probs_BKGTS: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Dropout whose draw for a key-value group does not depend on how many groups are padded."""
    B, K, *rest = probs_BKGTS.shape
    keep_KB = jax.random.bernoulli(key, 1.0 - rate, (K, B, *rest))
    return jnp.where(jnp.moveaxis(keep_KB, 0, 1), probs_BKGTS / (1.0 - rate), 0)
