"""What a run says about itself: lines for people, JSON lines, and TensorBoard."""

import importlib.util
import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

import phi3_jax as phi3
from phi3_jax.json_files import parse_json
from train.config import LoraConfig

# Dense bfloat16 products a second of one device, in 10^12, from the vendors' data sheets, by a
# part of jax.Device.device_kind; the first that fits counts. TPU v2 and v3 devices are half a chip,
# as those of v7x are.
_PEAK_TFLOPS = {
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5p": 459,
    "TPU v5": 459,
    "TPU v6": 918,
    "TPU7x": 1154,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "T4": 65,
}

METRICS_FILE = "metrics.jsonl"


def peak_flops(device: jax.Device) -> float | None:
    """Floating-point operations a second of a device in bfloat16, or None where it is unknown."""
    kind = device.device_kind
    found = next((peak for name, peak in _PEAK_TFLOPS.items() if name in kind), None)
    return None if found is None else found * 1e12


def layer_weights(config: phi3.Phi3Config) -> int:
    """Weights in the matrices of one layer."""
    heads, D = config.num_attention_heads, config.hidden_size
    in_attention = 2 * (heads + config.num_key_value_heads) * config.head_dim
    return D * (in_attention + 3 * config.intermediate_size)


def flops_per_token(config: phi3.Phi3Config, tokens: int, lora: LoraConfig | None) -> float:
    """Floating-point operations that training needs for each token of a row.

    As in PaLM (arXiv:2204.02311, appendix B), with two differences: attention is counted causal,
    half of all pairs; and where only adapters are trained, weights have no gradients, so that a
    product costs four operations a weight and not six. What is computed again (remat) and the
    lookup of the embedding do not count; packed documents need less attention than a whole row.
    """
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    weights = layers * layer_weights(config) + config.vocab_size * config.hidden_size
    seen = tokens if config.sliding_window is None else min(tokens, config.sliding_window)
    pairs = seen - seen * seen / (2 * tokens)  # keys that a query sees, on average
    attention = layers * 4 * pairs * heads * config.head_dim
    return (6 if lora is None else 4) * weights + 3 * attention


def memory_in_use() -> float | None:
    """GiB that this process has needed at most: of the fullest device, or on CPU of the host."""
    peaks = [
        stats["peak_bytes_in_use"]
        for device in jax.local_devices()
        if (stats := device.memory_stats()) and "peak_bytes_in_use" in stats
    ]
    if peaks:
        return max(peaks) / 2**30
    if jax.default_backend() != "cpu":
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Reporter:
    """Where the first process of a run writes; the others write nothing.

    Args:
      folder: of the run.
      steps: how many it has.
      tensorboard: also write events into the folder.

    Raises:
      ValueError: for tensorboard where tensorboardX is not installed.
    """

    def __init__(self, folder: Path, steps: int, tensorboard: bool = False):
        self._writes = jax.process_index() == 0
        self._console = Console(
            highlight=False, soft_wrap=True, quiet=not self._writes, force_jupyter=False
        )
        self._path, self._width = folder / METRICS_FILE, len(str(steps))
        self._steps = steps
        self._file: Any = None
        self._events: Any = None
        self._tensorboard = folder / "tensorboard" if tensorboard else None
        if tensorboard and importlib.util.find_spec("tensorboardX") is None:
            raise ValueError(
                "tensorboard=true needs tensorboardX: pip install 'phi3-jax[tensorboard]'"
            )

    def begin(self, step: int) -> None:
        """Forgets what was written about steps after this one, and opens the files."""
        if not self._writes:
            return
        cut_metrics(self._path, step)
        self._file = open(self._path, "a", encoding="utf-8")
        if self._tensorboard is not None:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(self._tensorboard), purge_step=step + 1)

    def has_evaluation(self, step: int) -> bool:
        """Whether that of a step has been written; the same answer in every process."""
        lines = read_metrics(self._path) if self._writes else []
        found = any(line["kind"] == "valid" and line["step"] == step for line in lines)
        return bool(multihost_utils.broadcast_one_to_all(np.array(found)))

    def banner(self, phase: str, *lines: str) -> None:
        """A phase of the run."""
        self._console.rule(f"[bold]{phase}", align="left")
        for line in lines:
            self.say(line)

    def say(self, line: str) -> None:
        """A line for people."""
        self._console.print(line, markup=False)

    def step(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """One line about a step, and its values into the files."""
        self._write("train", step, values)
        mfu, memory = values.get("mfu"), values.get("memory_gib")
        self.say(
            f"step {step:{self._width}}/{self._steps}  loss {values['loss']:.4f}  "
            f"lr {values['learning_rate']:.2e}  norms: grad {values['grad_norm']:.2e} "
            f"update {values['update_norm']:.2e} param {values['param_norm']:.4g}  "
            f"{values['tokens']:,} tokens, {values['tokens_per_second']:,.0f}/s"
            + ("" if mfu is None else f"  MFU {mfu:.1%}")
            + ("" if memory is None else f"  {memory:.2f} GiB")
        )

    def evaluation(self, step: int, values: Mapping[str, float | int]) -> None:
        """One line about an evaluation, and its values into the files."""
        self._write("valid", step, values)
        self.say(
            f"step {step:{self._width}}/{self._steps}  valid loss {values['loss']:.4f}  "
            f"perplexity {values['perplexity']:.4g}  ({values['labels']:,} labels)"
        )

    def sample(self, step: int, prompt: str, answer: str) -> None:
        """An answer of the model as it is now."""
        self.say(f"  {prompt!r} -> {answer!r}")
        if self._events is not None:
            self._events.add_text(prompt, answer, step)

    def close(self) -> None:
        """Closes the files."""
        for file in (self._file, self._events):
            if file is not None:
                file.close()

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if self._file is not None:
            # JSON has no NaN; what was one is null.
            fine = {n: v if v is None or math.isfinite(v) else None for n, v in values.items()}
            self._file.write(json.dumps({"kind": kind, "step": step, **fine}) + "\n")
            self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                if value is not None and math.isfinite(value):
                    self._events.add_scalar(f"{kind}/{name}", value, step)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; one that a killed run did not finish is left out.

    Raises:
      ValueError: where a line is not JSON in UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        return [parse_json(line) for line in lines[:-1]]
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} has a line that is not JSON ({error}); take that line out, or move the "
            "file away"
        ) from None


def cut_metrics(path: Path, step: int) -> None:
    """Leaves out what is about steps after this one: a run that goes on will write them again."""
    if not path.is_file():
        return
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    part = path.with_name(f"{path.name}.partial")
    part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(part, path)


class Clock:
    """Seconds of work since the last time it was asked; pauses are left out."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        """Forgets what has passed."""
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap or restart."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds
