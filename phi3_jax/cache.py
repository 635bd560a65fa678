"""The key-value cache: passed into a call and returned from it. Letters as in model.py."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh

from phi3_jax.config import Phi3Config
from phi3_jax.sharding import Names, constrain, padded_shape

# Heads before slots: a head is a matrix [S, H], which fills the tiles of a TPU. The other way round
# it is heads a device and H, and the compiler copied the cache of two heads a device at each token.
_NAMES = (None, "batch", "attention_heads", "slots", None)


class Quantized(NamedTuple):
    """Vectors in eight bits: values * scale is what they stand for.

    values: int8 [..., H], in [-127, 127].
    scale: float32 [...], the largest absolute value of the vector / 127.
    """

    values: jax.Array
    scale: jax.Array


Stored = jax.Array | Quantized


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

    A quantised cache keeps int8 and one float32 scale a vector: (H + 4) / 4H of the bytes of
    float32, (H + 4) / 2H of those of bfloat16. It is not exact: a value is off by up to 1/254 of
    the largest in its vector. The tokens of one call see each other unrounded, so that a prompt
    run in one call has exact logits. Those of later calls are off, as root mean square and share of
    their standard deviation, by 0.2 % in a random model of 4 layers with heads of 64 (float32), and
    by 2 to 4 % in those of the tests, whose weights are fifteen times as large.

    Attributes:
      k_LBKSH, v_LBKSH: rotated keys, and values; as `Quantized` in a quantised cache.
      valid_BS: bool, the slots that hold a token of the row.
      length: int32 scalar, the columns used so far.
      column_BS: int32, the column that each slot of a ring holds, where it is valid; None for a
        full cache, whose slots are its columns.
      ring_capacity: the columns a ring may run through (static); None for a full cache.
      filled: False (static) where the next call is not to look at the slots: an empty cache, or
        rows that are computed anew. The first write makes it True, so that a cache carried through
        a compiled loop has to be written once before.
    """

    k_LBKSH: Stored
    v_LBKSH: Stored
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
    ) -> "KVCache":
        """An empty cache for `capacity` columns, for a model on this mesh.

        Args:
          config, batch, mesh: of the model and the calls.
          capacity: tokens a row can have, padding with them.
          dtype: of keys and values; a quantised cache does not use it.
          ring: only as many slots as config.sliding_window; a full cache where that is None, or no
            less than the capacity.
          quantized: keys and values in int8.
        """
        slots = capacity
        if ring and config.sliding_window is not None:
            slots = min(capacity, config.sliding_window)
        heads, width = _heads(config, mesh)
        shape = (config.num_hidden_layers, batch, heads, slots, width)

        def empty() -> Stored:
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
        vectors = lambda x: function(x, _NAMES[: x.ndim])  # noqa: E731
        rows = lambda x: function(x, ("batch", "slots"))  # noqa: E731
        return dataclasses.replace(
            self,
            k_LBKSH=jax.tree.map(vectors, self.k_LBKSH),
            v_LBKSH=jax.tree.map(vectors, self.v_LBKSH),
            valid_BS=rows(self.valid_BS),
            column_BS=None if self.column_BS is None else rows(self.column_BS),
        )

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
        layers, rows, kv_heads, _, head_dim = _array(self.k_LBKSH).shape
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

    def write(self, k_LBTKH: jax.Array, v_LBTKH: jax.Array, mask_BT: jax.Array | None) -> "KVCache":
        """The cache with T more columns; where mask_BT is False a slot stays as it was."""
        new = self._as_stored(k_LBTKH), self._as_stored(v_LBTKH)
        tokens = k_LBTKH.shape[2]
        if self.column_BS is None:
            written = self._put(new, mask_BT, self.length)
        elif tokens == 1:
            written = self._put(new, mask_BT, self.length % self.slots, self.length[None])
        else:
            written = self._put(*self._by_slot(new, mask_BT))
        return dataclasses.replace(written, length=self.length + tokens, filled=True)

    def _as_stored(self, x_LBTKH: jax.Array) -> Stored:
        x_LBKTH = x_LBTKH.swapaxes(2, 3)
        if isinstance(self.k_LBKSH, Quantized):
            return quantize(x_LBKTH)
        return x_LBKTH.astype(self.k_LBKSH.dtype)

    def _by_slot(self, new: tuple[Stored, Stored], mask_BT: jax.Array | None):
        """New columns in the order of a ring's slots, as `_put` takes them."""
        _, rows, _, tokens, _ = _array(new[0]).shape
        if mask_BT is None:
            mask_BT = jnp.ones((rows, tokens), bool)
        # Padding behind the last token of all rows must not push tokens out.
        used = jnp.max(jnp.where(mask_BT.any(axis=0), _arange(tokens) + 1, 0))
        last = self.length + used - 1
        column_S = last - (last - _arange(self.slots)) % self.slots
        index_S = column_S - self.length
        new = jax.tree.map(lambda x: jnp.take(x, index_S, axis=3, mode="clip"), new)
        mask_BS = jnp.take(mask_BT, index_S, axis=1, mode="clip") & (index_S >= 0)
        return new, mask_BS, 0, column_S

    def _put(self, new: tuple[Stored, Stored], mask_BT, start, column_T: Any = None) -> "KVCache":
        """Writes slots side by side, the first one `start`."""
        old = (self.k_LBKSH, self.v_LBKSH)
        _, rows, _, tokens, _ = _array(new[0]).shape
        before = lambda x, axis: lax.dynamic_slice_in_dim(x, start, tokens, axis)  # noqa: E731
        if mask_BT is None:
            mask_BT = jnp.ones((rows, tokens), bool)
        else:
            keep = lambda x: jnp.expand_dims(mask_BT, (0, 2, *range(4, x.ndim)))  # noqa: E731
            merged = lambda x, old: jnp.where(keep(x), x, before(old, 3))  # noqa: E731
            new = jax.tree.map(merged, new, old)
        put = lax.dynamic_update_slice_in_dim
        write = lambda x, new: _laid_out(put(x, new, start, axis=3))  # noqa: E731
        k_LBKSH, v_LBKSH = jax.tree.map(write, old, new)
        column_BS = self.column_BS
        if column_BS is not None:
            column_BT = jnp.where(mask_BT, column_T, before(column_BS, 1))
            column_BS = put(column_BS, column_BT, start, axis=1)
        valid_BT = mask_BT | before(self.valid_BS, 1)
        valid_BS = put(self.valid_BS, valid_BT, start, axis=1)
        return dataclasses.replace(
            self, k_LBKSH=k_LBKSH, v_LBKSH=v_LBKSH, valid_BS=valid_BS, column_BS=column_BS
        )

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


