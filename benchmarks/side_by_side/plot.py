"""The figures of a run as horizontal bars."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from side_by_side.report import Figures, Spread, spreads, title

# Figure, and the kinds of jobs that stand side by side in it.
PANELS = (
    ("prefill_tps", "Prefill of 512 tokens, tokens/s", ("f32", "bf16", "int8", "q8_0", "q4_0")),
    ("decode1_tps", "Decoding, 1 row, tokens/s", ("f32", "bf16", "int8", "q8_0", "q4_0")),
    ("decode8_tps", "Decoding, 8 rows, tokens/s", ("f32", "bf16", "int8", "q8_0", "q4_0")),
    ("train_tps", "Training step 4 x 256, tokens/s", ("f32-train",)),
)
OURS, THEIRS = "#c44e52", "#9aa5b1"


def bars_of(figures: Figures, key: str, kinds: tuple[str, ...]) -> list[tuple[str, Spread]]:
    """Jobs that have the figure: precisions in order, in each the fastest first."""
    found = []
    for kind in kinds:
        group = [
            (job, kept[key])
            for job, kept in figures.items()
            if job.partition("-")[2] == kind and key in kept
        ]
        found += sorted(group, key=lambda pair: -pair[1].median)
    return found


def draw(results: dict[str, Any], picture: Path) -> None:
    """Writes a PNG: a panel a figure, a bar a job, its length the median and a line the spread.

    Raises:
      ValueError: for results without any of the figures.
    """
    figures = spreads(results["rows"])
    panels = [(name, bars_of(figures, key, kinds)) for key, name, kinds in PANELS]
    panels = [(name, bars) for name, bars in panels if bars]
    if not panels:
        raise ValueError("the results hold no figure that is drawn; run all jobs")
    heights = [len(bars) + 1.5 for _, bars in panels]
    figure = Figure(figsize=(8, 0.24 * sum(heights) + 0.6), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for ax, (name, bars) in zip(axes[:, 0], panels, strict=True):
        medians = [spread.median for _, spread in bars]
        errors = [[s.median - s.low for _, s in bars], [s.high - s.median for _, s in bars]]
        colors = [OURS if job.startswith("phi3-") else THEIRS for job, _ in bars]
        ax.barh(range(len(bars)), medians, xerr=errors, color=colors, error_kw={"lw": 1})
        for place, (_, spread) in enumerate(bars):
            ax.text(spread.high, place, f"  {spread.median:.3g}", va="center", fontsize=8)
        ax.set_yticks(range(len(bars)), [title(job) for job, _ in bars], fontsize=8)
        ax.invert_yaxis()
        ax.set_title(name, loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0.12)
    machine = results["machine"]
    where = f"{results['date']}, {machine['cpu']}, {machine['cores']} cores"
    figure.supxlabel(f"phi3-mid, 271 M parameters; {where}", fontsize=8)
    figure.savefig(picture, dpi=120)
