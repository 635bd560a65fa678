"""Draws the pictures of docs/explanation/: what they show is computed by the library.

python scripts/drawings.py
"""

from pathlib import Path

import jax
import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

import phi3_jax as phi3
from phi3_jax.hf_format import WeightTable
from phi3_jax.rope import attention_factor, inverse_frequencies, rows_are_long
from phi3_jax.sharding import abstract_params

FOLDER = Path(__file__).parent.parent / "docs" / "explanation"
COLORS = ["#8ecae6", "#ffb703", "#90be6d", "#f28482", "#b8a1d9", "#d4a373", "#adb5bd", "#4cc9b0"]
SHORT, LONG, NOTHING = COLORS[0], COLORS[1], "#f1f3f5"
DEVICES = 4  # of the picture of fused kernels
QKV = ("model", "layers", "self_attn", "qkv_proj", "weight")


def preset(name: str) -> phi3.Phi3Config:
    return phi3.Phi3Config.preset(name)


def box(panel, x, y, width, color, text="", height=1.0, **style) -> None:
    panel.add_patch(Rectangle((x, y), width, height, facecolor=color, **{"ec": "white", **style}))
    panel.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=7)


def bare(panel, xlim, ylim, title="") -> None:
    panel.set(xlim=xlim, ylim=ylim, title=title)
    panel.axis("off")


def fused() -> Figure:
    """Which device needs which heads of qkv_proj, in the file's order and in ours."""
    config = preset("phi-4-mini-instruct")
    groups = config.num_key_value_heads
    queries = config.num_attention_heads // groups
    names = [f"q{head}" for head in range(groups * queries)]
    names += [f"{part}{group}" for part in "kv" for group in range(groups)]
    # Each head is one row here, and its number is all that is in it.
    table = WeightTable(config)
    table.sizes |= {"H": 1, "D": 1}
    ours = table.from_hf(QKV, np.arange(len(names))[:, None])[:, :, 0, 0]
    device = {
        int(head): group * DEVICES // groups for group, row in enumerate(ours) for head in row
    }
    figure, panels = plt.subplots(2, 1, figsize=(11, 2.9), layout="constrained")
    orders = (range(len(names)), ours.ravel())
    titles = (
        "In the file: rows of qkv_proj, a box a head. The dashed lines cut it in equal parts.",
        f"Here: [K={groups}, G+2={queries + 2}, H, D]. The same lines fall between groups.",
    )
    for panel, order, title in zip(panels, orders, titles, strict=True):
        for place, head in enumerate(map(int, order)):
            box(panel, place, 0, 1, COLORS[device[head]], names[head])
        for cut in range(1, DEVICES):
            panel.plot([cut * len(names) / DEVICES] * 2, [-0.25, 1.25], "k--", lw=1.2)
        bare(panel, (0, len(names)), (-0.3, 1.3))
        panel.set_title(title, fontsize=10, loc="left")
    return figure


def factors() -> Figure:
    """The factors of a 128k model, and how far each pair turns."""
    config = preset("phi-3.5-mini-instruct")
    rope, original = config.rope_parameters, config.original_max_position_embeddings
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for name, color in (("short_factor", "#1f77b4"), ("long_factor", "#e08e00")):
        left.plot(rope[name], ".-", color=color, label=name)
        long = name == "long_factor"
        turns = config.max_position_embeddings if long else original
        turned = inverse_frequencies(config, long) * turns / (2 * np.pi)
        right.plot(turned, ".-", color=color, label=f"{name}, {turns:,} positions")
    plain = inverse_frequencies(config) * np.asarray(rope["short_factor"])
    turned = plain * config.max_position_embeddings / (2 * np.pi)
    right.plot(turned, color="grey", ls=":", label=f"no factor, {config.max_position_embeddings:,}")
    left.set(title="What a pair's period is multiplied with", xlabel="rotary pair", yscale="log")
    right.set(title="Turns of a pair over all positions", xlabel="rotary pair", yscale="log")
    right.axhline(1, color="black", lw=0.8)
    for panel in (left, right):
        panel.legend(frameon=False, fontsize=8)
        panel.grid(alpha=0.3)
    figure.suptitle(
        f"phi-3.5-mini: {len(rope['long_factor'])} pairs, "
        f"cos and sin times {attention_factor(config):.4f}",
        fontsize=10,
    )
    return figure


def crossing() -> Figure:
    """Two rows of a batch, one of which grows past the line."""
    line, prompt, shorter, steps = 8, 7, 4, 3
    config = phi3.Phi3Config(
        hidden_size=8,
        num_attention_heads=1,
        original_max_position_embeddings=line,
        max_position_embeddings=4 * line,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
        },
    )
    figure, panels = plt.subplots(1, steps, figsize=(11, 1.9), layout="constrained")
    for step, panel in enumerate(panels):
        width = prompt + step
        mask = np.ones((2, width), bool)
        mask[1, : prompt - shorter] = False
        position = np.where(mask, np.cumsum(mask, axis=1) - 1, 0)
        long = np.asarray(rows_are_long(config, position, mask))[:, 0]
        for row in range(2):
            for column in range(width):
                color = (LONG if long[row] else SHORT) if mask[row, column] else NOTHING
                text = str(position[row, column]) if mask[row, column] else "pad"
                box(panel, column, 1 - row, 1, color, text)
        tokens = mask.sum(axis=1)
        used = ["long" if one else "short" for one in long]
        bare(panel, (0, prompt + steps - 1), (0, 2))
        title = "; ".join(f"{n} tokens: {word}" for n, word in zip(tokens, used, strict=True))
        panel.set_title(title, fontsize=9)
    return figure


