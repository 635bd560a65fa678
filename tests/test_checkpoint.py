"""Loading and saving models over both formats, on one device and on meshes."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from model_folders import assert_same, params_in, write_hf_folder

import phi3_jax as phi3
from convert.to_orbax import to_orbax
from phi3_jax import checkpoint, load_leaves, orbax_format
from phi3_jax.checkpoint import from_pretrained, save_checkpoint, save_pretrained
from phi3_jax.sharding import abstract_params, make_mesh

KINDS = ("hf", "orbax")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The parent of a model in both formats, and its tensors by HF's names."""
    parent = tmp_path_factory.mktemp("folders")
    tensors = write_hf_folder(parent / "hf", "gqa", "BF16", max_shard_bytes=40_000)
    to_orbax(parent / "hf", parent / "orbax")
    return parent, tensors


def expected_params(folders, dtype="bfloat16"):
    return params_in(folders[0] / "hf", dtype)


# --- Loading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32", np.float16])
def test_parameters_are_those_of_the_file(folders, kind, dtype):
    model, params = from_pretrained(folders[0] / kind, dtype=dtype)
    kept = "bfloat16" if dtype is None else dtype
    assert model.dtype == model.param_dtype == np.dtype(kept)
    assert_same(params, expected_params(folders, kept))
    assert model.generation_config.eos_token_id == (2, 7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("one_device_mesh", [False, True])
def test_one_cpu_device_takes_what_was_read_where_it_is(
    folders, kind, one_device_mesh, monkeypatch
):
    """And no part is anywhere else before, in the dtype of the file."""
    buffers, aligned = [], load_leaves._aligned
    monkeypatch.setattr(
        load_leaves, "_aligned", lambda *kind: buffers.append(aligned(*kind)) or buffers[-1]
    )
    weights_class = checkpoint.HFWeights if kind == "hf" else orbax_format.OrbaxWeights
    monkeypatch.setattr(weights_class, "read", None)
    mesh = make_mesh(devices=jax.devices()[:1]) if one_device_mesh else None
    model, params = from_pretrained(folders[0] / kind, dtype=None, mesh=mesh)
    places = [
        leaf.addressable_shards[0].data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)
    ]
    assert sorted(places) == sorted(buffer.ctypes.data for buffer in buffers)
    assert_same(params, expected_params(folders))
    laid_out = lambda leaf: (leaf.shape, leaf.sharding)  # noqa: E731
    assert jax.tree.map(laid_out, params) == jax.tree.map(laid_out, abstract_params(model))


def test_donated_parameters_leave_their_views_alone(folders):
    """JAX copies memory that it does not own before a program may write into it."""
    _, params = from_pretrained(folders[0] / "hf")
    leaf = params["lm_head"]["weight"]
    view = np.asarray(leaf)
    before = view.copy()
    del leaf
    jax.block_until_ready(jax.jit(lambda x: x * 0, donate_argnums=0)(params["lm_head"]["weight"]))
    np.testing.assert_array_equal(view, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(1, 1, 8), (2, 2, 2), (1, 8, 1), (8, 1, 1), (1, 4, 2)])
def test_any_mesh_gets_the_same_parameters(folders, kind, sizes):
    mesh = make_mesh(*sizes)
    model, params = from_pretrained(folders[0] / kind, dtype=None, mesh=mesh)
    assert_same(params, expected_params(folders))
    laid_out = lambda leaf: (leaf.shape, leaf.sharding)  # noqa: E731
    assert jax.tree.map(laid_out, params) == jax.tree.map(laid_out, abstract_params(model))


