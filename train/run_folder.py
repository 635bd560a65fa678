"""The folder of a run: whose it is, and whether a run may go on in it."""

import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from phi3_jax.json_files import read_json_object
from phi3_jax.processes import by_all
from train.config import LoraConfig, OptimizerConfig, TrainConfig
from train.metrics import METRICS_FILE

CHECKPOINTS = "checkpoints"
CONFIG_FILE = "config.json"
_LOCK = ".lock"

# What a run may not change when it goes on; model, data and weights are compared besides.
_FIXED = ("optimizer", "lora", "batch_size", "seed")
_SECTIONS = {"optimizer": OptimizerConfig(), "lora": LoraConfig()}


@contextlib.contextmanager
def own_folder(folder: Path) -> Generator[None]:
    """Makes the folder of a run, for all of its processes, and keeps a second run out of it.

    Raises:
      ValueError: where another run is writing into it, it has the config.json of a model or the
        metrics of another program, its file system has no locks, or the processes do not all see
        the same folder.
    """
    with contextlib.ExitStack() as stack:
        mark = np.frombuffer(secrets.token_bytes(8), np.uint8)
        with by_all():
            if jax.process_index() == 0:
                stack.enter_context(_locked(folder, mark.tobytes().hex()))
        if jax.process_count() > 1:
            mark = multihost_utils.broadcast_one_to_all(mark)
        with by_all():
            path = folder / _LOCK
            found = path.read_text(encoding="utf-8") if path.is_file() else None
            if found != mark.tobytes().hex():
                raise ValueError(
                    f"process {jax.process_index()} does not see the folder {str(folder)!r} of "
                    "process 0; choose one on a file system that all hosts share (folder=...)"
                )
        yield


@contextlib.contextmanager
def _locked(folder: Path, mark: str) -> Generator[None]:
    _check_own(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK, "a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run is writing into {str(folder)!r}; wait for its end, or choose another "
                "folder (folder=...)"
            ) from None
        except OSError as error:
            raise ValueError(
                f"the file system of {str(folder)!r} has no locks ({error}); mount it with them "
                "(Lustre: -o flock), or choose another folder (folder=...)"
            ) from None
        lock.truncate(0)
        lock.write(mark)
        lock.flush()
        os.fsync(lock.fileno())
        yield


def _check_own(folder: Path) -> None:
    """Refuses a folder with files of something else, such as a model, that a run would overwrite.

    A run writes its config before the first line of its metrics, so that one which ended before its
    first checkpoint is known by it.
    """
    config, metrics = folder / CONFIG_FILE, folder / METRICS_FILE
    try:
        is_run = config.is_file() and {"folder", "data"} <= read_json_object(config).keys()
    except ValueError:
        is_run = False
    if config.is_file() and not is_run:
        raise ValueError(
            f"{str(config)!r} is not the config of a run, and would be overwritten; choose another "
            "folder (folder=...)"
        )
    if metrics.is_file() and metrics.stat().st_size and not is_run:
        raise ValueError(
            f"{str(metrics)!r} has no {CONFIG_FILE} of a run beside it, and would be overwritten; "
            "choose another folder (folder=...), or move that file away"
        )


def write_config(folder: Path, config: TrainConfig) -> None:
    """Writes the config of a run, for export and evaluation; the first process does."""
    with by_all():
        if jax.process_index() == 0:
            part = folder / f"{CONFIG_FILE}.partial"
            part.write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
            os.replace(part, folder / CONFIG_FILE)


def check_same_run(saved: dict[str, Any], run: dict[str, Any], folder: Path) -> None:
    """Refuses to go on with other settings, data or weights than the run began with.

    Settings that the version which began it did not have were as they are by default.

    Args:
      saved: values of a checkpoint: config, model (its config), data (a fingerprint) and frozen
        (that of the weights that are not trained).
      run: those of the run that is to go on.
      folder: of the run.

    Raises:
      ValueError: with all that differs, or with the settings that this version does not have; for
        checkpoints of another program.
    """
    run = json.loads(json.dumps(run))
    if missing := [name for name in run if name not in saved]:
        raise ValueError(
            f"the checkpoints in {str(folder)!r} are another program's: they do not say their "
            f"{', '.join(missing)}; choose another folder (folder=...)"
        )
    changed, unknown = [], []
    for name in _FIXED:
        was, value = saved["config"][name], run["config"][name]
        then, now = {name: was}, {name: value}
        if isinstance(was, dict) and isinstance(value, dict):
            default = json.loads(json.dumps(dataclasses.asdict(_SECTIONS[name])))
            then = {f"{name}.{key}": part for key, part in (default | was).items()}
            now = {f"{name}.{key}": part for key, part in value.items()}
        changed += [f"{key} was {then[key]}, is {now[key]}" for key in now if then[key] != now[key]]
        unknown += [key for key in then if key not in now]
    if unknown:
        raise ValueError(
            f"{str(folder)!r} holds a run of another version, with {', '.join(unknown)} in its "
            "config, which this version does not know; go on with the version that began it, or "
            "choose another folder (folder=...)"
        )
    changed += [
        f"the model's {name} was {value}, is {run['model'].get(name)}"
        for name, value in saved["model"].items()
        if run["model"].get(name) != value
    ]
    if saved["data"] != run["data"]:
        changed.append("the data (its documents, their order or their tokens) is another one")
    if saved["frozen"] != run["frozen"]:
        changed.append("the weights of the model that are not trained are others")
    if changed:
        raise ValueError(
            f"{str(folder)!r} holds another run: {'; '.join(changed)}; set that back to go on with "
            "it, or choose another folder (folder=...)"
        )
