"""Meshes, and the one table that says which mesh axis shards which logical axis.

Model code names logical axes ("embed", "kv_heads", ...) where a parameter is born and where the
residual stream passes; this file alone knows the mesh.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "sequence", "tensor")

# data: whole copies of the model, each with its share of the batch. fsdp: the batch too, and the
# parameters along their width, gathered layer by layer. sequence: the tokens of each row, and the
# parameters as fsdp does; inside of attention each device has whole rows of a share of the heads
# (DeepSpeed-Ulysses, arXiv:2309.14509). tensor: heads, mlp and vocabulary; what does not divide
# there is padded with zeros (`padded_shape`).
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "tokens": ("sequence",),
    "embed": ("fsdp", "sequence"),
    "kv_heads": ("tensor",),
    "attention_heads": ("tensor", "sequence"),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}

# The axes whose product the size of a parameter is rounded up to: key-value heads have to divide
# inside of attention too.
_PADDED = {
    "kv_heads": RULES["attention_heads"],
    "mlp": RULES["mlp"],
    "vocab": RULES["vocab"],
}

Names = tuple[str | None, ...]


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    tensor: int = -1,
    devices: Sequence[jax.Device] | None = None,
    *,
    sequence: int = 1,
) -> Mesh:
    """A mesh with the axes data, fsdp, sequence and tensor; one size may be -1: what is left.

    Devices of several slices (TPU slices, hosts of GPUs), between which the network is slow, are
    put side by side along data, and along fsdp where data does not divide by their number.

    Args:
      data: whole copies of the model; a size, as the next ones are. RULES says what each shards.
      fsdp: the batch, and parameters along their width.
      tensor: heads, mlp and vocabulary.
      devices: those to use; by default all.
      sequence: the tokens of each row, and parameters as fsdp does.

    Raises:
      ValueError: where the sizes do not multiply to the number of devices, with sizes that do, or
        where neither data nor fsdp can hold the slices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    sizes = {"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise ValueError(f"mesh axis {axis!r} has size {size}, must be at least 1, or -1")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(f"mesh axes {open_axes} are all -1; only one size can be left open")
    given = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and count % given == 0:
        sizes[open_axes[0]] = count // given
    if math.prod(sizes.values()) != count:
        raise ValueError(
            f"mesh data={data} x fsdp={fsdp} x sequence={sequence} x tensor={tensor} does not make "
            f"{count} devices; each size must be one of {_divisors(count)} and their product "
            f"{count}, or pass fewer devices (devices=jax.devices()[:n])"
        )
    auto = (AxisType.Auto,) * len(MESH_AXES)
    return Mesh(_on_network(sizes, devices), MESH_AXES, axis_types=auto)


def _on_network(sizes: dict[str, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices in the order of a mesh, so that the axes that send most have the fast links."""
    slices = Counter(getattr(device, "slice_index", 0) for device in devices)
    if len(slices) == 1:
        shape = tuple(sizes.values())
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    left, across = len(slices), dict.fromkeys(sizes, 1)
    for axis in ("data", "fsdp"):
        across[axis] = math.gcd(sizes[axis], left)
        left //= across[axis]
    if left > 1 or len(set(slices.values())) > 1:
        raise ValueError(
            f"the devices are in {len(slices)} slices with {sorted(slices.values())} of them; a "
            f"mesh over slices needs as many of each, and data x fsdp a multiple of {len(slices)}, "
            f"not {sizes['data']} x {sizes['fsdp']}: sequence and tensor have to stay in a slice"
        )
    return mesh_utils.create_hybrid_device_mesh(
        [sizes[axis] // across[axis] for axis in sizes],
        list(across.values()),
        devices,
        allow_split_physical_axes=True,
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def axis_size(mesh: Mesh | None, axis: str) -> int:
    """The size of a mesh axis; 1 without a mesh, or in a mesh that does not have it.

    Raises:
      ValueError: for a mesh with axes that RULES does not know, which would shard nothing, or
        axes that are not of the type Auto.
    """
    if mesh is None:
        return 1
    if unknown := [name for name in mesh.axis_names if name not in MESH_AXES]:
        raise ValueError(
            f"the mesh has axes {unknown}, known are {list(MESH_AXES)}; use phi3_jax.make_mesh"
        )
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            f"the mesh has axes of the types {mesh.axis_types}; the compiler places activations on "
            "Auto axes only: use phi3_jax.make_mesh, or jax.make_mesh(..., axis_types=)"
        )
    return dict(mesh.shape).get(axis, 1)


def padded_shape(names: Names, shape: tuple[int, ...], mesh: Mesh | None) -> tuple[int, ...]:
    """The shape of a parameter in memory: sizes that the tensor axis shards are rounded up to it.

    Key-value heads are rounded up to the product of tensor and sequence: phi-3-medium's 10 are 12
    where that is 4, and 16 where it is 8.

    The padding is at the end of a dimension and always zero. Zero key-value groups meet zero rows
    of o_proj, zero mlp columns zero rows of down_proj, so the model computes the same and their
    gradients are zero; padded vocabulary is cut from the logits. Checkpoints never hold it.
    """
    shares = [
        math.prod(axis_size(mesh, axis) for axis in _PADDED.get(name, ())) if name else 1
        for name in names
    ]
    return tuple(-(-size // share) * share for size, share in zip(shape, shares, strict=True))


def logical_spec(names: Names, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The partition of an array whose dimensions have these logical names.

    A mesh axis that does not divide its dimension is left out: the array is then replicated along
    that axis, as a batch of one row has to be.
    """
    entries = []
    for name, size in zip(names, shape, strict=True):
        axes, parts = [], 1
        for axis in RULES.get(name, ()) if name else ():
            along = axis_size(mesh, axis)
            if along > 1 and size % (parts * along) == 0:
                axes, parts = [*axes, axis], parts * along
        entries.append(tuple(axes) if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *names: str | None, mesh: Mesh | None = None) -> jax.Array:
    """Asks the compiler to lay an array out by its logical names; nothing without a mesh."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, named_sharding(names, x.shape, mesh))


def named_sharding(names: Names, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The NamedSharding of an array whose dimensions have these logical names."""
    return NamedSharding(mesh, logical_spec(names, shape, mesh))


def default_device() -> jax.Device:
    """Where arrays go without a mesh: `jax.default_device`, or the first device of this process."""
    chosen = jax.config.jax_default_device  # ty: ignore[missing-attribute]
    if isinstance(chosen, str):
        return jax.local_devices(backend=chosen)[0]
    return jax.local_devices()[0] if chosen is None else chosen


def abstract_params(model: nn.Module) -> dict[str, Any]:
    """Shapes, dtypes and shardings of a model's parameters, without making them.

    Returns a nested dict of jax.ShapeDtypeStruct, with the padding of the model's mesh; without a
    mesh every leaf is on the default device.

    Raises:
      ValueError: where a parameter does not divide over the mesh, with the sizes that would.
    """
    tokens = jnp.zeros((1, 1), jnp.int32)
    boxed = jax.eval_shape(lambda key: model.init(key, tokens), jax.random.key(0))["params"]
    mesh: Mesh | None = getattr(model, "mesh", None)

    def abstract(path, leaf: nn.LogicallyPartitioned) -> jax.ShapeDtypeStruct:
        value = leaf.value
        if mesh is None:
            place = jax.sharding.SingleDeviceSharding(default_device())
        else:
            _check_divides(path, leaf.names, value.shape, mesh)
            place = named_sharding(leaf.names, value.shape, mesh)
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=place)

    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree_util.tree_map_with_path(abstract, boxed, is_leaf=is_box)


def _check_divides(path, names: Names, shape: tuple[int, ...], mesh: Mesh) -> None:
    """A parameter that cannot be cut would be held whole by every device, unasked."""
    for name, size in zip(names, shape, strict=True):
        axes = {axis: axis_size(mesh, axis) for axis in (RULES.get(name, ()) if name else ())}
        if size % math.prod(axes.values()):
            leaf = ".".join(key.key for key in path)
            over = " x ".join(f"{axis}={along}" for axis, along in axes.items())
            raise ValueError(
                f"{leaf} of shape {shape}: its dimension {name!r} of {size} does not divide over "
                f"{over} of the mesh; products that would work are {_divisors(size)}"
            )


def init_params(model: nn.Module, seed: int = 0) -> dict[str, Any]:
    """New parameters, each born in its shards on the model's mesh.

    The values depend on the seed and the config alone, not on the mesh.

    Raises:
      ValueError: as `abstract_params`.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(model))
    tokens = jnp.zeros((1, 1), jnp.int32)
    init = lambda key: nn.unbox(model.init(key, tokens))["params"]  # noqa: E731
    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def shard_params(model: nn.Module, params: Any) -> dict[str, Any]:
    """Parameters without padding, from anywhere, laid out on the model's mesh and padded for it.

    Args:
      model: the model with its mesh.
      params: what `from_pretrained` or `init` gave without a mesh.

    Raises:
      ValueError: where they are not the model's parameters.
    """
    params = plain_tree(params)
    expected, wanted = abstract_params(model.clone(mesh=None)), abstract_params(model)
    found = jax.tree.map(jnp.shape, params)
    shapes = jax.tree.map(lambda leaf: leaf.shape, expected)
    if found != shapes:
        raise ValueError(
            "these are not the model's parameters without padding: their shapes are "
            f"{found}, must be {shapes}"
        )

    def place(leaf, target):
        padding = [(0, b - a) for a, b in zip(leaf.shape, target.shape, strict=True)]
        return jax.device_put(jnp.pad(leaf, padding), target.sharding)

    return jax.tree.map(place, params, wanted)


def plain_tree(params: Any) -> dict[str, Any]:
    """Parameters as nested dicts of arrays: `init` of linen puts each into a box with its names."""
    return flax.core.unfreeze(nn.unbox(params))


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """The same arrays on every device of the mesh (of every process, with equal values)."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    everywhere = NamedSharding(mesh, PartitionSpec())
    put = lambda x: jax.make_array_from_callback(  # noqa: E731
        np.shape(x), everywhere, lambda index: np.asarray(x)[index]
    )
    return jax.tree.map(put, tree)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that a tree of arrays lives on, or None for arrays on one device."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(getattr(leaf, "sharding", None), NamedSharding):
            return leaf.sharding.mesh
    return None
