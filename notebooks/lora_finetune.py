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
# # Fine-tune with LoRA
#
# A model learns to do something that it cannot do yet: to number the words of a list. We look at
# the data, train small adapters beside the frozen weights (LoRA), compare the answers before and
# after, and export the result for transformers and PEFT.
#
# On a GPU or TPU with much memory this is `microsoft/Phi-3-mini-4k-instruct`. Anywhere else it is
# `phi3-tiny-demo`, which comes with the package: a toy with the same architecture, not Phi-3. To
# choose yourself, set `MODEL`.

# %%
MODEL = None  # a model folder or a hub id

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
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML

import configs
import phi3_jax as phi3
from train.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from train.evaluate import exact_match
from train.examples import make_example
from train.export import export
from train.loop import train
from train.lora import attach
from train.metrics import METRICS_FILE, read_metrics
from train.peft_format import load_adapter
from train.records import open_records


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
memory = (device.memory_stats() or {}).get("bytes_limit", 0) / 2**30  # of one device
tiny_demo = str(Path(phi3.__file__).parent / "tiny_demo")
if MODEL is None:
    fits = not on_cpu and memory > 20  # and about 16 GB of the host for the export
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
# ## The data
#
# One JSON object a line, with `prompt` and `completion`, or with `messages`. Some of the lines are
# chats of kinds that the small model knows already, so that it does not forget them. Below, what is
# learnt is marked: the answers, and the tokens that end them. The rest is only read.

# %%
data = Path(configs.__file__).parent / "tiny_skill"
tokenizer = phi3.Tokenizer.from_pretrained(MODEL)


def read(split):
    records = open_records(str(data), split)
    return [records[number] for number in range(len(records))]


def marked(record):
    """A record as the model sees it, with what is learnt in colour."""
    example = make_example(record, tokenizer, mask_prompt=True)
    cuts = np.flatnonzero(np.diff(example.learnt)) + 1
    runs = zip(np.split(example.ids, cuts), np.split(example.learnt, cuts), strict=True)
    texts = [(html.escape(tokenizer.decode(ids)), learnt[0]) for ids, learnt in runs]
    return "".join(
        f"<mark style='background: #ffd54f; color: black'>{text}</mark>" if learnt else text
        for text, learnt in texts
    )


records = read("train")
asked = ["prompt" in record for record in records]
print(f"{len(records):,} documents: {sum(asked):,} of the new skill, the others of old kinds")
shown = [records[number] for number in (asked.index(True), asked.index(False), *range(6, 10))]
rows = [f"<tr><td style='text-align: left'>{marked(record)}</td></tr>" for record in shown]
HTML(f"<table>{''.join(rows)}</table>")

# %% [markdown]
# ## Before
#
# Questions that the model was never trained on: 100 of the new skill, and 50 of the old kinds. An
# answer counts if it is right word for word.

# %%
questions = {
    "new skill": read("test")[:100],
    "old kinds": [record for record in read("valid") if "messages" in record],
}


def ask(model, params):
    """How the questions of each kind are answered."""
    return {
        kind: exact_match(model, params, tokenizer, records) for kind, records in questions.items()
    }


def show_score(found):
    rows = [(kind, match.right, match.asked) for kind, match in found.items()]
    return show_table(("", "right", "of"), rows)


mesh = phi3.make_mesh(data=1, fsdp=-1, tensor=1)
model, params = phi3.from_pretrained(MODEL, dtype=DTYPE, mesh=mesh)
before = ask(model, params)
show_score(before)

# %% [markdown]
# ## Train
#
# All settings are in one object. In a shell `phi3-train CONFIG section.name=value ...` does the
# same with a page of `configs/`. A run that was stopped goes on when it is started again with the
# same folder.

# %%
del model, params  # makes room for the run
work = Path(tempfile.mkdtemp(prefix="phi3-"))
tiny = MODEL == tiny_demo
config = TrainConfig(
    folder=str(work / "run"),
    model=ModelConfig(
        path=None if tiny else MODEL,
        dtype=DTYPE,
        frozen_dtype=DTYPE,
        remat="none" if tiny else "full",
    ),
    data=DataConfig(path=str(data), sequence_length=128 if tiny else 256),
    optimizer=OptimizerConfig(learning_rate=5e-3 if tiny else 2e-4, warmup_steps=5),
    lora=LoraConfig(rank=16, alpha=32.0),
    evaluation=EvaluationConfig(every=30, batches=4),
    checkpoint=CheckpointConfig(every=50),
    steps=150,
    batch_size=8,
)
result = train(config)

