"""`phi3-plan`: whether a job fits a machine, and what limits it, by the compilers alone."""

import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phi3_jax.interrupts import ctrl_c_ends_imports

if TYPE_CHECKING:
    from plan.figures import Figures
    from plan.machines import Machine
    from plan.programs import Job

DOES_NOT_FIT_STATUS = 3

_HELP = """Compile a training step, a prefill or a decoding step for a machine that is not here:
memory, traffic, and what binds.

Needs no accelerator and no weights. Status: 0 it fits, 3 not, 1 a failure, 2 a wrong argument."""

app = typer.Typer(
    help=_HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
sweep_app = typer.Typer(
    help="Rows a device and meshes against memory and time: a table, and a picture.",
    no_args_is_help=True,
)
app.add_typer(sweep_app, name="sweep")

Config = Annotated[str, typer.Argument(help="A page of configs/, or the path of a .py file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes of it: section.name=value each; train/config.py has all names."),
]
Model = Annotated[str, typer.Argument(help="A preset, a model folder, or a config.json.")]
Topology = Annotated[
    str, typer.Option(help="The machine: v5e:2x4, v5p:4x4x4, h100:8, h100:2x8, ...")
]
NumSlices = Annotated[int, typer.Option(help="How many slices of that topology, TPUs only.")]
Preset = Annotated[
    str | None,
    typer.Option(help="Sizes of the model: a preset, folder or config.json, not the page's own."),
]
Compare = Annotated[
    list[str] | None,
    typer.Option(metavar="MESH", help="A mesh to compare, as fsdp=4,tensor=2; may be repeated."),
]
Meshes = Annotated[
    list[str] | None,
    typer.Option("--mesh", metavar="MESH", help="A mesh, as fsdp=4,tensor=2; may be repeated."),
]
Mesh = Annotated[str, typer.Option(metavar="MESH", help="As fsdp=4,tensor=2; -1: what is left.")]
Batch = Annotated[int, typer.Option(help="Rows, over all devices.", min=1)]
Cache = Annotated[int, typer.Option(help="Tokens of a row that the cache has room for.", min=1)]
Quantized = Annotated[bool, typer.Option("--quantized-cache", help="Keys and values in 8 bits.")]
Ring = Annotated[
    bool, typer.Option("--ring-cache", help="Only as many slots as the model's window is wide.")
]
Rows = Annotated[str, typer.Option(help="Rows a device, separated by commas.")]
Output = Annotated[
    Path | None, typer.Option(metavar="FILE.png", help="A picture of the table (extra `plan`).")
]
Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write all figures here; - for stdout.")
]


@app.command("train")
def _train(
    config: Config,
    topology: Topology,
    overrides: Overrides = None,
    num_slices: NumSlices = 1,
    preset: Preset = None,
    compare: Compare = None,
    json_file: Json = None,
) -> None:
    """The optimizer step of a config page, as it is run: batch, parts, optimizer, adapters."""
    machine = _machine(topology, num_slices)
    _plan(_train_job(config, overrides, preset), machine, compare, json_file)


@app.command("decode")
def _decode(
    model: Model,
    batch: Batch,
    cache: Cache,
    topology: Topology,
    num_slices: NumSlices = 1,
    mesh: Mesh = "tensor=-1",
    quantized_cache: Quantized = False,
    ring_cache: Ring = False,
    compare: Compare = None,
    json_file: Json = None,
) -> None:
    """One token of every row, greedily, over a full cache; weights and activations bfloat16."""
    machine = _machine(topology, num_slices)
    job = _decode_job(model, batch, cache, mesh, quantized_cache, ring_cache)
    _plan(job, machine, compare, json_file)


@app.command("prefill")
def _prefill(
    model: Model,
    batch: Batch,
    tokens: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)],
    topology: Topology,
    cache: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a row that the cache has room for; by default the prompt's.", min=1
        ),
    ] = None,
    num_slices: NumSlices = 1,
    mesh: Mesh = "tensor=-1",
    quantized_cache: Quantized = False,
    ring_cache: Ring = False,
    compare: Compare = None,
    json_file: Json = None,
) -> None:
    """Prompts into an empty cache, up to the logits of their last tokens; bfloat16."""
    machine = _machine(topology, num_slices)
    from plan.programs import PrefillJob, model_config, parse_mesh

    kind = _cache_kind(quantized_cache, ring_cache)
    job = PrefillJob(
        _name(model),
        model_config(model),
        batch,
        tokens,
        tokens if cache is None else cache,
        parse_mesh(mesh),
        kind,
    )
    _plan(job, machine, compare, json_file)


@sweep_app.command("train")
def _sweep_train(
    config: Config,
    topology: Topology,
    overrides: Overrides = None,
    num_slices: NumSlices = 1,
    preset: Preset = None,
    rows: Rows = "1,2,4",
    mesh: Meshes = None,
    output: Output = None,
    json_file: Json = None,
) -> None:
    """Of a config page, whose batch_size becomes rows x devices x accumulate."""
    machine = _machine(topology, num_slices)
    _sweep(_train_job(config, overrides, preset), machine, mesh, rows, output, json_file)


