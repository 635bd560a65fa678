"""What is planned: its arguments, and the operations that it asks for."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import phi3_jax as phi3
from phi3_jax import folder
from phi3_jax.attention import causal_mask
from phi3_jax.sharding import abstract_params
from plan.flops import causal_pairs, forward_flops, head_rows, kernel_flops
from plan.hlo import Kernel
from plan.programs import (
    DecodeJob,
    PrefillJob,
    TrainJob,
    make_mesh,
    model_config,
    parse_mesh,
)
from train.config import load_config
from train.metrics import flops_per_token

PAGE = "sft_mini_4k_v5e8"


def arguments(job, devices: int):
    """What the job says that it is given, and what the compiler says, bytes a device."""
    program = job.lower(jax.devices()[:devices])
    # Arguments are the same in a program that is compiled quickly.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    analysis = program.lowered.compile(compiler_options=quick).memory_analysis()
    return program, analysis.argument_size_in_bytes


def test_a_decoding_steps_arguments_are_the_compilers(small):
    """Six rows in two shares, two key-value heads in two."""
    mesh = parse_mesh("fsdp=2,tensor=2")
    for cache in ("quantized", "sliding_window"):
        job = DecodeJob("small", small(), 6, 40, mesh, cache)
        program, nbytes = arguments(job, 4)
        assert sum(program.arguments.values()) == nbytes
        vectors = 2 * 2 * 3 * (23 if cache == "sliding_window" else 40)  # k and v, layers, rows
        each = 8 + 4 if cache == "quantized" else 2 * 8
        assert 0 < program.arguments["cache"] - vectors * each < 3 * 40 * 5 + 8
    assert program.tokens == 6 and program.mesh["tensor"] == 2
    assert "40" in job.settings and "sliding-window" in job.settings


def test_a_prefills_arguments_are_the_compilers(small):
    """Longrope; a prompt of 50 tokens is padded to 56."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = small(rope_scaling=rope, original_max_position_embeddings=32)
    program, nbytes = arguments(PrefillJob("small", config, 3, 50, 60, parse_mesh("tensor=2")), 2)
    # The length is a part of the program where the cache is fresh.
    assert 0 <= sum(program.arguments.values()) - nbytes <= 4
    assert program.tokens == 150
    assert program.model_flops == 3 * forward_flops(config, 50, causal_pairs(config, 50))


def test_a_training_steps_arguments_are_the_compilers(small):
    changes = ["data.sequence_length=24", "batch_size=8", "accumulate=2", "optimizer.ema_decay=0.9"]
    job = TrainJob("page", load_config(PAGE, [*changes, "mesh.fsdp=2"]), small())
    program, nbytes = arguments(job, 2)
    # But for the three numbers that a state counts with.
    assert nbytes - 16 <= sum(program.arguments.values()) <= nbytes
    # Two moments and an average, float32 as the parameters.
    assert program.arguments["optimizer"] // program.arguments["params"] == 3
    assert program.tokens == 8 * 24
    assert program.model_flops == 8 * 24 * flops_per_token(small(), 24, None)
    assert "8 rows of 24 tokens in 2 parts" in job.settings


def test_qlora_holds_few_bits_on_every_mesh(small):
    """The frozen matrices are cut as their weights are, and so are scales where they divide."""
    config = small(hidden_size=192, intermediate_size=64)
    lora = ["data.sequence_length=24", "batch_size=4", "accumulate=1"]
    page = load_config("lora_mini_4k_colab", [*lora, "lora.quantize=nf4", "mesh.fsdp=2"])
    program = TrainJob("page", page, config).lower(jax.devices()[:2])
    page = load_config("lora_mini_4k_colab", [*lora, "mesh.fsdp=2"])
    plain = TrainJob("page", page, config).lower(jax.devices()[:2])
    layers = (
        sum(leaf.size for leaf in jax.tree.leaves(abstract_params(phi3.Phi3Model(config))))
        - config.vocab_size * 192
    )
    saved = plain.arguments["params"] - program.arguments["params"]
    # Half of 16 bits less 4 and a share of the scales.
    assert 0.6 * layers < saved < 0.75 * layers
    assert program.arguments["optimizer"] == plain.arguments["optimizer"]


def test_what_a_page_names_on_the_hub_is_not_asked_for(small, monkeypatch):
    def refuse(name):
        raise AssertionError(f"{name} was asked for")

    monkeypatch.setattr(folder, "_download", refuse)
    page = load_config(PAGE, ["data.sequence_length=24", "batch_size=2", "accumulate=1"])
    shape = model_config(page.model.path)
    assert shape == phi3.Phi3Config.preset("phi-3-mini-4k-instruct")
    TrainJob("page", page, small()).lower(jax.devices()[:2])


