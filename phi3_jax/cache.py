"""The key-value cache: passed into a call and returned from it. Letters as in model.py."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from phi3_jax.config import Phi3Config
from phi3_jax.sharding import Names, constrain, padded_shape
from phi3_jax.slots import (
    LayerSlots,
    Quantized,
    Stored,
    apart,
    laid_out,
    merged,
    put,
    quantize,
    stacked,
    unstacked,
)

# Heads before slots: a head is a matrix [S, H], which fills the tiles of a TPU. The other way round
# it is heads a device and H, and the compiler copied the cache of two heads a device at each token.
_NAMES = (None, "batch", "attention_heads", "slots", None)


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far, a slot a column, columns equal for all rows.

    Rows of unequal length are padded on the left, so that the next token of every row has the same
    column:

        column   0 1 2 3 4 5 6 7        length = 5, S = 8
        row 0    a b c d e . . .        valid 1 1 1 1 1 0 0 0
        row 1    - - f g h . . .        valid 0 0 1 1 1 0 0 0

    A ring has as many slots as the model's window is wide, and column c in slot c % S. What it
    forgets is nothing that a later token could see, so it serves like a full cache of its capacity;
    only `truncate` reaches less far back, and 4D masks need a full cache.

    Attributes:
      k_LBKSH, v_LBKSH: rotated keys, and values; as `Quantized` in a quantised cache. Or tuples of
        L [N, S, H], N = B * K, each layer's slots an array of their own (`split`): where the layers
        are no loop, XLA's CPU compiler writes into those in place, and copies others.
      valid_BS: bool, the slots that hold a token of the row.
      length: int32 scalar, the columns used so far.
      column_BS: int32, the column that each slot of a ring holds, where it is valid; None for a
        full cache, whose slots are its columns.
      ring_capacity: the columns a ring may run through (static); None for a full cache.
      filled: False (static) where the next call is not to look at the slots: an empty cache, or
        rows that are computed anew. The first write makes it True, so that a cache carried through
        a compiled loop has to be written once before.
    """

    k_LBKSH: Stored | tuple[Stored, ...]
    v_LBKSH: Stored | tuple[Stored, ...]
    valid_BS: jax.Array
    length: jax.Array
    column_BS: jax.Array | None = None
    ring_capacity: int | None = flax.struct.field(pytree_node=False, default=None)
    filled: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def init(
        cls,
        config: Phi3Config,
        batch: int,
        capacity: int,
        dtype: jax.typing.DTypeLike,
        mesh: Mesh | None = None,
        ring: bool = False,
        quantized: bool = False,
        split: bool = False,
    ) -> "KVCache":
        """An empty cache for `capacity` columns, for a model on this mesh.

        Args:
          config: of the model.
          batch: rows of the calls.
          capacity: tokens a row can have, padding with them.
          dtype: of keys and values; a quantised cache does not use it.
          mesh: of the model.
          ring: only as many slots as config.sliding_window; a full cache where that is None, or no
            less than the capacity.
          quantized: keys and values in int8.
          split: an array for each layer.
        """
        slots = capacity
        if ring and config.sliding_window is not None:
            slots = min(capacity, config.sliding_window)
        heads, width = _heads(config, mesh)
        layers = config.num_hidden_layers

        def empty() -> Stored | tuple[Stored, ...]:
            return tuple(zeros() for _ in range(layers)) if split else zeros(layers)

        def zeros(*layers: int) -> Stored:
            rows = (*layers, batch, heads) if layers else (batch * heads,)
            shape = (*rows, slots, width)
            if not quantized:
                return jnp.zeros(shape, dtype)
            return Quantized(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1], jnp.float32))

        column_BS = jnp.broadcast_to(_arange(slots), (batch, slots))
        return cls(
            k_LBKSH=empty(),
            v_LBKSH=empty(),
            valid_BS=jnp.zeros((batch, slots), bool),
            length=jnp.zeros((), jnp.int32),
            column_BS=None if slots == capacity else column_BS,
            ring_capacity=None if slots == capacity else capacity,
        ).settled(mesh)

    def settled(self, mesh: Mesh | None) -> "KVCache":
        """The cache laid out on a mesh: rows and key-value heads over its axes."""
        cache = self.mapped(lambda x, names: constrain(x, *names, mesh=mesh))
        return dataclasses.replace(cache, length=constrain(self.length, mesh=mesh))

    def mapped(self, function: Callable[[Any, Names], Any]) -> "KVCache":
        """The cache with a function applied to each array that has slots, and the names of its
        axes: "slots", and those of sharding.RULES.
        """

        def vectors(x: jax.Array) -> jax.Array:
            if not self.is_split:
                return function(x, _NAMES[: x.ndim])
            x = apart(x, len(self.valid_BS))
            return merged(function(x, _NAMES[1 : 1 + x.ndim]))

        rows = lambda x: function(x, ("batch", "slots"))  # noqa: E731
        return dataclasses.replace(
            self,
            k_LBKSH=jax.tree.map(vectors, self.k_LBKSH),
            v_LBKSH=jax.tree.map(vectors, self.v_LBKSH),
            valid_BS=rows(self.valid_BS),
            column_BS=None if self.column_BS is None else rows(self.column_BS),
        )

    @property
    def is_split(self) -> bool:
        """Whether each layer's slots are an array of their own."""
        return isinstance(self.k_LBKSH, tuple) and not isinstance(self.k_LBKSH, Quantized)

    @property
    def is_quantized(self) -> bool:
        """Whether keys and values are in eight bits."""
        return isinstance(self._some, Quantized)

    @property
    def _some(self) -> Any:
        """Keys of a layer, or of all."""
        return self.k_LBKSH[0] if self.is_split else self.k_LBKSH

    def split(self, wanted: bool = True, dtype: Any = None) -> "KVCache":
        """The cache with an array for each layer, or with all layers stacked.

        A copy, unless it is that already and of this dtype; a quantised one keeps its dtypes.
        """
        cache = self
        if dtype is not None and not self.is_quantized:
            cache = self.mapped(lambda x, names: x if len(names) == 2 else x.astype(dtype))
        if wanted == self.is_split:
            return cache
        rows = len(self.valid_BS)
        turned: Any = unstacked if wanted else lambda layers: stacked(layers, rows)
        k_LBKSH, v_LBKSH = turned(cache.k_LBKSH), turned(cache.v_LBKSH)
        return dataclasses.replace(cache, k_LBKSH=k_LBKSH, v_LBKSH=v_LBKSH)

    @property
    def capacity(self) -> int:
        """Columns a row can have."""
        return self.slots if self.ring_capacity is None else self.ring_capacity

    @property
    def slots(self) -> int:
        """Slots a row."""
        return self.valid_BS.shape[1]

    @property
    def columns(self) -> jax.Array:
        """The column of each slot, int32 [S], or [B, S] of a ring."""
        return _arange(self.slots) if self.column_BS is None else self.column_BS

    def check(self, config: Phi3Config, batch: int, tokens: int, mesh: Mesh | None) -> None:
        """Raises ValueError for a cache of another model or batch, or one without room for
        `tokens` more.

        Inside a compiled function the fill is not known; only a call longer than the whole cache
        is refused there, and the caller has to know that the rest fits.
        """
        sizes = (config.num_hidden_layers, batch, *_heads(config, mesh))
        some = _array(self._some)
        layers = len(self.k_LBKSH if self.is_split else some)
        rows = len(self.valid_BS)
        kv_heads, head_dim = some.shape[-3] // (rows if self.is_split else 1), some.shape[-1]
        if (layers, rows, kv_heads, head_dim) != sizes:
            raise ValueError(
                f"the cache has (layers, rows, key-value heads, head dim) "
                f"{(layers, rows, kv_heads, head_dim)}, this call needs {sizes}; make it with "
                "KVCache.init and the config and mesh of the model"
            )
        if self.ring_capacity is not None and self.slots != config.sliding_window:
            raise ValueError(
                f"the cache is a ring of {self.slots} slots, the model's sliding_window is "
                f"{config.sliding_window}; make it with KVCache.init and the config of the model"
            )
        used = 0 if isinstance(self.length, jax.core.Tracer) else int(self.length)
        if used + tokens > self.capacity:
            raise ValueError(
                f"the cache has {self.capacity} slots, {used} of them used: {tokens} more tokens "
                "do not fit; make a larger cache, or give fewer tokens"
            )

    def layers(self) -> Any:
        """Keys and values: of a split cache a list of each layer's [B, K, S, H]; otherwise all."""
        if not self.is_split:
            return self.k_LBKSH, self.v_LBKSH
        rows = len(self.valid_BS)
        both = jax.tree.map(lambda x: apart(x, rows), (self.k_LBKSH, self.v_LBKSH))
        return list(zip(*both, strict=True))

    def slots_of_layers(self, mask_BT: jax.Array | None) -> list["LayerSlots"] | None:
        """The slots of each layer, for a call that writes before it reads: those read first are
        copied by XLA's CPU compiler. None where the call has to see what it overwrites (a ring), or
        its own tokens unrounded (a quantised cache).
        """
        if not self.is_split or self.is_quantized or self.column_BS is not None:
            return None
        pairs: Any = zip(self.k_LBKSH, self.v_LBKSH, strict=True)
        return [LayerSlots(k, v, self.length, mask_BT) for k, v in pairs]

    def written(self, k_LBKSH, v_LBKSH, tokens: int, mask_BT: jax.Array | None) -> "KVCache":
        """The cache after `slots_of_layers` were written: they are what came of it."""
        return dataclasses.replace(
            self,
            k_LBKSH=k_LBKSH,
            v_LBKSH=v_LBKSH,
            valid_BS=self._valid(tokens, mask_BT, self.length),
            length=self.length + tokens,
            filled=True,
        )

    def write(self, k_LBTKH: Any, v_LBTKH: Any, mask_BT: jax.Array | None) -> "KVCache":
        """The cache with T more columns; where mask_BT is False a slot stays as it was.

        k_LBTKH, v_LBTKH: arrays, or tuples of L where the cache is split.
        """
        new = self._as_stored(k_LBTKH), self._as_stored(v_LBTKH)
        tokens = jax.tree.leaves(k_LBTKH)[0].shape[-3]
        if self.column_BS is None:
            written = self._put(new, mask_BT, self.length)
        elif tokens == 1:
            written = self._put(new, mask_BT, self.length % self.slots, self.length[None])
        else:
            written = self._put(*self._by_slot(new, mask_BT))
        return dataclasses.replace(written, length=self.length + tokens, filled=True)

    def _as_stored(self, x_LBTKH: Any) -> Any:
        def stored(x: jax.Array) -> Stored:
            x = x.swapaxes(-3, -2)
            x = merged(x) if self.is_split else x
            return quantize(x) if self.is_quantized else x.astype(self._some.dtype)

        return jax.tree.map(stored, x_LBTKH)

    def _by_slot(self, new: tuple[Stored, Stored], mask_BT: jax.Array | None):
        """New columns in the order of a ring's slots, as `_put` takes them."""
        tokens = jax.tree.leaves(new)[0].shape[self._axis]
        if mask_BT is None:
            mask_BT = jnp.ones((len(self.valid_BS), tokens), bool)
        # Padding behind the last token of all rows must not push tokens out.
        used = jnp.max(jnp.where(mask_BT.any(axis=0), _arange(tokens) + 1, 0))
        last = self.length + used - 1
        column_S = last - (last - _arange(self.slots)) % self.slots
        index_S = column_S - self.length
        new = jax.tree.map(lambda x: jnp.take(x, index_S, axis=self._axis, mode="clip"), new)
        mask_BS = jnp.take(mask_BT, index_S, axis=1, mode="clip") & (index_S >= 0)
        return new, mask_BS, 0, column_S

    def _put(self, new: tuple[Stored, Stored], mask_BT, start, column_T: Any = None) -> "KVCache":
        """Writes slots side by side, the first one `start`."""
        write = lambda old, new: laid_out(put(old, new, mask_BT, start, self._axis))  # noqa: E731
        k_LBKSH, v_LBKSH = jax.tree.map(write, (self.k_LBKSH, self.v_LBKSH), new)
        tokens = jax.tree.leaves(new)[0].shape[self._axis]
        column_BS = self.column_BS
        if column_BS is not None:
            column_BT = jnp.broadcast_to(column_T, (len(column_BS), tokens))
            column_BS = put(column_BS, column_BT, mask_BT, start, 1)
        return dataclasses.replace(
            self,
            k_LBKSH=k_LBKSH,
            v_LBKSH=v_LBKSH,
            valid_BS=self._valid(tokens, mask_BT, start),
            column_BS=column_BS,
        )

    @property
    def _axis(self) -> int:
        """The axis of the slots in keys, values and scales."""
        return 1 if self.is_split else _NAMES.index("slots")

    def _valid(self, tokens: int, mask_BT: jax.Array | None, start) -> jax.Array:
        """valid_BS with the tokens of a call."""
        new_BT = jnp.ones((len(self.valid_BS), tokens), bool)
        return put(self.valid_BS, new_BT, mask_BT, start, 1)

    def rewind(self, rows_B: jax.typing.ArrayLike | None = None) -> "KVCache":
        """The cache about to be written again from its first column.

        rows_B: bool, the rows that are to be computed anew, in one call or in several; by default
        all. What the cache holds of them is forgotten; the others keep their slots if the calls
        mask them throughout. The cache is to be cut to its length afterwards (`truncate`).
        """
        kept_BS = self._rows_but(rows_B)
        column_BS = self.column_BS
        if column_BS is not None:
            column_BS = jnp.where(kept_BS, column_BS, _arange(self.slots))
        return dataclasses.replace(
            self,
            valid_BS=self.valid_BS & kept_BS,
            column_BS=column_BS,
            length=jnp.zeros((), jnp.int32),
            filled=False,
        )

    def _rows_but(self, rows_B: jax.typing.ArrayLike | None) -> jax.Array:
        """bool [B, S], False in these rows, which None says are all."""
        rows_B1 = True if rows_B is None else jnp.asarray(rows_B)[:, None]
        return jnp.broadcast_to(~jnp.asarray(rows_B1), self.valid_BS.shape)

    def truncate(
        self, length: jax.typing.ArrayLike, rows_B: jax.typing.ArrayLike | None = None
    ) -> "KVCache":
        """The cache with its first `length` columns at most; the slots behind are free again.

        A ring has lost what the tokens behind overwrote: unless those are padding, or all columns
        still have a slot of their own, it can be cut by one column only.

        rows_B: bool, the rows to forget the columns of; by default all. Where rows are computed
        anew in several calls, the others hold columns that the length does not count yet.

        Raises:
          ValueError: where a ring has lost columns that the next token would see; inside a
            compiled function that is not known.
        """
        length = jnp.minimum(length, self.length)
        others_BS = self._rows_but(rows_B)
        if self.column_BS is not None and not isinstance(length, jax.core.Tracer):
            self._check_cut(int(length), jnp.where(others_BS, 0, self.column_BS))
        valid_BS = self.valid_BS & ((self.columns < length) | others_BS)
        return dataclasses.replace(self, valid_BS=valid_BS, length=jnp.asarray(length, jnp.int32))

    def _check_cut(self, length: int, columns_BS: jax.Array) -> None:
        newest = int(columns_BS.max()) + 1
        if newest > self.slots and length + 1 < newest:
            raise ValueError(
                f"the cache is a ring of {self.slots} slots that has run through {newest} columns: "
                f"cut to {length} it would miss columns that the next token sees; use a full cache"
            )

    def repeated(self, copies: int) -> "KVCache":
        """The cache with each row so many times, side by side. On a mesh the copies of a row are
        made where the row is.
        """
        return self.mapped(lambda x, names: jnp.repeat(x, copies, axis=names.index("batch")))

    def resized(self, capacity: int) -> "KVCache":
        """The cache with room for so many columns.

        Raises:
          ValueError: where it holds more.
        """
        used = 0 if isinstance(self.length, jax.core.Tracer) else int(self.length)
        if used > capacity:
            raise ValueError(f"the cache holds {used} columns, more than {capacity}; truncate it")
        if self.ring_capacity is not None:
            # With no more columns than slots it would not be a ring.
            return dataclasses.replace(self, ring_capacity=max(capacity, self.slots + 1))
        more = max(0, capacity - self.slots)

        def fit(x: jax.Array, names: Names) -> jax.Array:
            axis = names.index("slots")
            padding = [(0, more if i == axis else 0) for i in range(x.ndim)]
            return lax.slice_in_dim(jnp.pad(x, padding), 0, capacity, axis=axis)

        return self.mapped(fit)


def _arange(number: int) -> jax.Array:
    return jnp.arange(number, dtype=jnp.int32)


def _array(x: Stored) -> jax.Array:
    return x.values if isinstance(x, Quantized) else x


def _heads(config: Phi3Config, mesh: Mesh | None) -> tuple[int, ...]:
    """Key-value heads, padded as in the parameters, and their width."""
    return padded_shape(("kv_heads", None), (config.num_key_value_heads, config.head_dim), mesh)
