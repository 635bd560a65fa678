"""Converted checkpoints, and loading and saving over both formats."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as orbax_v0
import pytest
import safetensors.numpy
import tensorstore
from flax.traverse_util import flatten_dict
from model_folders import write_hf_folder
from orbax.checkpoint import v1 as orbax
from reference import params_of

import phi3_jax as phi3
from convert.to_orbax import to_orbax
from phi3_jax import checkpoint
from phi3_jax.checkpoint import from_pretrained, save_pretrained
from phi3_jax.config import Phi3Config
from phi3_jax.sharding import abstract_params, make_mesh

KINDS = ("hf", "orbax")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model in both formats, and its tensors by HF's names."""
    parent = tmp_path_factory.mktemp("folders")
    tensors = write_hf_folder(parent / "hf", "gqa", "BF16", max_shard_bytes=40_000)
    to_orbax(parent / "hf", parent / "orbax")
    return parent, tensors


def expected_params(folders, dtype="bfloat16"):
    parent, tensors = folders
    params = params_of(Phi3Config.from_pretrained(parent / "hf"), tensors)
    return flatten_dict(jax.tree.map(lambda leaf: leaf.astype(dtype), params))


def assert_same(params, expected):
    params = flatten_dict(params)
    assert params.keys() == expected.keys()
    for path, leaf in params.items():
        assert leaf.dtype == expected[path].dtype, path
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(expected[path]), str(path))


# --- The format ------------------------------------------------------------------------------


def test_plain_orbax_restores_the_checkpoint(folders):
    params_folder = folders[0] / "orbax" / "params"
    assert_same(orbax.load(params_folder), expected_params(folders))
    metadata = orbax.metadata(params_folder)
    assert metadata.custom_metadata == {"format": "phi3-jax", "format_version": 1}
    # The older interface too, which looks for the tree one folder down.
    restored = orbax_v0.StandardCheckpointer().restore(params_folder / "state")
    assert_same(restored, expected_params(folders))


def test_plain_orbax_restores_onto_a_mesh(folders):
    config = Phi3Config.from_pretrained(folders[0] / "orbax")
    model = phi3.Phi3ForCausalLM(config, param_dtype="bfloat16")
    target = abstract_params(model, make_mesh(fsdp=4, tensor=2))
    restored = orbax.load(folders[0] / "orbax" / "params", target)
    assert_same(restored, expected_params(folders))
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
        lambda x: x.sharding, target
    )


def test_another_version_of_the_format_is_refused(folders, monkeypatch):
    monkeypatch.setattr(checkpoint, "_FORMAT", {"format": "phi3-jax", "format_version": 2})
    with pytest.raises(ValueError, match="'format_version': 1.*reads.*'format_version': 2"):
        from_pretrained(folders[0] / "orbax")


def test_all_differences_to_the_config_come_in_one_message(folders, tmp_path):
    shutil.copytree(folders[0] / "orbax", tmp_path / "m")
    values = json.loads((tmp_path / "m" / "config.json").read_text())
    values.update(tie_word_embeddings=True, intermediate_size=72)
    (tmp_path / "m" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError) as raised:
        from_pretrained(tmp_path / "m")
    assert str(raised.value).splitlines()[1:] == [
        "  model.layers.mlp.gate_up_proj.weight: shape (3, 48, 2, 80), "
        "the config makes it (3, 48, 2, 72)",
        "  model.layers.mlp.down_proj.weight: shape (3, 80, 48), the config makes it (3, 72, 48)",
        "  lm_head.weight: unexpected",
    ]


def test_truncated_data_is_an_error_not_zeros(folders, tmp_path):
    """Whichever file it is, but for those that newer ones replaced while writing."""
    shutil.copytree(folders[0] / "orbax", tmp_path / "m")
    messages = []
    files = (tmp_path / "m" / "params" / "state" / "d").iterdir()
    for file in sorted(files, key=lambda file: file.stat().st_size)[-6:]:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        try:
            assert_same(from_pretrained(tmp_path / "m", dtype=None)[1], expected_params(folders))
        except ValueError as error:
            messages.append(str(error))
        file.write_bytes(content)
    assert messages
    for message in messages:
        assert "OUT_OF_RANGE" in message and "tensorstore_spec" not in message


