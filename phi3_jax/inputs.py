"""What a caller says about the tokens of a call, brought into one form. Letters as in model.py."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from phi3_jax.attention import Mask, SeenColumns, document_runs
from phi3_jax.cache import KVCache
from phi3_jax.config import Phi3Config


@dataclass(frozen=True)
class CallInputs:
    """The tokens of a call: their positions, and what they may see.

    Attributes:
      position_BT: int32, 0 for padding.
      mask_BT: bool, False for padding; None where there is none.
      document_BT: int32 in [0, T), the document of each token of packed rows; else None.
      column_T: int32, the columns of the tokens, counted from the start of the cache.
      slots_BS: bool, slots of the cache that may be seen; None without a filled cache.
      slot_column_S: int32 [S] or [B, S], the columns that they hold; None likewise.
      given_mask: what the caller's 4D mask says, [B or 1, N or 1, T, S or T], or None.
    """

    position_BT: jax.Array
    mask_BT: jax.Array | None
    document_BT: jax.Array | None
    column_T: jax.Array
    slots_BS: jax.Array | None
    slot_column_S: jax.Array | None
    given_mask: jax.Array | None

    @property
    def segment_BT(self) -> jax.Array | None:
        """int32: tokens see those of their own number, 0 is padding; None for one document."""
        if self.document_BT is None:
            return None if self.mask_BT is None else self.mask_BT.astype(jnp.int32)
        number_BT = self.document_BT + 1
        return number_BT if self.mask_BT is None else jnp.where(self.mask_BT, number_BT, 0)

    def masks(self, config: Phi3Config, written_first: bool = False) -> tuple[Mask, ...]:
        """The masks of the pieces of keys, slots before new tokens, as `attend` takes them; one for
        all where the new tokens are in their slots already.
        """
        if self.given_mask is not None:
            return self._given_masks(config)
        column_BT, segment_BT, window = self.column_T[None], self.segment_BT, config.sliding_window
        new = SeenColumns(column_BT, column_BT, segment_BT, segment_BT, window)
        if self.slots_BS is None or self.slot_column_S is None:
            return (new,)
        slot_column_BS = jnp.atleast_2d(self.slot_column_S)
        is_slot_BT = jnp.ones_like(column_BT, bool)
        if written_first:
            new_BT = (
                jnp.ones(self.position_BT.shape, bool) if self.mask_BT is None else self.mask_BT
            )
            slots_BS = lax.dynamic_update_slice_in_dim(
                self.slots_BS, new_BT, self.column_T[0], axis=1
            )
            return (SeenColumns(column_BT, slot_column_BS, is_slot_BT, slots_BS, window),)
        return SeenColumns(column_BT, slot_column_BS, is_slot_BT, self.slots_BS, window), new

    def _given_masks(self, config: Phi3Config) -> tuple[jax.Array, ...]:
        mask: Any = self.given_mask
        heads = config.num_attention_heads // config.num_key_value_heads
        rows, _, tokens, keys = mask.shape
        groups = (1, 1) if mask.shape[1] == 1 else (config.num_key_value_heads, heads)
        mask = mask.reshape(rows, *groups, tokens, keys)
        if self.slot_column_S is None:
            return (mask,)
        new = lax.dynamic_slice_in_dim(mask, self.column_T[0], tokens, axis=-1)
        hidden = False if mask.dtype == bool else -jnp.inf
        return jnp.where(self.slot_column_S < self.column_T[0], mask, hidden), new


def read_inputs(
    config: Phi3Config,
    rows: int,
    tokens: int,
    attention_mask: Any,
    position_ids: Any,
    segment_ids: Any,
    cache: KVCache | None,
    token_mask: Any = None,
) -> CallInputs:
    """Reads the arguments of a call as `Phi3Model` describes them.

    Raises:
      ValueError: for shapes and kinds that do not go together.
    """
    B, T = rows, tokens
    of_tokens = {
        "position_ids": position_ids,
        "segment_ids": segment_ids,
        "token_mask": token_mask,
    }
    for name, array in of_tokens.items():
        if array is not None and np.shape(array) not in ((B, T), (1, T)):
            raise ValueError(
                f"{name} has shape {np.shape(array)}, expected that of the tokens, {(B, T)}"
            )
    column_T = jnp.arange(T, dtype=jnp.int32) + (0 if cache is None else cache.length)
    slots_BS = slot_column_S = None
    if cache is not None and cache.filled:
        slots_BS, slot_column_S = cache.valid_BS, cache.columns
    mask_BT = given_mask = None
    if token_mask is not None:
        if attention_mask is not None or segment_ids is not None:
            other = "attention_mask" if attention_mask is not None else "segment_ids"
            raise ValueError(f"token_mask and {other} both say what is padding; give one")
        mask_BT = jnp.broadcast_to(jnp.asarray(token_mask) != 0, (B, T))
    if attention_mask is not None:
        if np.ndim(attention_mask) == 4:
            given_mask = _whole_mask(attention_mask, config, B, T, cache)
        else:
            mask_BT, seen_BS = _padding_mask(attention_mask, B, T, cache)
            if slots_BS is not None and seen_BS is not None:
                slots_BS = slots_BS & seen_BS

    document_BT = None
    offsets_BT = column_T
    if segment_ids is not None:
        if cache is not None or given_mask is not None:
            other = "a cache" if cache is not None else "a 4D attention_mask"
            raise ValueError(
                f"segment_ids do not go with {other}; packed rows must be computed in one call, "
                "and see what their segment_ids say"
            )
        ids_BT = jnp.broadcast_to(jnp.asarray(segment_ids), (B, T))
        document_BT, offsets_BT = document_runs(ids_BT)
        mask_BT = (ids_BT != 0) if mask_BT is None else mask_BT & (ids_BT != 0)
    position_BT = offsets_BT if position_ids is None else jnp.asarray(position_ids)
    position_BT = jnp.broadcast_to(position_BT, (B, T)).astype(jnp.int32)
    if cache is not None:
        # What a compiled call writes past the end would land on other tokens: no position, NaN.
        position_BT = jnp.where(column_T < cache.capacity, position_BT, -1)
    alone = cache is None and mask_BT is None and given_mask is None
    if position_ids is not None and alone:
        document_BT, _ = document_runs(position_BT - column_T)
    if mask_BT is not None:
        # What padding computes is never looked at, but it must stay finite.
        position_BT = jnp.where(mask_BT, position_BT, 0)
    return CallInputs(
        position_BT, mask_BT, document_BT, column_T, slots_BS, slot_column_S, given_mask
    )


def _padding_mask(attention_mask, B: int, T: int, cache: KVCache | None):
    """A 2D mask as that of this call's tokens [B, T], and of the slots [B, S] where there are."""
    shape = np.shape(attention_mask)
    if len(shape) != 2 or shape[0] not in (B, 1):
        raise ValueError(
            f"attention_mask has shape {shape}, expected [batch, tokens] ({(B, T)}), or "
            "[batch, heads, queries, keys]"
        )
    mask = jnp.broadcast_to(jnp.asarray(attention_mask) != 0, (B, shape[1]))
    if shape[1] == T and (cache is None or not cache.filled):
        return mask, None
    mask = _over_columns(mask, T, cache)
    mask_BT = lax.dynamic_slice_in_dim(mask, 0 if cache is None else cache.length, T, axis=1)
    if cache is not None and cache.column_BS is not None:
        mask = jnp.take_along_axis(mask, cache.column_BS, axis=1)
    return mask_BT, mask