# %% [markdown]
# The run has written a line for each step into `metrics.jsonl`. The loss of the questions that are
# not learnt (valid) should fall with the other one.

# %%
lines = read_metrics(work / "run" / METRICS_FILE)
figure, panel = plt.subplots(figsize=(8, 3.5), layout="constrained")
for kind, style in (("train", "-"), ("valid", "o--")):
    points = [(line["step"], line["loss"]) for line in lines if line["kind"] == kind]
    panel.plot(*zip(*points, strict=True), style, label=kind)
panel.set(xlabel="step", ylabel="loss of a token, in nats", title=f"{result.step} steps")
panel.legend()
plt.show()

# %% [markdown]
# ## Export
#
# Two ways to hand the result on: the whole model with the adapters added into its weights, as a
# folder that transformers loads, and the adapters alone, as PEFT has them. In a shell this is
# `phi3-train export RUN FOLDER`, with `--adapter` for the second.

# %%
merged, adapter = work / "merged", work / "adapter"
export(config.folder, merged)
export(config.folder, adapter, adapter=True)
rows = [
    (f"{folder.name}/{file.name}", f"{file.stat().st_size / 1e6:,.2f}")
    for folder in (merged, adapter)
    for file in sorted(folder.iterdir())
]
show_table(("file", "megabytes"), rows)

# %% [markdown]
# ## After
#
# We load the merged folder as anybody would, and ask the same questions again. The old kinds tell
# what learning something new has cost.

# %%
model, params = phi3.from_pretrained(merged, dtype=DTYPE, mesh=mesh)
after = ask(model, params)
assert after["new skill"].right > before["new skill"].right

figure, panel = plt.subplots(figsize=(7, 3.5), layout="constrained")
for shift, name, found in ((-0.2, "before", before), (0.2, "after", after)):
    shares = [100 * match.right / match.asked for match in found.values()]
    bars = panel.bar(np.arange(len(shares)) + shift, shares, 0.38, label=name)
    panel.bar_label(bars, fmt="%.0f %%", padding=3)
panel.set_xticks(range(len(questions)), questions)
panel.set(ylabel="right word for word, in %", ylim=(0, 130))
panel.legend(loc="upper center", ncols=2)
plt.show()

# %% [markdown]
# The same as words. What is not marked is right.


# %%
def answered(match, records):
    """The answer to each record: what is not wrong is as the record has it."""
    wrong = {answer.messages[-1]["content"]: answer.answer for answer in match.wrong}
    for record in records:
        messages = record.get("messages") or [{"content": record["prompt"]}, {"content": ""}]
        question = messages[-2]["content"]
        yield question, wrong.get(question), record.get("completion") or messages[-1]["content"]


rows = []
for kind, count in (("new skill", 6), ("old kinds", 4)):
    records = questions[kind][:count]
    pairs = zip(answered(before[kind], records), answered(after[kind], records), strict=True)
    for (question, wrong_before, right), (_, wrong_after, _) in pairs:
        said = [
            right if wrong is None else f"\u2717 {wrong}" for wrong in (wrong_before, wrong_after)
        ]
        rows.append((question, *said))
show_table(("question", "before", "after"), rows)

# %% [markdown]
# ## The adapter alone
#
# It goes beside the weights of the model that it was made for, and every call uses it from then on.
# Adapters that PEFT has trained load in the same way.

# %%
model, params = phi3.from_pretrained(MODEL, dtype=DTYPE, mesh=mesh)
lora, adapters = load_adapter(adapter, model)
chat = phi3.TextGenerator(model, attach(params, adapters, lora), tokenizer)
for text in ("Number these words: lemon, tiger, bell.", "What is the capital of France?"):
    print(chat(text, max_new_tokens=40))

# %% [markdown]
# Elsewhere, `transformers.AutoModelForCausalLM.from_pretrained` loads the merged folder, and
# `peft.PeftModel.from_pretrained(base, folder)` the adapter.
