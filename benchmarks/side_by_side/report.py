"""Medians, spreads and goals of a run, as Markdown."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from side_by_side.environments import weights_read

# Bytes of a weight of the layers and of the head. A gguf block of 32 has a scale of two bytes; with
# q4_0 llama.cpp keeps the head in q6_K, 210 bytes for 256 weights.
BYTES = {
    "f32": (4.0, 4.0),
    "bf16": (2.0, 2.0),
    "int8": (1.0, 1.0),
    "q8_0": (34 / 32, 34 / 32),
    "q4_0": (18 / 32, 210 / 256),
}
TITLES = {
    "phi3": "phi3-jax",
    "hf": "transformers",
    "hfcompile": "transformers, compiled",
    "llama": "llama.cpp",
    "keras": "KerasHub on JAX",
    "easydel": "EasyDeL",
}
INFERENCE = {
    "prefill_tps": "prefill 512",
    "decode1_tps": "decode, 1 row",
    "decode8_tps": "decode, 8 rows",
    "import_s": "import s",
    "load_s": "load s",
    "cold_s": "load to first token s",
    "rss_gb": "peak RSS GB",
    "decode1_rss_gb": "after 1 row GB",
    "compile_decode_s": "compile decode s",
    "compile_prefill_s": "compile prefill s",
}
TRAINING = {"train_tps": "tokens/s", "compile_train_s": "compile s", "rss_gb": "peak RSS GB"}


@dataclass(frozen=True)
class Spread:
    """A figure over the rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 0 if self.median >= 100 else 1 if self.median >= 10 else 2
        low, high = f"{self.low:.{digits}f}", f"{self.high:.{digits}f}"
        middle = f"{self.median:.{digits}f}"
        return middle if low == high else f"{middle} [{low}-{high}]"


@dataclass(frozen=True)
class Goal:
    """A line of the table of goals.

    Attributes:
      figure: what it is called.
      key: of the figures. Where less is better it does not end in "_tps".
      ours: jobs of this project, of which the better counts.
      peers: jobs that they stand beside, without their peers' names: "f32", "q8_0", "f32-train".
      limit: what is to be reached, of the best peer where `relative`, else the figure itself.
    """

    figure: str
    key: str
    ours: tuple[str, ...]
    peers: tuple[str, ...]
    limit: float
    relative: bool = True


GOALS = (
    Goal("prefill 512, float32, tokens/s", "prefill_tps", ("phi3-f32",), ("f32",), 1.10),
    Goal("decode 1 row, float32, tokens/s", "decode1_tps", ("phi3-f32",), ("f32",), 1.20),
    Goal("decode 1 row, bfloat16, tokens/s", "decode1_tps", ("phi3-bf16",), ("bf16",), 1.05),
    Goal("decode 1 row, int8, tokens/s", "decode1_tps", ("phi3-int8",), ("q8_0",), 1.00),
    Goal(
        "decode 8 rows, bfloat16 or float32, tokens/s",
        "decode8_tps",
        ("phi3-bf16", "phi3-f32"),
        ("bf16", "f32"),
        1.10,
    ),
    Goal(
        "training step 4 x 256, float32, tokens/s",
        "train_tps",
        ("phi3-f32-train",),
        ("f32-train",),
        1.15,
    ),
    Goal("load, float32, s", "load_s", ("phi3-f32",), ("f32",), 0.5, relative=False),
    Goal(
        "load, compile (cache warm) and first token, float32, s",
        "cold_s",
        ("phi3-f32-cold",),
        ("f32",),
        2.0,
        relative=False,
    ),
    Goal("peak RSS, bfloat16, GB", "rss_gb", ("phi3-bf16",), ("bf16",), 1.0, relative=False),
    Goal(
        "- of it, until one row is decoded",
        "decode1_rss_gb",
        ("phi3-bf16",),
        ("bf16",),
        1.0,
        relative=False,
    ),
)

Figures = dict[str, dict[str, Spread]]


def spreads(rows: Iterable[dict[str, Any]]) -> Figures:
    """Every numeric figure of every job over the rounds in which it did not fail."""
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if "error" in row:
            continue
        kept = values.setdefault(row["job"], {})
        for key, value in row.items():
            if isinstance(value, (int, float)) and key not in ("round", "wall_s"):
                kept.setdefault(key, []).append(value)
    return {
        job: {key: Spread(statistics.median(v), min(v), max(v)) for key, v in kept.items()}
        for job, kept in values.items()
    }


def title(job: str) -> str:
    """A job in words."""
    peer, _, kind = job.partition("-")
    return f"{TITLES.get(peer, peer)} {kind.removesuffix('-train')}"


def best(figures: Figures, jobs: Iterable[str], key: str) -> tuple[str, Spread] | None:
    """The job with the best median, and that; None where no job has the figure."""
    found = [(job, figures[job][key]) for job in jobs if key in figures.get(job, {})]
    choose = max if key.endswith("_tps") else min
    return choose(found, key=lambda pair: pair[1].median) if found else None


def peers_of(figures: Figures, kinds: Iterable[str]) -> list[str]:
    """The jobs of all peers of these kinds."""
    kinds = set(kinds)
    split = {job: job.partition("-") for job in figures}
    return [job for job, (peer, _, kind) in split.items() if peer != "phi3" and kind in kinds]


