# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Convert and verify
#
# A model folder from Hugging Face becomes an Orbax checkpoint and comes back, and we check that no
# bit has changed. Then we load it on several devices and look at which of them holds what.
#
# On a GPU or TPU with enough memory this is `microsoft/Phi-3-mini-4k-instruct` (a download of
# 7.6 GB, and twice as much again on the disk). Anywhere else it is `phi3-tiny-demo`, which comes
# with the package: a toy with the same architecture, not Phi-3. To choose yourself, set `MODEL`.

# %%
MODEL = None  # a folder with safetensors, or a hub id

# %% [markdown]
# Installing, from the checkout that this notebook lies in: nothing happens here where all is there.

# %%
import importlib.util
import subprocess
import sys
from pathlib import Path

folders = [folder for folder in (Path.cwd(), Path.cwd().parent) if (folder / "phi3_jax").is_dir()]
sys.path[:0] = map(str, folders)
if importlib.util.find_spec("phi3_jax") is None:
    raise ImportError(
        f"{Path.cwd()} is no checkout of phi3-jax, nor its notebooks/; "
        "open the notebook where it lies, or change into a checkout by %cd"
    )
if any(importlib.util.find_spec(name) is None for name in ("flax", "grain", "matplotlib")):
    # A plugin of jax for an accelerator has to be of the same version as jax.
    plugins = {"libtpu": "tpu", "jax_cuda12_plugin": "cuda12", "jax_cuda13_plugin": "cuda13"}
    extras = [extra for name, extra in plugins.items() if importlib.util.find_spec(name)]
    package = f"{folders[0] if folders else 'phi3-jax'}[{','.join(['train', *extras])}]"
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, package, "huggingface_hub", "matplotlib"], check=True)

# %% [markdown]
# ## The device
#
# Without an accelerator the CPU plays eight devices, so that there is something to share between.

# %%
import html
import os
import tempfile
import time

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")  # jax reads it when it is imported

import jax
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML
from matplotlib.patches import Rectangle

import phi3_jax as phi3
from convert.inspect_folder import inspect_folder
from convert.to_hf import to_hf
from convert.to_orbax import to_orbax
from convert.verify import verify
from phi3_jax.checkpoint import open_weights
from phi3_jax.folder import find_folder


