"""Whole runs for the tests of train/: a model with a tokenizer, documents, what a run left."""

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from reference import BASE
from training import write_model

import phi3_jax as phi3
import train.loop
from train.cli import main
from train.config import TrainConfig, from_dict
from train.metrics import METRICS_FILE, read_metrics
from train.run_folder import CHECKPOINTS
from train.state import EMBEDDED_MODEL

SKILL = resources.files("configs") / "tiny_skill"
# What two runs of the same steps need not share.
SPEED = ("tokens_per_second", "memory_gib", "mfu")


def write_chat_model(folder: Path, **changes: Any) -> dict[str, np.ndarray]:
    """Writes a small random model with the tokenizer of the embedded one."""
    values = {**BASE, "vocab_size": 1024, "num_hidden_layers": 2}
    values |= {"pad_token_id": 1016, "eos_token_id": 1016}
    weights = write_model(folder, values | changes)
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(EMBEDDED_MODEL / name, folder / name)
    return weights


def write_documents(folder: Path, train: int = 40, valid: int = 7, skip: int = 0) -> None:
    """Writes train.jsonl and valid.jsonl of so many conversations each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("valid", valid)):
        if count:
            lines = (SKILL / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
            text = "\n".join(lines[skip : skip + count]) + "\n"
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def small_run(parent: Path, name: str = "run", **changes: Any) -> TrainConfig:
    """A run on parent / "model" and parent / "data", float32; sections may be given as dicts."""
    given: dict[str, Any] = dict(
        folder=str(parent / name),
        data=dict(path=str(parent / "data"), sequence_length=48),
        model=dict(
            path=str(parent / "model"), dtype="float32", frozen_dtype="float32", remat="none"
        ),
        # Constant, so that runs of other lengths are the same program.
        optimizer=dict(learning_rate=1e-3, schedule="constant", weight_decay=0.1),
        checkpoint=dict(every=100),
        evaluation=dict(every=100),
        steps=6,
        batch_size=8,
    )
    for key, value in changes.items():
        given[key] = given[key] | value if isinstance(given.get(key), dict) else value
    return from_dict(given)


def use_devices(monkeypatch: pytest.MonkeyPatch, count: int = 1) -> None:
    """Gives runs the first devices only."""
    few = functools.partial(phi3.make_mesh, devices=jax.devices()[:count])
    monkeypatch.setattr(phi3, "make_mesh", few)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Lets runs be told to stop after a step."""
    stops = contextlib.nullcontext(lambda done: done == step)
    monkeypatch.setattr("train.loop.preemption", lambda: stops)


def recorded(folder: str | Path) -> list[dict[str, Any]]:
    """The metrics of a run, but for speed and memory."""
    return [
        {name: value for name, value in line.items() if name not in SPEED}
        for line in read_metrics(Path(folder) / METRICS_FILE)
    ]


def losses(folder: str | Path) -> list[float]:
    """Of each step."""
    return [line["loss"] for line in recorded(folder) if line["kind"] == "train"]


def leaves_of(tree: Any) -> dict[str, np.ndarray]:
    """Every leaf, by its path."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def assert_equal_bits(some: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> None:
    """That two sets of leaves are one."""
    assert some.keys() == others.keys()
    for path, leaf in some.items():
        assert leaf.dtype == others[path].dtype and leaf.shape == others[path].shape, path
        assert leaf.tobytes() == others[path].tobytes(), path


def saved_steps(folder: str | Path) -> list[int]:
    """The steps that the run has whole checkpoints of, by the names of their folders."""
    names = [path.name for path in (Path(folder) / CHECKPOINTS).iterdir()]
    assert all(name.isdigit() for name in names), names
    return sorted(map(int, names))


def write_page(config: TrainConfig) -> Path:
    """Writes a config as a page that phi3-train reads, beside the folder of its run."""
    page = Path(f"{config.folder}.py")
    page.write_text(
        "from train.config import from_dict\n\n\n"
        f"def get_config():\n    return from_dict({config.to_dict()!r})\n"
    )
    return page


def record_batches(monkeypatch: pytest.MonkeyPatch) -> list[dict[int, str]]:
    """Of each step or evaluation that follows: the digest of each row that this process makes."""
    batches = []
    real = train.loop.place_batch

    def place_batch(setup, arrays, rows):
        digests = {}
        for part, place in np.ndindex(arrays["labels"].shape[:2]):
            row = b"".join(arrays[name][part, place].tobytes() for name in sorted(arrays))
            number = part * (setup.config.batch_size // setup.config.accumulate) + rows[place]
            digests[int(number)] = hashlib.sha1(row).hexdigest()
        batches.append(digests)
        return real(setup, arrays, rows)

    monkeypatch.setattr(train.loop, "place_batch", place_batch)
    return batches


def command_in_child(arguments: Sequence[str], log: str, devices: int) -> None:
    """What a process forked for one command does; its output goes into a file."""
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    jax.config.update("jax_num_cpu_devices", devices)
    sys.argv = ["phi3-train", *arguments]
    main()


def train_in_child(
    config: TrainConfig, log: str, devices: int, watch: str | None, environ: dict[str, str]
) -> None:
    """What a process forked for one run does: the command line, its output going into a file.

    With `watch`, the batches and the files of the run that Python opens to write go into that file.
    """
    os.environ.update(environ)
    arguments = (f"{config.folder}.py",), log, devices
    if watch is None:
        command_in_child(*arguments)
    opened = set()

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and str(arguments[0]).startswith(config.folder):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR):
                opened.add(str(arguments[0]))

    sys.addaudithook(hook)
    batches = record_batches(pytest.MonkeyPatch())
    try:
        command_in_child(*arguments)
    finally:
        Path(watch).write_text(json.dumps({"batches": batches, "opened": sorted(opened)}))


class Forks:
    """Runs in processes of their own, forked from one that has imported everything.

    No JAX backend is started there, so that each child starts its own, as a fresh process would.
    """

    def __init__(self, log: Path, devices: int):
        self.log, self._devices = log, devices
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["conftest", "train_runs"])

    def start(self, config: TrainConfig, watch: Path | None = None, **environ: str) -> Any:
        """A process that begins with a run, or goes on with one."""
        write_page(config)
        arguments = (config, str(self.log), self._devices, watch and str(watch), environ)
        return self._fork(train_in_child, arguments)

    def command(self, *arguments: str) -> Any:
        """A process of `phi3-train` with these arguments."""
        return self._fork(command_in_child, (arguments, str(self.log), self._devices))

    def _fork(self, target: Callable[..., None], arguments: tuple[Any, ...]) -> Any:
        process = self._context.Process(target=target, args=arguments)
        with pytest.MonkeyPatch.context() as patch:
            # The server, which starts with the first of them, finds modules only there.
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            process.start()
        return process

    def start_together(self, config: TrainConfig, count: int) -> tuple[list[Any], list[Path]]:
        """Processes that are one run, and the files of what was watched."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        processes = []
        watched = [Path(f"{config.folder}-{number}.json") for number in range(count)]
        for number, watch in enumerate(watched):
            launched = {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(number),
            }
            processes.append(self.start(config, watch, **launched))
        return processes, watched
