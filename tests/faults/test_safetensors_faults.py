"""Safetensors, wrong in every way: `phi3-convert` names file and tensor, and writes nothing."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from model_folders import tensors_in, write_hf_folder, write_tensors

from convert import cli
from phi3_jax.checkpoint import from_pretrained

NORM, HEAD, QKV = (
    "model.norm.weight",
    "lm_head.weight",
    "model.layers.1.self_attn.qkv_proj.weight",
)
SHARD = "model-00002-of-00003.safetensors"
THIRD = "model-00003-of-00003.safetensors"


def parts(file: Path) -> tuple[dict, bytes]:
    """Header and data of a safetensors file."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write_parts(file: Path, header: dict | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def with_header(change):
    """A fault in the header, which change() makes."""

    def spoil(folder: Path) -> None:
        file = folder / "model.safetensors"
        header, data = parts(file)
        write_parts(file, change(header) or header, data)

    return spoil


def with_entry(**changes):
    def change(header):
        header[NORM].update(changes)

    return with_header(change)


def with_tensors(change):
    """A well-formed file of other tensors."""

    def spoil(folder: Path) -> None:
        tensors = tensors_in(folder)
        (folder / "model.safetensors").unlink()
        write_tensors(folder, change(tensors) or tensors)

    return spoil


