"""Folders that transformers writes and reads, converted there and back."""

import jax
import numpy as np
import pytest
from reference import config_values, tokens

from convert.to_hf import to_hf
from convert.to_orbax import to_orbax
from phi3_jax.checkpoint import from_pretrained, save_pretrained
from phi3_jax.safetensors_files import INDEX_FILE

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity


def reference_model(case: str, dtype):
    torch.manual_seed(0)
    config = transformers.Phi3Config(**config_values(case), attn_implementation="eager")
    return transformers.Phi3ForCausalLM(config).to(dtype).eval()


def load(folder, dtype):
    model, info = transformers.Phi3ForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    for what, names in info.items():
        assert not names, (what, names)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(tokens(2, 11)), use_cache=False).logits


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


def test_a_changed_dtype_is_what_transformers_loads(tmp_path):
    reference_model("gqa", torch.bfloat16).save_pretrained(tmp_path / "hf")
    model, params = from_pretrained(tmp_path / "hf", dtype="float32")
    doubled = jax.tree.map(lambda leaf: leaf * (1 + 2**-12), params)
    save_pretrained(tmp_path / "ours", model, doubled)
    stored = load(tmp_path / "ours", "auto").state_dict()["model.norm.weight"]
    assert stored.dtype == torch.float32
    np.testing.assert_array_equal(stored.numpy(), np.asarray(doubled["model"]["norm"]["weight"]))
