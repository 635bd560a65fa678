"""Conversions both ways, comparison and inspection, as functions."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from model_folders import SIDE_FILES, write_hf_folder, write_tensors

from convert.inspect_folder import inspect_folder
from convert.quantization_error import quantization_error
from convert.to_hf import to_hf
from convert.to_orbax import to_orbax
from convert.verify import verify
from phi3_jax.cli import EMBEDDED_MODEL
from phi3_jax.folder import folder_kind
from train.tiny_demo.tasks import held_out_chats


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor, by the safetensors library."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(file)
    return tensors


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("case", "head", "dtype", "shard"),
    [
        ("gqa", "lm_head", "BF16", 30_000),
        ("gqa", "lm_head", "F32", 5_000_000_000),
        ("gqa", "score", "BF16", 30_000),
        ("gqa", "none", "F32", 30_000),
        ("mha_window", "lm_head", "F16", 5_000_000_000),
        ("mqa_tied_window1", "lm_head", "BF16", 5_000_000_000),
        ("mqa_tied_window1", "score_bias", "F32", 5_000_000_000),
        ("mqa_tied_window1", "none", "BF16", 5_000_000_000),
        ("longrope_partial_tied", "lm_head", "F32", 100_000),
        ("head_dim", "lm_head", "BF16", 30_000),
        ("head_dim", "score_bias", "F16", 30_000),
    ],
)
def test_there_and_back_every_bit_is_kept(tmp_path, case, head, dtype, shard):
    """Trap 34: same names, same bits, and the other files byte for byte."""
    source = tmp_path / "hf"
    tensors = write_hf_folder(source, case, dtype, shard, head=head, num_labels=3)
    to_orbax(tmp_path / "hf", tmp_path / "orbax")
    assert folder_kind(tmp_path / "orbax") == "orbax"
    to_hf(tmp_path / "orbax", tmp_path / "back")
    back = tensors_of(tmp_path / "back")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        np.testing.assert_array_equal(back[name].view(np.uint8), tensor.view(np.uint8), name)
    for name in ("config.json", *SIDE_FILES):
        content = (tmp_path / "hf" / name).read_bytes()
        assert (tmp_path / "orbax" / name).read_bytes() == content
        assert (tmp_path / "back" / name).read_bytes() == content
    for pair in (("hf", "orbax"), ("orbax", "back"), ("back", "hf"), ("orbax", "orbax")):
        result = verify(*(tmp_path / name for name in pair))
        assert result.differences == []
        assert result.tensors == len(tensors)
        assert result.nbytes == sum(tensor.nbytes for tensor in tensors.values())


def test_special_values_are_bits_like_any_other(tmp_path):
    tensors = write_hf_folder(tmp_path / "hf", dtype="F32")
    special = np.array([0x7FC00001, 0xFFC12345, 0x7F800001, 0x80000000, 1, 0xFF800000], np.uint32)
    for tensor in tensors.values():
        flat = tensor.reshape(-1)
        flat[:6] = special.view(np.float32)
    write_tensors(tmp_path / "hf", tensors)
    to_orbax(tmp_path / "hf", tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "back")
    for name, tensor in tensors_of(tmp_path / "back").items():
        np.testing.assert_array_equal(tensor.view("u4"), tensors[name].view("u4"), name)
    assert verify(tmp_path / "hf", tmp_path / "orbax").differences == []


def test_bytes_are_reported_up_to_all_of_them(tmp_path):
    tensors = write_hf_folder(tmp_path / "hf")
    total = sum(tensor.nbytes for tensor in tensors.values())
    for job, arguments in (
        (to_orbax, (tmp_path / "hf", tmp_path / "orbax")),
        (to_hf, (tmp_path / "orbax", tmp_path / "back")),
        (verify, (tmp_path / "hf", tmp_path / "orbax")),
    ):
        reports = []
        job(*arguments, report=lambda *report, reports=reports: reports.append(report))
        assert len(reports) == len(tensors)
        done = [report[0] for report in reports]
        assert done == sorted(done) and reports[-1] == (total, total)


@pytest.mark.parametrize("job", [to_orbax, to_hf])
def test_an_existing_target_is_refused_without_force(tmp_path, job):
    write_hf_folder(tmp_path / "hf")
    to_orbax(tmp_path / "hf", tmp_path / "orbax")
    source = tmp_path / ("hf" if job is to_orbax else "orbax")
    write_hf_folder(tmp_path / "target", "mha_window")
    before = tensors_of(tmp_path / "target")
    with pytest.raises(FileExistsError, match="target' exists"):
        job(source, tmp_path / "target")
    assert tensors_of(tmp_path / "target").keys() == before.keys()
    job(source, tmp_path / "target", force=True)
    assert verify(source, tmp_path / "target").differences == []
    assert names(tmp_path) == ["hf", "orbax", "target"]


@pytest.mark.parametrize("job", [to_orbax, to_hf])
def test_an_error_at_any_tensor_leaves_nothing(tmp_path, job):
    class DiskFullError(Exception):
        pass

    tensors = write_hf_folder(tmp_path / "hf")
    to_orbax(tmp_path / "hf", tmp_path / "orbax")
    source = tmp_path / ("hf" if job is to_orbax else "orbax")
    for fatal in (1, 2, len(tensors) // 2, len(tensors)):
        calls = iter(range(1, 1000))

        def report(done, total, calls=calls, fatal=fatal):
            if next(calls) == fatal:
                raise DiskFullError

        with pytest.raises(DiskFullError):
            job(source, tmp_path / "target", report=report)
        assert names(tmp_path) == ["hf", "orbax"]


def test_what_is_converted_already_is_said(tmp_path):
    write_hf_folder(tmp_path / "hf")
    to_orbax(tmp_path / "hf", tmp_path / "orbax")
    with pytest.raises(ValueError, match="orbax' is converted already; to-hf goes the other way"):
        to_orbax(tmp_path / "orbax", tmp_path / "new")
    with pytest.raises(ValueError, match="hf' holds safetensors already"):
        to_hf(tmp_path / "hf", tmp_path / "new")
    for job, source in ((to_orbax, "hf"), (to_hf, "orbax")):
        with pytest.raises(ValueError, match="holds the source"):
            job(tmp_path / source, tmp_path / source, force=True)
    assert names(tmp_path) == ["hf", "orbax"]


def test_wrong_weights_are_refused_before_anything_is_written(tmp_path):
    tensors = write_hf_folder(tmp_path / "hf")
    to_orbax(tmp_path / "hf", tmp_path / "orbax")
    for folder in ("hf", "orbax"):
        config = tmp_path / folder / "config.json"
        values = json.loads(config.read_text())
        config.write_text(json.dumps({**values, "num_hidden_layers": 4}))
    with pytest.raises(ValueError, match=r"^6 problems(.|\n)*layers\.3\.mlp\.down_proj.*missing"):
        to_orbax(tmp_path / "hf", tmp_path / "deep" / "new")
    with pytest.raises(ValueError, match=r"^6 problems(.|\n)*shape \(3, 48\), .* \(4, 48\)"):
        to_hf(tmp_path / "orbax", tmp_path / "deep" / "new")
    assert len(tensors) == 21
    assert names(tmp_path) == ["hf", "orbax"]


def test_verify_names_every_tensor_that_differs(tmp_path):
    tensors = write_hf_folder(tmp_path / "a")
    to_orbax(tmp_path / "a", tmp_path / "orbax")
    qkv, norm = "model.layers.2.self_attn.qkv_proj.weight", "model.norm.weight"
    tensors[qkv].view(np.uint16)[3, 4] ^= 1
    tensors[qkv].view(np.uint16)[79, 47] ^= 0x8000
    tensors[norm] = tensors[norm].astype(np.float32)
    write_hf_folder(tmp_path / "b")
    write_tensors(tmp_path / "b", tensors)
    for first, second in (("a", "b"), ("orbax", "b")):
        result = verify(tmp_path / first, tmp_path / second)
        assert result.tensors == 21
        assert result.differences == [
            f"{qkv}: 2 values differ",
            f"{norm}: bfloat16 (48,) and float32 (48,)",
        ]


def test_verify_names_tensors_of_one_side(tmp_path):
    write_hf_folder(tmp_path / "a", num_hidden_layers=1)
    write_hf_folder(tmp_path / "b", num_hidden_layers=1, tie_word_embeddings=True)
    for first, second in (("a", "b"), ("b", "a")):
        result = verify(tmp_path / first, tmp_path / second)
        tied, head = result.differences
        assert tied == f"config.json: tie_word_embeddings is {first == 'b'} and {second == 'b'}"
        assert head == f"lm_head.weight: only in {str(tmp_path / 'a')!r}"


def test_verify_names_what_differs_in_the_config(tmp_path):
    """The same tensors are another model with another window."""
    write_hf_folder(tmp_path / "a", sliding_window=5)
    to_orbax(tmp_path / "a", tmp_path / "orbax")
    write_hf_folder(tmp_path / "b", sliding_window=7, rope_theta=5e5)
    rope, window = verify(tmp_path / "orbax", tmp_path / "b").differences
    assert re.fullmatch("config.json: rope_parameters is .*10000.0.* and .*500000.0.*", rope)
    assert window == "config.json: sliding_window is 5 and 7"


def test_inspect_lists_both_formats(tmp_path):
    tensors = write_hf_folder(tmp_path / "hf", max_shard_bytes=30_000)
    to_orbax(tmp_path / "hf", tmp_path / "orbax")
    total = sum(tensor.nbytes for tensor in tensors.values())
    for folder, count, shown in (
        ("hf", 21, r"model\.layers\.2\.self_attn\.qkv_proj\.weight +\[80, 48\] +bfloat16 +7,680"),
        ("orbax", 9, r"model\.layers\.self_attn\.qkv_proj\.weight +\[3, 2, 5, 8, 48\] +bfloat16"),
    ):
        text, problems = inspect_folder(tmp_path / folder)
        assert problems == []
        assert re.search(shown, text)
        assert f"{count} tensors, {total // 2:,} parameters, {total:,} bytes" in text
        assert "num_key_value_heads = 2" in text and "rope = default, theta 10000.0" in text


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_inspect_names_the_labels_of_a_classifier(tmp_path, kind):
    names = {0: "no", 1: "yes", 2: "unsure"}
    write_hf_folder(tmp_path / "hf", head="score_bias", id2label=names)
    to_orbax(tmp_path / "hf", tmp_path / "orbax")
    text, problems = inspect_folder(tmp_path / kind)
    assert problems == []
    assert re.search(r"score\.bias +\[3\] +bfloat16 +6\n", text)
    assert "id2label = {0: 'no', 1: 'yes', 2: 'unsure'}" in text
    write_hf_folder(tmp_path / "causal")
    assert "id2label" not in inspect_folder(tmp_path / "causal")[0]


def test_inspect_shows_what_it_can_of_a_broken_folder(tmp_path):
    write_hf_folder(tmp_path / "hf", max_shard_bytes=60_000)
    shards = sorted((tmp_path / "hf").glob("*.safetensors"))
    shards[0].unlink()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "llama"}')
    text, problems = inspect_folder(tmp_path / "hf")
    assert "model.norm.weight" in text
    assert len(problems) == 2
    assert "the file is not there" in problems[0] and "'llama'" in problems[1]


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_folder(tmp_path, kind):
    """It is looked at and compared as others are, and is no way back to safetensors."""
    write_hf_folder(tmp_path / "hf", "gqa", "BF16")
    for name in ("one", "two"):
        to_orbax(tmp_path / "hf", tmp_path / name, quantize=kind)
    assert not verify(tmp_path / "one", tmp_path / "two").differences
    found = verify(tmp_path / "hf", tmp_path / "one")
    assert found.tensors == 8  # the norms and the embedding, bit by bit
    assert len(found.differences) == 3 * (3 * 4 + 1)  # a weight here, values and scales there
    text, problems = inspect_folder(tmp_path / "one")
    assert not problems and text.splitlines()[0].endswith(f"converted (Orbax), quantised ({kind})")
    assert "lm_head.weight.values" in text
    for name in ("config.json", *SIDE_FILES):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    with pytest.raises(ValueError, match=rf"is quantised \({kind}\).*convert the original"):
        to_hf(tmp_path / "one", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_what_quantisation_changes(tmp_path):
    """The embedded model on the chats that it was trained for, and on text that it was not."""
    text = "\n".join(
        f"<|user|>\n{chat.messages[-1]['content']}<|end|>\n<|assistant|>\n{chat.answer}<|end|>"
        for chat in held_out_chats(2)
    )
    found = {}
    for kind in ("int8", "nf4"):
        to_orbax(EMBEDDED_MODEL, tmp_path / kind, quantize=kind)
        found[kind] = quantization_error(EMBEDDED_MODEL, tmp_path / kind, text)
        other = quantization_error(EMBEDDED_MODEL, tmp_path / kind)
        assert other.tokens == 256 and other.perplexity > 100 * found[kind].perplexity
    int8, nf4 = found["int8"], found["nf4"]
    assert int8.tokens == nf4.tokens > 200 and int8.perplexity == nf4.perplexity
    assert 0.001 < int8.logits < 0.03 < nf4.logits < 0.4
    assert abs(int8.quantized_perplexity / int8.perplexity - 1) < 0.02
    assert abs(nf4.quantized_perplexity / nf4.perplexity - 1) < 0.5
    assert re.fullmatch(
        r"on \d+ tokens of a text: logits off by .*%, perplexity \S+ \(was \S+\)", str(int8)
    )
    same = quantization_error(EMBEDDED_MODEL, EMBEDDED_MODEL, text)
    assert same.logits == 0 and same.perplexity == same.quantized_perplexity
