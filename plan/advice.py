"""What to change where a job does not fit: changes are compiled, one on top of the other, until one
does. The first are those that cost least.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from plan.figures import CompilerError, Figures, compile_job
from plan.machines import Machine
from plan.programs import DecodeJob, Job, PrefillJob, TrainJob
from train.config import MeshConfig

MOST_TRIES = 6

# What is kept of a layer, from most to least.
_REMAT = ("none", "dots", "attention", "full")


@dataclass(frozen=True)
class Tried:
    """A change, as it is typed, and what came of it."""

    change: str
    figures: Figures


def advise(job: Job, figures: Figures, machine: Machine, say: Callable[[str], None]) -> list[Tried]:
    """What was tried for a job that does not fit; the last one fits, or none of them does.

    Args:
      job: what does not fit. figures: its own.
      machine: for which.
      say: told of each change before it is compiled, which takes up to minutes.
    """
    tried: list[Tried] = []
    for change, changed in changes(job, figures.mesh):
        if len(tried) == MOST_TRIES:
            break
        say(f"it does not fit; trying {change} ({len(tried) + 1} of at most {MOST_TRIES})")
        try:
            found = compile_job(changed, machine)
        except (ValueError, CompilerError) as error:  # of other sizes than the machine's, say
            say(f"  left out: {error}")
            continue
        tried.append(Tried(change, found))
        if found.fits:
            break
    return tried


def changes(job: Job, mesh: dict[str, int]) -> Iterator[tuple[str, Job]]:
    """Changes that make a job smaller, with the words to type for each.

    mesh: the job's, with all its sizes known.
    """
    sizes = MeshConfig(**mesh)
    if isinstance(job, TrainJob):
        yield from _of_training(job, sizes)
    else:
        yield from _of_generation(job, sizes)


def _of_training(job: TrainJob, mesh: MeshConfig) -> Iterator[tuple[str, Job]]:
    """First less is kept of each layer, then a part of the batch is smaller, then the mesh cuts
    more.
    """
    config, words = job.config, {}

    def change(**typed: Any) -> tuple[str, Job]:
        words.update({name.replace("__", "."): value for name, value in typed.items()})
        text = " ".join(f"{name}={value}" for name, value in words.items())
        return text, dataclasses.replace(job, config=config)

    if config.model.remat in _REMAT:
        stronger = _REMAT[_REMAT.index(config.model.remat) + 1 :]
        for remat in dict.fromkeys((*stronger[:1], *stronger[-1:])):
            model = dataclasses.replace(config.model, remat=remat)
            config = dataclasses.replace(config, model=model)
            yield change(model__remat=remat)
    parts = _parts(config.batch_size, mesh.data * mesh.fsdp)
    more = [count for count in parts if count > config.accumulate]
    for count in dict.fromkeys((*more[:1], *more[-1:])):
        config = dataclasses.replace(config, accumulate=count)
        yield change(accumulate=count)
    typed = {axis for axis, size in dataclasses.asdict(config.mesh).items() if size != 1}
    for other in _meshes(mesh):
        # A mesh of fewer shares of the batch has more rows on each.
        count = max(_parts(config.batch_size, other.data * other.fsdp), default=config.accumulate)
        config = dataclasses.replace(config, mesh=other, accumulate=count)
        sizes = dataclasses.asdict(other)
        typed |= {axis for axis, size in sizes.items() if size != 1}
        named = {f"mesh__{axis}": size for axis, size in sizes.items() if axis in typed}
        yield change(accumulate=count, **named)


def _parts(batch: int, over: int) -> list[int]:
    """Numbers of equal parts of a batch that divide over so many devices."""
    rows = batch // over if batch % over == 0 else 0
    return [count for count in range(1, rows + 1) if rows % count == 0]


def _of_generation(job: DecodeJob | PrefillJob, mesh: MeshConfig) -> Iterator[tuple[str, Job]]:
    """First another cache, then fewer rows, then the mesh cuts heads and not rows."""
    window, option = job.shape.sliding_window, ""
    if job.cache == "full" and window is not None and window < job.capacity:
        yield "--ring-cache", dataclasses.replace(job, cache="sliding_window")
    if job.cache != "quantized":
        option = "--quantized-cache "
        job = dataclasses.replace(job, cache="quantized")
        yield option.strip(), job
    for batch in (job.batch // 2, job.batch // 4):
        if batch:
            yield f"{option}--batch {batch}", dataclasses.replace(job, batch=batch)
    for smaller in _meshes(mesh):
        sizes = dataclasses.asdict(smaller).items()
        text = ",".join(f"{axis}={size}" for axis, size in sizes if size > 1)
        yield f"{option}--mesh {text}", job.with_mesh(smaller)


def _meshes(mesh: MeshConfig) -> Iterator[MeshConfig]:
    """First no whole copies of the model, then heads and mlp cut in twice as many parts."""
    if mesh.data > 1:
        mesh = dataclasses.replace(mesh, data=1, fsdp=mesh.data * mesh.fsdp)
        yield mesh
    while mesh.fsdp % 2 == 0:
        mesh = dataclasses.replace(mesh, fsdp=mesh.fsdp // 2, tensor=2 * mesh.tensor)
        yield mesh
