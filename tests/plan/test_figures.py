"""Figures of compiled programs, and of those that do not compile."""

import json

import jax
import pytest

from plan.figures import CompilerError, compile_job, out_of_memory
from plan.programs import DecodeJob, Program, parse_mesh

NEW = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries (24.50G) exceeds available HBM (15.75G). HLO module: jit__step.\n"
    "See https://openxla.org/xla/errors/error_1000 for more details."
)
OLD = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 20.06G of 15.48G hbm. Exceeded hbm capacity by 4.58G."
)


class Failing:
    """A job whose compilation ends with a text."""

    kind, name, settings = "train", "page", "8 rows"

    def __init__(self, text):
        self.text = text

    def lower(self, devices):
        return Program(self, {"fsdp": 4}, {"params": 700, "optimizer": 50}, 60, 1e9, 1e6)

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.text)


@pytest.fixture(scope="module")
def decoded(small, cpu_machine):
    """A decoding step of five layers on two devices, and its figures."""
    job = DecodeJob("small", small(num_hidden_layers=5), 6, 40, parse_mesh("tensor=2"))
    return job, compile_job(job, cpu_machine(2))


def test_the_parts_are_the_peak(decoded):
    found = decoded[1]
    assert found.fits and found.peak_bytes == sum(found.memory.values()) <= found.limit_bytes
    assert list(found.memory) == ["params", "cache", "batch", "padding", "temporaries"]
    assert min(found.memory.values()) >= 0
    assert found.mesh["tensor"] == 2 and found.devices == 2


def test_all_layers_are_counted(decoded):
    """Two all-reduces a layer and one for the embedding; a device does half of the products with
    weights, of six rows, and attends to all slots.
    """
    found = decoded[1]
    reduced = [one for one in found.collectives if one.kind == "all-reduce"]
    assert sum(one.times for one in reduced) == 2 * 5 + 1
    assert sum(one.nbytes for one in reduced) in ((2 * 5 + 1) * 6 * 48 * size for size in (2, 4))
    layer = 48 * (6 + 4) * 8 + 6 * 8 * 48 + 3 * 48 * 80
    flops = 6 * 2 * (5 * layer + 98 * 48) / 2  # the vocabulary is padded to 98
    attention = 5 * 4 * 6 * 40 * 6 * 8 / 2
    assert flops + 0.9 * attention < found.flops < flops + 1.2 * attention
    assert found.kernel_flops == 0 and not found.uncounted


def test_what_follows_from_the_longest_time(decoded):
    found = decoded[1]
    floors = found.estimate
    assert floors.compiler_s is None  # as on a GPU
    times = (floors.compute_s, floors.memory_s, floors.interconnect_s)
    assert found.seconds == max(times) > 0
    assert found.tokens_per_s == pytest.approx(6 / found.seconds)
    assert found.tokens_per_s_device == pytest.approx(3 / found.seconds)
    assert found.mfu == pytest.approx(found.model_flops / found.seconds / 1e12 / 2)


def test_figures_are_json(decoded):
    values = json.loads(json.dumps(decoded[1].to_dict(), allow_nan=False))
    assert values["estimate"]["binds"] in ("compute", "memory", "interconnect")
    assert values["chip"]["flops"] == 1e12 and values["collectives"][0]["times"] > 0
    assert values["versions"]["jax"] == jax.__version__


def test_a_program_may_compile_and_be_too_large(decoded, cpu_machine):
    """As the GPU compiler has it."""
    job, fitting = decoded
    found = compile_job(job, cpu_machine(2, hbm_bytes=fitting.peak_bytes - 1))
    assert not found.fits and found.peak_bytes == fitting.peak_bytes
    assert found.flops == fitting.flops


@pytest.mark.parametrize("text, needed, limit", [(NEW, 24.5, 15.75), (OLD, 20.06, 15.48)])
def test_no_memory_is_an_outcome(cpu_machine, text, needed, limit):
    found = compile_job(Failing(text), cpu_machine(4))
    assert not found.fits and found.estimate is None and found.seconds is None
    assert found.peak_bytes == int(needed * 2**30) and found.limit_bytes == int(limit * 2**30)
    assert found.memory == {
        "params": 700,
        "optimizer": 50,
        "temporaries": int(needed * 2**30) - 750,
    }
    json.dumps(found.to_dict())


def test_no_memory_in_unknown_words(cpu_machine):
    found = compile_job(Failing("RESOURCE_EXHAUSTED: it is full"), cpu_machine(4, 2**20))
    assert not found.fits and found.peak_bytes is None and found.limit_bytes == 2**20
    assert found.memory == {"params": 700, "optimizer": 50}
    assert out_of_memory("Used 512M of 2K hbm") == (512 * 2**20, 2048)


def test_other_failures_are_the_compilers_first_line(cpu_machine):
    with pytest.raises(CompilerError) as caught:
        compile_job(Failing("INTERNAL: RET_CHECK failure\n  in pass\n  at file"), cpu_machine(4))
    assert str(caught.value) == "the compiler for cpu:4 failed: INTERNAL: RET_CHECK failure"
