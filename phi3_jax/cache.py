"""The key-value cache: passed into a call and returned from it. Letters as in model.py."""

import dataclasses

import flax.struct
import jax
import jax.core
import jax.numpy as jnp
from jax import lax

from phi3_jax.config import Phi3Config
from phi3_jax.sharding import constrain


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
        rows that are computed anew.
    """

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array
    valid_BS: jax.Array
    length: jax.Array
    filled: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def init(
        cls, config: Phi3Config, batch: int, capacity: int, dtype: jax.typing.DTypeLike
    ) -> "KVCache":
        """An empty cache of `capacity` slots a row."""
        layers, kv_heads = config.num_hidden_layers, config.num_key_value_heads
        shape = (layers, batch, capacity, kv_heads, config.head_dim)
        return cls(
            k_LBSKH=jnp.zeros(shape, dtype),
            v_LBSKH=jnp.zeros(shape, dtype),
            valid_BS=jnp.zeros((batch, capacity), bool),
            length=jnp.zeros((), jnp.int32),
        ).settled()

    def settled(self) -> "KVCache":
        """The cache laid out on the active mesh: rows and key-value heads over its axes."""
        names = (None, "batch", None, "kv_heads", None)
        return dataclasses.replace(
            self,
            k_LBSKH=constrain(self.k_LBSKH, *names),
            v_LBSKH=constrain(self.v_LBSKH, *names),
            valid_BS=constrain(self.valid_BS, "batch", None),
            length=constrain(self.length),
        )

    @property
    def capacity(self) -> int:
        """Slots a row."""
        return self.k_LBSKH.shape[2]

    def check(self, config: Phi3Config, batch: int, tokens: int) -> None:
        """Raises ValueError for a cache of another model or batch, or one without room for
        `tokens` more.

        Inside a compiled function the fill is not known; only a call longer than the whole cache
        is refused there, and the caller has to know that the rest fits.
        """
        sizes = (config.num_hidden_layers, batch, config.num_key_value_heads, config.head_dim)
        layers, rows, _, kv_heads, head_dim = self.k_LBSKH.shape
        if (layers, rows, kv_heads, head_dim) != sizes:
            raise ValueError(
                f"the cache has (layers, rows, key-value heads, head dim) "
                f"{(layers, rows, kv_heads, head_dim)}, this call needs {sizes}"
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
        """The cache as it stands, about to be written again from its first column."""
        return dataclasses.replace(self, length=jnp.zeros((), jnp.int32), filled=False)

    def truncate(self, length: jax.typing.ArrayLike) -> "KVCache":
        """The cache with its first `length` columns only; the slots behind are free again."""
        kept = jnp.arange(self.capacity) < length
        return dataclasses.replace(
            self, valid_BS=self.valid_BS & kept, length=jnp.asarray(length, jnp.int32)
        )
