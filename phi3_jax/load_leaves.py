"""The leaves of a folder, read layer by layer to where they stay.

On disk every leaf is whole and has its own shape. In memory it is cut over the mesh, and padded at
the end of the dimensions that the mesh does not divide.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from phi3_jax.hf_format import HFWeights, LeafPath
from phi3_jax.quantized import QuantizedWeight, layout_of_part
from phi3_jax.read_ahead import read_ahead

if TYPE_CHECKING:
    from phi3_jax.orbax_format import OrbaxWeights

Weights: TypeAlias = "HFWeights | OrbaxWeights"

# Start and stop along each dimension.
Ranges = tuple[tuple[int, int], ...]

# Of arrays that XLA takes from the host's memory, in bytes (`xla::cpu::MinAlign`).
_ALIGNMENT = 64


def ranges_of(index: Any, shape: tuple[int, ...]) -> Ranges:
    """What an index of slices covers of a shape."""
    return tuple(axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True))


def stored_part(ranges: Ranges, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The part of some ranges that is not padding, which begins where the stored shape ends."""
    return tuple(
        slice(min(start, size), min(stop, size))
        for (start, stop), size in zip(ranges, shape, strict=True)
    )


def load_leaves(
    weights: Weights, targets: Mapping[LeafPath, jax.ShapeDtypeStruct]
) -> dict[LeafPath, Any]:
    """The leaves of these padded shapes, dtypes and shardings, read layer by layer.

    A weight that is quantised in the folder is a QuantizedWeight, with scales of the dtype.
    """
    table, parts, wanted = weights.table, {}, {}
    for path, target in targets.items():
        parts[path] = {path: target}
        if table.stored(path) != (path,):
            parts[path] = _quantized_targets(weights, path, target)
        wanted |= parts[path]
    arrays = _load_arrays(weights, wanted)
    loaded: dict[LeafPath, Any] = {}
    for path, own in parts.items():
        if len(own) == 1:
            loaded[path] = arrays[path]
            continue
        values, scales = (arrays[part] for part in own)
        last, kind = targets[path].shape[-1], str(table.quantized)
        loaded[path] = QuantizedWeight(values, scales, kind, last, table.tile(path))
    return loaded


def _quantized_targets(
    weights: Weights, path: LeafPath, target: jax.ShapeDtypeStruct
) -> dict[LeafPath, jax.ShapeDtypeStruct]:
    """Values and scales of a weight with this target."""
    values, scales = weights.table.stored(path)
    outer, last = target.shape[:-1], target.shape[-1]
    if weights.table.quantized == "int8":
        inputs = weights.table.weights[scales].axes.count("1")
        shapes = [target.shape, (*target.shape[:-inputs], *[1] * inputs)]
    else:
        shapes = [(*outer, -(-last // 2)), (*outer, -(-last // weights.table.tile(path)))]
    return {
        part: jax.ShapeDtypeStruct(shape, dtype, sharding=layout_of_part(target.sharding, shape))
        for part, shape, dtype in zip(
            (values, scales), shapes, (weights.leaves[values].dtype, target.dtype), strict=True
        )
    }


def _load_arrays(
    weights: Weights, targets: Mapping[LeafPath, jax.ShapeDtypeStruct]
) -> dict[LeafPath, jax.Array]:
    """`load_leaves` of what is stored as it is in memory."""
    devices = {device for target in targets.values() for device in target.sharding.device_set}
    if len(devices) == 1 and devices.pop().platform == "cpu":
        return _load_in_place(weights, targets)
    parts = [part for part in weights.table.parts if part[0] in targets]
    stacked = {path: targets[path] for path, layer in parts if layer == 0}
    shardings = {path: target.sharding for path, target in stacked.items()}
    zeros = lambda: {path: jnp.zeros(x.shape, x.dtype) for path, x in stacked.items()}  # noqa: E731
    arrays = jax.jit(zeros, out_shardings=shardings)()
    put = {
        path: jax.jit(_put_layer, donate_argnums=0, out_shardings=sharding)
        for path, sharding in shardings.items()
    }

    def read(part: tuple[LeafPath, int | None]) -> dict[Ranges, np.ndarray]:
        path, layer = part
        target = targets[path] if layer is None else _one_layer(targets[path])
        indices = target.sharding.addressable_devices_indices_map(target.shape).values()
        # Devices that hold the same part are given the same array.
        wanted = {ranges_of(index, target.shape) for index in indices}
        return {key: _read_part(weights, path, layer, key, target.dtype) for key in wanted}

    for (path, layer), cut in read_ahead(read, parts):
        target = targets[path] if layer is None else _one_layer(targets[path])
        array = jax.make_array_from_callback(
            target.shape,
            target.sharding,
            lambda index, target=target, cut=cut: cut[ranges_of(index, target.shape)],
            dtype=target.dtype,
        )
        if layer is not None:
            array = put[path](arrays[path], array, np.int32(layer))
        # Waiting keeps the copies of many layers from being in memory at once.
        arrays[path] = jax.block_until_ready(array)
    return arrays


def _load_in_place(
    weights: Weights, targets: Mapping[LeafPath, jax.ShapeDtypeStruct]
) -> dict[LeafPath, jax.Array]:
    """As `load_leaves` on one CPU device, whose memory is the host's: no layer is moved again."""
    buffers = {path: _aligned(target.shape, target.dtype) for path, target in targets.items()}

    def fill(part: tuple[LeafPath, int | None]) -> None:
        path, layer = part
        slot = buffers[path] if layer is None else buffers[path][layer]
        if slot.dtype == weights.leaves[path].dtype:
            weights.read_into(path, layer, slot)
        else:
            slot[...] = weights.read(path, layer)

    for _ in read_ahead(fill, (part for part in weights.table.parts if part[0] in targets)):
        pass
    return {
        path: jax.device_put(buffers[path], target.sharding) for path, target in targets.items()
    }


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A new array that starts where XLA takes it over as it is, without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _put_layer(stack: jax.Array, array: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, array, layer, axis=0)


def _one_layer(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """A layer of a stacked leaf, cut over the mesh as the leaf is."""
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        assert sharding.spec[0] is None, "layers are on every device"
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)


def _read_part(
    weights: Weights, path: LeafPath, layer: int | None, ranges: Ranges, dtype: np.dtype
) -> np.ndarray:
    """One part of a tensor, with zeros where it is padding."""
    inside = stored_part(ranges, weights.table.layer_shape(path))
    stored = tuple(axis.stop - axis.start for axis in inside)
    shape = tuple(stop - start for start, stop in ranges)
    if stored == shape:
        return weights.read(path, layer, inside).astype(dtype, copy=False)
    part = np.zeros(shape, dtype)
    if all(stored):
        part[tuple(map(slice, stored))] = weights.read(path, layer, inside)
    return part
