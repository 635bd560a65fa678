"""A killed conversion leaves no folder that loads, and the next one succeeds."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from model_folders import write_hf_folder

from convert.to_hf import to_hf
from convert.to_orbax import to_orbax
from convert.verify import verify
from phi3_jax.checkpoint import from_pretrained
from phi3_jax.folder import find_folder

ROOT = Path(__file__).parent.parent.parent
JOBS = {"to_orbax": to_orbax, "to_hf": to_hf}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The source of each job: some megabytes, so that writing takes a while."""
    parent = tmp_path_factory.mktemp("sources")
    sizes = dict(vocab_size=2000, hidden_size=192, intermediate_size=900, num_hidden_layers=8)
    write_hf_folder(parent / "hf", max_shard_bytes=4_000_000, **sizes)
    to_orbax(parent / "hf", parent / "orbax")
    return {"to_orbax": parent / "hf", "to_hf": parent / "orbax"}


def start(job: str, source: Path, target: Path) -> subprocess.Popen:
    script = f"from convert.{job} import {job}; {job}({str(source)!r}, {str(target)!r})"
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)


def stages(target: Path) -> list[Path]:
    return list(target.parent.glob(f".{target.name}.partial-*"))


def wait_for_stage(process: subprocess.Popen, target: Path) -> None:
    while not stages(target) and process.poll() is None:
        time.sleep(0.002)


def writing_time(job: str, source: Path, target: Path) -> float:
    process = start(job, source, target)
    wait_for_stage(process, target)
    begun = time.perf_counter()
    while not target.exists() and process.poll() is None:
        time.sleep(0.002)
    taken = time.perf_counter() - begun
    assert process.wait() == 0
    assert verify(source, target).differences == []
    return taken


def kill_at_random_moments(job: str, source: Path, parent: Path, count: int) -> None:
    span = writing_time(job, source, parent / "measured")
    moments = random.Random(job)
    found_half = 0
    for number in range(count):
        target = parent / f"target-{number}"
        process = start(job, source, target)
        wait_for_stage(process, target)
        # The first at once, then one moment in each of equal parts of the time that writing takes.
        if number:
            time.sleep(span * (number - moments.random()) / (count - 1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for stage in stages(target):
            found_half += 1
            with pytest.raises(ValueError, match="interrupted"):
                from_pretrained(stage)
        if target.exists():
            # It was faster, so it has to be right.
            assert verify(source, target).differences == []
        else:
            with pytest.raises(FileNotFoundError):
                find_folder(target)
        JOBS[job](source, target, force=target.exists())
        assert verify(source, target).differences == []
        hidden = [path.name for path in parent.iterdir() if path.name.startswith(".")]
        assert hidden == []
    assert found_half, "no kill came while it was writing"


@pytest.mark.parametrize("job", JOBS)
def test_killed_at_random_moments(sources, tmp_path, job, pytestconfig):
    kill_at_random_moments(job, sources[job], tmp_path, 30 if pytestconfig.option.long else 4)


@pytest.mark.parametrize("job", JOBS)
def test_killed_while_replacing_the_old_one_stays(sources, tmp_path, job):
    target = tmp_path / "target"
    write_hf_folder(target)
    before = sorted(path.name for path in target.iterdir())
    script = f"from convert.{job} import {job}; {job}({str(sources[job])!r}, {str(target)!r}, True)"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    wait_for_stage(process, target)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert sorted(path.name for path in target.iterdir()) == before
    from_pretrained(target)
