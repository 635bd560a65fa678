"""What a job costs on a machine: compiled for it, and read off the compiled program."""

import contextlib
import dataclasses
import importlib.metadata
import os
import re
import tempfile
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from plan import hlo
from plan.estimate import Estimate, estimate
from plan.flops import kernel_flops
from plan.machines import Chip, Machine
from plan.programs import Job, Program

# The TPU compiler's words, those of libtpu 0.0.52 and of older ones.
_OUT_OF_MEMORY = (
    re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"),
    re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_PACKAGES = ("phi3-jax", "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")


class CompilerError(RuntimeError):
    """The compiler failed, and not for want of memory; in its own first line."""


@dataclass(frozen=True)
class Traffic:
    """The collectives of one kind, over one network.

    Attributes:
      kind: "all-gather", ...
      network: "ici" (within a slice or host), "dcn" (between slices).
      times: how many are run.
      asynchronous_times: those of them that other work can run beside.
      nbytes: of the whole arrays, all times together.
      sent: bytes that each device sends, all times together.
    """

    kind: str
    network: str
    times: int
    asynchronous_times: int
    nbytes: int
    sent: int


@dataclass(frozen=True)
class Figures:
    """What one run of a program costs; by its compiler, nothing is timed.

    Attributes:
      job, kind, settings: what was planned.
      machine, chip, devices: for what, and of how many devices.
      mesh: sizes of its axes, by name.
      fits: whether the program can be run there.
      peak_bytes: a device needs at most; where it does not fit, what the compiler says that it
        would need, None where it does not say.
      limit_bytes: a program can have.
      memory: the peak in parts, bytes a device: "params", "optimizer", "cache", "batch", "padding"
        (of these in the device's layouts), and "temporaries", all that is left: activations among
        it. The last is missing where the peak is.
      tokens: of one run, all devices together.
      model_flops: that the model asks for, all devices together.
      compile_s: seconds that the compiler took here.
      versions: of what computed this, by package.

    None where the program does not compile:
      flops: operations on a device, kernels with them. kernel_flops: those of kernels, analytic.
      hbm_bytes: read and written on a device.
      collectives: by kind.
      estimate: the floors, and the compiler's estimate.
      seconds: of one run, estimated: the largest of these.
      tokens_per_s, tokens_per_s_device: that follow.
      mfu: model FLOPs utilisation that follows: model_flops over what all devices could do.

    uncounted: kernels whose operations are in no count, and loops that are counted once because
      their number of turns depends on data.
    """

    job: str
    kind: str
    settings: str
    machine: str
    chip: Chip
    devices: int
    mesh: dict[str, int]
    fits: bool
    peak_bytes: int | None
    limit_bytes: int
    memory: dict[str, int]
    tokens: int
    model_flops: float
    compile_s: float
    versions: dict[str, str]
    flops: float | None = None
    kernel_flops: float | None = None
    hbm_bytes: float | None = None
    collectives: tuple[Traffic, ...] | None = None
    estimate: Estimate | None = None
    seconds: float | None = None
    tokens_per_s: float | None = None
    tokens_per_s_device: float | None = None
    mfu: float | None = None
    uncounted: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of plain JSON values."""
        return dataclasses.asdict(self)


def compile_job(job: Job, machine: Machine) -> Figures:
    """The figures of a job on a machine. That it does not fit is a result, and no error.

    Raises:
      ValueError: for settings that do not go with the model or the machine.
      CompilerError: where the compiler fails for another reason.
    """
    program = job.lower(machine.devices)
    begin = time.perf_counter()
    try:
        compiled, counts = _compile(program.lowered, machine)
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" not in message:
            raise CompilerError(
                f"the compiler for {machine.topology} failed: {str(error).strip().splitlines()[0]}"
            ) from error
        compiled, counts = None, None
        needed, limit = out_of_memory(message)
    else:
        # A GPU program is compiled whether it fits or not.
        needed, limit = compiled.memory_analysis().peak_memory_in_bytes, None
    limit = machine.chip.hbm_bytes if limit is None else limit
    fits = compiled is not None and needed is not None and needed <= limit
    found = Figures(
        job=f"{job.kind} {job.name}",
        kind=job.kind,
        settings=job.settings,
        machine=machine.topology + (f" x {machine.num_slices}" if machine.num_slices > 1 else ""),
        chip=machine.chip,
        devices=len(machine.devices),
        mesh=program.mesh,
        fits=fits,
        peak_bytes=needed,
        limit_bytes=limit,
        memory=_memory(program, compiled, needed),
        tokens=program.tokens,
        model_flops=program.model_flops,
        compile_s=time.perf_counter() - begin,
        versions=_versions(),
    )
    return found if counts is None else _with_costs(found, program, counts, machine)


def _compile(lowered: Any, machine: Machine) -> tuple[Any, hlo.Counts]:
    """The compiled program and what it costs."""
    if machine.devices[0].platform != "tpu":
        compiled = lowered.compile()
        return compiled, hlo.read(compiled.as_text())
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        try:
            with _silence():
                return compiled, hlo.read(compiled.as_text())
        except jax.errors.JaxRuntimeError:
            # jaxlib reads a program before it writes it, and does not always know what newer chips
            # have (jaxlib 0.10.2 and programs of libtpu 0.0.52 for v5p and v6e). What libtpu wrote
            # itself lacks its estimates of time.
            texts = Path(folder).glob("*.after_optimizations.txt")
            text = max(texts, key=lambda path: path.stat().st_size).read_text()
            return compiled, dataclasses.replace(hlo.read(text), cycles=None)


@contextlib.contextmanager
def _silence() -> Generator[None]:
    """Without what the C++ of jaxlib writes to stderr beside the error that it raises."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def out_of_memory(text: str) -> tuple[int | None, int | None]:
    """Bytes that are needed and bytes that there are, of a compiler's error; None where it does
    not say.
    """
    for pattern in _OUT_OF_MEMORY:
        if match := pattern.search(text):
            needed, unit, limit, other = match.groups()
            return int(float(needed) * _UNITS[unit]), int(float(limit) * _UNITS[other])
    return None, None


def _memory(program: Program, compiled: Any, peak: int | None) -> dict[str, int]:
    memory = dict(program.arguments)
    known = sum(memory.values())
    if compiled is not None:
        memory["padding"] = max(compiled.memory_analysis().argument_size_in_bytes - known, 0)
    if peak is not None:
        memory["temporaries"] = max(peak - sum(memory.values()), 0)
    return memory


def _with_costs(found: Figures, program: Program, counts: hlo.Counts, machine: Machine) -> Figures:
    kernels, unknown = kernel_flops(counts.kernels, program.attention_flops)
    floors = estimate(counts, machine.chip, kernels)
    seconds = max(
        floors.compute_s, floors.memory_s, floors.interconnect_s, floors.compiler_s or 0.0
    )
    rate = program.tokens / seconds
    return dataclasses.replace(
        found,
        flops=counts.flops + kernels,
        kernel_flops=kernels,
        hbm_bytes=counts.hbm_bytes,
        collectives=_traffic(counts.collectives),
        estimate=floors,
        seconds=seconds,
        tokens_per_s=rate,
        tokens_per_s_device=rate / found.devices,
        mfu=program.model_flops / (seconds * machine.chip.flops * found.devices),
        uncounted=(*unknown, *counts.unbounded),
    )


def _traffic(collectives: list[hlo.Collective]) -> tuple[Traffic, ...]:
    groups: dict[tuple[str, str], list[hlo.Collective]] = {}
    for one in collectives:
        groups.setdefault((one.kind, one.network), []).append(one)
    return tuple(
        Traffic(
            kind=kind,
            network=network,
            times=sum(one.times for one in group),
            asynchronous_times=sum(one.times for one in group if one.asynchronous),
            nbytes=sum(one.times * one.nbytes for one in group),
            sent=sum(one.times * one.sent for one in group),
        )
        for (kind, network), group in sorted(groups.items())
    )


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
