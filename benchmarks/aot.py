"""What the compilers say of our programs, beside MaxText's: a table, and no accelerator.

    python benchmarks/aot.py                                 # all rows whose compilers are here
    python benchmarks/aot.py --rows train --maxtext-python mtenv/bin/python

TPU rows need libtpu, the GPU row jax's CUDA plugin and cuDNN (plan/machines.py has the commands).
MaxText compiles in an environment of its own, Python 3.12: `uv pip install 'maxtext[tpu]==0.2.5'
--resolution=lowest`. Its program is read as ours are. A full-size training step takes a minute or
more to compile. Nothing is run: every figure is a count of a compiled program, or its memory.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout

import phi3_jax as phi3
from phi3_jax.attention import Visible, attend
from phi3_jax.attention_kernels import choose_implementation
from plan import hlo
from plan.machines import ENVIRONMENT, machine
from plan.programs import DecodeJob, TrainJob, parse_mesh
from train.config import load_config
from train.metrics import layer_weights

GIB = 2**30
PRESET = "phi-3-mini-4k-instruct"
# Below it are norms' gradients and scalars. Over fsdp alone no activation is ever summed, so what
# is larger and summed whole is the gradient of a matrix.
LARGE = 2**20

# The same step by MaxText: its own train_compile, which is made to leave its program behind.
MAXTEXT_SETTINGS = {
    "compile_topology": "v5e-8",
    "compile_topology_num_slices": 1,
    "decoder_block": "llama2",
    "base_emb_dim": 3072,
    "base_num_query_heads": 32,
    "base_num_kv_heads": 32,
    "base_mlp_dim": 8192,
    "base_num_decoder_layers": 32,
    "head_dim": 96,
    "vocab_size": 32064,
    "per_device_batch_size": 1,
    "max_target_length": 4096,
    "remat_policy": "full",
}
MAXTEXT_SCRIPT = """
import json, sys
from importlib.metadata import version
from pathlib import Path

import maxtext
from absl import app
from maxtext.trainers.pre_train import train_compile

folder, settings = Path(sys.argv[1]), sys.argv[2:]
compile_step = train_compile.jit_and_compile


def compile_and_keep(*arguments, **named):
    compiled = compile_step(*arguments, **named)
    (folder / "program.txt").write_text(compiled.as_text())
    peak = compiled.memory_analysis().peak_memory_in_bytes
    versions = {name: version(name) for name in ("maxtext", "jax", "libtpu")}
    (folder / "figures.json").write_text(json.dumps({"peak": peak, "versions": versions}))
    return compiled


train_compile.jit_and_compile = compile_and_keep
base = Path(maxtext.__path__[0]) / "configs" / "base.yml"
app.run(train_compile.main, ["train_compile", str(base), *settings])
"""


@dataclass(frozen=True)
class Row:
    """A line of the table: what is counted, what it should be, and what it is."""

    figure: str
    goal: str
    ours: str
    maxtext: str = ""


@dataclass(frozen=True)
class Step:
    """Figures of a training step.

    Attributes:
      peak: bytes a device.
      whole_sums: all-reduces of at least LARGE that are run in a step.
      sent: bytes that a device sends in a layer, forward and backward.
      waiting: collectives of at least LARGE during which nothing else can run, of all such.
    """

    peak: int
    whole_sums: int
    sent: float
    waiting: str


def read_step(peak: int, text: str, layers: int) -> Step:
    """The figures of a compiled training step. Layers are its loops; what is sent elsewhere, for
    the two tables of the vocabulary, is not in `sent`.
    """
    collectives = hlo.read(text).collectives
    large = [one for one in collectives if one.nbytes >= LARGE]
    waiting = sum(one.times for one in large if not one.asynchronous)
    return Step(
        peak=peak,
        whole_sums=sum(one.times for one in large if one.kind == "all-reduce"),
        sent=sum(one.sent * one.times for one in collectives if one.depth) / layers,
        waiting=f"{waiting} of {sum(one.times for one in large)}",
    )


def floor(shape: phi3.Phi3Config, devices: int) -> float:
    """Bytes that a device has to send in a layer: its bfloat16 weights are gathered for the forward
    pass and again for the backward pass, and their gradients summed and cut.
    """
    return 3 * 2 * layer_weights(shape) * (devices - 1) / devices


def compile_for(job: Any, topology: str) -> tuple[Any, Any]:
    """The job's program (plan.programs.Program), and what its compiler makes of it."""
    program = job.lower(machine(topology).devices)
    return program, program.lowered.compile()


