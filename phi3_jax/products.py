"""The product of activations and a weight, on every platform. Letters as in model.py."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from phi3_jax.quantized import QuantizedWeight

# Up to how many rows a weight stands on the left of a product on a CPU: what stands on the right
# is what the library lays out anew. Measured with jax 0.10.2 on AVX2 (2 and 8 rows with 0.12 too):
# float32 takes 0.5 to 0.9 of the time from 2 rows to 64; a few rows of 16 bits or less take longer.
_MOST_ON_THE_RIGHT, _LEAST_ON_THE_RIGHT = 64, {4: 2, 2: 8, 1: 8}


def product(
    equation: str, x: jax.Array, weight: jax.Array | QuantizedWeight, mesh: Mesh | None
) -> jax.Array:
    """einsum of activations [B, T, *in] and a weight [*out, *in], of one dtype or quantised.

    XLA's CPU compiler copies a weight of more than two dimensions into another order, and widens a
    16-bit one at each call, unless the result is float32 and there are two rows at least (jax
    0.10.2): on one CPU it gets what it takes as it is.
    """
    if not isinstance(weight, QuantizedWeight):
        plain = partial(jnp.einsum, equation)
        if mesh is not None:
            return plain(x, weight)
        return jax.lax.platform_dependent(x, weight, cpu=_on_cpu, default=plain)
    if weight.in_integers:
        # Many rows take as long in floats as in integers, and half as long as in two.
        few = 2 * x.shape[0] * x.shape[1] <= _MOST_ON_THE_RIGHT
        if weight.kind == "int8" and few:
            return _in_integers(x, weight)
        return product(equation, x, _when_there(weight, x).astype(x.dtype), mesh)
    if weight.kind != "int8":
        return product(equation, x, weight.astype(x.dtype), mesh)
    # The scale of an output multiplies the sum: what is read is the bytes.
    y = product(equation, x, weight.values.astype(x.dtype), mesh)
    return (y * _of_outputs(weight, y)).astype(x.dtype)


def _on_cpu(x: jax.Array, weight: jax.Array) -> jax.Array:
    outputs = weight.shape[: weight.ndim - x.ndim + 2]
    y = _of_matrices(x.reshape(-1, math.prod(x.shape[2:])), weight, jnp.float32)
    return y.reshape(*x.shape[:2], *outputs).astype(x.dtype)


def _in_integers(x: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """With the activations as two 8-bit integers each, together 15 bits of a token's largest.

    One would not do: a token's few large values take all the steps from the others. The second is
    what the row of zeros would be that a single row needs anyway.
    """
    rows = x.reshape(-1, math.prod(x.shape[2:])).astype(jnp.float32)
    step = jnp.max(jnp.abs(rows), axis=1, keepdims=True) / 127
    steps = rows / jnp.where(step == 0, 1, step)
    high = jnp.round(steps)
    halves = jnp.concatenate([high, jnp.round((steps - high) * 254)]).astype(jnp.int8)
    high, low = jnp.split(_of_matrices(halves, weight.values, jnp.int32).astype(jnp.float32), 2)
    y = (high + low / 254) * step
    y = y.reshape(*x.shape[:2], *weight.shape[: len(weight.shape) - x.ndim + 2])
    return (y * _of_outputs(weight, y)).astype(x.dtype)


def _when_there(weight: QuantizedWeight, x: jax.Array) -> QuantizedWeight:
    """The same weight, made to wait for its inputs: without a loop over layers XLA's CPU compiler
    would have all of them as floats before the first product.
    """
    first = x.ravel()[0].astype(jnp.float32)
    nothing = 0 * jnp.clip(jnp.where(jnp.isnan(first), 0, first), -1, 1)
    scales = weight.scales * (1 + nothing).astype(weight.scales.dtype)
    return dataclasses.replace(weight, scales=scales)


def _of_outputs(weight: QuantizedWeight, y: jax.Array) -> jax.Array:
    """The scales of int8, float32, in the shape of a token's outputs."""
    return weight.scales.reshape(y.shape[2:]).astype(jnp.float32)


def _of_matrices(rows: jax.Array, weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """rows [n, in] times weight [*out, *in] transposed, as XLA's CPU compiler does it fastest."""
    matrix = weight.reshape(-1, rows.shape[1])
    last = (((1,), (1,)), ((), ()))
    dot = partial(jax.lax.dot_general, dimension_numbers=last, preferred_element_type=dtype)
    count, least = len(rows), _LEAST_ON_THE_RIGHT[rows.dtype.itemsize]
    if least <= count <= _MOST_ON_THE_RIGHT:
        # The barrier keeps the compiler from turning it round again.
        return jax.lax.optimization_barrier(dot(matrix, rows)).T
    alone = count == 1 and rows.dtype.itemsize < 4
    return dot(jnp.pad(rows, ((0, alone), (0, 0))), matrix)[:count]
