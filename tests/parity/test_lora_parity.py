"""Adapters against PEFT's, live: files in both directions, logits, merging and gradients."""

import dataclasses

import jax
import numpy as np
import pytest
from reference import config_values, tokens

import phi3_jax as phi3
from phi3_jax.hf_format import WeightTable
from train.config import TARGETS, LoraConfig
from train.lora import attach, init_adapters, merge
from train.peft_format import AdapterTable, load_adapter, save_adapter

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("torch_reference")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT's, on the missing model card
]

SETTINGS = {
    "all": {},
    "rslora": {"use_rslora": True, "r": 5},
    "attention": {"target_modules": ["qkv_proj", "o_proj"]},
    "down": {"target_modules": ["down_proj"], "r": 1},
    "regex": {"target_modules": r".*(self_attn\.o_proj|mlp\.gate_up_proj)"},
    "all-linear": {"target_modules": "all-linear"},
    "gaussian": {"init_lora_weights": "gaussian"},
}
CASES = ("gqa", "longrope_partial_tied", "mqa_tied_window1", "head_dim", "mha_window")


def theirs(reference, **settings):
    """The reference with random adapters A and B."""
    settings = {"r": 3, "lora_alpha": 7, "target_modules": list(TARGETS), **settings}
    model = peft.get_peft_model(reference, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.uniform_(-0.3, 0.3, generator=generator)
    return model.eval()


def ours(model, lora, seed=0):
    """Random adapters A and B."""
    rng = np.random.default_rng(seed)
    new = lambda leaf: rng.uniform(-0.3, 0.3, leaf.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(lambda leaf: jax.numpy.asarray(new(leaf)), init_adapters(model, lora))


@pytest.mark.parametrize(
    "case, settings", [(case, "all") for case in CASES] + [("gqa", name) for name in SETTINGS]
)
def test_an_adapter_of_peft(case, settings, tmp_path):
    reference, model, params = hf.both(config_values(case), name=case)
    adapted = theirs(reference, **SETTINGS[settings])
    adapted.save_pretrained(tmp_path / "adapter")
    lora, adapters = load_adapter(tmp_path / "adapter", model)
    ids = tokens(2, 18)
    wanted = hf.run(adapted, ids).logits
    plain = hf.apply(model, params, ids).logits
    assert hf.relative(plain, wanted) > 0.01
    assert hf.relative(hf.apply(model, attach(params, adapters, lora), ids).logits, wanted) < 1e-4
    merged = merge(params, adapters, lora)
    assert hf.relative(hf.apply(model, merged, ids).logits, wanted) < 1e-4
    state = adapted.merge_and_unload().state_dict()
    table = WeightTable(model.config)
    for path, layer in table.parts:
        leaf = merged
        for key in path:
            leaf = leaf[key]
        tensor = table.to_hf(path, np.asarray(leaf if layer is None else leaf[layer]))
        assert hf.relative(tensor, state[table.hf_name(path, layer)]) < 1e-6


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("changes", [{}, {"rslora": True, "targets": ("gate_up_proj", "o_proj")}])
def test_an_adapter_for_peft(case, changes, tmp_path):
    reference, model, params = hf.both(config_values(case), name=case)
    lora = dataclasses.replace(LoraConfig(rank=3, alpha=7.0, dropout=0.1), **changes)
    adapters = ours(model, lora)
    save_adapter(tmp_path / "adapter", model, adapters, lora, "a/model")
    adapted = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
    assert adapted.peft_config["default"].base_model_name_or_path == "a/model"
    assert adapted.peft_config["default"].lora_dropout == lora.dropout
    ids = tokens(2, 18)
    found = hf.apply(model, attach(params, adapters, lora), ids).logits
    wanted = hf.run(adapted, ids).logits
    assert hf.relative(hf.apply(model, params, ids).logits, wanted) > 0.01
    assert hf.relative(found, wanted) < 1e-4


def test_files_are_those_of_peft(tmp_path):
    """Written again by PEFT, all that we write is the same."""
    reference, model, _ = hf.both(config_values("gqa"))
    lora = LoraConfig(rank=3, alpha=7.0, targets=("o_proj", "qkv_proj"))
    save_adapter(tmp_path / "ours", model, ours(model, lora), lora, "a/model")
    adapted = peft.PeftModel.from_pretrained(reference, tmp_path / "ours")
    adapted.save_pretrained(tmp_path / "theirs")
    read = lambda name: safetensors_of(tmp_path / name)  # noqa: E731
    assert read("ours").keys() == read("theirs").keys()
    for name, tensor in read("ours").items():
        np.testing.assert_array_equal(tensor, read("theirs")[name])
    ours_config, theirs_config = (
        peft.LoraConfig.from_pretrained(tmp_path / name).to_dict() for name in ("ours", "theirs")
    )
    ours_config.pop("peft_version"), theirs_config.pop("peft_version")
    assert ours_config == theirs_config


def safetensors_of(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_a_merged_model_in_transformers(tmp_path):
    _, model, params = hf.both(config_values("longrope_partial_tied"), name="merged")
    lora = LoraConfig(rank=3, alpha=7.0)
    merged = merge(params, ours(model, lora), lora)
    phi3.save_pretrained(tmp_path / "merged", model, merged)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", attn_implementation="eager"
    )
    ids = tokens(2, 18)
    wanted = hf.run(reference.eval(), ids).logits
    assert hf.relative(hf.apply(model, merged, ids).logits, wanted) < 1e-4


@pytest.mark.parametrize("case", ["gqa", "longrope_partial_tied"])
@pytest.mark.parametrize("rslora", [False, True])
def test_gradients(case, rslora, tmp_path):
    """Of A and B, one by one, where only some labels count."""
    reference, model, params = hf.both(config_values(case), name=case)
    adapted = theirs(reference, use_rslora=rslora)
    adapted.save_pretrained(tmp_path / "adapter")
    lora, adapters = load_adapter(tmp_path / "adapter", model)
    ids = tokens(3, 18)
    labels = np.where(np.arange(18) < 4, -100, ids).astype(np.int32)
    inputs = {"labels": hf.as_torch(labels), "use_cache": False}
    adapted(hf.as_torch(ids), **inputs).loss.backward()
    theirs_by_name = {
        name.replace(".default", ""): weight.grad.numpy()
        for name, weight in adapted.named_parameters()
        if weight.requires_grad
    }

    def loss(adapters):
        attached = attach(params, adapters, lora)
        return model.apply({"params": attached}, ids, labels=labels).loss

    gradients = jax.jit(jax.grad(loss))(adapters)
    table = AdapterTable(model.config, lora.targets, lora.rank)
    assert len(theirs_by_name) == len(table.parts)
    for path, layer in table.parts:
        leaf = gradients
        for key in path:
            leaf = leaf[key]
        wanted = theirs_by_name[table.hf_name(path, layer)]
        assert np.abs(wanted).max() > 0
        assert hf.relative(table.to_hf(path, np.asarray(leaf[layer])), wanted) < 1e-4