@sweep_app.command("decode")
def _sweep_decode(
    model: Model,
    cache: Cache,
    topology: Topology,
    num_slices: NumSlices = 1,
    rows: Rows = "1,8,32",
    mesh: Meshes = None,
    quantized_cache: Quantized = False,
    ring_cache: Ring = False,
    output: Output = None,
    json_file: Json = None,
) -> None:
    """Of a decoding step."""
    machine = _machine(topology, num_slices)
    job = _decode_job(model, 1, cache, "tensor=-1", quantized_cache, ring_cache)
    _sweep(job, machine, mesh, rows, output, json_file)


def _machine(topology: str, num_slices: int) -> "Machine":
    """The machine; before JAX is started, which would look for devices that are here."""
    is_gpu = topology.startswith(("h100", "a100"))
    os.environ.setdefault("JAX_PLATFORMS", "cpu,cuda" if is_gpu else "cpu")
    from plan import machines

    return machines.machine(topology, num_slices)


def _train_job(config: str, overrides: Sequence[str] | None, preset: str | None) -> "Job":
    from plan.programs import TrainJob, model_config
    from train.config import load_config
    from train.state import EMBEDDED_MODEL

    page = load_config(config, overrides or ())
    source = preset or page.model.path
    try:
        shape = model_config(str(EMBEDDED_MODEL) if source is None else source)
    except ValueError as error:
        raise ValueError(f"{error}; --preset names the sizes to take") from None
    return TrainJob(_name(config), page, shape)


def _decode_job(
    model: str, batch: int, cache: int, mesh: str, quantized: bool, ring: bool
) -> "Job":
    from plan.programs import DecodeJob, model_config, parse_mesh

    kind = _cache_kind(quantized, ring)
    return DecodeJob(_name(model), model_config(model), batch, cache, parse_mesh(mesh), kind)


def _cache_kind(quantized: bool, ring: bool) -> Any:
    if quantized and ring:
        raise ValueError("--quantized-cache and --ring-cache do not go together: take one of them")
    return "quantized" if quantized else "sliding_window" if ring else "full"


def _name(source: str) -> str:
    path = Path(source)
    return (
        path.parent.name if path.name == "config.json" else path.stem if path.suffix else path.name
    )


def _plan(
    job: "Job", machine: "Machine", compare: Sequence[str] | None, json_file: str | None
) -> None:
    from plan import report
    from plan.advice import advise
    from plan.figures import compile_job
    from plan.programs import parse_mesh

    console, tried = _console(json_file), []
    if compare:
        jobs = [job.with_mesh(parse_mesh(text)) for text in compare]
        found = []
        for one in jobs:
            _say(f"compiling {one.settings}, on {one.mesh}")
            found.append(compile_job(one, machine))
        report.compare(console, found)
    else:
        found = [compile_job(job, machine)]
        report.show(console, found[0])
        if not found[0].fits:
            tried = advise(job, found[0], machine, _say)
            report.show_advice(console, tried)
    _write(json_file, found, [{"change": t.change, "figures": t.figures.to_dict()} for t in tried])
    _leave(found)


def _sweep(
    job: Any,
    machine: "Machine",
    meshes: Sequence[str] | None,
    rows: str,
    output: Path | None,
    json_file: str | None,
) -> None:
    from plan.programs import parse_mesh
    from plan.sweep import check_drawing, draw, show_sweep, sweep

    if output is not None:
        check_drawing()
    if not all(part.strip().isdecimal() for part in rows.split(",")):
        raise ValueError(f"--rows is {rows!r}; write numbers with commas, as 1,2,4")
    chosen = [parse_mesh(text) for text in meshes or ()] or [job.mesh]
    points = sweep(job, machine, chosen, [int(part) for part in rows.split(",")], _say)
    show_sweep(_console(json_file), points)
    if output is not None:
        draw(points, output)
        _say(f"wrote {output}")
    found = [point.figures for point in points]
    _write(json_file, found, [])
    _leave(found)


def _console(json_file: str | None) -> Any:
    from rich.console import Console

    stream = sys.stderr if json_file == "-" else sys.stdout
    width = None if stream.isatty() else 100
    return Console(file=stream, highlight=False, width=width)


def _write(json_file: str | None, found: "Sequence[Figures]", advice: list[Any]) -> None:
    if json_file is None:
        return
    values = {"figures": [one.to_dict() for one in found], "advice": advice}
    text = json.dumps(values, indent=1)
    if json_file == "-":
        print(text)
    else:
        Path(json_file).write_text(text + "\n", encoding="utf-8")


def _leave(found: "Sequence[Figures]") -> None:
    """Ends with status 3 where nothing fits."""
    if not any(one.fits for one in found):
        raise typer.Exit(DOES_NOT_FIT_STATUS)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Runs the command line; what the user can mend is one line on stderr, with status 2 where an
    argument or a setting is wrong, and 1 where something is missing.
    """
    try:
        with ctrl_c_ends_imports():
            app()
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        lacks = isinstance(error, ModuleNotFoundError) and error.name == "optax"
        if not (_is_ours(error) or lacks or isinstance(error, OSError)):
            raise
        hint = "; pip install 'phi3-jax[plan]'" if lacks else ""
        _say(f"error: {error}{hint}")
        sys.exit(2 if isinstance(error, ValueError) else 1)


def _is_ours(error: Exception) -> bool:
    """Whether this project raised it, in words for users; others need their traceback."""
    last = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    root = Path(__file__).parent.parent
    return any(
        last.is_relative_to(root / name) for name in ("phi3_jax", "train", "configs", "plan")
    )


if __name__ == "__main__":
    main()