def with_bytes(change):
    def spoil(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return spoil


def directory(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def dangling(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("nowhere")


def overlapping(header):
    first, second = header[NORM]["data_offsets"], header[HEAD]["data_offsets"]
    header[NORM]["data_offsets"] = [second[0], second[0] + first[1] - first[0]]


def renamed(old, new):
    def change(header):
        return {new if name == old else name: entry for name, entry in header.items()}

    return with_header(change)


def without(name):
    return with_tensors(lambda tensors: {n: x for n, x in tensors.items() if n != name})


FILES = {
    "zero length": (with_bytes(lambda content: b""), "model.safetensors"),
    "seven bytes": (with_bytes(lambda content: content[:7]), "model.safetensors"),
    "length alone": (with_bytes(lambda content: content[:8]), "model.safetensors"),
    "header cut short": (with_bytes(lambda content: content[:100]), "model.safetensors"),
    "data cut short": (with_bytes(lambda content: content[:-1]), "model.safetensors"),
    "data too long": (with_bytes(lambda content: content + b"\0"), "model.safetensors"),
    "header of no end": (with_bytes(lambda content: b"\xff" * 8 + content[8:]), "model"),
    "header of length 0": (with_bytes(lambda content: bytes(8) + content[8:]), "model"),
    "not a header": (with_bytes(lambda content: content[:8] + b"?" + content[9:]), "model"),
    "a pickle": (with_bytes(lambda content: b"\x80\x04\x95" + content), "model"),
    "HTML": (with_bytes(lambda content: b"<!doctype html><title>404</title>" * 9), "model"),
    "a pointer to a file": (
        with_bytes(lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a"),
        "model.safetensors",
    ),
    "directory": (directory, "not a model folder"),
    "dangling link": (dangling, "not a model folder"),
    "overlap": (with_header(overlapping), "model.safetensors"),
    "offsets reversed": (with_entry(data_offsets=[96, 0]), "model.safetensors"),
    "offsets beyond the end": (with_entry(data_offsets=[0, 10**12]), "model.safetensors"),
    "offsets below 0": (with_entry(data_offsets=[-96, 0]), "model.safetensors"),
    "offsets of text": (with_entry(data_offsets=["0", "96"]), "model.safetensors"),
    "shape larger than data": (with_entry(shape=[49]), "model.safetensors"),
    "shape of text": (with_entry(shape="48"), "model.safetensors"),
    "shape of many": (with_entry(shape=[2**62, 2**62]), "model.safetensors"),
    "dtype unknown": (with_entry(dtype="F17"), "model.safetensors"),
    "dtype of other width": (with_entry(dtype="F32"), "model.safetensors"),
    "dtype of integers": (with_entry(dtype="I16"), f"{NORM}: dtype I16, must be one of"),
    "dtype of one layer": (
        with_header(lambda header: header[QKV].update(dtype="F16")),
        r"layers differ in dtype: BF16 in layers \[0, 2\]; F16 in layers \[1\]",
    ),
    "shape swapped": (
        with_header(lambda header: header[QKV].update(shape=header[QKV]["shape"][::-1])),
        f"{QKV}: shape ",
    ),
    "no entry": (with_header(lambda header: header.update({NORM: 3})), "model.safetensors"),
    "name of two": (renamed(NORM, "model.norm.bias"), f"{NORM}: missing.*norm.bias: unexpected"),
    "name with a prefix": (renamed(NORM, f"module.{NORM}"), f"{NORM}: missing"),
    "name of layer 01": (renamed(QKV, QKV.replace(".1.", ".01.")), f"{QKV}: missing"),
    "name of layer -1": (renamed(QKV, QKV.replace(".1.", ".-1.")), f"{QKV}: missing"),
    "missing": (without(QKV), f"{QKV}: missing"),
    "missing head": (without(HEAD), f"{HEAD}: missing; a tied model has tie_word_embeddings"),
    "extra": (
        with_tensors(lambda tensors: {**tensors, "model.extra.weight": tensors[NORM]}),
        "model.extra.weight: unexpected",
    ),
    "scalar": (
        with_tensors(lambda tensors: {**tensors, NORM: tensors[NORM][0].reshape(())}),
        rf"{NORM}: shape \(\)",
    ),
    "no tensors": (with_tensors(lambda tensors: {NORM: tensors[NORM]}), f"{QKV}: missing"),
    "other model": (
        with_tensors(lambda tensors: {"weight": np.zeros(3, np.float32)}),
        "weight: unexpected",
    ),
}


def with_index(change):
    """A fault in the index of three files."""

    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        changed = change(index)
        if not isinstance(changed, bytes):
            changed = json.dumps(index if changed is None else changed).encode()
        path.write_bytes(changed)

    return spoil


def shard_gone(folder: Path) -> None:
    (folder / SHARD).unlink()


def shard_empty(folder: Path) -> None:
    (folder / SHARD).write_bytes(b"")


def shard_directory(folder: Path) -> None:
    shard_gone(folder)
    (folder / SHARD).mkdir()


def shard_of_another(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / THIRD).read_bytes())


def index_gone(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


INDICES = {
    "no index": (index_gone, "not a model folder"),
    "index not JSON": (with_index(lambda index: b"{"), "model.safetensors.index.json: "),
    "index empty": (with_index(lambda index: b""), "model.safetensors.index.json: "),
    "index not UTF-8": (with_index(lambda index: b"\xff\xfe{}"), "model.safetensors.index.json: "),
    "index too deep": (with_index(lambda index: b"[" * 10**5), "nested too deeply"),
    "index a list": (with_index(lambda index: []), "model.safetensors.index.json: "),
    "no weight_map": (with_index(lambda index: {"metadata": {}}), "weight_map"),
    "weight_map a list": (with_index(lambda index: {"weight_map": [1]}), "not an index"),
    "weight_map empty": (with_index(lambda index: {"weight_map": {}}), "missing"),
    "file not a text": (with_index(lambda index: {"weight_map": {NORM: 3}}), "not an index"),
    "file not there": (
        with_index(lambda index: index["weight_map"].update({NORM: "model-9.safetensors"})),
        "model-9.safetensors: the file is not there",
    ),
    "file elsewhere": (
        with_index(lambda index: index["weight_map"].update({NORM: "../../etc/passwd"})),
        "passwd: the file is not there",
    ),
    "file the folder itself": (
        with_index(lambda index: index["weight_map"].update({NORM: "."})),
        "not an index of safetensors",
    ),
    "name in the wrong file": (
        with_index(lambda index: index["weight_map"].update({NORM: THIRD})),
        f"{NORM}: the index puts it into {THIRD}, not so the file",
    ),
    "name left out": (
        with_index(lambda index: index["weight_map"].pop(NORM) and None),
        f"{NORM}: is in .*, which the index does not say",
    ),
    "name of nothing": (
        with_index(lambda index: index["weight_map"].update({"model.extra": SHARD})),
        f"model.extra: the index puts it into {SHARD}",
    ),
    "shard gone": (shard_gone, f"{SHARD}: the file is not there"),
    "shard empty": (shard_empty, f"{SHARD}: "),
    "shard a directory": (shard_directory, f"{SHARD}: "),
    "shard of other tensors": (shard_of_another, f"the index puts it into {SHARD}"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file(refused, tmp_path, kind):
    spoil, words = FILES[kind]
    write_hf_folder(tmp_path / "model")
    spoil(tmp_path / "model")
    check(refused, tmp_path, words)


@pytest.mark.parametrize("kind", INDICES)
def test_an_index(refused, tmp_path, kind):
    spoil, words = INDICES[kind]
    write_hf_folder(tmp_path / "model", max_shard_bytes=64_000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 3
    spoil(tmp_path / "model")
    check(refused, tmp_path, words)


def check(refused, tmp_path, words):
    error = refused(cli.main, "to-orbax", tmp_path / "model", tmp_path / "target")
    assert re.search(words, error, re.DOTALL), error
    with pytest.raises(ValueError):
        from_pretrained(tmp_path / "model")


@pytest.mark.skipif(os.getuid() == 0, reason="root may read all files")
def test_a_file_that_may_not_be_read(refused, tmp_path):
    write_hf_folder(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").chmod(0)
    assert "Permission denied" in refused(
        cli.main, "to-orbax", tmp_path / "model", tmp_path / "target"
    )