def our_step(page: str, topology: str, shape: phi3.Phi3Config) -> Step:
    """One row a device, all computed again in the backward pass."""
    changes = ["batch_size=8", "accumulate=1", "model.remat=full"]
    _, compiled = compile_for(TrainJob(page, load_config(page, changes), shape), topology)
    peak = compiled.memory_analysis().peak_memory_in_bytes
    return read_step(peak, compiled.as_text(), shape.num_hidden_layers)


def maxtext_step(python: str, shape: phi3.Phi3Config) -> tuple[Step, dict[str, str]]:
    """The same step by MaxText, and the versions that made it.

    Raises:
      RuntimeError: where it fails, with the end of what it said.
    """
    settings = MAXTEXT_SETTINGS | {"base_num_decoder_layers": shape.num_hidden_layers}
    environment = {**os.environ, **ENVIRONMENT, "JAX_PLATFORMS": "cpu", "DECOUPLE_GCLOUD": "TRUE"}
    environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as folder:
        arguments = [f"{name}={value}" for name, value in settings.items()]
        done = subprocess.run(
            [python, "-c", MAXTEXT_SCRIPT, folder, *arguments],
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{python} did not compile MaxText's step: {done.stderr[-2000:]}")
        figures = json.loads((Path(folder) / "figures.json").read_text())
        text = (Path(folder) / "program.txt").read_text()
    return read_step(figures["peak"], text, shape.num_hidden_layers), figures["versions"]


def train_rows(shape: phi3.Phi3Config, python: str | None) -> Iterable[Row]:
    steps, least = [our_step("sft_mini_4k_v5e8", "v5e:2x4", shape)], floor(shape, 8)
    versions = {}
    if python is not None:
        step, versions = maxtext_step(python, shape)
        steps.append(step)
    made_by = ", ".join(f"{name} {number}" for name, number in versions.items())

    def row(figure: str, goal: str, cell: Callable[[Step], str]) -> Row:
        return Row(figure, goal, *map(cell, steps))

    yield Row("train step, v5e-8, FSDP, a row of 4096 a device, full remat", "", "", made_by)
    yield row("- peak, GiB", "<= 9.0", lambda step: f"{step.peak / GIB:.2f}")
    yield row("- all-reduces of weight gradients", "0", lambda step: str(step.whole_sums))
    yield row(
        f"- sent a layer, times the floor of {least / 2**20:.0f} MiB",
        "<= 1.1",
        lambda step: f"{step.sent / least:.2f}",
    )
    yield row("- large collectives that nothing overlaps", "", lambda step: step.waiting)


def decode_rows(shape: phi3.Phi3Config, _: str | None) -> Iterable[Row]:
    program, compiled = compile_for(
        DecodeJob(PRESET, shape, 32, 4096, parse_mesh("tensor=-1")), "v5e:2x4"
    )
    held = program.arguments["params"] + program.arguments["cache"]
    above = compiled.memory_analysis().peak_memory_in_bytes - held
    counts = hlo.read(compiled.as_text())
    of_layers = [one for one in counts.collectives if one.depth]
    layers = shape.num_hidden_layers
    kinds = sorted({one.kind for one in of_layers})
    found = ", ".join(
        f"{sum(one.times for one in of_layers if one.kind == kind) / layers:g} {kind}"
        for kind in kinds
    )
    largest = max((one.nbytes for one in of_layers), default=0) / 2**10
    goal = 2 * 32 * shape.hidden_size / 2**10
    yield Row("decode step, v5e-8, TP=8, 32 rows, cache of 4096", "", "")
    yield Row(
        f"- peak above weights and cache ({held / GIB:.2f}), GiB", "<= 0.15", f"{above / GIB:.2f}"
    )
    yield Row(
        f"- memory traffic, times the floor of {held / 1e9:.2f} GB (weights and cache once)",
        "<= 1.25",
        f"{counts.hbm_bytes / held:.2f}",
    )
    yield Row("- collectives a layer", "2 all-reduce", found)
    yield Row("- the largest of them, KiB", f"{goal:g}, [B, D]", f"{largest:g}")


def attention_rows(shape: phi3.Phi3Config, _: str | None) -> Iterable[Row]:
    tokens, heads, width = 4096, shape.num_attention_heads, shape.head_dim
    device = machine("v5e:1x1").devices[0]
    chosen = choose_implementation("auto", device, jnp.bfloat16, width, tokens)
    visible = Visible(None, (), None, chosen)

    def forward_and_backward(q, k, v, d_out):
        attention = lambda q, k, v: attend(q, [k], [v], visible)[0]  # noqa: E731
        out, backward = jax.vjp(attention, q, k, v)
        return out, *backward(d_out)

    q, k = (
        jax.ShapeDtypeStruct((1, tokens, heads, *groups, width), jnp.bfloat16)
        for groups in ((1,), ())
    )
    # In a model the products before and after leave and take them as the kernels want them.
    best = Format(Layout.AUTO, jax.sharding.SingleDeviceSharding(device))
    run = jax.jit(forward_and_backward, in_shardings=best, out_shardings=best)
    memory: Any = run.lower(q, k, k, q).compile().memory_analysis()
    yield Row(
        f"attention forward and backward, v5e, {tokens} tokens, {heads} heads of {width}: "
        "temporaries, GiB",
        "<= 0.03",
        f"{memory.temp_size_in_bytes / GIB:.3f}",
    )


def h100_rows(shape: phi3.Phi3Config, _: str | None) -> Iterable[Row]:
    step, least = our_step("sft_mini_4k_h100x8", "h100:8", shape), floor(shape, 8)
    yield Row("train step, 8 x H100, FSDP, a row of 4096 a device, full remat", "", "")
    yield Row("- peak, GiB", "<= 10.0", f"{step.peak / GIB:.2f}")
    yield Row("- all-reduces of weight gradients", "0", str(step.whole_sums))
    yield Row("- sent a layer, times the floor", "<= 1.1", f"{step.sent / least:.2f}")
    yield Row("- large collectives that nothing overlaps", "0", step.waiting)


ROWS = {
    "train": train_rows,
    "decode": decode_rows,
    "attention": attention_rows,
    "h100": h100_rows,
}


def versions_here() -> str:
    """The packages that these programs depend on, those that are installed."""
    found = []
    for name in ("phi3-jax", "jax", "libtpu", "jax-cuda12-plugin"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(ROWS), help="which, separated by commas")
    parser.add_argument("--maxtext-python", default=None, help="of an environment with MaxText")
    parser.add_argument("--layers", type=int, default=None, help="of the model; by default all")
    arguments = parser.parse_args()
    names = arguments.rows.split(",")
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"--rows {','.join(unknown)}: known are {', '.join(ROWS)}")
    with_cuda = "h100" in names and importlib.util.find_spec("jax_cuda12_plugin") is not None
    # Or jax would look for devices that are here.
    jax.config.update("jax_platforms", "cpu,cuda" if with_cuda else "cpu")
    shape = phi3.Phi3Config.preset(PRESET)
    if arguments.layers is not None:
        shape = dataclasses.replace(shape, num_hidden_layers=arguments.layers)
    print(f"{PRESET}, bfloat16, by the compilers on {datetime.now(UTC):%Y-%m-%d}; nothing was run.")
    print(f"Ours: {versions_here()}.\n")
    print("| figure | goal | ours | MaxText |\n|---|---|---|---|", flush=True)
    for name in names:
        try:
            for row in ROWS[name](shape, arguments.maxtext_python):
                print(f"| {' | '.join(dataclasses.astuple(row))} |", flush=True)
        except RuntimeError as error:
            print(f"| {name}: not compiled, {' '.join(str(error).split())} | | | |", flush=True)


if __name__ == "__main__":
    main()
