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
# # Quickstart
#
# Load a Phi-3, talk to it, and look at what it thinks comes next.
#
# The notebook takes the device that is here. On a GPU or TPU with enough memory it downloads
# `microsoft/Phi-3-mini-4k-instruct` (7.6 GB). Anywhere else it takes `phi3-tiny-demo`, which comes
# with the package. That one is a toy and not Phi-3: it knows a few small tasks, such as capitals,
# sums and very short stories. To choose yourself, set `MODEL`.

# %%
MODEL = None  # a model folder or a hub id, such as "microsoft/Phi-3.5-mini-instruct"

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

# %%
import html

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML

import phi3_jax as phi3


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
# ## Load
#
# `model` is a Flax module and holds no weights; `params` is a plain tree of arrays.

# %%
mesh = phi3.make_mesh(data=1, fsdp=1, tensor=-1)  # all devices share the work
model, params = phi3.from_pretrained(MODEL, dtype=DTYPE, mesh=mesh)
tokenizer = phi3.Tokenizer.from_pretrained(MODEL)
leaves = jax.tree.leaves(params)
rows = [
    ("parameters", f"{sum(leaf.size for leaf in leaves):,}"),
    ("megabytes", f"{sum(leaf.nbytes for leaf in leaves) / 1e6:,.1f}"),
    ("layers", model.config.num_hidden_layers),
    ("width", model.config.hidden_size),
    ("tokens in the vocabulary", f"{model.config.vocab_size:,}"),
    ("longest text, in tokens", f"{model.config.max_position_embeddings:,}"),
]
show_table(("", "this model"), rows)

# %% [markdown]
# ## Chat
#
# The first answer takes longest, since the programs are compiled then. Later ones use them again.

# %%
chat = phi3.TextGenerator(model, params, tokenizer, mesh=mesh)
print(chat("What is the capital of France?", max_new_tokens=60))

# %% [markdown]
# Each call stands alone. A conversation goes on by passing what was said before.

# %%
messages = [
    {"role": "user", "content": "My name is Nina."},
    {"role": "assistant", "content": "Hello, Nina! How can I help you?"},
    {"role": "user", "content": "What is my name?"},
]
print(chat(messages, max_new_tokens=60))

# %% [markdown]
# `stream` gives each piece of the answer as soon as it is there. A temperature above 0 draws the
# tokens instead of taking the most likely ones; the same seed draws the same answer.

# %%
story = "Write a short story with a mouse and a hat."
for piece in chat.stream(story, temperature=0.8, seed=1, max_new_tokens=80):
    print(piece, end="", flush=True)

# %% [markdown]
# ## What comes next?
#
# For each text the model gives a score (logit) to every token of the vocabulary, and softmax makes
# probabilities of them. Below, the beginning of an answer is given, and the bars are the tokens
# that the model finds most likely to follow. Of the capital it is sure; of where a cat lives it is
# not.


# %%
def next_tokens(question, beginning, count=8):
    """The most likely next tokens of an answer that has begun, with their probabilities."""
    asked = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    ids = tokenizer.encode(text + beginning)
    logits = model.apply({"params": params}, [ids]).logits[0, -1]
    probabilities = np.asarray(jax.nn.softmax(logits.astype(jnp.float32)))
    best = np.argsort(-probabilities)[:count]
    return [repr(tokenizer.decode(id)) for id in best], probabilities[best]


figure, panels = plt.subplots(1, 2, figsize=(11, 3.5), layout="constrained")
for panel, question, beginning in (
    (panels[0], "What is the capital of France?", "The capital of France is"),
    (panels[1], "Tell me a story about a cat and a hat.", "Once upon a time, a cat lived in the"),
):
    tokens, probabilities = next_tokens(question, beginning)
    bars = panel.barh(tokens[::-1], probabilities[::-1])
    panel.bar_label(bars, fmt="%.2f", padding=3)
    panel.set(title=f"{beginning} ...", xlabel="probability", xlim=(0, 1.12))
plt.show()

# %% [markdown]
# ## Several at once
#
# Prompts of unequal length are padded on the left, and answered together. `mask` tells the model
# which tokens are padding.

# %%
questions = [
    "What is 7 + 5?",
    "What is the opposite of hot?",
    "Sort these numbers: 20, 4, 11.",
    "Reverse this list: kite, horse, green.",
]
prompts = [
    tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    for text in questions
]
ids, mask = tokenizer.pad(prompts)
result = phi3.generate(model, params, ids, mask, max_new_tokens=30)
answers = [
    tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True) for row in result.sequences
]
show_table(("question", "answer"), zip(questions, answers, strict=True))

# %% [markdown]
# Next: `convert_and_verify.ipynb` on files, meshes and devices, and `lora_finetune.ipynb`, which
# teaches the model something new.
