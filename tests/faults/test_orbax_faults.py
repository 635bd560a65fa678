"""Converted folders, wrong in every way: `phi3-convert to-hf` and loading say what is."""

import json
import re
import shutil
from pathlib import Path

import pytest
from model_folders import write_hf_folder

from convert import cli
from convert.to_orbax import to_orbax
from phi3_jax.checkpoint import from_pretrained

METADATA = "params/_CHECKPOINT_METADATA"


def without(name: str):
    """A fault that is a missing file or folder."""

    def spoil(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def data(change):
    """A fault in every file with arrays: of a model this small, some are of no use any more."""

    def spoil(folder: Path) -> None:
        for file in (folder / "params/state/d").iterdir():
            change(file)

    return spoil


def content(name: str, content: bytes):
    """A fault that is the whole content of a file."""
    return lambda folder: (folder / name).write_bytes(content)


def metadata(change):
    """A fault in what the format says of itself."""

    def spoil(folder: Path) -> None:
        values = json.loads((folder / METADATA).read_text())
        change(values)
        (folder / METADATA).write_text(json.dumps(values))

    return spoil


def written(**changes):
    return metadata(lambda values: values["custom_metadata"].update(changes))


def config(**changes):
    def spoil(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **changes}))

    return spoil


def two_models(folder: Path) -> None:
    shutil.copy(folder.parent / "hf" / "model.safetensors", folder)


def params_a_file(folder: Path) -> None:
    shutil.rmtree(folder / "params")
    (folder / "params").write_text("here")


# Those that say it when the folder is opened.
OPENED = {
    "no params": (without("params"), "is not a model folder"),
    "params a file": (params_a_file, "is not a model folder"),
    "two models": (two_models, "holds two models at once"),
    "no config": (without("config.json"), "no config.json"),
    "no metadata": (without(METADATA), "is not a checkpoint"),
    "metadata empty": (content(METADATA, b""), "is not a checkpoint"),
    "metadata a list": (content(METADATA, b"[]"), "is not a checkpoint"),
    "metadata too deep": (content(METADATA, b'{"a":' * 10**5), "nested too deeply"),
    "metadata without ours": (
        metadata(lambda values: values.pop("custom_metadata")),
        "is not a checkpoint",
    ),
    "ours is null": (
        metadata(lambda values: values.update(custom_metadata=None)),
        "is not a checkpoint",
    ),
    "ours is a text": (
        metadata(lambda values: values.update(custom_metadata="phi3-jax")),
        "is not a checkpoint",
    ),
    "of another library": (written(format="other"), "has the format .*other"),
    "of a later version": (written(format_version=3), "'format_version': 3.* this version of"),
    "of an earlier version": (written(format_version=1), "convert the original weights again"),
    "with what we do not know": (written(packed="yes"), "has the format .*packed"),
    "of another quantisation": (written(quantized="int3"), "has the format .*int3"),
    "quantised by a list": (written(quantized=["int8"]), "has the format"),
    "called int8 and is not": (written(quantized="int8"), "missing"),
    "no state": (without("params/state"), "is not a checkpoint|missing"),
    "no manifest": (without("params/state/manifest.ocdbt"), "is not a checkpoint|missing"),
    "manifest empty": (content("params/state/manifest.ocdbt", b""), "is not a checkpoint"),
    "manifest of noise": (
        content("params/state/manifest.ocdbt", bytes(range(200))),
        "is not a checkpoint",
    ),
    "of another config": (config(num_hidden_layers=5), r"the config makes it \(5, |the config"),
    "of another width": (config(intermediate_size=88), "the config"),
    "of another head": (config(tie_word_embeddings=True), "lm_head"),
}
# Those that say it when the data is read.
READ = {
    "data gone": data(Path.unlink),
    "data cut short": data(
        lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    ),
    "data empty": data(lambda file: file.write_bytes(b"")),
    "data of noise": data(lambda file: file.write_bytes(bytes(file.stat().st_size))),
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    parent = tmp_path_factory.mktemp("converted")
    write_hf_folder(parent / "hf")
    to_orbax(parent / "hf", parent / "orbax")
    return parent


@pytest.mark.parametrize("kind", OPENED | READ)
def test_it_is_refused(refused, tmp_path, converted, kind):
    spoil, words = OPENED[kind] if kind in OPENED else (READ[kind], "cannot be read|params")
    shutil.copytree(converted, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path / "orbax")
    error = refused(cli.main, "to-hf", tmp_path / "orbax", tmp_path / "target")
    assert re.search(words, error, re.DOTALL), error
    with pytest.raises((ValueError, FileNotFoundError)):
        from_pretrained(tmp_path / "orbax")


def test_what_a_killed_run_left(refused, tmp_path, converted):
    shutil.copytree(converted, tmp_path, dirs_exist_ok=True)
    stage = tmp_path / ".orbax.partial-1234"
    (tmp_path / "orbax").rename(stage)
    assert "left unfinished" in refused(cli.main, "to-hf", stage, tmp_path / "target")


@pytest.mark.parametrize("command", ["to-hf", "to-orbax"])
def test_of_the_same_kind(refused, tmp_path, converted, command):
    """A folder that has the format already."""
    source = converted / ("hf" if command == "to-hf" else "orbax")
    assert "already" in refused(cli.main, command, source, tmp_path / "target")


@pytest.mark.parametrize("target", ["taken", "a_file", "a_file/inside", "orbax"])
def test_a_target_that_is_there(refused, tmp_path, converted, target):
    shutil.copytree(converted, tmp_path, dirs_exist_ok=True)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("kept")
    (tmp_path / "a_file").write_text("kept")
    refused(cli.main, "to-hf", tmp_path / "orbax", tmp_path / target, "--force")
