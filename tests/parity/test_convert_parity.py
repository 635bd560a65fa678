"""Folders that transformers writes and reads, converted there and back."""

import jax
import numpy as np
import pytest
from reference import config_values, tokens

import phi3_jax as phi3
from convert.to_hf import to_hf
from convert.to_orbax import to_orbax
from phi3_jax.checkpoint import from_pretrained, save_pretrained
from phi3_jax.safetensors_files import INDEX_FILE

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity


CLASSES = (
    "Phi3Model",
    "Phi3ForCausalLM",
    "Phi3ForSequenceClassification",
    "Phi3ForTokenClassification",
)


def reference_model(case: str, dtype, name="Phi3ForCausalLM"):
    torch.manual_seed(0)
    values = {**config_values(case), "num_labels": 3}
    config = transformers.Phi3Config(**values, attn_implementation="eager")
    return getattr(transformers, name)(config).to(dtype).eval()


def load(folder, dtype, name="Phi3ForCausalLM"):
    model, info = getattr(transformers, name).from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    for what, names in info.items():
        assert not names, (what, names)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(tokens(2, 11)), use_cache=False)[0]


def assert_same_model(model, other):
    state, other_state = model.state_dict(), other.state_dict()
    assert state.keys() == other_state.keys()
    for name, tensor in state.items():
        assert tensor.dtype == other_state[name].dtype
        assert torch.equal(tensor, other_state[name]), name
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("case", ["gqa", "mqa_tied_window1", "longrope_partial_tied", "head_dim"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_transformers_loads_the_same_model(tmp_path, case, dtype):
    kind = getattr(torch, dtype)
    reference_model(case, kind).save_pretrained(tmp_path / "hf", max_shard_size="30KB")
    assert (tmp_path / "hf" / INDEX_FILE).is_file()
    # As loaded: converting a whole module also rounds its rope frequencies.
    reference = load(tmp_path / "hf", kind)
    to_orbax(tmp_path / "hf", tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "back")
    assert_same_model(load(tmp_path / "back", kind), reference)
    config = (tmp_path / "hf" / "config.json").read_bytes()
    assert (tmp_path / "back" / "config.json").read_bytes() == config


@pytest.mark.parametrize("case", ["gqa", "mqa_tied_window1", "longrope", "head_dim"])
def test_what_is_saved_here_transformers_loads(tmp_path, case):
    reference = reference_model(case, torch.float32)
    reference.save_pretrained(tmp_path / "hf")
    reference = load(tmp_path / "hf", torch.float32)
    model, params = from_pretrained(tmp_path / "hf")
    save_pretrained(tmp_path / "ours", model, params)
    assert_same_model(load(tmp_path / "ours", "auto"), reference)
    ours = model.apply({"params": params}, tokens(2, 11)).logits
    np.testing.assert_allclose(np.asarray(ours), logits(reference).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["gqa", "mqa_tied_window1"])
@pytest.mark.parametrize("name", CLASSES)
def test_every_class_goes_there_and_back(tmp_path, name, case):
    """Names, bits, architectures and labels, through both conversions and through a model here."""
    reference_model(case, torch.bfloat16, name).save_pretrained(tmp_path / "hf")
    reference = load(tmp_path / "hf", torch.bfloat16, name)
    to_orbax(tmp_path / "hf", tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "back")
    assert_same_model(load(tmp_path / "back", "auto", name), reference)

    model, params = from_pretrained(tmp_path / "orbax", getattr(phi3, name), dtype=None)
    save_pretrained(tmp_path / "ours", model, params)
    assert_same_model(load(tmp_path / "ours", "auto", name), reference)
    theirs, ours = (
        transformers.AutoConfig.from_pretrained(tmp_path / folder) for folder in ("hf", "ours")
    )
    for field in ("architectures", "num_labels", "id2label", "label2id", "dtype"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.architectures == [name] and ours.num_labels == 3


@pytest.mark.parametrize("name", CLASSES[2:])
def test_a_new_head_is_new_to_both(tmp_path, name):
    """The same leaves are missing there and here, and what is saved then is whole."""
    reference_model("gqa", torch.float32).save_pretrained(tmp_path / "hf")
    _, info = getattr(transformers, name).from_pretrained(
        tmp_path / "hf", num_labels=5, output_loading_info=True
    )
    with pytest.warns(UserWarning, match=f"has no {', '.join(sorted(info['missing_keys']))}: new"):
        model, params = from_pretrained(tmp_path / "hf", getattr(phi3, name), num_labels=5)
    save_pretrained(tmp_path / "ours", model, params)
    theirs = load(tmp_path / "ours", "auto", name)
    assert theirs.config.id2label == {index: f"LABEL_{index}" for index in range(5)}
    np.testing.assert_array_equal(theirs.score.weight.detach(), params["score"]["weight"])
    ours = model.apply({"params": params}, tokens(1, 11)).logits
    with torch.no_grad():
        reference = theirs(torch.tensor(tokens(1, 11)), use_cache=False)[0].numpy()
    np.testing.assert_allclose(np.asarray(ours), reference, rtol=1e-4, atol=1e-5)


def test_a_changed_dtype_is_what_transformers_loads(tmp_path):
    reference_model("gqa", torch.bfloat16).save_pretrained(tmp_path / "hf")
    model, params = from_pretrained(tmp_path / "hf", dtype="float32")
    doubled = jax.tree.map(lambda leaf: leaf * (1 + 2**-12), params)
    save_pretrained(tmp_path / "ours", model, doubled)
    stored = load(tmp_path / "ours", "auto").state_dict()["model.norm.weight"]
    assert stored.dtype == torch.float32
    np.testing.assert_array_equal(stored.numpy(), np.asarray(doubled["model"]["norm"]["weight"]))
