"""Figures for people: tables of a terminal, readable at 100 columns."""

import math
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from plan.advice import Tried
from plan.figures import Figures

_PARTS = {
    "params": "parameters",
    "optimizer": "optimizer state",
    "cache": "cache",
    "batch": "batch and tables",
    "padding": "padding of these",
    "temporaries": "activations and temporaries",
}


def gib(nbytes: float | None) -> str:
    """Bytes in GiB, or "?" for none."""
    return "?" if nbytes is None else f"{nbytes / 2**30:,.2f}"


def seconds(value: float | None) -> str:
    """A time with its unit, or "-" for none."""
    if value is None:
        return "-"
    scale, unit = (1, "s") if value >= 1 else (1e3, "ms") if value >= 1e-3 else (1e6, "us")
    return f"{_digits(value * scale)} {unit}"


def quantity(value: float | None, unit: str) -> str:
    """A number with a decimal prefix, or "-" for none."""
    if value is None:
        return "-"
    power = min(int(math.log10(value)) // 3, 5) if value >= 1 else 0
    prefix = ["", "k", "M", "G", "T", "P"][power]
    return f"{_digits(value / 1000**power)} {prefix}{unit}".rstrip()


def mesh_text(mesh: dict[str, int]) -> str:
    """The axes of a mesh that cut something."""
    return " ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "one device"


def bar(nbytes: float | None, limit: float, width: int) -> Text:
    """How full a memory is; red where it is too small."""
    share = math.inf if nbytes is None else nbytes / limit
    full = width if share > 1 else math.ceil(share * width)
    return Text("#" * full + "." * (width - full), style="red" if share > 1 else "green")


def show(console: Console, found: Figures) -> None:
    """All figures of a job."""
    console.print(
        f"[bold]{found.job}[/] on {found.machine} ({found.devices} x {found.chip.name}), "
        f"{mesh_text(found.mesh)}"
    )
    console.print(f"{found.settings}; what follows is of each device\n")
    console.print(_memory_table(found), "")
    if found.estimate is not None:
        _show_costs(console, found)
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    console.print(f"[dim]Compiled in {found.compile_s:.0f} s by {versions}.[/]")


def _show_costs(console: Console, found: Figures) -> None:
    asked = quantity(found.model_flops / found.devices, "FLOP")
    kernels = quantity(found.kernel_flops, "FLOP")
    once = sum(found.memory.get(name, 0) for name in ("params", "cache"))
    console.print(_time_table(found))
    console.print(
        f"The model itself asks for {asked}; attention kernels do {kernels}, by formula."
        + (f" Weights and cache once are {quantity(once, 'B')}." if found.kind == "decode" else "")
        + "\n"
    )
    if found.collectives:
        console.print(_traffic_table(found), "")
    else:
        console.print("No collectives.\n")
    if found.uncounted:
        names = ", ".join(dict.fromkeys(found.uncounted))
        console.print(f"Counted once, or not at all: {names}.\n", markup=False)
    sure = found.estimate is not None and found.estimate.compiler_s is not None
    source = "Estimated from the longest of these times" if sure else "At best, by the floors alone"
    console.print(
        f"{source}, nothing was run: {seconds(found.seconds)} for "
        f"{found.tokens:,} tokens,\n[bold]{quantity(found.tokens_per_s_device, 'tokens/s')} a "
        f"device, {quantity(found.tokens_per_s, 'tokens/s')} in all, model FLOPs utilisation "
        f"{found.mfu:.1%}[/]."
    )


def compare(console: Console, several: Sequence[Figures]) -> None:
    """Figures of several meshes or settings side by side, a line each."""
    first = several[0]
    console.print(
        f"[bold]{first.job}[/] on {first.machine} ({first.devices} x {first.chip.name}), a device "
        f"each; of {gib(first.limit_bytes)} GiB\n"
    )
    table = new_table(
        "settings and mesh", "peak GiB", "traffic", "sent", "binds", "time", "tokens/s", "MFU"
    )
    for found in several:
        table.add_row(_name(found, several), *_line(found))
    console.print(table, "")
    console.print("Traffic is that of HBM. Times and what follows are estimates; nothing was run.")


def show_advice(console: Console, tried: Sequence[Tried]) -> None:
    """What was tried for a job that does not fit."""
    if not tried:
        console.print("It does not fit, and there is nothing smaller to try.")
        return
    table = new_table("tried", "peak GiB", "time", "tokens/s a device", "")
    for one in tried:
        found = one.figures
        verdict = "[green]fits[/]" if found.fits else "[red]does not fit[/]"
        rate = quantity(found.tokens_per_s_device, "")
        table.add_row(one.change, gib(found.peak_bytes), seconds(found.seconds), rate, verdict)
    console.print("", table, "")
    if tried[-1].figures.fits:
        console.print(f"It fits with [bold]{tried[-1].change}[/].")
    else:
        console.print(f"It does not fit with any of these {len(tried)}; take more devices.")


def _memory_table(found: Figures) -> Table:
    table = new_table("memory", "GiB", "HBM")
    for part, nbytes in found.memory.items():
        if nbytes >= 2**20 or part in ("params", "temporaries"):
            share = bar(min(nbytes, found.limit_bytes), found.limit_bytes, 40)
            table.add_row(_PARTS[part], gib(nbytes), share)
    table.add_section()
    verdict = "[green]fits[/]" if found.fits else "[bold red]DOES NOT FIT[/]"
    table.add_row(
        f"peak, of {gib(found.limit_bytes)}: {verdict}",
        gib(found.peak_bytes),
        bar(found.peak_bytes, found.limit_bytes, 40),
    )
    return table


def _time_table(found: Figures) -> Table:
    chip, floors = found.chip, found.estimate
    assert floors is not None
    sent = sum(traffic.sent for traffic in found.collectives or ())
    rows = {
        "compute": (floors.compute_s, found.flops, chip.flops, "FLOP"),
        "memory": (floors.memory_s, found.hbm_bytes, chip.hbm_bandwidth, "B"),
        "interconnect": (floors.interconnect_s, sent, chip.link_bandwidth, "B"),
    }
    table = new_table("time, at least", "", "of")
    for name, (value, amount, rate, unit) in rows.items():
        binds = name == floors.binds
        table.add_row(
            f"[bold]{name}, which binds[/]" if binds else name,
            f"[bold]{seconds(value)}[/]" if binds else seconds(value),
            f"{quantity(amount, unit)} at {quantity(rate, unit + '/s')}",
        )
    if floors.compiler_s is not None:
        table.add_section()
        table.add_row("compiler's estimate", seconds(floors.compiler_s), "all but collectives")
    return table


def _traffic_table(found: Figures) -> Table:
    table = new_table("collectives", "times", "asynchronous", "arrays", "sent", "over")
    for one in found.collectives or ():
        table.add_row(
            one.kind,
            f"{one.times:,}",
            f"{one.asynchronous_times:,}",
            quantity(one.nbytes, "B"),
            quantity(one.sent, "B"),
            one.network,
        )
    return table


def _line(found: Figures) -> list[str]:
    peak = f"[{'green' if found.fits else 'red'}]{gib(found.peak_bytes)}[/]"
    if found.estimate is None:
        return [peak, "-", "-", "[red]does not fit[/]", "-", "-", "-"]
    sent = sum(traffic.sent for traffic in found.collectives or ())
    return [
        peak,
        quantity(found.hbm_bytes, "B"),
        quantity(sent, "B"),
        found.estimate.binds if found.fits else "[red]does not fit[/]",
        seconds(found.seconds),
        quantity(found.tokens_per_s_device, ""),
        f"{found.mfu:.1%}",
    ]


def _name(found: Figures, several: Sequence[Figures]) -> str:
    """What a line is about: the mesh, and the settings where they differ."""
    alike = len({one.settings for one in several}) == 1
    mesh = mesh_text(found.mesh)
    return mesh if alike else f"{found.settings}, {mesh}"


def new_table(first: str, *others: str) -> Table:
    """An empty table with these columns; numbers are to the right."""
    table = Table(box=box.SIMPLE, pad_edge=False, show_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(
            name, justify="left" if name in ("of", "over", "HBM") else "right", no_wrap=True
        )
    return table


def _digits(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
