"""Measures both conversions of a folder against a plain copy of its files on the same disk.

    python benchmarks/convert.py FOLDER [--work DIR]

Prints seconds, bytes a second, CPU seconds and peak resident memory of the process, and each
conversion's seconds as a multiple of those of a copy of the files that it reads, made just before
it. Each step starts with its source out of the page cache and ends when all is on the disk; what it
writes is removed again. DIR, by default beside the folder, needs three times the room of the
weights.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(command: list[str], source: Path) -> tuple[float, float, int]:
    """Seconds until the output is on the disk, and the process's CPU seconds and peak RSS bytes."""
    for file in source.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"{' '.join(command)} failed")
    unit = 1 if sys.platform == "darwin" else 1024
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    work = (arguments.work or folder.parent).resolve() / f"convert-benchmark-{os.getpid()}"
    work.mkdir(parents=True)
    convert = [sys.executable, "-m", "convert.cli"]
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"{folder}: {size:,} bytes of safetensors; {os.cpu_count()} cores")
    try:
        orbax, hf, copy = work / "orbax", work / "hf", work / "copy"
        copied_s = 0.0
        steps = [
            ("plain copy", ["cp", "-r"], folder, copy),
            ("to-orbax", [*convert, "to-orbax"], folder, orbax),
            ("plain copy", ["cp", "-r"], orbax, copy),
            ("to-hf", [*convert, "to-hf"], orbax, hf),
            ("verify", [*convert, "verify"], hf, folder),
        ]
        os.sync()
        for name, command, source, target in steps:
            seconds, cpu, peak = run([*command, str(source), str(target)], source)
            rates = f"{seconds:7.1f} s  {size / seconds / 1e6:7.0f} MB/s  CPU {cpu:6.1f} s"
            line = f"{name:10}  {rates}  peak RSS {peak / 1e9:.2f} GB"
            if name == "plain copy":
                shutil.rmtree(copy)
                copied_s = seconds
            elif name.startswith("to-"):
                line += f"  {seconds / copied_s:.2f} x the copy"
            print(line, flush=True)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