def row_of(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def goals_table(figures: Figures) -> list[str]:
    """Best peer, ours, ratio, goal and whether it is met; "-" where something was not measured."""
    lines = [
        row_of(["figure", "best peer", "ours", "ratio", "goal", "met"]),
        "|---|---|---|---|---|---|",
    ]
    for goal in GOALS:
        ours = best(figures, goal.ours, goal.key)
        peer = best(figures, peers_of(figures, goal.peers), goal.key)
        mine = "-" if ours is None else str(ours[1])
        if ours is not None and len(goal.ours) > 1:
            mine += f" ({ours[0].partition('-')[2]})"
        theirs = "-" if peer is None else f"{peer[1]} ({title(peer[0])})"
        ratio = None if ours is None or peer is None else ours[1].median / peer[1].median
        if goal.relative:
            aim = f">= {goal.limit:.2f} x"
            met = None if ratio is None else ratio >= goal.limit
        else:
            aim = f"<= {goal.limit:g}"
            met = None if ours is None else ours[1].median <= goal.limit
        lines.append(row_of([goal.figure, theirs, mine, factor(ratio), aim, yes(met)]))
        if goal.ours == ("phi3-f32",) and goal.key == "decode1_tps":
            share = efficiency("phi3-f32", figures)
            met = None if share is None else share >= 0.90
            name = "- of it, part of streamed bandwidth"
            part = "-" if share is None else f"{share:.2f}"
            lines.append(row_of([name, "", part, "", ">= 0.90", yes(met)]))
    return lines


def factor(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def yes(met: bool | None) -> str:
    return "-" if met is None else "yes" if met else "no"


def efficiency(job: str, figures: Figures) -> float | None:
    """Bytes of weights that decoding one row reads a second, as a part of streamed bandwidth."""
    rate = figures.get(job, {}).get("decode1_tps")
    streamed = figures.get("limits-memory", {}).get("streamed_gbs")
    kind = job.rpartition("-")[2]
    if rate is None or streamed is None or kind not in BYTES:
        return None
    nbytes = sum(count * size for count, size in zip(weights_read(), BYTES[kind], strict=True))
    return nbytes * rate.median / 1e9 / streamed.median


def same_tokens(job: str, rows: list[dict[str, Any]]) -> str:
    """How many of its first tokens are those of transformers in float32, one row."""
    tokens = {row["job"]: row["tokens"] for row in rows if "tokens" in row}
    if job not in tokens or "hf-f32" not in tokens:
        return "-"
    pairs = list(zip(tokens[job], tokens["hf-f32"], strict=True))
    same = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return f"{same} of {len(pairs)}"


def job_table(figures: Figures, rows: list[dict[str, Any]]) -> list[str]:
    """All figures of every inference job."""
    heads = [*INFERENCE.values(), "of bandwidth", "tokens as transformers", "others' share"]
    lines = [row_of(["", *heads]), "|---" * (len(heads) + 1) + "|"]
    for job, kept in figures.items():
        if job.startswith("limits") or job.endswith("-train"):
            continue
        cells = [str(kept[key]) if key in kept else "-" for key in INFERENCE]
        part = efficiency(job, figures)
        cells += ["-" if part is None else f"{part:.2f}", same_tokens(job, rows), others(kept)]
        lines.append(row_of([title(job), *cells]))
    return lines


def training_table(figures: Figures) -> list[str]:
    """Training steps."""
    heads = [*TRAINING.values(), "others' share"]
    lines = [row_of(["training", *heads]), "|---" * (len(heads) + 1) + "|"]
    for job, kept in figures.items():
        if job.endswith("-train"):
            lines.append(row_of([title(job), *(str(kept[key]) for key in TRAINING), others(kept)]))
    return lines


def limits_table(figures: Figures) -> list[str]:
    """What memory and matrix products reach."""
    lines = [row_of(["limit", "", "others' share"]), "|---|---|---|"]
    for job, kept in figures.items():
        if job.startswith("limits"):
            for key, value in kept.items():
                if key.endswith(("_gbs", "_gflops")):
                    name, _, unit = key.rpartition("_")
                    unit = {"gbs": "GB/s", "gflops": "GFLOP/s"}[unit]
                    head = f"{job.removeprefix('limits-')}: {name.replace('_', ' ')}, {unit}"
                    lines.append(row_of([head, str(value), others(kept)]))
    return lines


def others(kept: dict[str, Spread]) -> str:
    """The largest share of the machine that others had in a round."""
    return f"{kept['others'].high:.0%}" if "others" in kept else "-"


def origin(results: dict[str, Any]) -> str:
    """When, on what, and with which versions."""
    machine, versions = results["machine"], {}
    for row in results["rows"]:
        versions |= row.get("versions", {})
    rounds = 1 + max((row["round"] for row in results["rows"]), default=-1)
    packages = ", ".join(f"{name} {number}" for name, number in sorted(versions.items()))
    quick = f" NOT THE REAL SIZES: {results['sizes']}." if results["sizes"] else ""
    return (
        f"{results['date']}, {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_gb']} GB, {machine['system']}, Python {machine['python']}; {packages}. "
        f"Medians [lowest-highest] of {rounds} rounds; phi3-mid, 271 M random parameters.{quick}"
    )


def tables(results: dict[str, Any]) -> str:
    """All tables of a run, what failed and what was left out."""
    figures = spreads(results["rows"])
    failed = [
        f"- {row['job']}, round {row['round'] + 1}: {row['error']}"
        for row in results["rows"]
        if "error" in row
    ]
    skipped = [f"- {job} was not run: {why}" for job, why in results["skipped"].items()]
    parts = [
        [origin(results)],
        goals_table(figures),
        ["Tokens/s, all rows together:"],
        job_table(figures, results["rows"]),
        training_table(figures),
        limits_table(figures),
        failed + skipped,
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def line(row: dict[str, Any]) -> str:
    """A row as it is shown while the run goes on."""
    head = f"{row['at']} round {row['round'] + 1} {row['job']}: "
    if "error" in row:
        return f"{head}FAILED, {row['error']}"
    numbers = {key: value for key, value in row.items() if isinstance(value, float)}
    return head + ", ".join(f"{key} {value:.3g}" for key, value in numbers.items())
