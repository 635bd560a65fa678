"""Meshes, and the one table that says which mesh axis shards which logical axis.

Model code names logical axes ("embed", "kv_heads", ...) where a parameter is born and where the
residual stream passes; this file alone knows the mesh.
"""

import contextlib
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

# data: whole copies of the model, each with its share of the batch. fsdp: the batch too, and the
# parameters along their width, gathered layer by layer. tensor: heads, mlp and vocabulary.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = -1) -> Mesh:
    """A mesh of all devices with the axes data, fsdp and tensor; one size may be -1: what is left.

    Raises:
      ValueError: where the sizes do not multiply to the number of devices, with sizes that do.
    """
    devices = jax.device_count()
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise ValueError(f"mesh axis {axis!r} has size {size}, must be at least 1, or -1")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(f"mesh axes {open_axes} are all -1; only one size can be left open")
    given = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and devices % given == 0:
        sizes[open_axes[0]] = devices // given
    if math.prod(sizes.values()) != devices:
        fitting = [n for n in range(1, devices + 1) if devices % n == 0]
        raise ValueError(
            f"mesh data={data} x fsdp={fsdp} x tensor={tensor} does not make {devices} devices; "
            f"each size must be one of {fitting} and their product {devices}"
        )
    # jax.make_mesh defaults to Explicit axes, under which the compiler does not place activations.
    auto = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=auto)


def active_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """The context in which `constrain` takes effect; without a mesh it changes nothing."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def logical_spec(names: tuple[str | None, ...], shape: tuple[int, ...], mesh) -> PartitionSpec:
    """The partition of an array whose dimensions have these logical names.

    A mesh axis that does not divide its dimension is left out: the array is then replicated along
    that axis, which costs memory and is right on every mesh.
    """
    entries = []
    for name, size in zip(names, shape, strict=True):
        axes: tuple[str, ...] = ()
        for axis in RULES.get(name, ()) if name else ():
            if size % (math.prod(mesh.shape[a] for a in axes) * mesh.shape[axis]) == 0:
                axes += (axis,)
        entries.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Asks the compiler to lay an activation out by its logical names on the active mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, logical_spec(names, x.shape, mesh))


def named_sharding(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh):
    """The NamedSharding of an array whose dimensions have these logical names."""
    return NamedSharding(mesh, logical_spec(names, shape, mesh))


def abstract_params(model: nn.Module, mesh: Mesh | None = None) -> dict[str, Any]:
    """Shapes, dtypes and shardings of a model's parameters, without making them.

    Returns a nested dict of jax.ShapeDtypeStruct; without a mesh every leaf is on the first
    local device.
    """
    tokens = jnp.zeros((1, 1), jnp.int32)
    boxed = jax.eval_shape(lambda key: model.init(key, tokens), jax.random.key(0))["params"]

    def abstract(leaf: nn.LogicallyPartitioned) -> jax.ShapeDtypeStruct:
        value = leaf.value
        if mesh is None:
            place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        else:
            place = named_sharding(leaf.names, value.shape, mesh)
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=place)

    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(abstract, boxed, is_leaf=is_box)


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