def test_missing_data_is_an_error_not_zeros(folders, tmp_path):
    shutil.copytree(folders[0] / "orbax", tmp_path / "m")
    spec = {"driver": "ocdbt", "base": f"file://{tmp_path}/m/params/state/"}
    store = tensorstore.KvStore.open(spec).result()
    keys = [key for key in store.list().result() if key.startswith(b"model.layers.mlp.down_proj")]
    assert len(keys) == 1 + 3 * 8 * 8
    store.write(keys[-1] if b"zarr" not in keys[-1] else keys[0], None).result()
    with pytest.raises(ValueError, match="mlp.down_proj.weight in '.*/m' cannot be read: .*miss"):
        from_pretrained(tmp_path / "m")


def test_what_is_no_checkpoint_is_said(folders, tmp_path):
    shutil.copytree(folders[0] / "orbax", tmp_path / "m")
    state = tmp_path / "m" / "params" / "state"
    shutil.rmtree(state / "d")
    with pytest.raises(ValueError, match="'.*/m/params' is not a checkpoint: NOT_FOUND"):
        from_pretrained(tmp_path / "m")
    shutil.rmtree(state)
    with pytest.raises(ValueError, match="9 problems with(.|\n)*model.norm.weight: missing"):
        from_pretrained(tmp_path / "m")
    (state.parent / "_CHECKPOINT_METADATA").write_text("{}")
    with pytest.raises(ValueError, match="is not a checkpoint: 'custom_metadata'"):
        from_pretrained(tmp_path / "m")


def test_zeros_keep_their_sign(tmp_path):
    """A chunk of nothing but zeros is stored like any other."""
    tensors = write_hf_folder(tmp_path / "hf")
    for name in tensors:
        tensors[name] = np.full_like(tensors[name], -0.0 if "down" in name else 0.0)
    safetensors.numpy.save_file(tensors, tmp_path / "hf" / "model.safetensors")
    to_orbax(tmp_path / "hf", tmp_path / "orbax")
    _, params = from_pretrained(tmp_path / "orbax", dtype=None)
    assert np.signbit(params["model"]["layers"]["mlp"]["down_proj"]["weight"]).all()
    assert not np.signbit(params["model"]["layers"]["self_attn"]["o_proj"]["weight"]).any()


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
@pytest.mark.parametrize("sizes", [(1, 1, 8), (2, 2, 2), (1, 8, 1), (8, 1, 1), (1, 4, 2)])
def test_any_mesh_gets_the_same_parameters(folders, kind, sizes):
    mesh = make_mesh(*sizes)
    model, params = from_pretrained(folders[0] / kind, dtype=None, mesh=mesh)
    assert_same(params, expected_params(folders))
    wanted = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(model, mesh))
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_each_part_is_read_once(folders, kind, monkeypatch):
    """Copies of a shard on several devices are one read and one array on the host."""
    read = []
    weights_class = checkpoint.HFWeights if kind == "hf" else checkpoint.OrbaxWeights
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
    assert_same(params_again, flatten_dict(params))
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
    model, params = from_pretrained(folders[0] / "hf", model_class=phi3.Phi3Model)
    with pytest.raises(ValueError, match="problems with the parameters to save") as raised:
        save_pretrained(tmp_path / "m", model, params)
    assert "\n  model.norm.weight: missing" in str(raised.value)
    assert "\n  norm.weight: unexpected" in str(raised.value)
    assert not list(tmp_path.iterdir())


TWO_PROCESSES = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
address, process, source, target = sys.argv[1:]
jax.distributed.initialize(address, num_processes=2, process_id=int(process))
import phi3_jax as phi3
assert len(jax.devices()) == 4
model, params = phi3.from_pretrained(source, dtype=None, mesh=phi3.make_mesh(fsdp=2, tensor=2))
assert not params["lm_head"]["weight"].is_fully_addressable
phi3.save_pretrained(target, model, params)
assert phi3.Phi3Config.from_pretrained(target).hidden_size == 48
"""


@pytest.mark.slow
def test_two_processes_load_and_save_together(folders, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-c", TWO_PROCESSES, address]
    places = [str(folders[0] / "orbax"), str(tmp_path / "m")]
    root = Path(__file__).parent.parent
    runs = [subprocess.Popen([*command, str(i), *places], cwd=root) for i in range(2)]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    stored = safetensors.numpy.load_file(tmp_path / "m" / "model.safetensors")
    for name, tensor in folders[1].items():
        np.testing.assert_array_equal(stored[name].view("u2"), tensor.view("u2"))
