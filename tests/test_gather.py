"""Weights cast and gathered where they are used, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from phi3_jax.gather import gathered
from phi3_jax.sharding import make_mesh

NAMES = (None, "mlp", "embed")
B, T, D, C, F = 8, 3, 16, 2, 6


def arrays(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    return x, jnp.asarray(rng.normal(size=(C, F, D)), jnp.float32)


def product(x, weight):
    return jnp.sum(jnp.square(jnp.einsum("BTD,CFD->BTCF", x, weight)).astype(jnp.float32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_is_a_cast(dtype):
    x, weight = arrays(dtype)
    use = lambda weight: product(x, gathered(weight, dtype, NAMES, None))  # noqa: E731
    plain = lambda weight: product(x, weight.astype(dtype))  # noqa: E731
    assert gathered(weight, dtype, NAMES, None).dtype == dtype
    for ours, wanted in zip(
        jax.value_and_grad(use)(weight), jax.value_and_grad(plain)(weight), strict=True
    ):
        assert ours.dtype == wanted.dtype
        np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize("sizes", [dict(fsdp=8, tensor=1), dict(data=2, fsdp=2, tensor=2)])
def test_it_is_whole_and_its_gradient_cut(sizes):
    mesh = make_mesh(**sizes)
    x, weight = arrays(jnp.float32)
    cut = NamedSharding(mesh, PartitionSpec(None, "tensor", "fsdp"))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    x, weight = jax.device_put(x, rows), jax.device_put(weight, cut)
    whole = jax.jit(lambda weight: gathered(weight, jnp.float32, NAMES, mesh))(weight)
    assert whole.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(None, "tensor")), 3)
    use = lambda weight: product(x, gathered(weight, jnp.float32, NAMES, mesh))  # noqa: E731
    gradient = jax.jit(jax.grad(use))(weight)
    assert gradient.sharding.is_equivalent_to(cut, 3)
    wanted = jax.grad(lambda weight: product(arrays(jnp.float32)[0], weight))(
        arrays(jnp.float32)[1]
    )
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5)
