"""Makes phi3-tiny-demo, the embedded default model, from nothing:

    python -m train.tiny_demo.build --out DIR [--steps N] [--force]

It draws chats from tasks.py, trains a SentencePiece vocabulary on them, trains the model from
scratch, grades the rounded weights on held-out questions, and writes a Hugging Face folder with a
model card. Seeds are fixed: the same versions on the same machine make the same chats.
"""

import argparse
import io
import itertools
import json
import shutil
import string
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import sentencepiece

import phi3_jax as phi3
from phi3_jax.folder import staged_folder
from phi3_jax.loss import IGNORED_LABEL
from train.optimizer import matrix_axes
from train.tiny_demo.tasks import KINDS, Chat, held_out_chats, training_chats

STEPS = 2600
PEAK_LEARNING_RATE = 4e-3
# Chats are padded to the next of these widths, and a batch holds chats of one width: few programs
# to compile, and little padding.
WIDTHS = (24, 32, 48, 72, 112)
TOKENS_A_BATCH = 2048

VOCAB_SIZE = 1024
PIECES = 1016
# Right behind the pieces, in the order of Phi-3's own; the last rows of the embedding stay unused.
ADDED_TOKENS = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] "
    "+ '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
    "{% else %}{{ eos_token }}{% endif %}"
)
TOKENIZER_CHATS = 20_000


class Example(NamedTuple):
    """A chat as tokens: what is given, and what the model has to say."""

    prompt: list[int]
    answer: list[int]


def write_tokenizer(folder: Path) -> None:
    """Trains the vocabulary on chats and writes tokenizer.model and tokenizer_config.json."""
    chats = itertools.islice(training_chats(seed=1), TOKENIZER_CHATS)
    texts = (
        text for chat in chats for text in (*(m["content"] for m in chat.messages), chat.answer)
    )
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts,
        model_writer=proto,
        model_type="bpe",
        vocab_size=PIECES,
        # Nothing in a text is changed: newlines and runs of spaces come back as they were.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        byte_fallback=True,
        character_coverage=1.0,
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(proto.getvalue())

    def entry(content: str, special: bool = True, rstrip: bool = False) -> dict[str, Any]:
        flags = dict(lstrip=False, normalized=False, rstrip=rstrip, single_word=False)
        return {"content": content, **flags, "special": special}

    added = {0: entry("<unk>"), 1: entry("<s>"), 2: entry("</s>", special=False, rstrip=True)}
    for id, content in enumerate(ADDED_TOKENS, start=PIECES):
        # The chat tokens swallow the newlines that the template writes after them, as Phi-3's do.
        added[id] = entry(content, rstrip=content != "<|endoftext|>")
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": added,
        "bos_token": "<s>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "legacy": False,
        "model_max_length": 512,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def model_config() -> phi3.Phi3Config:
    """The sizes of phi3-tiny-demo: 1.77 million parameters."""
    end_of_text = PIECES + ADDED_TOKENS.index("<|endoftext|>")
    return phi3.Phi3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        original_max_position_embeddings=512,
        # Phi-3's 0.02 is for a width of 3072; at this width a model would wake up late from it.
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )


def new_model() -> phi3.Phi3ForCausalLM:
    """The untrained model, with the settings of generation that its folder will have."""
    config = model_config()
    end_of_text, end = (PIECES + ADDED_TOKENS.index(t) for t in ("<|endoftext|>", "<|end|>"))
    settings = phi3.GenerationConfig(
        bos_token_id=1, eos_token_id=(end_of_text, end), pad_token_id=end_of_text
    )
    return phi3.Phi3ForCausalLM(config, generation_config=settings)


def encode(tokenizer: phi3.Tokenizer, chat: Chat) -> Example:
    """The tokens of a chat; the answer ends with <|end|>."""
    prompt = tokenizer.apply_chat_template(chat.messages, add_generation_prompt=True)
    return Example(prompt, tokenizer.encode(chat.answer + "<|end|>"))


