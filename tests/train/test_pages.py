"""The pages of configs/ and the lines of docs/launch.md fit the devices that they are for."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from train.config import config_names

ROOT = Path(__file__).parent.parent.parent
# Devices that each page says it is for.
HARDWARE = {
    "smoke_cpu": 1,
    "sft_tiny_cpu": 1,
    "lora_mini_4k_colab": 1,
    "sft_mini_4k_v5e8": 8,
    "sft_mini_4k_h100x8": 8,
    "sft_medium_v5p64": 32,
    "sft_mini_128k": 32,
}
# Of the commands in docs/launch.md, in their order: one machine, pod slice, two slices, SLURM,
# JobSet, MPI.
LAUNCHED = [8, 8, 32, 32, 16, 32, 16]
TWO_SLICES = ["sft_mini_128k", "mesh.data=2", "batch_size=8"]

# Builds what a run is made of, without weights, on so many devices of the CPU.
BUILD = """
import json, sys, tempfile
import jax
jax.config.update("jax_num_cpu_devices", 64)
import phi3_jax as phi3
from train.config import load_config
from train.state import Setup
from train.step import abstract_batch, rows_held
presets = {"lora_mini": "phi-3-mini-4k-instruct", "sft_mini": "phi-3-mini-4k-instruct",
           "sft_medium": "phi-3-medium-4k-instruct", "sft_mini_128k": "phi-3.5-mini-instruct"}
for devices, (page, *changes) in json.loads(sys.stdin.read()):
    fitting = [name for name in presets if page.startswith(name)]
    if fitting:
        folder = tempfile.mkdtemp()
        phi3.Phi3Config.preset(presets[max(fitting, key=len)]).save_pretrained(folder)
        changes.append(f"model.path={folder}")
    config = load_config(page, changes)
    mesh = config.mesh
    mesh = phi3.make_mesh(mesh.data, mesh.fsdp, mesh.tensor, jax.devices()[:devices],
                          sequence=mesh.sequence)
    setup = Setup(config, mesh, config.steps or 1000)
    labels = abstract_batch(setup)["labels"]
    assert labels.sharding.shard_shape(labels.shape)[1] >= 1 and len(rows_held(setup))
    print("built", page, devices, dict(mesh.shape))
"""


def launch_lines() -> list[list[str]]:
    text = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8").replace("\\\n", " ")
    text = re.sub(r",\s+", " ", text)  # the list of a YAML command
    found = re.findall(r"phi3-train ((?:sft|lora)_\w+(?: +[\w.]+=[^\s\"\]]+)*)", text)
    return [command.split() for command in found]


def test_pages_and_launch_lines_fit_their_devices():
    assert set(HARDWARE) == set(config_names())
    lines = launch_lines()
    assert len(lines) == len(LAUNCHED), lines
    runs = [(devices, [name]) for name, devices in HARDWARE.items()]
    runs += [*zip(LAUNCHED, lines, strict=True), (64, TWO_SLICES)]
    done = subprocess.run(
        [sys.executable, "-c", BUILD],
        input=json.dumps(runs),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"
    assert done.stdout.count("built") == len(runs)
    assert " ".join(TWO_SLICES[1:]) in (ROOT / "docs" / "launch.md").read_text()
