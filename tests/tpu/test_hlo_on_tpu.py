"""What is read out of the TPU compiler's programs, against what they must cost."""

import jax
import jax.numpy as jnp
import pytest
from compiler_jobs import training_step
from jax.sharding import NamedSharding, PartitionSpec

import phi3_jax as phi3
from plan.hlo import read
from plan.machines import machine


def compiled(mesh, run, *shapes, specs=None):
    specs = specs or [PartitionSpec()] * len(shapes)
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    return read(jax.jit(run).lower(*arrays).compile().as_text())


def scan(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


@pytest.mark.parametrize(
    "run, shapes, flops",
    [
        (lambda x, w: x @ w, [(512, 384), (384, 640)], 2 * 512 * 384 * 640),
        (lambda x, w: x @ w, [(5, 256, 384), (5, 384, 640)], 5 * 2 * 256 * 384 * 640),
        (scan, [(256, 384), (7, 384, 384)], 7 * 2 * 256 * 384 * 384),
        (
            lambda q, k: jnp.einsum("BTKGH,BSKH->BKGTS", q, k),
            [(2, 128, 4, 3, 96), (2, 384, 4, 96)],
            2 * 2 * 4 * 3 * 128 * 384 * 96,
        ),
    ],
)
def test_products_are_counted(tpu_mesh, run, shapes, flops):
    """A TPU has convolutions in their place, with windows for batch dims."""
    assert compiled(tpu_mesh(), run, *shapes).flops == flops


def test_loops_multiply_cycles_and_bytes(tpu_mesh):
    six, nine, twelve = (
        compiled(tpu_mesh(), scan, (256, 384), (times, 384, 384)) for times in (6, 9, 12)
    )
    assert twelve.cycles - nine.cycles == nine.cycles - six.cycles > 0
    # Each time round reads one matrix; x stays on the chip.
    more = (twelve.hbm_bytes - six.hbm_bytes) / 6
    assert more == pytest.approx(2 * 384 * 384, rel=0.01)


def test_a_loop_that_depends_on_data_counts_once(tpu_mesh):
    def run(x, w):
        return jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: jnp.tanh(x @ w), x)

    found = compiled(tpu_mesh(), run, (256, 384), (384, 384))
    assert found.flops == 2 * 256 * 384 * 384
    assert len(found.unbounded) == 1 and "while" in found.unbounded[0]


def test_bytes_of_arrays_that_do_not_fit_on_the_chip(tpu_mesh):
    """A sum of 64 MiB arrays, and a row of 96 numbers that is padded to 128."""
    found = compiled(tpu_mesh(), lambda x, y: x + y, (8192, 4096), (8192, 4096))
    assert found.hbm_bytes == 3 * 2 * 8192 * 4096
    # The shares of 8 devices.
    over = PartitionSpec("fsdp")
    mesh = tpu_mesh(shape=(1, 8, 1))
    found = compiled(mesh, lambda x, y: x + y, (65536, 4096), (65536, 4096), specs=[over, over])
    assert found.hbm_bytes == 3 * 2 * 8192 * 4096 and not found.collectives


def test_a_cut_weight_arrives_whole_once(tpu_mesh):
    """As gathers or as a ring of collective-permutes within a loop: 7 shares of 8 are sent, of
    each weight of a scan, by each device.
    """
    mesh = tpu_mesh(shape=(1, 8, 1))
    specs = [PartitionSpec("fsdp"), PartitionSpec(None, "fsdp")]
    found = compiled(mesh, scan, (16384, 1024), (6, 1024, 1024), specs=specs)
    assert {one.group for one in found.collectives} == {8}
    sent = sum(one.sent * one.times for one in found.collectives)
    whole = 2 * 1024 * 1024
    assert 6 * whole * 7 / 8 <= sent <= 6 * whole * 9 / 8  # a ring may send one share too many
    assert found.flops == 6 * 2 * 2048 * 1024 * 1024


def test_between_slices(tpu_devices):
    mesh = phi3.make_mesh(2, 8, 1, tpu_devices("v5e:2x4", slices=2))
    w = jax.ShapeDtypeStruct(
        (1024, 512), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec())
    )
    place = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((256, 1024), jnp.float32, sharding=place)
    step = jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.tanh(x @ w))))
    found = read(step.lower(w, x).compile().as_text())
    (one,) = [each for each in found.collectives if each.network == "dcn"]
    assert (one.kind, one.group, one.times) == ("all-reduce", 2, 1)
    assert one.nbytes <= 4 * 1024 * 512  # the compiler may send it as bfloat16, or in shares


def test_a_layer_of_a_training_step(tpu_mesh):
    """Forward, again for the gradients but for the last product, and twice as much backward; the
    attention is four kernels.
    """
    mesh = tpu_mesh(shape=(1, 8, 1))
    two, five = training_step(2, mesh), training_step(5, mesh)
    down = 640 * 256
    weights = 256 * (256 + 2 * 128) + 256 * 256 + 256 * 2 * 640 + down
    tokens = 256  # of a device
    assert five.flops - two.flops == 3 * 2 * tokens * (4 * weights - down)
    assert sum(one.times for one in two.kernels) == 4 * 2
    assert sum(one.times for one in five.kernels) == 4 * 5
    assert five.cycles > two.cycles and not five.unbounded


@pytest.mark.parametrize(
    "topology",
    ["v5e:2x4", "v6e:2x4"]
    + [
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("v4:2x2x1", "v5p:2x2x1", "tpu7x:2x2x1")
    ],
)
def test_a_product_takes_the_cycles_of_its_floor(topology):
    """The compiler's cycles of a large product are a little more than the units need at the clock
    of the chip, and less than twice that.
    """
    pytest.importorskip("libtpu")
    found = machine(topology)
    mesh = jax.sharding.Mesh(found.devices, ("all",))
    counts = compiled(mesh, lambda x, w: x @ w, (4096, 4096), (4096, 4096))
    ideal = counts.flops / found.chip.flops * found.chip.clock_hz
    assert ideal < counts.cycles < 2 * ideal


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x4", "v5p:2x2x1", "v6e:2x4", "tpu7x:2x2x1"])
def test_what_the_compiler_lets_a_program_use(topology):
    """In the words of its error for a program that needs more."""
    pytest.importorskip("libtpu")
    found = machine(topology)
    mesh = jax.sharding.Mesh(found.devices, ("all",))
    with pytest.raises(jax.errors.JaxRuntimeError, match="CompileTimeHbmOom") as error:
        compiled(mesh, lambda x: x @ x.T, (2**20, 2**17))
    assert f"({found.chip.hbm_bytes / 2**30:.2f}G)" in str(error.value)