def test_sizes_come_from_folders_and_files(small, tmp_path):
    small().save_pretrained(tmp_path)
    assert model_config(str(tmp_path)) == small()
    assert model_config(str(tmp_path / "config.json")) == small()
    assert model_config("phi-4") == phi3.Phi3Config.preset("phi-4")
    with pytest.raises(ValueError, match="no preset 'phi-5'.*nothing is downloaded"):
        model_config("microsoft/Phi-5")
    (tmp_path / "other.json").write_text("[1")
    with pytest.raises(ValueError, match="other.json.* is no config"):
        model_config(str(tmp_path / "other.json"))
    (tmp_path / "other.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="other.json.* is no config"):
        model_config(str(tmp_path / "other.json"))


def test_meshes_as_they_are_typed():
    mesh = parse_mesh("fsdp=4, tensor=-1")
    assert (mesh.data, mesh.fsdp, mesh.sequence, mesh.tensor) == (1, 4, 1, -1)
    for text in ("fsdp", "fsdp=", "fsdp=x", "pipe=2", "", "8", "fsdp=4tensor=2"):
        with pytest.raises(ValueError, match="write for example fsdp=4,tensor=2"):
            parse_mesh(text)


@pytest.mark.parametrize(
    "job, message",
    [
        (lambda c: DecodeJob("x", c, 2, 513, parse_mesh("tensor=2")), "--cache is 513.*512"),
        (lambda c: PrefillJob("x", c, 2, 9, 8, parse_mesh("tensor=2")), "--cache is 8.*--tokens 9"),
        (lambda c: DecodeJob("x", c, 2, 40, parse_mesh("tensor=3")), "does not make 2 devices"),
    ],
)
def test_what_cannot_be_is_refused(small, job, message):
    with pytest.raises(ValueError, match=message):
        job(small()).lower(jax.devices()[:2])


# --- Operations -------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens, window", [(7, None), (40, 23), (23, 23), (5, 23), (30, 1)])
def test_pairs_are_what_the_mask_leaves(small, tokens, window):
    config = small(sliding_window=window)
    mask = causal_mask(jnp.arange(tokens), jnp.arange(tokens), window)
    assert causal_pairs(config, tokens) == int(mask.sum())


def test_a_forward_pass_is_a_third_of_training(small):
    """But for the logits, of which it needs one row, and half of each diagonal of the scores."""
    config, tokens = small(), 40
    pairs = causal_pairs(config, tokens) - 23 / 2
    head = 2 * (tokens - 1) * config.vocab_size * config.hidden_size
    third = tokens * flops_per_token(config, tokens, None) / 3
    assert forward_flops(config, tokens, pairs) == pytest.approx(third - head)


def test_head_rows_count_padded_heads(small):
    """Ten key-value heads of four queries are sixteen over eight devices; six rows are not cut."""
    config = phi3.Phi3Config.preset("phi-3-medium-4k")
    mesh = make_mesh(parse_mesh("tensor=8"), jax.devices())
    assert head_rows(config, mesh, 6) == 2 * 4 * 6
    mesh = make_mesh(parse_mesh("fsdp=2,sequence=2,tensor=2"), jax.devices())
    assert head_rows(config, mesh, 6) == 3 * 4 * 3
    assert head_rows(config, mesh, 5) == 3 * 4 * 5


def test_kernels_are_told_by_their_names():
    step = "jit(step)/transpose(jvp(Phi3ForCausalLM))/shard_map/jit(_splash_attention)/"
    kernels = [
        Kernel("tpu_custom_call", f"{step}splash_mha_fwd_segmented_residuals/pallas_call", 64),
        Kernel("tpu_custom_call", f"{step}splash_mha_dq_no_residuals/pallas_call", 32),
        Kernel("tpu_custom_call", f"{step}splash_mha_dkv_no_residuals/pallas_call", 32),
        Kernel("__cudnn$fmhaScaleBiasSoftmax", "jvp(model)/self_attn/custom_partitioning", 3),
        Kernel("__cudnn$fmhaScaleBiasSoftmaxBackward", "self_attn/custom_partitioning", 5),
        Kernel("tpu_custom_call", "jit(step)/sort", 7),
    ]
    total, unknown = kernel_flops(kernels, 1000.0)
    assert total == 1000 * (64 + 1.5 * 32 + 2 * 32 + 3 + 2.5 * 5)
    assert unknown == ["jit(step)/sort"]
    assert np.isfinite(total)
