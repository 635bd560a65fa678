"""A number that tells weights from others."""

from typing import Any

import jax
import jax.numpy as jnp

_ODD = 0x9E3779B1, 0x85EBCA6B


def fingerprint(params: Any, dtype: str | None = None) -> int:
    """A number of 32 bits that changes with the bits of the weights and with their places.

    It is the same on every mesh. All weights are read once.

    Args:
      params: a tree of arrays of 1, 2 or 4 bytes a number.
      dtype: what they are cast to first, None for none.
    """

    def one(leaf: jax.Array) -> jax.Array:
        leaf = leaf if dtype is None else leaf.astype(dtype)
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        sums = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
        sums *= jnp.uint32(_ODD[0])
        sums ^= sums >> 15  # or signs, the highest bits, could change places
        # Zeros add nothing: a mesh pads with them. Axis by axis, since a CPU is slow to add up the
        # last one, where there is least left of it then.
        while sums.ndim:
            weights = jnp.arange(len(sums), dtype=jnp.uint32) * jnp.uint32(_ODD[1]) | 1
            weights = jnp.expand_dims(weights, range(1, sums.ndim))
            sums = jnp.sum(sums * weights, axis=0, dtype=jnp.uint32)
        return sums

    def total(leaves: list[jax.Array]) -> jax.Array:
        return sum(
            (one(leaf) * jnp.uint32(2 * place + 1) for place, leaf in enumerate(leaves)),
            start=jnp.zeros((), jnp.uint32),
        )

    return int(jax.jit(total)(jax.tree.leaves(params)))
