"""A killed export leaves no folder that loads, and the same command again succeeds."""

import random
import time
from pathlib import Path

import pytest
from train_runs import Forks, small_run, use_devices, write_chat_model, write_documents

import phi3_jax as phi3
from phi3_jax.folder import find_folder
from train.export import export
from train.loop import train
from train.peft_format import load_adapter

# The run that is exported, and whether as an adapter alone.
KINDS = {"model": ("full", False), "merged": ("lora", False), "adapter": ("lora", True)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs whose exports are some megabytes, so that writing takes a while."""
    parent = tmp_path_factory.mktemp("runs")
    write_chat_model(parent / "model", hidden_size=192, intermediate_size=900, num_hidden_layers=3)
    write_documents(parent / "data", valid=0)
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch)
        train(small_run(parent, "full", steps=1))
        train(small_run(parent, "lora", steps=1, lora=dict(rank=64)))
    return parent


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stages(target: Path) -> list[Path]:
    return list(target.parent.glob(f".{target.name}.partial-*"))


class Exports:
    """Exports of one kind, each in a process of its own, into one folder."""

    def __init__(self, runs: Path, parent: Path, kind: str):
        run, self.is_adapter = KINDS[kind]
        self.run, self.parent = runs / run, parent
        self.model = phi3.from_pretrained(runs / "model")[0]
        self.forks = Forks(runs / "log", devices=1)

    def start(self, target: Path):
        """A process that has begun to write."""
        options = ["--adapter"] if self.is_adapter else []
        process = self.forks.command("export", str(self.run), str(target), *options)
        while not stages(target) and process.is_alive():
            time.sleep(0.001)
        return process

    def writing_time(self, target: Path) -> float:
        process = self.start(target)
        begun = time.perf_counter()
        while not target.exists() and process.is_alive():
            time.sleep(0.001)
        taken = time.perf_counter() - begun
        process.join()
        assert process.exitcode == 0, self.forks.log.read_text()[-3000:]
        return taken

    def load(self, folder: Path) -> None:
        if self.is_adapter:
            load_adapter(folder, self.model)
        else:
            phi3.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_moments(runs, tmp_path, kind, pytestconfig):
    exports = Exports(runs, tmp_path, kind)
    span = exports.writing_time(tmp_path / "undisturbed")
    exports.load(tmp_path / "undisturbed")
    expected = contents(tmp_path / "undisturbed")
    moments, count = random.Random(kind), 7 if pytestconfig.option.long else 1
    found_half = 0
    for number in range(count):
        target = tmp_path / f"target-{number}"
        process = exports.start(target)
        # The first at once, then one moment in each of equal parts of the time that writing takes.
        if number:
            time.sleep(span * (number - moments.random()) / (count - 1))
        process.kill()
        process.join()
        for stage in stages(target):
            found_half += 1
            with pytest.raises(ValueError, match="interrupted"):
                exports.load(stage)
        if target.exists():
            # It was faster, so it has to be right; its lock goes after it has its name.
            assert {**contents(target), ".lock": b""} == {**expected, ".lock": b""}
        else:
            with pytest.raises(FileNotFoundError):
                find_folder(target)
        export(exports.run, target, exports.is_adapter, force=target.exists())
        assert contents(target) == expected
        hidden = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
        assert hidden == []
    print(f"{kind}: {count} kills, {found_half} while it was writing for {span:.3f} s")
    assert found_half, "no kill came while it was writing"
