"""What a model is worth on data: perplexity, and questions answered word for word."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import phi3_jax as phi3
from phi3_jax.loss import IGNORED_LABEL
from phi3_jax.rope import RopeTables, rope_tables
from phi3_jax.sharding import named_sharding, replicate

Messages = Sequence[Mapping[str, str]]

# Prompts that are answered together.
ROWS = 32


class Perplexity(NamedTuple):
    """The mean loss of the tokens that are learnt, in nats; its exponential; how many they are."""

    loss: float
    perplexity: float
    tokens: int


@functools.partial(jax.jit, static_argnames="model")
def summed_loss(
    model: nn.Module, params: Any, batch: Mapping[str, jax.Array], rope: RopeTables
) -> tuple[jax.Array, jax.Array]:
    """The summed loss of a batch, without dropout, and how many tokens it sums over.

    Args:
      model: a Phi3ForCausalLM (static); of its mesh are the other arguments.
      params: its parameters, adapters of LoRA included where there are some.
      batch: input_ids, labels and segment_ids, int32 [A, B, T]; the A parts follow one another.
      rope: tables of at least T positions.

    Returns:
      float32 and int32 scalars.
    """

    def part(total, rows):
        out: Any = model.apply(
            {"params": params},
            rows["input_ids"],
            labels=rows["labels"],
            segment_ids=rows["segment_ids"],
            num_items_in_batch=1,
            rope=rope,
        )
        return total + out.loss, (rows["labels"] != IGNORED_LABEL).sum()

    total, counts = jax.lax.scan(part, jnp.zeros((), jnp.float32), dict(batch))
    return total, counts.sum()


def perplexity(model: nn.Module, params: Any, batches: Iterable[Mapping[str, Any]]) -> Perplexity:
    """The perplexity of batches, one after the other.

    Args:
      model: a Phi3ForCausalLM with the mesh that the parameters are on, or None.
      params: its parameters.
      batches: as `summed_loss` takes them, all of one shape: numpy arrays with all rows (the same
        in every process), or arrays that are on the mesh already.

    Raises:
      ValueError: where nothing is learnt in any of them.
    """
    tables = functools.cache(
        lambda length: replicate(rope_tables(model.config, length), model.mesh)
    )
    total, tokens = 0.0, 0
    for batch in batches:
        placed = {name: _on_mesh(array, model.mesh) for name, array in batch.items()}
        loss, count = summed_loss(model, params, placed, tables(placed["labels"].shape[-1]))
        total, tokens = total + float(loss), tokens + int(count)
    if not tokens:
        raise ValueError(
            "there is no token to learn in these batches, and so no perplexity; is the data empty, "
            "or longer than a row?"
        )
    loss = total / tokens
    return Perplexity(loss, math.inf if loss > 700 else math.exp(loss), tokens)


def _on_mesh(array: Any, mesh: Mesh | None) -> Any:
    if mesh is None or isinstance(array, jax.Array):
        return array
    sharding = named_sharding((None, "batch", None), array.shape, mesh)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def answers(
    model: nn.Module,
    params: Any,
    tokenizer: phi3.Tokenizer,
    prompts: Sequence[Messages],
    max_new_tokens: int,
) -> list[str]:
    """What the model says to each conversation, decoded greedily.

    Prompts of similar length go together; one program decodes them all, and one for each of a few
    widths reads them.

    Raises:
      ValueError: for messages that are none, and as `phi3_jax.generate`.
    """
    if not prompts:
        return []
    rows = [tokenizer.apply_chat_template(m, add_generation_prompt=True) for m in prompts]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    longest, together = len(rows[order[-1]]), min(ROWS, len(rows))
    found = [""] * len(rows)
    for start in range(0, len(rows), together):
        some = order[start : start + together]
        # The last ones are filled up: another number of rows would be another program.
        filled = some + some[-1:] * (together - len(some))
        input_ids, attention_mask = tokenizer.pad([rows[index] for index in filled])
        result = phi3.generate(
            model,
            params,
            input_ids,
            attention_mask,
            max_new_tokens=max_new_tokens,
            max_cache_len=longest + max_new_tokens,
            do_sample=False,
        )
        new_tokens = result.sequences[: len(some), input_ids.shape[1] :]
        for index, row in zip(some, new_tokens, strict=True):
            found[index] = tokenizer.decode(row, skip_special_tokens=True)
    return found


def questions(records: Iterable[Mapping[str, Any]]) -> list[tuple[Messages, str]]:
    """The conversation of each record up to its answer, and that.

    Args:
      records: each with "messages", the last one the assistant's, or "prompt" and "completion". A
        value of None is as none.

    Raises:
      ValueError: for a record that asks nothing, by its number.
    """
    return [_question(number, record) for number, record in enumerate(records)]


class WrongAnswer(NamedTuple):
    """A conversation, the answer that its record gives, and the model's."""

    messages: Messages
    expected: str
    answer: str


class ExactMatch(NamedTuple):
    """How many questions were answered as the data answers them, of how many; and the others."""

    right: int
    asked: int
    wrong: list[WrongAnswer]


def exact_match(
    model: nn.Module,
    params: Any,
    tokenizer: phi3.Tokenizer,
    records: Iterable[Mapping[str, Any]],
) -> ExactMatch:
    """Compares greedy answers with those of the data, but for white space around them.

    Args:
      model: as in `answers`.
      params: as in `answers`.
      tokenizer: as in `answers`.
      records: as in `questions`.

    Raises:
      ValueError: as `questions` and `answers`.
    """
    asked = questions(records)
    if not asked:
        return ExactMatch(0, 0, [])
    # A longer answer is wrong whatever it says; the one more is the token that ends it.
    room = 1 + max(len(tokenizer.encode(expected, False)) for _, expected in asked)
    said = answers(model, params, tokenizer, [messages for messages, _ in asked], room)
    wrong = [
        WrongAnswer(messages, expected, answer)
        for (messages, expected), answer in zip(asked, said, strict=True)
        if answer.strip() != expected.strip()
    ]
    return ExactMatch(len(asked) - len(wrong), len(asked), wrong)


def _question(number: int, record: Mapping[str, Any]) -> tuple[Messages, str]:
    given = {key: value for key, value in record.items() if value is not None}
    if "prompt" in given and "completion" in given:
        return [{"role": "user", "content": given["prompt"]}], given["completion"]
    messages = given.get("messages") or [{}]
    if len(messages) < 2 or messages[-1].get("role") != "assistant":
        raise ValueError(
            f"record {number} (from 0) has no question with an answer: it needs messages that end "
            f"with the assistant's, or prompt and completion; its keys are {sorted(given)}"
        )
    return messages[:-1], messages[-1]["content"]
