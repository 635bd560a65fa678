"""phi3-plan with the TPU compiler: small jobs that fit and that do not, and one at full size."""

import pytest
from compiler_jobs import small_config

import phi3_jax as phi3
from plan.advice import advise
from plan.figures import compile_job
from plan.machines import machine
from plan.programs import DecodeJob, TrainJob, parse_mesh
from train.config import load_config


@pytest.fixture(scope="module")
def libtpu():
    pytest.importorskip("libtpu")


def test_a_training_step(libtpu):
    """Kernels run for every layer and part: twice forward, once for each of the gradients."""
    changes = ["data.sequence_length=256", "batch_size=8", "accumulate=2", "model.remat=full"]
    job = TrainJob("page", load_config("sft_mini_4k_v5e8", changes), small_config())
    found = compile_job(job, machine("v5e:2x2"))
    assert found.fits and found.limit_bytes == int(15.75 * 2**30)
    assert found.peak_bytes == sum(found.memory.values())
    pairs = 200 * 201 / 2 + 56 * 200
    once = 4 * pairs * 2 * 96  # one row of both heads
    assert found.kernel_flops == (2 + 1.5 + 2) * once * 3 * 2
    assert not found.uncounted
    assert found.estimate.compiler_s > found.estimate.compute_s / 2
    assert found.seconds >= found.estimate.compiler_s
    assert {"all-reduce", "all-gather"} <= {one.kind for one in found.collectives}


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_other_generations(libtpu, topology, capfd):
    """Where jaxlib cannot write the program down, libtpu's own text is read, without a word."""
    chips = machine(topology)
    changes = ["data.sequence_length=256", f"batch_size={len(chips.devices)}", "accumulate=1"]
    found = compile_job(
        TrainJob("page", load_config("sft_mini_4k_v5e8", changes), small_config()), chips
    )
    assert found.fits and found.limit_bytes == chips.chip.hbm_bytes
    assert found.flops > found.model_flops / len(chips.devices)
    assert found.collectives and found.seconds > 0
    assert capfd.readouterr().err == ""


def test_what_does_not_fit_is_said_with_what_would(libtpu):
    """24 GiB of cache on a chip of 15.75: half of it fits, in eight bits."""
    batch = 24 * 2**30 // (3 * 2 * 2 * 96 * 2 * 4096)
    job = DecodeJob("small", small_config(sliding_window=None), batch, 4096, parse_mesh("tensor=1"))
    chip = machine("v5e:1x1")
    found = compile_job(job, chip)
    assert not found.fits and found.estimate is None
    assert found.limit_bytes == int(15.75 * 2**30)
    assert 24 * 2**30 < found.peak_bytes < 27 * 2**30
    said = []
    (tried,) = advise(job, found, chip, said.append)
    assert tried.change == "--quantized-cache" and tried.figures.fits and len(said) == 1
    assert tried.figures.memory["cache"] > 12 * 2**30


@pytest.mark.slow
def test_decoding_at_full_size(libtpu):
    """phi-3-mini, 32 rows over 4096 slots, heads over eight chips."""
    config = phi3.Phi3Config.preset("phi-3-mini-4k")
    job = DecodeJob("phi-3-mini-4k", config, 32, 4096, parse_mesh("tensor=8"))
    found = compile_job(job, machine("v5e:2x4"))
    assert found.fits and found.memory["temporaries"] < 0.15 * 2**30
    # Of two bytes each: 3.8 billion weights and 6 GiB of cache, over eight.
    assert found.memory["params"] + found.memory["cache"] == pytest.approx(6.89 * 2**30, rel=1e-3)
    reduced = {one.kind: one.times for one in found.collectives}["all-reduce"]
    assert reduced == 2 * 32 + 1
    assert found.hbm_bytes < 1.25 * (found.memory["params"] + found.memory["cache"])
    assert found.estimate.binds == "memory"