@pytest.mark.parametrize("kind", KINDS)
def test_each_part_is_read_once(folders, kind, monkeypatch):
    """Copies of a shard on several devices are one read and one array on the host."""
    read = []
    weights_class = checkpoint.HFWeights if kind == "hf" else orbax_format.OrbaxWeights
    plain = weights_class.read

    def spy(self, path, layer, index=()):
        part = plain(self, path, layer, index)
        read.append(part.nbytes)
        return part

    monkeypatch.setattr(weights_class, "read", spy)
    from_pretrained(folders[0] / kind, dtype=None, mesh=make_mesh(data=4, tensor=2))
    assert sum(read) == sum(tensor.nbytes for tensor in folders[1].values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_alone_is_a_part_of_the_folder(folders, kind):
    model, params = from_pretrained(folders[0] / kind, model_class=phi3.Phi3Model, dtype=None)
    inside = {path[1:]: x for path, x in expected_params(folders).items() if path[0] == "model"}
    assert isinstance(model, phi3.Phi3Model)
    assert_same(params, inside)


def test_the_stored_dtype_may_differ_from_leaf_to_leaf(tmp_path):
    tensors = write_hf_folder(tmp_path / "hf", case="mqa_tied_window1", side_files={})
    for name in tensors:
        tensors[name] = tensors[name].astype(np.float32 if "norm" in name else tensors[name].dtype)
    safetensors.numpy.save_file(tensors, tmp_path / "hf" / "model.safetensors")
    to_orbax(tmp_path / "hf", tmp_path / "orbax")
    for kind in KINDS:
        model, params = from_pretrained(tmp_path / kind, dtype=None)
        assert params["model"]["norm"]["weight"].dtype == np.float32
        assert params["model"]["embed_tokens"]["weight"].dtype == model.dtype == "bfloat16"
        assert "lm_head" not in params
        assert model.generation_config is None


@pytest.mark.parametrize("dtype", ["int8", "float", "nonsense", 32])
def test_other_dtypes_are_refused(folders, dtype):
    with pytest.raises(ValueError, match="must be one of bfloat16, float16, float32, or None"):
        from_pretrained(folders[0] / "hf", dtype=dtype)


def test_a_folder_without_config_is_named(folders, tmp_path):
    shutil.copy(folders[0] / "hf" / "model.safetensors.index.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="no config.json"):
        from_pretrained(tmp_path)


# --- Saving ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh_sizes", [None, (2, 2, 2)])
def test_what_is_saved_loads_again(folders, tmp_path, mesh_sizes):
    mesh = mesh_sizes and make_mesh(*mesh_sizes)
    model, params = from_pretrained(folders[0] / "orbax", dtype=None, mesh=mesh)
    save_pretrained(tmp_path / "m", model, params)
    stored = safetensors.numpy.load_file(tmp_path / "m" / "model.safetensors")
    assert stored.keys() == folders[1].keys()
    for name, tensor in stored.items():
        np.testing.assert_array_equal(tensor.view("u2"), folders[1][name].view("u2"))
    again, params_again = from_pretrained(tmp_path / "m", dtype=None)
    assert_same(params, flatten_dict(params_again))
    assert again.generation_config == model.generation_config
    assert again.config.extra["unknown_key"] == (1, 2)


def test_the_saved_config_names_the_saved_dtype(folders, tmp_path):
    """transformers loads in the dtype of config.json, whatever that of the tensors is."""
    model, params = from_pretrained(folders[0] / "hf", dtype="float32")
    save_pretrained(tmp_path / "m", model, params)
    saved = json.loads((tmp_path / "m" / "config.json").read_text())
    assert saved["torch_dtype"] == "float32" and "dtype" not in saved


def test_saving_replaces_only_with_force(folders, tmp_path):
    model, params = from_pretrained(folders[0] / "hf")
    save_pretrained(tmp_path / "m", model, params)
    with pytest.raises(FileExistsError):
        save_pretrained(tmp_path / "m", model, params)
    save_pretrained(tmp_path / "m", model, jax.tree.map(lambda x: x * 0, params), force=True)
    _, zeros = from_pretrained(tmp_path / "m")
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(zeros))


def test_parameters_of_another_model_are_refused(folders, tmp_path):
    model, params = from_pretrained(folders[0] / "hf")
    for save in (save_pretrained, save_checkpoint):
        with pytest.raises(ValueError, match="problems with the parameters to save") as raised:
            save(tmp_path / "m", model, params["model"])
        assert "\n  model.norm.weight: missing" in str(raised.value)
        assert "\n  norm.weight: unexpected" in str(raised.value)
        wrong = {**params, "lm_head": {"weight": params["lm_head"]["weight"][:, 1:]}}
        with pytest.raises(ValueError, match=r"lm_head.weight: shape \(97, 47\)"):
            save(tmp_path / "m", model, wrong)
    assert not list(tmp_path.iterdir())
