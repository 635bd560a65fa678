"""The jobs, and their rounds: each job a process, all jobs of a round before the next one."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from side_by_side.environments import DTYPES, GGUF_TYPES, ROOT, make_quantized, python_of
from side_by_side.worker import MARK, Settings

WORKER = Path(__file__).with_name("worker.py")
# Variables that would change what a job measures.
DROPPED = ("PYTHONPATH", "JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")


@dataclass(frozen=True)
class Job:
    """One process.

    Attributes:
      name: PEER-DTYPE, and -train or -cold.
      peer: whose environment it runs in; "phi3" is this project, in the interpreter of the command.
      settings: for worker.py.
      times: how often it is run in a round; the last one counts.
    """

    name: str
    peer: str
    settings: Settings
    times: int = 1


def all_jobs(folder: Path, sizes: Mapping[str, Any]) -> list[Job]:
    """Every job there is, in the order of the table; `sizes` are fields of Settings, laid over."""

    def job(name: str, peer: str, module: str, times: int = 1, **settings: Any) -> Job:
        return Job(name, peer, Settings(module, **(settings | dict(sizes))), times)

    checkpoints = {short: str(folder / "ckpt" / f"phi3-mid-{short}") for short in DTYPES}
    jobs = []
    int8 = {"int8": ("float32", str(folder / "ckpt" / "phi3-mid-int8"))}
    ours = {short: (DTYPES[short], path) for short, path in checkpoints.items()} | int8
    for short, (dtype, path) in ours.items():
        jobs.append(job(f"phi3-{short}", "phi3", "ours", path=path, dtype=dtype))
    for short, (dtype, path) in ours.items():
        cold = job(f"phi3-{short}-cold", "phi3", "ours", 2, task="cold", path=path, dtype=dtype)
        jobs.append(cold)
    for short, path in checkpoints.items():
        jobs.append(job(f"hf-{short}", "hf", "hf", path=path, dtype=DTYPES[short]))
    for short, path in checkpoints.items():
        compiled: dict[str, Any] = {"path": path, "dtype": DTYPES[short], "compiled": True}
        jobs.append(job(f"hfcompile-{short}", "hf", "hf", **compiled))
    for kind in GGUF_TYPES:
        path = str(folder / "gguf" / f"phi3-mid-{kind}.gguf")
        jobs.append(job(f"llama-{kind}", "llama", "llama", path=path))
    for peer, module in (("keras", "kerashub"), ("easydel", "easydel_peer")):
        for short, path in checkpoints.items():
            jobs.append(job(f"{peer}-{short}", peer, module, path=path, dtype=DTYPES[short]))
    training: dict[str, Any] = {"task": "train", "path": checkpoints["f32"]}
    jobs.append(job("phi3-f32-train", "phi3", "ours_training", **training))
    jobs.append(job("hf-f32-train", "hf", "hf", **training))
    jobs.append(job("hfcompile-f32-train", "hf", "hf", compiled=True, **training))
    jobs.append(job("keras-f32-train", "keras", "kerashub", **training))
    stream = str(folder / "stream")
    jobs.append(job("limits-memory", "phi3", "limits_memory", task="limits", path=stream))
    jobs.append(job("limits-torch", "hf", "limits_torch", task="limits"))
    jobs.append(job("limits-jax", "phi3", "limits_jax", task="limits"))
    return jobs


def python_for(job: Job, folder: Path) -> Path:
    """The interpreter that a job runs in."""
    return Path(sys.executable) if job.peer == "phi3" else python_of(folder, job.peer)


def why_not(jobs: Iterable[Job], folder: Path) -> dict[str, str]:
    """Jobs that cannot be run, and why; makes the int8 model where a job wants it."""
    jobs, reasons = list(jobs), {}
    int8 = [job.name for job in jobs if "int8" in job.name]
    if int8 and (said := make_quantized(folder)) is not None:
        reasons |= dict.fromkeys(int8, said)
    for job in jobs:
        path = Path(job.settings.path)
        if not python_for(job, folder).exists():
            reasons[job.name] = f"no environment: python benchmarks/peers.py setup {job.peer}"
        elif job.settings.task != "limits" and not path.exists() and job.name not in reasons:
            reasons[job.name] = f"no {path}: python benchmarks/peers.py setup {job.peer}"
    return reasons


def order(names: list[str], number: int) -> list[str]:
    """A round's jobs: each round begins elsewhere, and every other one goes backwards, so that no
    job always follows the same one.
    """
    start = number % max(1, len(names))
    turned = names[start:] + names[:start]
    return turned[::-1] if number % 2 else turned


def variables(job: Job, folder: Path) -> dict[str, str]:
    """The environment of a job's process."""
    kept = {name: value for name, value in os.environ.items() if name not in DROPPED}
    kept |= {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "JAX_PLATFORMS": "cpu",
        "KERAS_BACKEND": "jax",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }
    if job.peer == "phi3":
        kept["PYTHONPATH"] = str(ROOT)
    if job.settings.task == "cold":
        kept["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compilation")
        kept["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return kept


def read_through(path: Path) -> None:
    """Brings the files of a model into the page cache, which all peers load from."""
    for file in [path, *path.rglob("*")]:
        if file.is_file():
            with open(file, "rb", buffering=0) as handle:
                while handle.read(1 << 24):
                    pass


def run_job(job: Job, folder: Path, limit_s: float) -> dict[str, Any]:
    """The figures of a job, or {"error": what it said last}."""
    if job.settings.path:
        read_through(Path(job.settings.path))
    command = [str(python_for(job, folder)), str(WORKER), json.dumps(asdict(job.settings))]
    figures: dict[str, Any] = {}
    for _ in range(job.times):
        try:
            done = subprocess.run(
                command,
                env=variables(job, folder),
                capture_output=True,
                text=True,
                timeout=limit_s,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"took longer than {limit_s:.0f} s"}
        marked = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
        if done.returncode or not marked:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            last = said[-1] if said else "nothing"
            return {"error": f"status {done.returncode}: {last}"}
        figures = json.loads(marked[-1].removeprefix(MARK))
    return figures


def run_rounds(
    jobs: list[Job],
    rounds: int,
    run_one: Callable[[Job], dict[str, Any]],
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Runs every job in every round; one that fails is left out of the others' way.

    Args:
      jobs: those that can be run.
      run_one: gives the figures of a job, or its error.
      report: is told each row, {"job", "round", "at", ...figures}, as soon as it is there.
    """
    named = {job.name: job for job in jobs}
    for number in range(rounds):
        for name in order(list(named), number):
            at = datetime.now(UTC).strftime("%H:%M:%S")
            begin = time.perf_counter()
            row = {"job": name, "round": number, "at": at, **run_one(named[name])}
            report({**row, "wall_s": time.perf_counter() - begin})


def machine() -> dict[str, Any]:
    """What this is run on."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
    }
