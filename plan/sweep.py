"""Rows a device and meshes against memory and time: many jobs in one table and one picture."""

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from plan.figures import Figures, compile_job
from plan.machines import Machine
from plan.programs import DecodeJob, TrainJob, make_mesh
from plan.report import bar, gib, mesh_text, new_table, quantity, seconds
from train.config import MeshConfig

_GIB = 2**30


@dataclass(frozen=True)
class Point:
    """A job of a sweep. rows: of the batch, or of a part of it, on each device."""

    rows: int
    figures: Figures


def sweep(
    job: TrainJob | DecodeJob,
    machine: Machine,
    meshes: Sequence[MeshConfig],
    rows: Sequence[int],
    say: Callable[[str], None],
) -> list[Point]:
    """Figures of a job on each mesh with more and more rows, up to the first that do not fit.

    Args:
      job: whose mesh and batch are replaced; the parts of a training batch stay as many.
      machine: for which.
      meshes, rows: what to try; rows a device.
      say: told of each job before it is compiled.

    Raises:
      ValueError, CompilerError: as `compile_job`; for rows below 1.
    """
    if not rows or min(rows) < 1:
        raise ValueError(f"--rows is {', '.join(map(str, rows))}; give numbers from 1 on")
    points = []
    for mesh in meshes:
        sizes = dict(make_mesh(mesh, machine.devices).shape)
        for count in sorted(set(rows)):
            say(f"compiling {mesh_text(sizes)} with {count} rows a device")
            batch = count * sizes["data"] * sizes["fsdp"]
            found = compile_job(_with_batch(job.with_mesh(mesh), batch), machine)
            points.append(Point(count, found))
            if not found.fits:
                break
    return points


def _with_batch(job: TrainJob | DecodeJob, rows: int) -> TrainJob | DecodeJob:
    if isinstance(job, DecodeJob):
        return dataclasses.replace(job, batch=rows)
    batch = rows * job.config.accumulate
    return dataclasses.replace(job, config=dataclasses.replace(job.config, batch_size=batch))


def show_sweep(console: Console, points: Sequence[Point]) -> None:
    """A line for each point, memory and time as bars."""
    first = points[0].figures
    console.print(
        f"[bold]{first.job}[/] on {first.machine} ({first.devices} x {first.chip.name}), a device "
        f"each; the memory bar is {gib(first.limit_bytes)} GiB\n"
    )
    longest = max((point.figures.seconds or 0 for point in points), default=0)
    lines = new_table("mesh", "rows", "HBM", "GiB", "time", "", "tokens/s", "MFU")
    last = None
    for point in points:
        found = point.figures
        mesh = mesh_text(found.mesh)
        lines.add_row(
            "" if mesh == last else mesh,
            f"{point.rows}",
            bar(found.peak_bytes, found.limit_bytes, 20),
            gib(found.peak_bytes),
            *_time(found, longest),
        )
        last = mesh
    console.print(lines, "")
    console.print("Times and what follows are estimates; nothing was run.")


def _time(found: Figures, longest: float) -> list[Any]:
    if not found.fits or found.mfu is None:
        return ["[red]does not fit[/]", "-", "-", "-"]
    return [
        bar(found.seconds, longest, 12),
        seconds(found.seconds),
        quantity(found.tokens_per_s_device, ""),
        f"{found.mfu:.1%}",
    ]


def check_drawing() -> None:
    """Says before the compiling what `draw` would lack after it.

    Raises:
      RuntimeError: where matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError("a picture needs matplotlib: pip install 'phi3-jax[plan]'")


def draw(points: Sequence[Point], path: Path) -> None:
    """Writes a picture: memory, time and tokens a second over rows a device, a line a mesh."""
    from matplotlib.figure import Figure

    first = points[0].figures
    figure = Figure(figsize=(13, 4), layout="constrained")
    memory, time, speed = axes = figure.subplots(1, 3)
    limit = first.limit_bytes / _GIB
    memory.axhline(limit, linestyle="--", color="red", label=f"limit, {limit:.2f} GiB")
    for mesh in dict.fromkeys(mesh_text(point.figures.mesh) for point in points):
        own = [point for point in points if mesh_text(point.figures.mesh) == mesh]
        known = [point for point in own if point.figures.peak_bytes is not None]
        peaks = [(point.figures.peak_bytes or 0) / _GIB for point in known]
        (line,) = memory.plot([point.rows for point in known], peaks, marker="o", label=mesh)
        over = [(p.rows, peak) for p, peak in zip(known, peaks, strict=True) if not p.figures.fits]
        memory.plot([x for x, _ in over], [y for _, y in over], "x", color="red", markersize=11)
        fitting = [point for point in own if point.figures.fits]
        rows, style = [point.rows for point in fitting], {"marker": "o", "color": line.get_color()}
        time.plot(rows, [point.figures.seconds for point in fitting], **style)
        speed.plot(rows, [point.figures.tokens_per_s_device for point in fitting], **style)
    memory.set_ylabel("peak HBM a device, GiB")
    time.set_ylabel(f"seconds a {'token' if first.kind == 'decode' else 'step'}, estimated")
    speed.set_ylabel("tokens/s a device, estimated")
    ticks = sorted({point.rows for point in points})
    for panel in axes:
        panel.set_xlabel("rows a device")
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, ticks)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    memory.legend(fontsize="small")
    figure.suptitle(f"{first.job}, {first.machine}: by the compiler, nothing was run", fontsize=11)
    figure.savefig(path, dpi=150)
