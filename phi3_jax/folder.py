"""What a model folder is, where it comes from, and how a new one appears whole or not at all."""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Literal

from phi3_jax.config import CONFIG_FILE
from phi3_jax.safetensors_files import INDEX_FILE, SINGLE_FILE

PARAMS_FOLDER = "params"
# What Orbax tells a checkpoint by.
CHECKPOINT_FILE = "_CHECKPOINT_METADATA"
# What PEFT tells a folder with an adapter by.
ADAPTER_CONFIG_FILE = "adapter_config.json"

# What travels with the weights, unchanged, whichever format they are in.
SIDE_FILES = (
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_HUB_PATTERNS = [*SIDE_FILES, "model*.safetensors", INDEX_FILE, f"{PARAMS_FOLDER}/*"]
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")

_PARTIAL = ".partial-"
_REPLACED = ".replaced-"
_LOCK = ".lock"


def find_folder(name: str | Path) -> Path:
    """A model folder by its path, or by its id on the Hugging Face hub, which downloads it.

    Raises:
      FileNotFoundError: where there is no such folder and none can be downloaded.
      ValueError: for a file, for a folder with an adapter alone, and for what an interrupted run
        left behind.
    """
    if name == "":  # a variable of the shell that was not set; as a path it is the folder here
        raise ValueError("the name of the model folder is empty; give a path or a hub id")
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_finished(folder)
        if (folder / ADAPTER_CONFIG_FILE).is_file() and not (folder / CONFIG_FILE).is_file():
            raise ValueError(
                f"{str(name)!r} holds an adapter, expected a model folder; without --adapter "
                "`phi3-train export` writes the model with the adapter in it"
            )
        return folder
    if folder.exists():
        raise ValueError(f"{str(name)!r} is a file, expected a model folder")
    if not isinstance(name, str) or not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(
            f"there is no folder {str(name)!r}; give one that is there, or a hub id, OWNER/NAME"
        )
    return _download(name)


def check_finished(folder: Path) -> None:
    """Refuses a folder of `staged_folder` that an interrupted run left behind.

    Raises:
      ValueError: then.
    """
    if re.match(rf"\..*{_PARTIAL}", folder.resolve().name):
        raise ValueError(
            f"{str(folder)!r} was left unfinished by an interrupted run; run that again"
        )


def _download(hub_id: str) -> Path:
    trouble = f"there is no folder {hub_id!r} here, and it cannot be downloaded from the hub"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(f"{trouble}: `pip install huggingface_hub` first") from None
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_PATTERNS))
    except Exception as error:  # the hub's errors have no base class but this
        raise FileNotFoundError(f"{trouble}: {error}") from error


def folder_kind(folder: Path) -> Literal["hf", "orbax"]:
    """Which of the two formats a model folder holds.

    Raises:
      ValueError: where it holds none, or both.
    """
    kinds: list[Literal["hf", "orbax"]] = []
    if (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file():
        kinds.append("hf")
    if (folder / PARAMS_FOLDER).is_dir():
        kinds.append("orbax")
    if len(kinds) == 1:
        return kinds[0]
    looked_for = f"{SINGLE_FILE}, {INDEX_FILE} or an Orbax checkpoint in {PARAMS_FOLDER}/"
    if kinds:
        raise ValueError(f"{str(folder)!r} holds two models at once ({looked_for}); separate them")
    raise ValueError(f"{str(folder)!r} is not a model folder, which needs one of {looked_for}")


def copy_side_files(source: Path, target: Path) -> None:
    """Copies config, generation config and the tokenizer's files, byte for byte."""
    for pattern in SIDE_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def check_apart(source: Path, target: str | Path) -> None:
    """Refuses a target that is the source, or holds it, or would be a second model in it.

    Raises:
      ValueError: then.
    """
    inside, outside = source.resolve(), Path(target).expanduser().resolve()
    if outside in (inside, *inside.parents):
        raise ValueError(
            f"the target {str(target)!r} holds the source {str(source)!r}; choose another target"
        )
    if outside == inside / PARAMS_FOLDER:
        raise ValueError(
            f"the target {str(target)!r} would make the source {str(source)!r} a converted folder "
            "too, which nothing loads then; choose another name"
        )


@contextlib.contextmanager
def staged_folder(target: str | Path, force: bool = False) -> Generator[Path]:
    """A new folder to write into, which becomes `target` when the context ends without an error.

    Until then it is a hidden sibling that no loader accepts. Siblings that killed runs left are
    removed first. With force an existing model or adapter folder is replaced, and is there until
    the new one is whole.

    Raises:
      FileExistsError: where the target exists, without force.
      ValueError: where the target exists and is no such folder, or holds other folders, with force.
    """
    target = Path(target).expanduser().resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(target)
    check_replaceable(target, force)
    stage, lock = _new_stage(target)
    with lock:
        try:
            yield stage
            flush(stage)
            check_replaceable(target, force)
            replaced = target.with_name(f".{target.name}{_REPLACED}{secrets.token_hex(4)}")
            if target.exists():
                target.rename(replaced)
            stage.rename(target)
            # Only now: without its lock the finished stage would be anyone's to clear.
            (target / _LOCK).unlink()
            shutil.rmtree(replaced, ignore_errors=True)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            _clear_leftovers(target)
            raise


def check_replaceable(target: str | Path, force: bool) -> None:
    """Refuses what `staged_folder` will not replace.

    Raises:
      FileExistsError, ValueError: as `staged_folder`.
    """
    target = Path(target).expanduser().resolve()
    if not target.exists():
        return
    if not force:
        raise FileExistsError(f"{str(target)!r} exists; replace it with force (--force)")
    # A slip of the hand must not cost a home folder, nor one whose params/ are something else.
    params = target / PARAMS_FOLDER
    is_checkpoint = (params / CHECKPOINT_FILE).is_file()
    files = (SINGLE_FILE, INDEX_FILE, ADAPTER_CONFIG_FILE)
    if not is_checkpoint and not any((target / name).is_file() for name in files):
        raise ValueError(
            f"{str(target)!r} exists and is not a model folder, so it is not replaced; "
            "remove it, or choose another name"
        )
    folders = {path for path in target.iterdir() if path.is_dir()}
    if others := sorted(path.name for path in folders - ({params} if is_checkpoint else set())):
        raise ValueError(
            f"{str(target)!r} holds a model and other folders ({', '.join(others)}), so it is not "
            "replaced; remove it, or choose another name"
        )


def flush(folder: Path) -> None:
    """Waits until all is on the disk; a rename that gets there first would show a half folder."""
    for place, _, files in os.walk(folder):
        for name in (*files, "."):
            handle = os.open(os.path.join(place, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _new_stage(target: Path):
    """A new stage and its open lock file, locked."""
    while True:
        stage = target.with_name(f".{target.name}{_PARTIAL}{secrets.token_hex(4)}")
        stage.mkdir()
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            lock = open(stage / _LOCK, "w")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another run may have cleared the stage while it had no lock yet.
            os.stat(stage / _LOCK)
            return stage, lock


def _clear_leftovers(target: Path) -> None:
    """Removes the stages of runs that are gone, and puts back what one was about to replace."""
    for stage in _siblings(target, _PARTIAL):
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            with open(stage / _LOCK, "a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(stage)
    for replaced in _siblings(target, _REPLACED):
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(target)


def _siblings(target: Path, mark: str) -> list[Path]:
    prefix = f".{target.name}{mark}"
    return [path for path in target.parent.iterdir() if path.name.startswith(prefix)]
