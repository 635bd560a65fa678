"""What is read out of the GPU compiler's programs, against what they must cost."""

import jax
import jax.numpy as jnp
import pytest
from compiler_jobs import training_step
from jax.sharding import NamedSharding, PartitionSpec

from plan.hlo import read


def compiled(mesh, run, *shapes):
    place = NamedSharding(mesh, PartitionSpec())
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in shapes]
    return read(jax.jit(run).lower(*arrays).compile().as_text())


@pytest.mark.parametrize(
    "run, shapes, flops",
    [
        (lambda x, w: x @ w, [(512, 384), (384, 640)], 2 * 512 * 384 * 640),
        (
            lambda x, w: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0],
            [(256, 384), (7, 384, 384)],
            7 * 2 * 256 * 384 * 384,
        ),
        (
            lambda q, k: jnp.einsum("BTKGH,BSKH->BKGTS", q, k),
            [(2, 128, 4, 3, 96), (2, 384, 4, 96)],
            2 * 2 * 4 * 3 * 128 * 384 * 96,
        ),
    ],
)
def test_products_are_counted(gpu_mesh, run, shapes, flops):
    found = compiled(gpu_mesh(), run, *shapes)
    assert found.flops == flops and found.cycles is None


def test_bytes_of_a_sum(gpu_mesh):
    found = compiled(gpu_mesh(), lambda x, y: x + y, (8192, 4096), (8192, 4096))
    assert found.hbm_bytes == 3 * 2 * 8192 * 4096


def test_a_layer_of_a_training_step(gpu_mesh):
    """Forward, again for the gradients but for the last product, and twice as much backward; the
    attention is three kernels.
    """
    mesh = gpu_mesh((1, 8, 1))
    two, five = training_step(2, mesh), training_step(5, mesh)
    down = 640 * 256
    weights = 256 * (256 + 2 * 128) + 256 * 256 + 256 * 2 * 640 + down
    tokens = 256  # of a device
    assert five.flops - two.flops == 3 * 2 * tokens * (4 * weights - down)
    attention = [one for one in five.kernels if one.target.startswith("__cudnn$fmha")]
    assert sum(one.times for one in attention) == 3 * 5
    inside = [one for one in five.collectives if one.depth == 1]
    assert {one.times for one in inside} == {5} and {one.group for one in inside} == {8}
    assert any(one.asynchronous for one in inside)