def shards() -> Figure:
    """Which device holds what of phi-3-medium's leaves on eight devices."""
    mesh = phi3.make_mesh(data=1, fsdp=2, tensor=4, devices=jax.devices()[:8])
    config = preset("phi-3-medium-4k-instruct")
    model = phi3.Phi3ForCausalLM(config, mesh=mesh)
    params = abstract_params(model)
    layer = params["model"]["layers"]
    groups, mlp, vocab = config.num_key_value_heads, config.intermediate_size, config.vocab_size
    drawn = (
        ("qkv_proj [L, K, G+2, H, D]", layer["self_attn"]["qkv_proj"], 1, 4, groups, "K"),
        ("o_proj [L, D, K, G, H]", layer["self_attn"]["o_proj"], 2, 1, groups, "K"),
        ("gate_up_proj [L, 2, F, D]", layer["mlp"]["gate_up_proj"], 2, 3, mlp, "F"),
        ("down_proj [L, D, F]", layer["mlp"]["down_proj"], 2, 1, mlp, "F"),
        ("embed_tokens, lm_head [V, D]", params["model"]["embed_tokens"], 0, 1, vocab, "V"),
    )
    figure, panels = plt.subplots(1, len(drawn), figsize=(13, 3.6), layout="constrained")
    for panel, (title, leaf, rows, columns, own, letter) in zip(panels, drawn, strict=True):
        leaf = leaf["weight"]
        height, width = leaf.shape[rows], leaf.shape[columns]
        for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
            top, bottom, _ = index[rows].indices(height)
            start, stop, _ = index[columns].indices(width)
            place = (start, top, stop - start)
            box(panel, *place, COLORS[device.id], str(device.id), height=bottom - top)
        if own < height:
            padding = dict(facecolor="none", ec="black", hatch="////", lw=0)
            panel.add_patch(Rectangle((0, own), width, height - own, **padding))
        panel.set(xlim=(0, width), ylim=(height, 0), xticks=[0, width], yticks=[0, own])
        if own < height:
            panel.set(yticks=[0, own, height])
        panel.set_title(title, fontsize=9)
        panel.set(xlabel="D: fsdp", ylabel=f"{letter}: tensor")
    return figure


def layer() -> Figure:
    """What two tensor-parallel devices do in a layer, and where they meet."""
    figure, panel = plt.subplots(figsize=(11, 2.6), layout="constrained")
    steps = (
        ("norm", "x [B,T,D]"),
        ("qkv_proj", "half the\ngroups K"),
        ("attention", "its own\nheads"),
        ("o_proj", "a partial\nsum [B,T,D]"),
        ("norm", "x [B,T,D]"),
        ("gate_up_proj", "half of F,\ngate and up"),
        ("up * act(gate)", "its own\nF"),
        ("down_proj", "a partial\nsum [B,T,D]"),
    )
    x, meeting = 0.0, []
    for number, (name, result) in enumerate(steps):
        for device in range(2):
            shared = name == "norm"
            color = NOTHING if shared else COLORS[device]
            box(panel, x, 1.4 * (1 - device), 1.25, color, f"{name}\n{result}", ec="black", lw=0.6)
        x += 1.45
        if number % 4 == 3:
            met = "all-\nreduce,\nthen\nx + sum"
            box(panel, x, 0, 0.85, COLORS[3], met, height=2.4, ec="black", lw=0.6)
            meeting.append(x)
            x += 1.05
    for device in range(2):
        panel.text(-0.1, 1.4 * (1 - device) + 0.5, f"device {device}", ha="right", va="center")
        arrow = dict(arrowstyle="->", mutation_scale=10, lw=0.8)
        level = 1.4 * (1 - device) + 0.5
        starts = [1.45 * i + 1.05 * (i // 4) for i in range(8)]
        for left in starts:
            panel.add_patch(FancyArrowPatch((left + 1.25, level), (left + 1.45, level), **arrow))
        panel.add_patch(FancyArrowPatch((meeting[0] + 0.85, level), (starts[4], level), **arrow))
    bare(panel, (-1.2, x), (-0.05, 2.5))
    return figure


DRAWINGS = {
    "fused": fused,
    "longrope-factors": factors,
    "longrope-crossing": crossing,
    "shards": shards,
    "layer": layer,
}


def draw(folder: Path) -> None:
    """Writes NAME.svg for each; their texts stay texts."""
    settings = {"svg.fonttype": "none", "svg.hashsalt": "phi3-jax", "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        for name, make in DRAWINGS.items():
            figure = make()
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    matplotlib.use("agg")
    draw(FOLDER)
