"""Full disks and folders that may not be written: one clear error, nothing half there, and the same
command again once there is room.

The disk is a small file system in memory where this machine allows one to be mounted. Elsewhere it
is the kernel's limit on the size of a file, for a process of its own.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from model_folders import write_hf_folder
from refusals import tree

from convert.to_orbax import to_orbax
from convert.verify import verify

ROOT = Path(__file__).parent.parent.parent
SIZES = dict(vocab_size=2000, hidden_size=192, intermediate_size=900, num_hidden_layers=8)
SMALL = 3_000_000  # of the 11 MB that a model takes

COMMANDS = {
    "to-orbax": "from convert.cli import main; sys.argv[1:] = ['to-orbax', source, target]",
    "to-hf": "from convert.cli import main; sys.argv[1:] = ['to-hf', source, target]",
    "save_pretrained": "main = lambda: phi3.save_pretrained(target, *load())",
    "save_checkpoint": "main = lambda: phi3.save_checkpoint(target, *load())",
}


class Disk:
    """A folder with little room.

    Attributes:
      mounted: whether it is a file system of its own.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        self.mounted = self._mount("-t", "tmpfs", "-o", f"size={SMALL}", "phi3-test", str(folder))
        self._limit: int | None = None if self.mounted else SMALL // 10

    def _mount(self, *arguments: str) -> bool:
        with contextlib.suppress(OSError):
            return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0
        return False

    def grow(self) -> None:
        """Makes room."""
        self._limit = None
        if self.mounted:
            assert self._mount("-o", "remount,size=100m", str(self.folder))

    def close_for_writing(self) -> None:
        if self.mounted:
            assert self._mount("-o", "remount,ro", str(self.folder))
        else:
            self.folder.chmod(0o500)

    def remove(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)

    def run(self, command: str, source: Path, target: Path) -> subprocess.CompletedProcess[str]:
        """A command in a process of its own, whose writing ends where the disk does."""
        limit = (
            ""
            if self._limit is None
            else f"resource.setrlimit(resource.RLIMIT_FSIZE, ({self._limit}, {self._limit})); "
        )
        script = (
            f"import resource, sys; {limit}"
            f"import phi3_jax as phi3; source, target = {str(source)!r}, {str(target)!r}; "
            f"load = lambda: phi3.from_pretrained(source, dtype=None); {COMMANDS[command]}; main()"
        )
        return subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk")
    print("a file system of", SMALL, "bytes" if made.mounted else "bytes by the limit of a file")
    yield made
    made.remove()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    parent = tmp_path_factory.mktemp("models")
    write_hf_folder(parent / "hf", max_shard_bytes=4_000_000, **SIZES)
    to_orbax(parent / "hf", parent / "orbax")
    return parent


def check_refusal(command: str, done: subprocess.CompletedProcess[str], words: str) -> None:
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    # Functions end with an error of Python's.
    assert last.startswith("error: ") if command.startswith("to-") else "Error" in last
    assert words in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk(disk, models, command):
    source = models / ("orbax" if command == "to-hf" else "hf")
    (disk.folder / "thesis.txt").write_text("kept")
    before = tree(disk.folder)
    target = disk.folder / "target"
    done = disk.run(command, source, target)
    check_refusal(command, done, "No space left" if disk.mounted else "File too large")
    assert tree(disk.folder) == before
    disk.grow()
    done = disk.run(command, source, target)
    assert done.returncode == 0, done.stderr
    assert verify(source, target).differences == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_may_not_be_written(disk, models, command):
    if not disk.mounted and os.getuid() == 0:
        pytest.skip("root may write everywhere, and nothing can be mounted here")
    source = models / ("orbax" if command == "to-hf" else "hf")
    disk.close_for_writing()
    done = disk.run(command, source, disk.folder / "target")
    check_refusal(command, done, "Read-only" if disk.mounted else "Permission denied")
    assert tree(disk.folder) == {}
