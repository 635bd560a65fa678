"""How fast all cores together read memory: by a small C program, or numpy where none compiles."""

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from worker import Settings, timed

PACKAGES = ("numpy",)
SOURCE = Path(__file__).with_name("stream.c")
NBYTES = 1 << 30
TIMES = 8


def measure(settings: Settings) -> dict[str, Any]:
    """The fastest pass over an array of 1 GiB; settings.path is where the program is kept."""
    threads = os.cpu_count() or 1
    program = Path(settings.path)
    try:
        if not program.exists() or program.stat().st_mtime < SOURCE.stat().st_mtime:
            flags = ["-O3", "-march=native", "-ffast-math", "-pthread"]
            subprocess.run(["cc", *flags, str(SOURCE), "-o", str(program)], check=True)
        arguments = [str(program), str(NBYTES), str(threads), str(TIMES)]
        text = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
        return {"streamed_gbs": json.loads(text)["gbs"], "by": "C"}
    except (OSError, subprocess.CalledProcessError):
        return {"streamed_gbs": by_numpy(threads), "by": "numpy"}


def by_numpy(threads: int, nbytes: int = NBYTES) -> float:
    """1e9 bytes a second of the fastest pass; numpy's maximum is as fast as memory."""
    parts = np.array_split(np.ones(nbytes // 4, np.float32), threads)
    with ThreadPoolExecutor(threads) as pool:
        seconds = [timed(lambda: list(pool.map(np.max, parts)))[0] for _ in range(TIMES)]
    return nbytes / min(seconds) / 1e9
