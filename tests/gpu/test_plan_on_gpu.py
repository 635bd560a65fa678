"""phi3-plan with the GPU compiler."""

import pytest

import phi3_jax as phi3
from plan.figures import compile_job
from plan.machines import machine
from plan.programs import TrainJob
from train.config import load_config


def test_a_training_step():
    """cuDNN's kernels run for every layer and part, the forward one once: its results are kept."""
    pytest.importorskip("jax_cuda12_plugin")
    pytest.importorskip("nvidia.cudnn")
    config = phi3.Phi3Config(
        vocab_size=512,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=4096,
        sliding_window=200,
        pad_token_id=0,
    )
    changes = ["data.sequence_length=256", "batch_size=8", "accumulate=2"]
    job = TrainJob("page", load_config("sft_mini_4k_h100x8", changes), config)
    found = compile_job(job, machine("h100:4"))
    assert found.fits and found.peak_bytes == sum(found.memory.values())
    pairs = 200 * 201 / 2 + 56 * 200
    once = 4 * pairs * 2 * 96  # one row of both heads
    assert found.kernel_flops == (1 + 2.5) * once * 3 * 2
    assert found.flops > found.kernel_flops and found.estimate.compiler_s is None
    gathers = next(one for one in found.collectives if one.kind == "all-gather")
    assert gathers.times >= 3 * 2 * 2 and gathers.asynchronous_times > 0
