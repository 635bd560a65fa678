"""This project beside other ways to run Phi-3 on this machine's CPU: one command a table.

    python benchmarks/peers.py setup hf llama
    python benchmarks/peers.py run --rounds 3 --output results.json
    python benchmarks/peers.py table results.json
    python benchmarks/peers.py plot results.json docs/cpu-speed.png

`setup` fills $PEERS_DIR (by default phi3-peers in the user's cache folder) with an environment for
each peer and with phi3-mid, 271 M random parameters: about 6 GB, and without network only what is
there already. Every job is a process of its own; rounds run all jobs in turn. What is measured
stands in side_by_side/worker.py. To read a figure, see in its row what share of the machine other
processes had.
"""

import argparse
import json
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from side_by_side import environments, jobs, report

# To see whether all jobs run; their figures say nothing.
QUICK = {"prompt": 16, "new": 4, "prefill": 32, "rows": 2, "rows_new": 4, "train_tokens": 16}


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    folder = environments.cache_folder()
    sizes = QUICK if arguments.quick else {}
    wanted = [job for job in jobs.all_jobs(folder, sizes) if re.search(arguments.only, job.name)]
    if not wanted:
        names = ", ".join(job.name for job in jobs.all_jobs(folder, sizes))
        parser.error(f"--only {arguments.only!r} names no job; there are {names}")
    skipped = jobs.why_not(wanted, folder)
    results: dict[str, Any] = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": jobs.machine(),
        "sizes": sizes,
        "skipped": skipped,
        "rows": [],
    }
    for name, reason in skipped.items():
        print(f"{name}: skipped, {reason}", flush=True)

    def keep(row: dict[str, Any]) -> None:
        results["rows"].append(row)
        # At once, so that a run that is stopped leaves what it has.
        partial = arguments.output.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1))
        partial.replace(arguments.output)
        print(report.line(row), flush=True)

    ready = [job for job in wanted if job.name not in skipped]
    run_one = lambda job: jobs.run_job(job, folder, arguments.limit)  # noqa: E731
    jobs.run_rounds(ready, arguments.rounds, run_one, keep)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    setup = commands.add_parser("setup", help="make environments, checkpoints, gguf files")
    setup.add_argument("peers", nargs="*", help=f"of {', '.join(environments.PEERS)}")
    measure = commands.add_parser("run", help="measure")
    measure.add_argument("--rounds", type=int, default=3)
    measure.add_argument("--only", default="", help="a regular expression of job names")
    measure.add_argument("--quick", action="store_true", help="few tokens: does every job run?")
    measure.add_argument("--limit", type=float, default=900, help="seconds of one job")
    measure.add_argument("--output", type=Path, required=True)
    table = commands.add_parser("table", help="print the README's tables")
    table.add_argument("results", type=Path)
    plot = commands.add_parser("plot", help="draw them")
    plot.add_argument("results", type=Path)
    plot.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "setup":
        if unknown := set(arguments.peers) - set(environments.PEERS):
            parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(environments.PEERS)}")
        try:
            environments.set_up(environments.cache_folder(), arguments.peers)
        except subprocess.CalledProcessError as error:
            sys.exit(f"error: {' '.join(error.cmd)} ended with {error.returncode}")
    elif arguments.command == "run":
        run(arguments, measure)
    elif arguments.command == "table":
        print(report.tables(json.loads(arguments.results.read_text())))
    else:
        from side_by_side.plot import draw  # matplotlib, which no other command needs

        draw(json.loads(arguments.results.read_text()), arguments.picture)


if __name__ == "__main__":
    main()
