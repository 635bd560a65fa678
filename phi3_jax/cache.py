"""The key-value cache: passed into a call and returned from it. Letters as in model.py."""

import dataclasses
import functools

import flax.struct
import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from phi3_jax.config import Phi3Config
from phi3_jax.sharding import constrain, padded_shape

_NAMES = (None, "batch", None, "attention_heads", None)


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far, one column (slot) a token, equal for all rows.

    Rows of unequal length are padded on the left, so that the next token of every row has the same
    column:

        column   0 1 2 3 4 5 6 7        length = 5, S = 8
        row 0    a b c d e . . .        valid 1 1 1 1 1 0 0 0
        row 1    - - f g h . . .        valid 0 0 1 1 1 0 0 0

    Attributes:
      k_LBSKH, v_LBSKH: rotated keys, and values.
      valid_BS: bool, the slots that hold a token of the row; none from `length` on.
      length: int32 scalar, the columns used so far.
      filled: False (static) where the next call is not to look at the slots: an empty cache, or
        rows that are computed anew. The first write makes it True, so that a cache carried through
        a compiled loop has to be written once before.
    """

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array
    valid_BS: jax.Array
    length: jax.Array
    filled: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def init(
        cls,
        config: Phi3Config,
        batch: int,
        capacity: int,
        dtype: jax.typing.DTypeLike,
        mesh: Mesh | None = None,
    ) -> "KVCache":
        """An empty cache of `capacity` slots a row, for a model on this mesh."""
        shape = (config.num_hidden_layers, batch, capacity, *_heads(config, mesh))
        return cls(
            k_LBSKH=jnp.zeros(shape, dtype),
            v_LBSKH=jnp.zeros(shape, dtype),
            valid_BS=jnp.zeros((batch, capacity), bool),
            length=jnp.zeros((), jnp.int32),
        ).settled(mesh)

    def settled(self, mesh: Mesh | None) -> "KVCache":
        """The cache laid out on a mesh: rows and key-value heads over its axes."""
        place = functools.partial(constrain, mesh=mesh)
        return dataclasses.replace(
            self,
            k_LBSKH=place(self.k_LBSKH, *_NAMES),
            v_LBSKH=place(self.v_LBSKH, *_NAMES),
            valid_BS=place(self.valid_BS, "batch", None),
            length=place(self.length),
        )

    @property
    def capacity(self) -> int:
        """Slots a row."""
        return self.k_LBSKH.shape[2]

    def check(self, config: Phi3Config, batch: int, tokens: int, mesh: Mesh | None) -> None:
        """Raises ValueError for a cache of another model or batch, or one without room for
        `tokens` more.

        Inside a compiled function the fill is not known; only a call longer than the whole cache
        is refused there, and the caller has to know that the rest fits.
        """
        sizes = (config.num_hidden_layers, batch, *_heads(config, mesh))
        layers, rows, _, kv_heads, head_dim = self.k_LBSKH.shape
        if (layers, rows, kv_heads, head_dim) != sizes:
            raise ValueError(
                f"the cache has (layers, rows, key-value heads, head dim) "
                f"{(layers, rows, kv_heads, head_dim)}, this call needs {sizes}; make it with "
                "KVCache.init and the config and mesh of the model"
            )
        used = 0 if isinstance(self.length, jax.core.Tracer) else int(self.length)
        if used + tokens > self.capacity:
            raise ValueError(
                f"the cache has {self.capacity} slots, {used} of them used: {tokens} more tokens "
                "do not fit; make a larger cache, or give fewer tokens"
            )

    def write(self, k_LBTKH: jax.Array, v_LBTKH: jax.Array, mask_BT: jax.Array | None) -> "KVCache":
        """The cache with T more columns; where mask_BT is False a slot stays as it was."""
        tokens = k_LBTKH.shape[2]
        start = self.length
        if mask_BT is None:
            mask_BT = jnp.ones(k_LBTKH.shape[1:3], bool)
        else:
            keep = mask_BT[None, :, :, None, None]
            old = lambda x: lax.dynamic_slice_in_dim(x, start, tokens, axis=2)  # noqa: E731
            k_LBTKH = jnp.where(keep, k_LBTKH, old(self.k_LBSKH))
            v_LBTKH = jnp.where(keep, v_LBTKH, old(self.v_LBSKH))
        valid = mask_BT | lax.dynamic_slice_in_dim(self.valid_BS, start, tokens, axis=1)
        put = lax.dynamic_update_slice_in_dim
        return KVCache(
            k_LBSKH=put(self.k_LBSKH, k_LBTKH.astype(self.k_LBSKH.dtype), start, axis=2),
            v_LBSKH=put(self.v_LBSKH, v_LBTKH.astype(self.v_LBSKH.dtype), start, axis=2),
            valid_BS=put(self.valid_BS, valid, start, axis=1),
            length=self.length + tokens,
            filled=True,
        )

    def rewind(self) -> "KVCache":
        """The cache as it stands, about to be written again from its first column; rows that the
        next call masks keep their slots. It is to be cut to its length afterwards (`truncate`).
        """
        return dataclasses.replace(self, length=jnp.zeros((), jnp.int32), filled=False)

    def truncate(self, length: jax.typing.ArrayLike) -> "KVCache":
        """The cache with its first `length` columns at most; the slots behind are free again."""
        length = jnp.minimum(length, self.length)
        kept = jnp.arange(self.capacity) < length
        return dataclasses.replace(
            self, valid_BS=self.valid_BS & kept, length=jnp.asarray(length, jnp.int32)
        )


def _heads(config: Phi3Config, mesh: Mesh | None) -> tuple[int, ...]:
    """Key-value heads, padded as in the parameters, and their width."""
    return padded_shape(("kv_heads", None), (config.num_key_value_heads, config.head_dim), mesh)
