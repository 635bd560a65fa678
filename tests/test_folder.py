"""Finding model folders, and folders that appear whole or not at all."""

import fcntl
import os
import sys
from pathlib import Path

import huggingface_hub
import pytest
from model_folders import write_hf_folder

from phi3_jax.folder import check_apart, copy_side_files, find_folder, folder_kind, staged_folder


def names(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir())


def make_model(folder: Path, mark: str = "old") -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_text(mark)


def abandon_stage(target: Path) -> Path:
    """What a killed run leaves: a stage without a lock on it."""
    stage = target.with_name(f".{target.name}.partial-dead")
    make_model(stage, "half")
    (stage / ".lock").touch()
    return stage


def test_a_folder_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "deep" / "model"
    with staged_folder(target) as stage:
        (stage / "file").write_text("content")
        assert not target.exists()
        with pytest.raises(ValueError, match="left unfinished by an interrupted run"):
            find_folder(stage)
    assert names(tmp_path / "deep") == ["model"] and names(target) == ["file"]


def test_other_users_may_read_it_as_the_umask_says(tmp_path):
    with staged_folder(tmp_path / "model"):
        pass
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_after_an_error(tmp_path, error):
    make_model(tmp_path / "model")
    with pytest.raises(error):
        with staged_folder(tmp_path / "model", force=True) as stage:
            (stage / "file").write_text("half")
            raise error
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "model.safetensors").read_text() == "old"


def test_an_existing_target_is_refused_without_force(tmp_path):
    make_model(tmp_path / "model")
    with pytest.raises(FileExistsError, match="exists; replace it with force"):
        with staged_folder(tmp_path / "model"):
            raise AssertionError("not entered")
    with staged_folder(tmp_path / "model", force=True) as stage:
        make_model(stage / "inside", "new")
        assert (tmp_path / "model" / "model.safetensors").read_text() == "old"
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["inside"]


def test_force_replaces_model_folders_only(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="not a model folder, so it is not replaced"):
        with staged_folder(tmp_path / "home", force=True):
            raise AssertionError("not entered")
    assert names(tmp_path / "home") == ["thesis.txt"]


@pytest.mark.parametrize("inside", ["src", "params", "checkpoints"])
@pytest.mark.parametrize("file", ["model.safetensors", "adapter_config.json", "notes.txt"])
def test_force_does_not_replace_what_holds_other_folders(tmp_path, inside, file):
    """A project beside whose code a model lies, or with params/ of its own."""
    (tmp_path / "home" / inside).mkdir(parents=True)
    (tmp_path / "home" / inside / "thesis.txt").write_text("years")
    (tmp_path / "home" / file).touch()
    words = "not a model folder" if file == "notes.txt" else rf"other folders \({inside}\)"
    with pytest.raises(ValueError, match=f"{words}, so it is not replaced"):
        with staged_folder(tmp_path / "home", force=True):
            raise AssertionError("not entered")
    assert (tmp_path / "home" / inside / "thesis.txt").read_text() == "years"


def test_a_target_that_comes_up_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(FileExistsError):
        with staged_folder(tmp_path / "model"):
            make_model(tmp_path / "model", "faster")
    assert (tmp_path / "model" / "model.safetensors").read_text() == "faster"
    assert names(tmp_path) == ["model"]


def test_what_killed_runs_left_is_cleared(tmp_path):
    target = tmp_path / "model"
    abandon_stage(target)
    stage_of_other = abandon_stage(tmp_path / "model-2")
    # Killed between making the stage and its lock.
    target.with_name(".model.partial-young").mkdir()
    with staged_folder(target):
        pass
    assert names(tmp_path) == [stage_of_other.name, "model"]


