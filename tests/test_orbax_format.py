"""The converted format: plain Orbax reads it, and what is broken is said."""

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as orbax_v0
import pytest
import safetensors.numpy
import tensorstore
from model_folders import assert_same, params_in, write_hf_folder
from orbax.checkpoint import v1 as orbax

import phi3_jax as phi3
from convert.to_orbax import to_orbax
from phi3_jax import orbax_format
from phi3_jax.checkpoint import from_pretrained
from phi3_jax.config import Phi3Config
from phi3_jax.sharding import abstract_params, make_mesh


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The parent of a model in both formats."""
    parent = tmp_path_factory.mktemp("folders")
    write_hf_folder(parent / "hf", "gqa", "BF16", max_shard_bytes=40_000)
    to_orbax(parent / "hf", parent / "orbax")
    return parent


def test_plain_orbax_restores_the_checkpoint(folders):
    params_folder = folders / "orbax" / "params"
    assert_same(orbax.load(params_folder), params_in(folders / "hf"))
    metadata = orbax.metadata(params_folder)
    assert metadata.custom_metadata == {"format": "phi3-jax", "format_version": 2}
    # The older interface too, which looks for the tree one folder down.
    restored = orbax_v0.StandardCheckpointer().restore(params_folder / "state")
    assert_same(restored, params_in(folders / "hf"))


def test_plain_orbax_restores_onto_a_mesh(folders):
    config = Phi3Config.from_pretrained(folders / "orbax")
    mesh = make_mesh(fsdp=8, tensor=1)  # one that pads nothing: plain Orbax would not
    target = abstract_params(phi3.Phi3ForCausalLM(config, param_dtype="bfloat16", mesh=mesh))
    restored = orbax.load(folders / "orbax" / "params", target)
    assert_same(restored, params_in(folders / "hf"))
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
        lambda x: x.sharding, target
    )


def test_another_version_of_the_format_is_refused(folders, monkeypatch):
    monkeypatch.setattr(orbax_format, "_FORMAT", {"format": "phi3-jax", "format_version": 3})
    with pytest.raises(ValueError, match="'format_version': 2.*reads.*'format_version': 3"):
        from_pretrained(folders / "orbax")


def test_all_differences_to_the_config_come_in_one_message(folders, tmp_path):
    shutil.copytree(folders / "orbax", tmp_path / "m")
    values = json.loads((tmp_path / "m" / "config.json").read_text())
    values.update(tie_word_embeddings=True, intermediate_size=72)
    (tmp_path / "m" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError) as raised:
        from_pretrained(tmp_path / "m")
    assert str(raised.value).splitlines()[1:] == [
        "  model.layers.mlp.gate_up_proj.weight: shape (3, 2, 80, 48), "
        "the config makes it (3, 2, 72, 48)",
        "  model.layers.mlp.down_proj.weight: shape (3, 48, 80), the config makes it (3, 48, 72)",
        "  lm_head.weight: unexpected",
    ]


def test_truncated_data_is_an_error_not_zeros(folders, tmp_path):
    """Whichever file it is, but for those that newer ones replaced while writing."""
    shutil.copytree(folders / "orbax", tmp_path / "m")
    messages = []
    files = (tmp_path / "m" / "params" / "state" / "d").iterdir()
    for file in sorted(files, key=lambda file: file.stat().st_size)[-6:]:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        try:
            assert_same(from_pretrained(tmp_path / "m", dtype=None)[1], params_in(folders / "hf"))
        except ValueError as error:
            messages.append(str(error))
        file.write_bytes(content)
    assert messages
    for message in messages:
        assert "OUT_OF_RANGE" in message and "tensorstore_spec" not in message


def test_missing_data_is_an_error_not_zeros(folders, tmp_path):
    shutil.copytree(folders / "orbax", tmp_path / "m")
    spec = {"driver": "ocdbt", "base": f"file://{tmp_path}/m/params/state/"}
    store = tensorstore.KvStore.open(spec).result()
    keys = [key for key in store.list().result() if key.startswith(b"model.layers.mlp.down_proj")]
    assert len(keys) == 1 + 3 * 8 * 8
    store.write(keys[-1] if b"zarr" not in keys[-1] else keys[0], None).result()
    with pytest.raises(ValueError, match="mlp.down_proj.weight in '.*/m' cannot be read: .*miss"):
        from_pretrained(tmp_path / "m")


def test_what_is_no_checkpoint_is_said(folders, tmp_path):
    shutil.copytree(folders / "orbax", tmp_path / "m")
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