def batches(tokenizer: phi3.Tokenizer, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless training batches: int32 input_ids and labels [rows, width], padded on the right.

    Only the answers are learnt. Padding needs no mask: no token that counts comes after it.
    """
    waiting: dict[int, list[Example]] = {width: [] for width in WIDTHS}
    for chat in training_chats(seed):
        example = encode(tokenizer, chat)
        length = len(example.prompt) + len(example.answer)
        width = next((width for width in WIDTHS if length <= width), None)
        if width is None:
            continue
        rows = waiting[width]
        rows.append(example)
        if len(rows) < TOKENS_A_BATCH // width:
            continue
        waiting[width] = []
        input_ids = np.full((len(rows), width), tokenizer.pad_token_id, np.int32)
        labels = np.full((len(rows), width), IGNORED_LABEL, np.int32)
        for index, (prompt, answer) in enumerate(rows):
            stop = len(prompt) + len(answer)
            input_ids[index, :stop] = prompt + answer
            labels[index, len(prompt) : stop] = answer
        yield input_ids, labels


def train(
    model: phi3.Phi3ForCausalLM, tokenizer: phi3.Tokenizer, steps: int
) -> tuple[Any, list[float]]:
    """Trains from scratch in float32; returns the parameters and the loss of every step."""
    params = nn.meta.unbox(model.init(jax.random.key(0), np.zeros((1, 8), np.int32))["params"])
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, PEAK_LEARNING_RATE, min(100, steps // 10 + 1), steps + 1
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            schedule,
            weight_decay=0.05,
            adam_b2=0.98,
            muon_weight_dimension_numbers=matrix_axes,
            consistent_rms=0.2,
        ),
    )
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, input_ids, labels):
        def loss_of(params):
            out: Any = model.apply({"params": params}, input_ids, labels=labels)
            return out.loss

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    start = time.perf_counter()
    for batch in itertools.islice(batches(tokenizer, seed=2), steps):
        params, state, loss = step(params, state, *batch)
        losses.append(float(loss))
        if len(losses) % 100 == 0:
            recent = sum(losses[-100:]) / 100
            seconds = time.perf_counter() - start
            print(f"step {len(losses)}/{steps}  loss {recent:.4f}  {seconds:.0f} s", flush=True)
    return params, losses


def answers(
    model: phi3.Phi3ForCausalLM, params: Any, tokenizer: phi3.Tokenizer, chats: Sequence[Chat]
) -> list[str]:
    """What the model says to each chat, decoded greedily."""
    prompts = [encode(tokenizer, chat).prompt for chat in chats]
    input_ids, attention_mask = tokenizer.pad(prompts)
    result = phi3.generate(model, params, input_ids, attention_mask, max_new_tokens=80)
    new_tokens = result.sequences[:, input_ids.shape[1] :]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in new_tokens]


def grade(
    model: phi3.Phi3ForCausalLM, params: Any, tokenizer: phi3.Tokenizer, chats: Sequence[Chat]
) -> tuple[Counter[str], Counter[str]]:
    """Counts of exactly right answers and of questions, by kind; prints the wrong ones."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for start in range(0, len(chats), 64):
        some = chats[start : start + 64]
        for chat, answer in zip(some, answers(model, params, tokenizer, some), strict=True):
            asked[chat.kind] += 1
            right[chat.kind] += answer == chat.answer
            if answer != chat.answer:
                print(f"{chat.messages[-1]['content']!r}: {answer!r}, not {chat.answer!r}")
    return right, asked


CARD = """\
# phi3-tiny-demo

A toy, made to try phi3-jax without downloading anything. **It is not Phi-3**: it has Phi-3's
architecture and chat format, {parameters:,} parameters (Phi-3-mini has 3,821,079,552), was trained
from scratch in minutes, and knows the {kinds} kinds of small tasks below and nothing else. It
answers everything it is asked, mostly wrongly outside of those. Nothing about Phi-3's quality can
be learnt from it. Its text and weights come from the generator in `train/tiny_demo/tasks.py`; no
other data was used. Same licence as phi3-jax.

## Exact match on held-out questions

{right} of {asked} ({share:.3f}) answered word for word, decoded greedily in float32 from the
bfloat16 weights of this folder. Of sums, lists, comparisons and stories, the arguments were never
trained on in any wording; of capitals, opposites, calendar, spelling, colors and plurals the
question in this wording was not, the fact in another wording may have been; of greetings and
questions about the model itself, that combination of phrases was not.

| kind | right | asked | exact match |
|---|---|---|---|
{rows}
| **overall** | {right} | {asked} | {share:.3f} |

These questions are at most 30 of each kind, and errors on them in trials decided which kinds were
made easier. A second draw, at most 100 of each kind and so with more of the hard ones, was only
graded at the end: {more_right} of {more_asked} ({more_share:.3f}).

## Training

`{command}`

{date}, {steps} steps of about {tokens} tokens, {seconds:.0f} s on CPU in float32; loss over the
last 100 steps {loss:.4f}. Seeds are fixed; another machine or another version of jax rounds
differently and gives a slightly different model.
"""


def card(
    model: phi3.Phi3ForCausalLM,
    first: tuple[Counter[str], Counter[str]],
    second: tuple[Counter[str], Counter[str]],
    losses: Sequence[float],
    seconds: float,
) -> str:
    """The model card, README.md of the folder; `first` and `second` come from `grade`."""
    right, asked = first
    more_right, more_asked = (counts.total() for counts in second)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    rows = [f"| {k} | {right[k]} | {asked[k]} | {right[k] / asked[k]:.3f} |" for k in KINDS]
    return CARD.format(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(shapes)),
        kinds=len(KINDS),
        right=right.total(),
        asked=asked.total(),
        share=right.total() / asked.total(),
        more_right=more_right,
        more_asked=more_asked,
        more_share=more_right / more_asked,
        rows="\n".join(rows),
        command=f"python -m train.tiny_demo.build --out DIR --steps {len(losses)}",
        date=date.today(),
        steps=len(losses),
        tokens=TOKENS_A_BATCH,
        seconds=seconds,
        loss=sum(losses[-100:]) / len(losses[-100:]),
    )


def build(out: Path, steps: int, force: bool = False) -> None:
    """Trains, grades and writes the whole folder.

    Raises:
      FileExistsError: where the folder exists, without force.
    """
    with staged_folder(out, force) as stage, tempfile.TemporaryDirectory() as work:
        parts = Path(work)
        write_tokenizer(parts)
        tokenizer = phi3.Tokenizer.from_pretrained(parts)
        model = new_model()
        start = time.perf_counter()
        params, losses = train(model, tokenizer, steps)
        seconds = time.perf_counter() - start
        rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        # What is graded is what is shipped.
        first = grade(model, rounded, tokenizer, held_out_chats())
        second = grade(model, rounded, tokenizer, held_out_chats(per_kind=100, seed=1))
        phi3.save_pretrained(parts / "model", model, rounded)
        for file in (*parts.glob("tokenizer*"), *(parts / "model").iterdir()):
            shutil.move(file, stage)
        (stage / "README.md").write_text(card(model, first, second, losses, seconds))
    right, asked = (counts.total() for counts in first)
    print(f"{right} of {asked} held-out answers are right; wrote {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and write phi3-tiny-demo.")
    parser.add_argument("--out", type=Path, required=True, help="the new folder")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps (%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace a folder that is there")
    arguments = parser.parse_args()
    build(arguments.out, arguments.steps, arguments.force)


if __name__ == "__main__":
    main()
