"""phi3-plan with the GPU compiler."""

import pytest
from compiler_jobs import small_config

from plan.figures import compile_job
from plan.machines import machine
from plan.programs import TrainJob
from train.config import load_config


def test_a_training_step():
    """cuDNN's kernels run for every layer and part, the forward one once: its results are kept."""
    pytest.importorskip("jax_cuda12_plugin")
    pytest.importorskip("nvidia.cudnn")
    changes = ["data.sequence_length=256", "batch_size=8", "accumulate=2"]
    job = TrainJob("page", load_config("sft_mini_4k_h100x8", changes), small_config())
    found = compile_job(job, machine("h100:4"))
    assert found.fits and found.peak_bytes == sum(found.memory.values())
    pairs = 200 * 201 / 2 + 56 * 200
    once = 4 * pairs * 2 * 96  # one row of both heads
    assert found.kernel_flops == (1 + 2.5) * once * 3 * 2
    assert found.flops > found.kernel_flops and found.estimate.compiler_s is None
    gathers = next(one for one in found.collectives if one.kind == "all-gather")
    assert gathers.times >= 3 * 2 * 2 and gathers.asynchronous_times > 0
