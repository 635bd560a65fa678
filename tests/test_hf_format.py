"""Names, layouts, and safetensors files, checked with the safetensors library itself."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from model_folders import write_hf_folder, write_tensors
from reference import config_values, hf_weights

from phi3_jax.config import Phi3Config
from phi3_jax.hf_format import HFWeights, WeightTable, head_of
from phi3_jax.safetensors_files import INDEX_FILE, Leaf, SafetensorsFolder, SafetensorsWriter

BF16 = np.dtype(ml_dtypes.bfloat16)
QKV = ("model", "layers", "self_attn", "qkv_proj", "weight")
NORM_0 = "model.layers.0.input_layernorm.weight"
QKV_1 = "model.layers.1.self_attn.qkv_proj.weight"
DOWN_2 = "model.layers.2.mlp.down_proj.weight"


def config_of(folder: Path) -> Phi3Config:
    return Phi3Config.from_pretrained(folder)


def problems_of(folder: Path) -> str:
    with pytest.raises(ValueError) as raised:
        HFWeights(folder, config_of(folder))
    return str(raised.value)


@pytest.mark.parametrize("case", ["gqa", "mha_window", "mqa_tied_window1", "head_dim"])
def test_layouts_are_those_of_the_reference_written_out(case):
    """Order of q, k, v, and of gate and up (traps 1, 2 and 4)."""
    config = Phi3Config(**config_values(case))
    table, hf = WeightTable(config), hf_weights(config, case)
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    G, F = N // K, config.intermediate_size

    def ours(*path):
        name = table.hf_name(("model", "layers", *path, "weight"), 1)
        return table.from_hf(("model", "layers", *path, "weight"), hf[name]), hf[name]

    qkv, fused = ours("self_attn", "qkv_proj")
    heads = fused.reshape(-1, H, fused.shape[1])
    for n in range(N):
        k, g = divmod(n, G)
        np.testing.assert_array_equal(qkv[k, g], heads[n])
    for k in range(K):
        np.testing.assert_array_equal(qkv[k, G], heads[N + k])
        np.testing.assert_array_equal(qkv[k, G + 1], heads[N + K + k])
    o_proj, flat = ours("self_attn", "o_proj")
    for n in range(N):
        k, g = divmod(n, G)
        np.testing.assert_array_equal(o_proj[:, k, g], flat[:, n * H : (n + 1) * H])
    gate_up, fused = ours("mlp", "gate_up_proj")
    np.testing.assert_array_equal(gate_up[0], fused[:F])
    np.testing.assert_array_equal(gate_up[1], fused[F:])
    down, flat = ours("mlp", "down_proj")
    np.testing.assert_array_equal(down, flat)


@pytest.mark.parametrize("case", ["gqa", "mqa_tied_window1", "head_dim"])
def test_any_part_of_a_leaf_is_that_of_the_whole(tmp_path, case):
    """Read in place, and from a map of the file, which a mesh does."""
    tensors = write_hf_folder(tmp_path / "model", case)
    weights = HFWeights(tmp_path / "model", config_of(tmp_path / "model"))
    for path, layer in weights.table.parts:
        whole = weights.table.from_hf(path, tensors[weights.table.hf_name(path, layer)])
        out = np.empty_like(whole)
        weights.read_into(path, layer, out)
        np.testing.assert_array_equal(out.view("u2"), whole.view("u2"))
        part = tuple(slice(size // 3, size - size // 4) for size in whole.shape)
        read = weights.read(path, layer, part)
        assert read.flags.c_contiguous
        np.testing.assert_array_equal(read.view("u2"), whole[part].view("u2"))


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    write_hf_folder(tmp_path / "model")
    weights = HFWeights(tmp_path / "model", config_of(tmp_path / "model"))
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="ended in the middle of"):
        for part in weights.table.parts:
            out = np.empty(weights.table.layer_shape(part[0]), BF16)
            weights.read_into(*part, out)


@pytest.mark.parametrize("case", ["gqa", "mqa_tied_window1", "head_dim"])
def test_every_layout_goes_back_contiguous(case):
    """A transposed matrix written as raw memory has the right shape and wrong data (trap 52)."""
    config = Phi3Config(**config_values(case))
    table, hf = WeightTable(config), hf_weights(config, case)
    for path, layer in table.parts:
        tensor = hf[table.hf_name(path, layer)].astype(BF16)
        ours = table.from_hf(path, tensor)
        # Also where ours is a strided view.
        wider = np.concatenate([ours, ours], axis=-1)
        back = table.to_hf(path, wider[..., : ours.shape[-1]])
        assert back.flags.c_contiguous and back.dtype == BF16
        np.testing.assert_array_equal(back.view(np.uint16), tensor.view(np.uint16))


@pytest.mark.parametrize("head", ["lm_head", "score", "score_bias", "none"])
@pytest.mark.parametrize("case", ["gqa", "mqa_tied_window1"])
def test_the_names_say_which_head_a_folder_has(tmp_path, head, case):
    tensors = write_hf_folder(tmp_path / "model", case, "F32", head=head, num_labels=3)
    weights = HFWeights(tmp_path / "model", config_of(tmp_path / "model"))
    table = weights.table
    assert table.head == head
    assert [table.hf_name(*part) for part in table.parts] == list(tensors)
    assert head_of(".".join(path) for path in table.weights) == head
    for path, layer in table.parts:
        tensor = tensors[table.hf_name(path, layer)]
        np.testing.assert_array_equal(table.to_hf(path, weights.read(path, layer)), tensor)
    prefix = () if head == "none" else ("model",)
    assert {*prefix, "embed_tokens", "weight"} == {*table.embedding}
    if "score" in head:
        np.testing.assert_array_equal(
            weights.read(("score", "weight"), None), tensors["score.weight"]
        )
        assert weights.leaves["score", "weight"].shape == (3, 48)


def test_differences_of_a_classifier_are_named(tmp_path):
    tensors = write_hf_folder(tmp_path / "model", head="score_bias", num_labels=3)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["score.bias"] = tensors["score.bias"][:2]
    del tensors["score.weight"]
    write_tensors(tmp_path / "model", tensors)
    assert problems_of(tmp_path / "model").splitlines()[1:] == [
        "  score.weight: missing",
        "  score.bias: shape (2,), the config makes it (3,)",
        "  lm_head.weight: unexpected",
    ]


def test_a_broken_file_leaves_the_head_to_the_index(tmp_path):
    write_hf_folder(tmp_path / "model", head="none", max_shard_bytes=30_000)
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    for shard in shards:
        shard.write_bytes(b"")
    assert problems_of(tmp_path / "model").startswith(f"{len(shards)} problems")


def test_writer_copies_a_strided_array_in_order(tmp_path):
    """Trap 52 once more, at the last door before the file."""
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_tensors(tmp_path, {"w": kernel.T})
    read = safetensors.numpy.load_file(tmp_path / "model.safetensors")["w"]
    np.testing.assert_array_equal(read, [[0, 3], [1, 4], [2, 5]])


def test_shards_and_index_are_those_of_transformers(tmp_path):
    tensors = {f"t{i}": np.full((3, 5), i, BF16 if i % 2 else np.float32) for i in range(5)}
    write_tensors(tmp_path, tensors, max_shard_bytes=100)
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*files, INDEX_FILE]
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"] == {
        "t0": files[0], "t1": files[0], "t2": files[1], "t3": files[1], "t4": files[2]
    }  # fmt: skip
    for name, tensor in tensors.items():
        read = safetensors.numpy.load_file(tmp_path / index["weight_map"][name])[name]
        np.testing.assert_array_equal(read, tensor)
    with safetensors.safe_open(tmp_path / files[0], "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_may_be_written_in_any_order_but_all_of_them(tmp_path):
    kinds = {name: Leaf((2,), np.dtype(np.float32)) for name in "abc"}
    with SafetensorsWriter(tmp_path, kinds) as writer:
        for value, name in enumerate("cab"):
            writer.write(name, np.full(2, value, np.float32))
    read = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert {name: value[0] for name, value in read.items()} == {"c": 0, "a": 1, "b": 2}
    with pytest.raises(AssertionError, match="never written.*'b'"):
        with SafetensorsWriter(tmp_path, kinds) as writer:
            writer.write("a", np.zeros(2, np.float32))
            writer.write("c", np.zeros(2, np.float32))


def test_tensors_are_mapped_one_by_one_and_unmapped(tmp_path):
    write_tensors(tmp_path, {name: np.zeros(100_000, np.float32) for name in "ab"})
    folder = SafetensorsFolder(tmp_path)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    tensor = folder.read("b")
    assert str(tmp_path) in maps.read_text()
    del tensor
    assert str(tmp_path) not in maps.read_text()


def test_bfloat16_is_read_bit_by_bit_without_jax(tmp_path):
    """Elsewhere bfloat16 is only known to NumPy once something imported ml_dtypes (trap 53)."""
    write_hf_folder(tmp_path / "model", dtype="BF16", max_shard_bytes=20_000)
    script = f"""
