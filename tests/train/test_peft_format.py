"""PEFT's files without PEFT: names, layouts, what is refused, and nothing half-written."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from reference import CASES, config_values, hf_weights, params_of

import phi3_jax as phi3
from phi3_jax.hf_format import WeightTable
from train.config import TARGETS, LoraConfig
from train.lora import abstract_adapters, init_adapters, merge
from train.peft_format import load_adapter, save_adapter

LORA = LoraConfig(rank=3, alpha=7.0, dropout=0.05)
PADDED = "longrope_partial_tied"  # 3 key-value groups, mlp 80: padded on 7 devices


def model_of(case: str = PADDED) -> phi3.Phi3ForCausalLM:
    return phi3.Phi3ForCausalLM(phi3.Phi3Config(**config_values(case)))


def random_adapters(model, lora=LORA):
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.uniform(-0.3, 0.3, leaf.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(lambda leaf: jnp.asarray(draw(leaf)), init_adapters(model, lora))


def saved(folder, model=None, lora=LORA):
    """A folder with random adapters, and those."""
    model = model or model_of()
    adapters = random_adapters(model, lora)
    save_adapter(folder, model, adapters, lora, "a/model")
    return adapters


def tensors_of(folder) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "adapter_model.safetensors")


def change_tensors(folder, change) -> None:
    tensors = tensors_of(folder)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")


def change_config(folder, **changes) -> None:
    file = folder / "adapter_config.json"
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: x for name, x in values.items() if x != "gone"}))


def assert_equal(found, wanted) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


# --- Both directions -------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_products_are_updates_of_the_hf_weights(case, tmp_path):
    """W + s B A of the tensors as Hugging Face orders them is what `merge` makes here."""
    model = model_of(case)
    adapters = saved(tmp_path / "adapter", model)
    tensors, weights = tensors_of(tmp_path / "adapter"), hf_weights(model.config, case)
    merged = flatten_dict(merge(params_of(model.config, weights), adapters, LORA))
    table = WeightTable(model.config)
    for path, layer in table.parts:
        if path[-2] not in TARGETS:
            continue
        name = table.hf_name(path, layer)
        stem = "base_model.model." + name.removesuffix("weight")
        a, b = tensors.pop(f"{stem}lora_A.weight"), tensors.pop(f"{stem}lora_B.weight")
        assert a.shape[0] == b.shape[1] == LORA.rank and a.dtype == "float32"
        wanted = table.from_hf(path, weights[name] + LORA.scale * b @ a)
        np.testing.assert_allclose(merged[path][layer], wanted, rtol=0, atol=1e-6)
    assert not tensors


@pytest.mark.parametrize(
    "changes",
    [{}, {"rslora": True}, {"targets": ("o_proj",), "rank": 1}, {"targets": TARGETS[::-2]}],
)
def test_saved_and_loaded(changes, tmp_path):
    lora = dataclasses.replace(LORA, **changes)
    adapters = saved(tmp_path / "adapter", lora=lora)
    found_lora, found = load_adapter(tmp_path / "adapter", model_of())
    assert set(found_lora.targets) == set(lora.targets)
    assert found_lora == dataclasses.replace(lora, targets=found_lora.targets)
    assert_equal(found, adapters)


def test_the_config_file(tmp_path):
    saved(tmp_path / "adapter")
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    wanted = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "a/model",
        "r": 3,
        "lora_alpha": 7.0,
        "lora_dropout": 0.05,
        "use_rslora": False,
        "target_modules": list(TARGETS),
        "bias": "none",
        "use_dora": False,
    }
    assert {name: values[name] for name in wanted} == wanted
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_through_a_mesh(tmp_path):
    """Padding is not in the file, and is zero in memory."""
    model = model_of()
    sharded = model.clone(mesh=phi3.make_mesh(1, 1, 7, devices=jax.devices()[:7]))
    wanted = saved(tmp_path / "adapter")
    lora, found = load_adapter(tmp_path / "adapter", sharded)
    for leaf, target, plain in zip(
        *map(jax.tree.leaves, (found, abstract_adapters(sharded, lora), wanted)), strict=True
    ):
        assert leaf.shape == target.shape and leaf.sharding == target.sharding
        ends = [(0, b - a) for a, b in zip(plain.shape, leaf.shape, strict=True)]
        np.testing.assert_array_equal(leaf, np.pad(plain, ends))
    assert jax.tree.leaves(found)[0].shape != jax.tree.leaves(wanted)[0].shape
    save_adapter(tmp_path / "again", sharded, found, lora, "a/model")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        first, second = ((tmp_path / one / name).read_bytes() for one in ("adapter", "again"))
        assert first == second


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_narrow_tensors_become_float32(dtype, tmp_path):
    adapters = saved(tmp_path / "adapter")
    narrow = lambda tensors: tensors.update(  # noqa: E731
        {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    )
    change_tensors(tmp_path / "adapter", narrow)
    _, found = load_adapter(tmp_path / "adapter", model_of())
    assert_equal(found, jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype("f4"), adapters))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {"float32"}


# --- What is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', must be 'LORA'"),
        ({"use_dora": True}, "use_dora is True; adapters here have no such setting"),
        ({"rank_pattern": {"o_proj": 8}}, r"rank_pattern is \{'o_proj': 8\}"),
        ({"alpha_pattern": {"o_proj": 8}}, "alpha_pattern is"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"layers_to_transform": [0]}, r"layers_to_transform is \[0\]"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices is"),
        ({"a_new_one": 1}, "a_new_one is 1"),
        ({"bias": "lora_only"}, "bias is 'lora_only'; biases have no place"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the model"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"r": "gone"}, "r is None, must be an int of at least 1"),
        ({"r": "8"}, "r is '8', must be an int of at least 1"),
        ({"r": 0}, r"1 problem with .*\n  r is 0, must be an int of at least 1"),
        ({"lora_dropout": 2.0}, "lora.dropout is 2.0"),
        ({"lora_dropout": "x"}, "lora_dropout is 'x', must be int or float or null"),
        ({"lora_alpha": None}, "lora_alpha is None, must be int or float"),
        ({"use_rslora": "no"}, "use_rslora is 'no', must be bool or null"),
        (
            {"r": 4},
            r"1 problem with .*\n  r is 4 in adapter_config.json, but the tensors have rank 3",
        ),
    ],
)
def test_settings_of_other_adapters(changes, words, tmp_path):
    saved(tmp_path / "adapter")
    change_config(tmp_path / "adapter", **changes)
    with pytest.raises(ValueError, match=words):
        load_adapter(tmp_path / "adapter", model_of())


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": "gaussian"},
        {"target_modules": r".*proj", "exclude_modules": "lm_head"},
        {"peft_version": "0.99", "megatron_core": "megatron.core", "qalora_group_size": 16},
        {"layers_pattern": None, "rank_pattern": {}, "lora_bias": False, "loftq_config": {}},
        {"bias": "gone", "use_rslora": "gone", "lora_dropout": "gone"},
        {"bias": None, "use_rslora": None, "lora_dropout": None},
    ],
)
def test_settings_that_change_nothing(changes, tmp_path):
    adapters = saved(tmp_path / "adapter")
    change_config(tmp_path / "adapter", **changes)
    assert_equal(load_adapter(tmp_path / "adapter", model_of())[1], adapters)


def test_all_that_is_wrong_with_the_tensors(tmp_path):
    saved(tmp_path / "adapter")
    stem = "base_model.model.model.layers.1."

    def change(tensors):
        del tensors[f"{stem}mlp.down_proj.lora_A.weight"]
        tensors[f"{stem}self_attn.o_proj.lora_B.weight"] = np.zeros((3, 48), np.float32)
        tensors[f"{stem}mlp.gate_up_proj.lora_A.weight"] = np.zeros((3, 48))
        tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((3, 48), np.float32)

    change_tensors(tmp_path / "adapter", change)
    with pytest.raises(ValueError) as raised:
        load_adapter(tmp_path / "adapter", model_of())
    for words in (
        "4 problems with the adapter in",
        "1.mlp.down_proj.lora_A.weight: missing",
        "1.self_attn.o_proj.lora_B.weight: shape (3, 48), model and rank make it (48, 3)",
        "1.mlp.gate_up_proj.lora_A.weight: dtype float64, must be one of BF16, F16, F32",
        "lm_head.lora_A.weight: unexpected; adapters are on qkv_proj, o_proj,",
    ):
        assert words in str(raised.value)


def test_an_adapter_of_another_model(tmp_path):
    saved(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"lora_B.weight: shape .*model and rank make it"):
        load_adapter(tmp_path / "adapter", model_of("gqa"))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_broken_and_missing_files(name, tmp_path):
    saved(tmp_path / "adapter")
    file = tmp_path / "adapter" / name
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="the adapter in .* cannot be read"):
        load_adapter(tmp_path / "adapter", model_of())
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}; an adapter of PEFT has"):
        load_adapter(tmp_path / "adapter", model_of())


# --- Whole or not at all ---------------------------------------------------------------------


def test_what_an_interrupted_run_left_is_refused(tmp_path):
    saved(tmp_path / "adapter")
    left = (tmp_path / "adapter").rename(tmp_path / ".adapter.partial-0a1b2c3d")
    with pytest.raises(ValueError, match="left unfinished by an interrupted run; run that again"):
        load_adapter(left, model_of())


def test_an_existing_folder_stays(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="adapter' exists; replace it with force"):
        saved(tmp_path / "adapter")
    assert [file.name for file in (tmp_path / "adapter").iterdir()] == ["mine"]


def test_those_who_may_read_the_settings_may_read_the_weights(tmp_path):
    before = os.umask(0o027)
    try:
        saved(tmp_path / "adapter")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "adapter").iterdir()}
    assert modes == {"adapter_config.json": 0o640, "adapter_model.safetensors": 0o640}


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments, **settings):
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_adapters_of_other_settings_are_not_saved(tmp_path):
    model = model_of()
    adapters = random_adapters(model)
    for lora in (dataclasses.replace(LORA, rank=4), dataclasses.replace(LORA, targets=TARGETS[:2])):
        with pytest.raises(ValueError, match="not those of this model and these settings"):
            save_adapter(tmp_path / "adapter", model, adapters, lora, "a/model")
    assert not list(tmp_path.iterdir())
