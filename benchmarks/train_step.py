"""How long a training step of a config takes on the devices that are here, and its memory.

    python benchmarks/train_step.py lora_mini_4k_colab --preset phi-3-mini-4k-instruct --steps 10

Rows are full and random, weights are random: nothing is loaded. Changes of the config follow as
for phi3-train. For devices that are elsewhere there is phi3-plan.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

import phi3_jax as phi3
from phi3_jax.sharding import init_params
from plan.programs import abstract_frozen, make_mesh
from train.config import load_config
from train.lora import init_adapters
from train.metrics import flops_per_token, memory_in_use, peak_flops
from train.quantize import quantize_params
from train.state import Setup, split
from train.step import (
    BATCH_NAMES,
    lower_step,
    model_tables,
    place_batch,
    rows_held,
    step_function,
)


def measure(setup: Setup, program: Any, steps: int) -> None:
    """Takes steps on random rows and prints how long they took."""
    params = init_params(setup.model)
    config = setup.config
    if config.lora is None:
        trained, frozen = split(params, set(flatten_dict(setup.frozen)))
    else:
        trained, frozen = init_adapters(setup.model, config.lora), params
    del params
    state: Any = setup.start(trained)
    frozen = jax.tree.map(lambda leaf, to: leaf.astype(to.dtype), frozen, setup.frozen)
    if config.lora is not None and config.lora.quantize is not None:
        frozen = quantize_params(frozen, config.lora.quantize, setup.model)
    rows = rows_held(setup)
    shape = (config.accumulate, len(rows), setup.tokens_per_row)
    rng = np.random.default_rng(0)
    ids = rng.integers(3, setup.model.config.vocab_size, shape, dtype=np.int32)
    arrays = dict(zip(BATCH_NAMES, (ids, ids, np.ones(shape, np.int32)), strict=True))
    batch, rope = place_batch(setup, arrays, rows), model_tables(setup)
    seconds = []
    if config.lora is not None and config.lora.quantize == "nf4":
        program = step_function(setup)  # as train.loop
    for _ in range(steps + 2):
        begin = time.perf_counter()
        state, metrics = program(state, frozen, batch, rope)
        loss = float(metrics["loss"])
        seconds.append(time.perf_counter() - begin)
    middle = statistics.median(seconds[2:])
    tokens = config.batch_size * setup.tokens_per_row / middle
    line = f"{middle:.3f} s a step (median of {steps}), {tokens:,.0f} tokens/s, loss {loss:.3f}"
    peak = peak_flops(jax.devices()[0])
    if peak is not None:
        flops = flops_per_token(setup.model.config, setup.tokens_per_row, config.lora)
        line += f", MFU {tokens * flops / (peak * setup.mesh.size):.1%}"
    print(f"{line}, memory {memory_in_use():.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--preset", default=None, help="sizes of a published model")
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        changes = list(arguments.overrides)
        if arguments.preset is not None:
            phi3.Phi3Config.preset(arguments.preset).save_pretrained(Path(folder))
            changes.append(f"model.path={folder}")
        config = load_config(arguments.config, changes)
        devices = jax.devices()
        mesh = make_mesh(config.mesh, devices)
        setup = Setup(config, mesh, config.steps or 1000)
        begin = time.perf_counter()
        program = lower_step(setup, abstract_frozen(setup)).compile()
        analysis = program.memory_analysis()
        print(
            f"{arguments.config} on {len(devices)} x {devices[0].device_kind}, mesh "
            f"{dict(mesh.shape)}: compiled in {time.perf_counter() - begin:.0f} s, peak "
            f"{analysis.peak_memory_in_bytes / 2**30:.2f} GiB a device "
            f"(arguments {analysis.argument_size_in_bytes / 2**30:.2f})",
            flush=True,
        )
        measure(setup, program, arguments.steps)


if __name__ == "__main__":
    main()
