"""Matrices in 8 or 4 bits, in place of float ones.

A quantised weight stands where the float one was, in the tree and on the mesh. What multiplies with
it (`phi3_jax.products`) turns it back into floats where it is used, or multiplies integers.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from phi3_jax.hf_format import tile_of

# The 16 numbers of NormalFloat, in units of the largest of a tile (QLoRA, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
_ZERO = NF4.index(0.0)


@flax.struct.dataclass
class QuantizedWeight:
    """A matrix [*out, *in] in few bits, in place of a projection's or a head's float `weight`.

    Attributes:
      values: int8 [*out, *in], -127 to 127; or for nf4 uint8 [..., ceil(last / 2)], two indices
        into NF4 each, that of the earlier input in the low bits.
      scales: float, what the values are multiplied with: int8 has one for an output [*out, 1, ...],
        nf4 one for `tile` inputs [..., last / tile].
      kind: "int8" or "nf4" (arXiv:2305.14314).
      last: the size of the last dimension.
      tile: how many of its inputs share a scale.
      in_integers: multiply the values of int8 as they are, with inputs as pairs of 8-bit integers.
        For inference on a CPU; such a product has no gradient.
    """

    values: Any
    scales: Any
    kind: str = flax.struct.field(pytree_node=False)
    last: int = flax.struct.field(pytree_node=False)
    tile: int = flax.struct.field(pytree_node=False)
    in_integers: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight."""
        return (*self.values.shape[:-1], self.last)

    def astype(self, dtype: Any) -> jax.Array:
        """The floats that it stands for, computed in float32."""
        scales = self.scales.astype(jnp.float32)
        if self.kind == "int8":
            return (self.values.astype(jnp.float32) * scales).astype(dtype)
        pairs = jnp.stack([self.values & 15, self.values >> 4], axis=-1)
        indices = pairs.reshape(*self.values.shape[:-1], -1)[..., : self.last]
        scales = jnp.repeat(scales, self.tile, axis=-1)[..., : self.last]
        return (jnp.asarray(NF4, jnp.float32)[indices] * scales).astype(dtype)


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf is a QuantizedWeight."""
    return isinstance(leaf, QuantizedWeight)


def require_floats(params: Mapping[str, Any], what: str) -> None:
    """Refuses parameters with quantised weights for what needs the floats.

    Raises:
      ValueError: with the name of one.
    """
    for path, leaf in flatten_dict(params).items():
        if is_quantized(leaf):
            raise ValueError(
                f"{'.'.join(path)} is quantised ({leaf.kind}), {what} needs the original weights"
            )


@partial(jax.jit, static_argnames=("kind", "outputs"))
def quantize_weight(weight: jax.Array, kind: str, outputs: int) -> QuantizedWeight:
    """A matrix as the nearest numbers that its kind has.

    Args:
      weight: [*out, *in], of any float dtype, which the scales have too.
      kind: "int8" or "nf4".
      outputs: how many of its dimensions are outputs.
    """
    last = weight.shape[-1]
    wide = weight.astype(jnp.float32)
    if kind == "int8":
        inputs = tuple(range(outputs, weight.ndim))
        largest = jnp.max(jnp.abs(wide), axis=inputs, keepdims=True)
        scales = (largest / 127).astype(weight.dtype)
        steps = wide / _not_zero(scales)
        values = jnp.clip(jnp.round(steps), -127, 127).astype(jnp.int8)
        return QuantizedWeight(values, scales, kind, last, last)
    tile = tile_of(last)
    largest = jnp.max(jnp.abs(wide.reshape(*wide.shape[:-1], -1, tile)), axis=-1)
    scales = largest.astype(weight.dtype)
    shares = wide / _not_zero(jnp.repeat(scales, tile, axis=-1))
    numbers = np.array(NF4, np.float32)
    indices = jnp.searchsorted((numbers[1:] + numbers[:-1]) / 2, shares, method="compare_all")
    pad = [(0, 0)] * (weight.ndim - 1) + [(0, last % 2)]
    pairs = jnp.pad(indices.astype(jnp.uint8), pad, constant_values=_ZERO)
    values = pairs[..., ::2] | pairs[..., 1::2] << 4
    return QuantizedWeight(values, scales, kind, last, tile)


def _not_zero(scales: jax.Array) -> jax.Array:
    """Of a tile that is all zeros it does not matter what it is divided by."""
    wide = scales.astype(jnp.float32)
    return jnp.where(wide == 0, 1, wide)


def layout_of_part(place: Any, shape: tuple[int, ...]) -> Any:
    """The layout of the values or the scales of a weight that is laid out so; scales too few to be
    cut over an axis are whole there.
    """
    if not isinstance(place, NamedSharding):
        return place
    spec = []
    for size, axes in zip(shape, place.spec, strict=True):
        names = (axes,) if isinstance(axes, str) else axes or ()
        parts = math.prod(place.mesh.shape[name] for name in names)
        spec.append(axes if size % parts == 0 else None)
    return NamedSharding(place.mesh, PartitionSpec(*spec))