def test_a_stage_in_use_is_not_cleared(tmp_path):
    stage = abandon_stage(tmp_path / "model")
    with open(stage / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with staged_folder(tmp_path / "model"):
            pass
        assert names(stage) == [".lock", "model.safetensors"]


def test_a_run_killed_while_replacing_loses_nothing(tmp_path):
    """Between its two renames the target is missing; the next run puts it back."""
    target = tmp_path / "model"
    make_model(target)
    abandon_stage(target)
    target.rename(tmp_path / ".model.replaced-dead")
    with pytest.raises(FileExistsError):
        with staged_folder(target):
            raise AssertionError("not entered")
    assert names(tmp_path) == ["model"]
    assert (target / "model.safetensors").read_text() == "old"


def test_a_failed_replacement_puts_the_old_one_back(tmp_path, monkeypatch):
    make_model(tmp_path / "model")
    with pytest.raises(OSError, match="no more"):
        with staged_folder(tmp_path / "model", force=True) as stage:
            rename = Path.rename

            def fail(path, to):
                if path == stage:
                    raise OSError("no more")
                return rename(path, to)

            monkeypatch.setattr(Path, "rename", fail)
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "model.safetensors").read_text() == "old"


def test_kinds_are_told_apart_by_looking(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors.index.json").touch()
    (tmp_path / "converted" / "params").mkdir(parents=True)
    (tmp_path / "neither").mkdir()
    assert folder_kind(tmp_path / "hf") == "hf"
    assert folder_kind(tmp_path / "converted") == "orbax"
    with pytest.raises(ValueError, match="is not a model folder, which needs one of model.safe"):
        folder_kind(tmp_path / "neither")
    (tmp_path / "converted" / "model.safetensors").touch()
    with pytest.raises(ValueError, match="two models at once"):
        folder_kind(tmp_path / "converted")


def test_side_files_travel_byte_for_byte(tmp_path):
    write_hf_folder(tmp_path / "a")
    (tmp_path / "a" / "README.md").touch()
    (tmp_path / "b").mkdir()
    copy_side_files(tmp_path / "a", tmp_path / "b")
    copied = names(tmp_path / "b")
    assert copied == sorted({*names(tmp_path / "a")} - {"README.md", "model.safetensors"})
    assert {"config.json", "tokenizer.model", "generation_config.json"} < {*copied}
    for name in copied:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_target_must_not_hold_its_source(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    check_apart(tmp_path / "a", tmp_path / "a" / "b")
    for target in (tmp_path / "a" / "b", tmp_path / "a", str(tmp_path / "x" / ".." / "a")):
        with pytest.raises(ValueError, match="holds the source"):
            check_apart(tmp_path / "a" / "b", target)
    with pytest.raises(ValueError, match="a converted folder too"):
        check_apart(tmp_path / "a", tmp_path / "a" / "params")


def test_missing_folders_and_files_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="'file' is a file, expected a model folder"):
        find_folder("file")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    with pytest.raises(ValueError, match="'adapter' holds an adapter, expected a model folder"):
        find_folder("adapter")
    (tmp_path / "adapter" / "config.json").touch()  # a model that has adapters beside its weights
    assert find_folder("adapter") == Path("adapter") and find_folder(".") == Path(".")
    with pytest.raises(ValueError, match="the name of the model folder is empty"):
        find_folder("")
    for name in ("missing", "./missing/folder", tmp_path / "missing", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            find_folder(name)


def test_a_hub_id_is_downloaded(tmp_path, monkeypatch):
    asked = {}

    def download(repo_id, allow_patterns):
        asked.update(repo_id=repo_id, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_folder("microsoft/Phi-3-mini-4k-instruct") == tmp_path
    assert asked["repo_id"] == "microsoft/Phi-3-mini-4k-instruct"
    files = [
        "config.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "params/state/d/0123",
        "README.md",
        "pytorch_model.bin",
        "onnx/model.safetensors",
    ]
    kept = huggingface_hub.utils.filter_repo_objects(files, allow_patterns=asked["patterns"])
    assert list(kept) == files[:-3]

    # A folder of that name comes first.
    os.makedirs(tmp_path / "microsoft" / "Phi-3-mini-4k-instruct")
    assert find_folder("microsoft/Phi-3-mini-4k-instruct") != tmp_path


def test_a_hub_out_of_reach_is_said(tmp_path, monkeypatch):
    def download(repo_id, allow_patterns):
        raise RuntimeError("no route to host")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(FileNotFoundError, match="cannot be downloaded from the hub: no route"):
        find_folder("microsoft/phi")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="pip install huggingface_hub"):
        find_folder("microsoft/phi")