def _laid_out(x_LBKSH: jax.Array) -> jax.Array:
    """The cache as a TPU holds arguments and results of programs: of the slots and the width of a
    vector the one that fills 128 lanes better is the minor axis.

    Unasked, the compiler gives the cache of a loop the layout of what one step writes, and copies
    all of it there and back: 8 GiB more for phi-3-mini in libtpu 0.0.52.
    """
    if x_LBKSH.ndim < 5:
        return x_LBKSH  # scales
    slots, width = x_LBKSH.shape[3:]
    pads = lambda minor, major: (-minor % 128 / minor + 1) * (-major % 8 / major + 1)  # noqa: E731
    last = (4, 3) if pads(slots, width) < pads(width, slots) else (3, 4)
    layout = Layout((0, 1, 2, *last))
    return lax.platform_dependent(
        x_LBKSH, tpu=lambda x: with_layout_constraint(x, layout), default=lambda x: x
    )


def quantize(x: jax.Array) -> Quantized:
    """Vectors [..., H] in eight bits."""
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / 127
    # A vector of zeros has no scale to divide by.
    values = jnp.round(wide / jnp.where(scale == 0, 1, scale)[..., None])
    return Quantized(values.astype(jnp.int8), scale)


def _arange(number: int) -> jax.Array:
    return jnp.arange(number, dtype=jnp.int32)


def _array(x: Stored) -> jax.Array:
    return x.values if isinstance(x, Quantized) else x


def _heads(config: Phi3Config, mesh: Mesh | None) -> tuple[int, ...]:
    """Key-value heads, padded as in the parameters, and their width."""
    return padded_shape(("kv_heads", None), (config.num_key_value_heads, config.head_dim), mesh)
