"""How a matrix gets from its shards to where a layer multiplies with it, and its gradient back."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh

from phi3_jax.sharding import Names, constrain, logical_spec


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gathered(weight: jax.Array, dtype: Any, names: Names, mesh: Mesh | None) -> jax.Array:
    """A weight cast to the dtype of the activations, then whole on every device along fsdp.

    For calls in which there is less of the weight than of what it is multiplied with. Its gradient
    is summed over the devices and cut in one go (reduce-scatter): no device ever holds a sum that
    is whole. Said to the compiler by the two directions' own layouts, since the gradient of a plain
    sharding constraint is the same constraint, here a whole gradient on every device.

    Args:
      weight: a layer's share of a leaf.
      dtype: of the result.
      names: the logical names of the weight's dimensions.
      mesh: of the model.
    """
    # A loop over layers takes its slice of the leaf from memory as it is, and casts that: left to
    # themselves, compilers cast and lay out anew the whole leaf in front of the loop, and keep a
    # copy of all layers' weights through the forward and the backward pass.
    weight = _as_it_lies(weight, names, mesh)
    if weight.dtype == jnp.float32 and jnp.dtype(dtype).itemsize < 4:
        # Not a float in between, or the loop is given a leaf of the narrower dtype after all.
        bits = jax.lax.optimization_barrier(jax.lax.bitcast_convert_type(weight, jnp.uint32))
        weight = jax.lax.bitcast_convert_type(bits, jnp.float32)
    # Cast before it is sent: half the bytes.
    weight = constrain(weight.astype(dtype), *names, mesh=mesh)
    weight = jax.lax.optimization_barrier(weight)
    return constrain(weight, *_whole(names), mesh=mesh)


def _forward(weight, dtype, names, mesh):
    # The dtype of the gradient, in a form that a scan can keep.
    return gathered(weight, dtype, names, mesh), jnp.zeros((), weight.dtype)


def _backward(dtype, names, mesh, like, gradient):
    return (constrain(gradient, *names, mesh=mesh).astype(like.dtype),)


gathered.defvjp(_forward, _backward)


def _as_it_lies(x: jax.Array, names: Names, mesh: Mesh | None) -> jax.Array:
    """In the order of memory that arrays have outside of a program."""
    keep = lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim))))  # noqa: E731
    if mesh is None:
        return keep(x)
    # Each device's share by itself: the compiler for GPUs gathers what a layout is asked of.
    share = logical_spec(names, x.shape, mesh)
    return jax.shard_map(keep, mesh=mesh, in_specs=share, out_specs=share, check_vma=False)(x)


def _whole(names: Names) -> Names:
    """The names without those that fsdp and sequence shard."""
    return tuple(None if name == "embed" else name for name in names)