def show_table(head, rows):
    """A table of texts and numbers."""

    def line(tag, cells):
        cells = "".join(
            f"<{tag} style='text-align: left'>{html.escape(str(cell))}</{tag}>" for cell in cells
        )
        return f"<tr>{cells}</tr>"

    return HTML(f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>")


device = jax.devices()[0]
on_cpu = device.platform == "cpu"
memory = sum((d.memory_stats() or {}).get("bytes_limit", 0) for d in jax.local_devices()) / 2**30
if MODEL is None:
    fits = not on_cpu and memory > 10  # 7.2 GiB of weights, and the key-value cache
    tiny_demo = str(Path(phi3.__file__).parent / "tiny_demo")
    MODEL = "microsoft/Phi-3-mini-4k-instruct" if fits else tiny_demo
DTYPE = "float32" if on_cpu else "bfloat16"
memory_text = "that of the host" if on_cpu else f"{memory:.1f} GiB for jax"
device_rows = [
    ("device", f"{jax.device_count()} x {device.device_kind}"),
    ("memory", memory_text),
    ("model", MODEL),
    ("dtype", DTYPE),
]
show_table(("", "here"), device_rows)

# %% [markdown]
# ## What is in the folder
#
# Hugging Face has one tensor for each weight of each layer. Here, all layers of a weight are one
# array (a leaf) with the layers along its first axis, and the axes that were folded together stand
# apart: the heads of `qkv_proj`, the two halves of `gate_up_proj`. The table shows the first layer,
# and what stands outside of the layers.

# %%
source = find_folder(MODEL)  # downloads a hub id
weights = open_weights(source, phi3.Phi3Config.from_pretrained(source))
layout = weights.table
rows = [
    (layout.hf_name(path, layer), layout.hf_shape(path), ".".join(path), leaf.shape, leaf.dtype)
    for path, layer in layout.parts
    if layer in (None, 0)
    for leaf in [weights.leaves[path]]
]
show_table(("tensor in the file", "shape", "leaf here", "shape", "dtype"), rows)

# %% [markdown]
# ## There and back
#
# Both conversions stream: no more than a few layers are in memory at a time, and a folder appears
# whole or not at all. In a shell these are `phi3-convert to-orbax` and `phi3-convert to-hf`.

# %%
work = Path(tempfile.mkdtemp(prefix="phi3-"))
orbax, back = work / "orbax", work / "back"
seconds = {}
for name, convert, start, end in (
    ("to Orbax", to_orbax, source, orbax),
    ("to Hugging Face", to_hf, orbax, back),
):
    began = time.perf_counter()
    convert(start, end)
    seconds[name] = time.perf_counter() - began


def megabytes(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


rows = [
    ("as it came", f"{megabytes(source):,.1f}", ""),
    *(
        (name, f"{megabytes(folder):,.1f}", f"{seconds[name]:.1f}")
        for name, folder in (("to Orbax", orbax), ("to Hugging Face", back))
    ),
]
show_table(("folder", "megabytes", "seconds"), rows)

# %% [markdown]
# This is what `phi3-convert inspect` says about the converted folder. It reads no weights.

# %%
text, problems = inspect_folder(orbax)
print(text)
assert not problems, problems

# %% [markdown]
# ## Are they equal?
#
# `verify` compares every tensor bit by bit, whatever the formats. A check that cannot fail says
# little, so the last row changes one bit in a copy and compares again.

# %%
comparisons = {
    "as it came and Orbax": verify(source, orbax),
    "as it came and back": verify(source, back),
}
assert not any(found.differences for found in comparisons.values())

file = sorted(back.glob("*.safetensors"))[0]
with open(file, "r+b") as changed:
    changed.seek(-1, 2)
    last = changed.read(1)[0]
    changed.seek(-1, 2)
    changed.write(bytes([last ^ 1]))
comparisons["as it came and back, one bit changed"] = verify(source, back)

rows = [
    (name, found.tensors, f"{found.nbytes:,}", "; ".join(found.differences) or "equal")
    for name, found in comparisons.items()
]
show_table(("folders", "tensors", "bytes", "result"), rows)

# %% [markdown]
# ## On several devices
#
# A mesh gives the devices a shape. Along `fsdp` the weights are cut by their width, along `tensor`
# by heads, by the inner width of the mlp, and by vocabulary. Each device reads only what it will
# hold. One device is a mesh as well; there, nothing is cut.

# %%
fsdp = 2 if jax.device_count() % 2 == 0 else 1
mesh = phi3.make_mesh(data=1, fsdp=fsdp, tensor=-1)
model, params = phi3.from_pretrained(orbax, dtype=DTYPE, mesh=mesh)
gate_up = params["model"]["layers"]["mlp"]["gate_up_proj"]["weight"]
print(f"The mesh: {dict(mesh.shape)}")
print(f"mlp.gate_up_proj has the shape {gate_up.shape} and the sharding {gate_up.sharding.spec}")
print("Its first layer, gate only, by the number of the device:")
jax.debug.visualize_array_sharding(gate_up[0, 0])

# %% [markdown]
# The same for one layer of each kind of weight. A colour is a device, and the number is its own. A
# piece with several numbers is held by each of them.


# %%
def draw_shards(panel, leaf, axes, title):
    """Which device holds what of a leaf, along two of its axes."""
    holders = {}
    for shard in leaf.addressable_shards:
        cut = tuple(shard.index[axis].indices(leaf.shape[axis])[:2] for axis in axes)
        holders.setdefault(cut, set()).add(shard.device.id)
    for ((top, bottom), (left, right)), devices in holders.items():
        color = plt.get_cmap("tab20")(min(devices) % 20)
        place = ((left, top), right - left, bottom - top)
        panel.add_patch(Rectangle(*place, facecolor=color, edgecolor="white", linewidth=2))
        label = ", ".join(map(str, sorted(devices)))
        panel.text((left + right) / 2, (top + bottom) / 2, label, ha="center", va="center")
    rows, columns = (leaf.shape[axis] for axis in axes)
    panel.set(title=title, xlim=(0, columns), ylim=(rows, 0), xticks=[0, columns], yticks=[0, rows])


layers = params["model"]["layers"]
figure, panels = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
for panel, leaf, axes, title in (
    (panels[0, 0], params["model"]["embed_tokens"]["weight"], (0, 1), "embedding: token, width"),
    (panels[0, 1], layers["self_attn"]["qkv_proj"]["weight"], (1, 4), "qkv: kv head, width"),
    (panels[0, 2], layers["self_attn"]["o_proj"]["weight"], (1, 2), "o: width, kv head"),
    (panels[1, 0], layers["mlp"]["gate_up_proj"]["weight"], (2, 3), "gate and up: inner, width"),
    (panels[1, 1], layers["mlp"]["down_proj"]["weight"], (1, 2), "down: width, inner"),
    (panels[1, 2], layers["input_layernorm"]["weight"], (0, 1), "norm: layer, width"),
):
    draw_shards(panel, leaf, axes, title)
plt.show()

# %% [markdown]
# How much that is for each device. The line is an equal share of the model; what is above it are
# weights that several devices hold, and zeros that fill up what the mesh does not divide.

# %%
held = dict.fromkeys([device.id for device in mesh.devices.flat], 0.0)
for leaf in jax.tree.leaves(params):
    for shard in leaf.addressable_shards:
        held[shard.device.id] += shard.data.nbytes / 1e6
size = sum(np.prod(layout.shape(path)) for path in layout.weights) * gate_up.dtype.itemsize / 1e6

figure, panel = plt.subplots(figsize=(8, 3), layout="constrained")
names = [str(id) for id in sorted(held)]
panel.bar_label(panel.bar(names, [held[id] for id in sorted(held)]), fmt="%.2f", padding=3)
panel.axhline(size / len(held), color="black", linestyle="--", label="an equal share")
panel.set(xlabel="device", ylabel="megabytes", title=f"The model has {size:,.1f} megabytes")
panel.margins(y=0.35)
panel.legend(loc="upper right")
plt.show()

# %% [markdown]
# And it answers, on all of them together.

# %%
chat = phi3.TextGenerator(model, params, phi3.Tokenizer.from_pretrained(orbax))
print(chat("What is the capital of France?", max_new_tokens=60))