import sys
from pathlib import Path
from phi3_jax.config import Phi3Config
from phi3_jax.hf_format import HFWeights
folder = Path({str(tmp_path / "model")!r})
weights = HFWeights(folder, Phi3Config.from_pretrained(folder))
print(weights.read({QKV!r}, 1).view("u2").astype("u8").sum(), weights.leaves[{QKV!r}].dtype)
assert "jax" not in sys.modules
"""
    root = Path(__file__).parent.parent
    ran = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    files = [
        safetensors.numpy.load_file(f) for f in sorted((tmp_path / "model").glob("*.safetensors"))
    ]
    stored = next(file[QKV_1] for file in files if QKV_1 in file)
    assert ran.stdout.split() == [str(stored.view("u2").astype("u8").sum()), "bfloat16"], ran.stderr


def test_all_problems_come_in_one_message(tmp_path):
    tensors = write_hf_folder(tmp_path / "model")
    folder = tmp_path / "model"
    del tensors[NORM_0], tensors["lm_head.weight"]
    tensors[QKV_1] = tensors[QKV_1].T
    tensors[DOWN_2] = tensors[DOWN_2].astype(np.float32)
    tensors["model.layers.3.mlp.down_proj.weight"] = tensors[DOWN_2]
    tensors["model.layers.0.self_attn.qkv_proj.bias"] = np.zeros(3, np.float32)
    write_tensors(folder, tensors)
    message = problems_of(folder)
    assert message.startswith("6 problems with the weights in ")
    for line in (
        f"{NORM_0}: missing",
        "lm_head.weight: missing; a tied model has tie_word_embeddings true",
        f"{QKV_1}: shape (48, 80), the config makes it (80, 48)",
        "model.layers.{}.mlp.down_proj.weight: its layers differ in dtype: "
        "BF16 in layers [0, 1]; F32 in layers [2]",
        "model.layers.3.mlp.down_proj.weight: unexpected",
        "model.layers.0.self_attn.qkv_proj.bias: unexpected",
    ):
        assert f"\n  {line}" in message


def test_a_dtype_that_is_no_weight_is_named(tmp_path):
    tensors = write_hf_folder(tmp_path / "model")
    safetensors.numpy.save_file(
        {n: t.astype(np.int8) if "norm.weight" in n else t for n, t in tensors.items()},
        tmp_path / "model" / "model.safetensors",
    )
    assert "model.norm.weight: dtype I8, must be one of BF16, F16, F32" in problems_of(
        tmp_path / "model"
    )


def test_broken_files_are_all_named(tmp_path):
    folder = tmp_path / "model"
    write_hf_folder(folder, max_shard_bytes=30_000)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 3
    data = shards[0].read_bytes()
    shards[0].write_bytes(data[:-10])
    shards[1].unlink()
    index = json.loads((folder / INDEX_FILE).read_text())
    moved = [name for name, file in index["weight_map"].items() if file == shards[2].name]
    index["weight_map"][moved[0]] = shards[3].name
    (folder / INDEX_FILE).write_text(json.dumps(index))
    message = problems_of(folder)
    assert message.startswith("4 problems")
    assert f"\n  {shards[0].name}: " in message
    assert f"\n  {shards[1].name}: the file is not there" in message
    assert f"\n  {moved[0]}: is in {shards[2].name}, which the index does not say" in message
    assert f"\n  {moved[0]}: the index puts it into {shards[3].name}, not so the file" in message


def test_a_truncated_single_file_is_one_problem(tmp_path):
    write_hf_folder(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    assert problems_of(tmp_path / "model").startswith("1 problem with the weights")
    file.write_bytes(b"")
    assert problems_of(tmp_path / "model").startswith("1 problem with the weights")


def test_an_index_that_is_none_is_one_problem(tmp_path):
    write_hf_folder(tmp_path / "model", max_shard_bytes=30_000)
    (tmp_path / "model" / INDEX_FILE).write_text("[]")
    message = problems_of(tmp_path / "model")
    assert message.startswith("1 problem") and INDEX_FILE in message


def test_rotary_buffers_of_old_files_are_dropped(tmp_path):
    tensors = write_hf_folder(tmp_path / "model")
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        tensors[name] = np.zeros(4, np.float32)
    write_tensors(tmp_path / "model", tensors)
    weights = HFWeights(tmp_path / "model", config_of(tmp_path / "model"))
    assert not any("rotary_emb" in part for path in weights.leaves for part in path)


def test_a_tied_head_may_be_there_if_it_is_the_embedding(tmp_path):
    """Trap 33: a tied model has no head of its own, an untied one must have it."""
    folder = tmp_path / "model"
    tensors = write_hf_folder(folder, case="mqa_tied_window1")
    assert "lm_head.weight" not in tensors
    assert ("lm_head", "weight") not in HFWeights(folder, config_of(folder)).leaves

    head = tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    write_tensors(folder, tensors)
    assert ("lm_head", "weight") not in HFWeights(folder, config_of(folder)).leaves

    head[0, 0] = -head[0, 0]
    write_tensors(folder, tensors)
    message = problems_of(folder)
    assert message.startswith("1 problem")
    assert "lm_head.weight: differs from model.embed_tokens.weight" in message