def _whole_mask(attention_mask, config: Phi3Config, B: int, T: int, cache: KVCache | None):
    """A 4D mask over the keys of this call: the slots of a filled cache, else the new tokens."""
    mask = jnp.asarray(attention_mask)
    rows, heads, queries, keys = mask.shape
    if mask.dtype != bool and not jnp.issubdtype(mask.dtype, jnp.floating):
        raise ValueError(
            f"a 4D attention_mask of dtype {mask.dtype} can be read two ways; give bool (True "
            "keeps a key) or a float (added to the scores)"
        )
    if rows not in (B, 1) or heads not in (config.num_attention_heads, 1) or queries != T:
        raise ValueError(
            f"attention_mask has shape {mask.shape}, expected [{B} or 1, "
            f"{config.num_attention_heads} or 1, {T}, keys]"
        )
    if mask.dtype != bool:
        mask = mask.astype(jnp.float32)
    if cache is None or not cache.filled:
        if keys == T:
            return mask
        return lax.slice_in_dim(_over_columns(mask, T, cache), 0, T, axis=-1)
    if cache.column_BS is not None:
        raise ValueError(
            f"a 4D attention_mask says alone which keys are seen, and the cache is a ring that "
            f"holds the last {cache.slots} only; use a full cache"
        )
    return _over_columns(mask, T, cache)


def _over_columns(mask: jax.Array, T: int, cache: KVCache | None) -> jax.Array:
    """A mask whose last axis has the columns so far, or all columns, as one of all columns.

    A mask that is shorter than the keys could be meant for any of them: the reference takes what
    is missing as masked, without a word.
    """
    width = mask.shape[-1]
    covers = f"attention_mask has shape {mask.shape}, it covers {width} keys"
    if cache is None:
        raise ValueError(f"{covers}; expected the {T} tokens of this call")
    if width == cache.capacity:
        return mask
    if isinstance(cache.length, jax.core.Tracer):
        raise ValueError(
            f"{covers}; in a compiled function, where the fill of the cache is not known, it must "
            f"cover its {cache.capacity} slots"
        )
    seen = int(cache.length) + T
    if width != seen:
        raise ValueError(
            f"{covers}; expected {seen} (those before and the {T} of this call) or the "
            f"{cache.capacity} slots of the cache"
        )
    padding = [(0, 0)] * (mask.ndim - 1) + [(0, cache.capacity - width)]
    return jnp.pad(mask, padding)
