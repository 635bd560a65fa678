"""One job of the comparison, in a process and an environment of its own; it prints its figures.

    python worker.py SETTINGS                   # JSON, the fields of Settings

The same measurements for every peer. What a peer is, its own module says: `load`, and where it
trains `start_training`; modules of limits have `measure`. Needs numpy and what the module imports.
"""

import importlib
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np

# What begins the line with the figures; all else that a worker prints is its own affair.
MARK = "RESULT "


@dataclass(frozen=True)
class Settings:
    """What a job is.

    Attributes:
      module: beside this file.
      task: "inference"; "cold", which ends after the first token; "train"; "limits".
      path: the model folder or file.
      dtype: of weights and activations, in the peer's words.
      compiled: whether the peer compiles where it need not.
      prompt, new: tokens of a row that is decoded.
      prefill: tokens of the row whose prefill is timed.
      rows, rows_new: of decoding in a batch.
      train_rows, train_tokens: of a training step.
      vocabulary: token ids are drawn below it.
    """

    module: str
    task: str = "inference"
    path: str = ""
    dtype: str = "float32"
    compiled: bool = False
    prompt: int = 128
    new: int = 128
    prefill: int = 512
    rows: int = 8
    rows_new: int = 32
    train_rows: int = 4
    train_tokens: int = 256
    vocabulary: int = 32000

    def ids(self, rows: int, tokens: int) -> np.ndarray:
        """int32 [rows, tokens], the same in every process."""
        rng = np.random.default_rng(1)
        return rng.integers(3, self.vocabulary, (rows, tokens)).astype(np.int32)


class Peer(Protocol):
    """A loaded model."""

    def prefill(self, ids_BT: np.ndarray) -> Any:
        """Fills a cache with the rows and takes the likeliest next token."""

    def first(self, ids_BT: np.ndarray, new: int) -> Any:
        """`generate` that ends with its first token, in the same programs."""

    def generate(self, ids_BT: np.ndarray, new: int) -> np.ndarray:
        """The likeliest `new` tokens after each row, [B, new]; nothing ends a row."""


class Others:
    """The share of the machine that other processes had while the context was open.

    Attributes:
      share: from 0 to 1; None where the kernel does not count it (/proc/stat).
    """

    share: float | None = None

    def __enter__(self) -> "Others":
        self.start = time.perf_counter(), machine_busy_s(), own_busy_s()
        return self

    def __exit__(self, *_: Any) -> None:
        begin, busy, own = self.start
        wall, now_busy = time.perf_counter() - begin, machine_busy_s()
        if busy is not None and now_busy is not None:
            others = (now_busy - busy) - (own_busy_s() - own)
            self.share = max(0.0, others / (wall * (os.cpu_count() or 1)))


def machine_busy_s() -> float | None:
    """CPU seconds of all processes since the start, other guests of the host among them."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _idle, _wait, *interrupts_and_steal = file.readline().split()[1:9]
    except OSError:
        return None
    ticks = sum(map(int, (user, nice, system, *interrupts_and_steal)))
    return ticks / os.sysconf("SC_CLK_TCK")


def own_busy_s() -> float:
    """CPU seconds of this process and of children that have ended."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, whose))


def peak_rss_gb() -> float:
    """Peak resident memory of this process, in 1e9 bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what was returned."""
    begin = time.perf_counter()
    value = function()
    return time.perf_counter() - begin, value


def median_s(function: Callable[[], Any], times: int) -> float:
    """Median of the seconds of some calls."""
    return statistics.median(timed(function)[0] for _ in range(times))


def decoding(peer: Peer, ids_BT: np.ndarray, new: int) -> tuple[float, float, np.ndarray]:
    """Tokens/s of all rows without the prompt's part; seconds of compiling; the tokens.

    Tokens are counted after the first one, in the time that the first one did not take.
    """
    cold_s, _ = timed(lambda: peer.generate(ids_BT, new))
    peer.first(ids_BT, new)
    first_s = median_s(lambda: peer.first(ids_BT, new), 3)
    whole_s, tokens = timed(lambda: peer.generate(ids_BT, new))
    if whole_s <= first_s:
        raise RuntimeError(
            f"{new} tokens took {whole_s:.3f} s and the first of them {first_s:.3f} s: too few "
            "tokens, or too much else on the machine"
        )
    return len(ids_BT) * (new - 1) / (whole_s - first_s), max(0.0, cold_s - whole_s), tokens


def measure_inference(settings: Settings, load: Callable[[Settings], Peer]) -> dict[str, Any]:
    """Load, first token, decoding at batch 1 and more, prefill, memory."""
    load_s, peer = timed(lambda: load(settings))
    one = settings.ids(1, settings.prompt)
    first_s, _ = timed(lambda: peer.first(one, settings.new))
    figures: dict[str, Any] = {"load_s": load_s, "cold_s": load_s + first_s}
    if settings.task == "cold":
        return figures
    rate, compile_s, tokens = decoding(peer, one, settings.new)
    figures |= {"decode1_tps": rate, "compile_decode_s": compile_s, "tokens": tokens[0, :16]}
    figures["decode1_rss_gb"] = peak_rss_gb()
    long = settings.ids(1, settings.prefill)
    cold_s, _ = timed(lambda: peer.prefill(long))
    prefill_s = median_s(lambda: peer.prefill(long), 3)
    figures["prefill_tps"] = settings.prefill / prefill_s
    figures["compile_prefill_s"] = max(0.0, cold_s - prefill_s)
    rows = settings.ids(settings.rows, settings.prompt)
    figures["decode8_tps"], _, _ = decoding(peer, rows, settings.rows_new)
    return figures


def measure_training(
    settings: Settings, start_training: Callable[[Settings, np.ndarray], Callable[[], float]]
) -> dict[str, Any]:
    """Forward, backward and AdamW over one batch."""
    ids_BT = settings.ids(settings.train_rows, settings.train_tokens)
    load_s, step = timed(lambda: start_training(settings, ids_BT))
    first_s, loss = timed(step)
    step_s = median_s(step, 3)
    return {
        "load_s": load_s,
        "train_tps": ids_BT.size / step_s,
        "compile_train_s": max(0.0, first_s - step_s),
        "loss": loss,
    }


def measure(settings: Settings) -> dict[str, Any]:
    """All figures of a job, plain JSON values."""
    import_s, module = timed(lambda: importlib.import_module(settings.module))
    with Others() as others:
        if settings.task == "limits":
            figures = module.measure(settings)
        elif settings.task == "train":
            figures = measure_training(settings, module.start_training)
        else:
            figures = measure_inference(settings, module.load)
    if "tokens" in figures:
        figures["tokens"] = [int(token) for token in figures["tokens"]]
    return figures | {
        "import_s": import_s,
        "rss_gb": peak_rss_gb(),
        "others": others.share,
        "versions": {name: version(name) for name in module.PACKAGES},
    }


if __name__ == "__main__":
    print(MARK + json.dumps(measure(Settings(**json.loads(sys.argv[1])))), flush=True)
