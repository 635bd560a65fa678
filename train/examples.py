"""One record becomes the tokens of a document, and which of them are learnt."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import phi3_jax as phi3

# What a record may be, told by its keys; it may have others, which are ignored.
KINDS = (("messages",), ("prompt", "completion"), ("text",))


class Example(NamedTuple):
    """A document: its token ids, int32 [n], and which are learnt, bool [n]."""

    ids: np.ndarray
    learnt: np.ndarray


def make_example(
    record: Mapping[str, Any], tokenizer: phi3.Tokenizer, mask_prompt: bool
) -> Example:
    """The document of a record.

    Args:
      record: {"messages": [...]} is a conversation; {"prompt": str, "completion": str} one of a
        user's and an assistant's message; {"text": str} stands for itself, ends with eos and is
        learnt as a whole. A value of None is as none.
      tokenizer: its chat template makes the text of a conversation.
      mask_prompt: of conversations, learn what the assistant says and the tokens that end it, such
        as <|end|> and the template's <|endoftext|> at the end of all; else learn everything. A
        token's id does not matter to this, so an eos that also serves as padding is learnt too.

    Raises:
      ValueError: for a record that is none of these or several, or that nothing can be learnt
        from; with the reason.
    """
    given = {key for key, value in record.items() if value is not None}
    kinds = [keys for keys in KINDS if given.issuperset(keys)]
    if len(kinds) != 1:
        found = " and ".join(map("/".join, kinds)) or f"the keys {', '.join(record) or '(none)'}"
        raise ValueError(f"has {found}; it must have one of messages, prompt/completion, or text")
    if record.get("tools"):
        raise ValueError("has tools, which are not supported; remove them or the record")
    if kinds[0] == ("text",):
        ids = _text_ids(record["text"], tokenizer)
        learnt = np.ones(len(ids), bool)
    else:
        messages: Any = record.get("messages")
        if kinds[0] == ("prompt", "completion"):
            messages = [
                {"role": "user", "content": record["prompt"]},
                {"role": "assistant", "content": record["completion"]},
            ]
        ids = tokenizer.apply_chat_template(messages)  # which refuses what are no messages
        _check_conversation(messages)
        learnt = np.ones(len(ids), bool)
        if mask_prompt:
            learnt = _answers(messages, ids, tokenizer)
    if not learnt[1:].any():
        raise ValueError(
            f"has nothing to learn in its {len(ids)} token(s); after the first, it must have one "
            "that is learnt"
        )
    return Example(np.asarray(ids, np.int32), learnt)


def _text_ids(text: Any, tokenizer: phi3.Tokenizer) -> list[int]:
    if not isinstance(text, str) or not text:
        raise ValueError(f"its text is {text!r}, must be a string that is not empty")
    ids, eos = tokenizer.encode(text), tokenizer.eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def _check_conversation(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuses what a template would write down, but no chat model should learn."""
    for index, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role == "tool" or message.get("tool_calls"):
            raise ValueError(f"message {index} is of a tool, which is not supported; take it out")
        if role != "system" and not content.strip():
            raise ValueError(f"message {index} (role {role!r}) is empty; it must have some text")
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if "assistant" not in roles:
        raise ValueError("has nothing to learn; it must have a message of the assistant")
    if roles[0] == "assistant":
        raise ValueError("begins with the assistant; there must be something to answer before")


def _answers(
    messages: Sequence[Mapping[str, Any]], ids: list[int], tokenizer: phi3.Tokenizer
) -> np.ndarray:
    """Which of a conversation's tokens are the assistant's, with those that end its turns.

    No more is known of the template than that a conversation's beginning is written as without the
    rest. Ids are compared and not texts: a token may take the white space before or after it.
    """
    learnt = np.zeros(len(ids), bool)
    known = ("", 0)  # a beginning of the conversation, and how many ids it has
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opening = tokenizer.apply_chat_template(messages[:turn], True, tokenize=False)
        closed = None
        if turn + 1 < len(messages):
            closed = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
        # Tokenising each text from its beginning is right whatever the vocabulary, but its time is
        # quadratic in the turns; from the last opening on it is mostly right, and told if not.
        span = _span(opening, closed, *known, ids, tokenizer)
        span = span or _span(opening, closed, "", 0, ids, tokenizer)
        if span is None:
            raise ValueError(
                f"the chat template writes message {turn} otherwise in the whole conversation than "
                "where it is the last one, so that its tokens cannot be told; set "
                "data.mask_prompt=false, or give the model a template that only adds"
            )
        learnt[slice(*span)] = True
        known = (opening, span[0])
    return learnt


def _span(
    opening: str,
    closed: str | None,
    text: str,
    place: int,
    ids: list[int],
    tokenizer: phi3.Tokenizer,
) -> tuple[int, int] | None:
    """Where a turn's ids begin and end, None if `opening` and `closed` are no such beginnings.

    Args:
      opening: the conversation before the turn, with the opening of an answer.
      closed: the conversation up to the turn; None where the turn is the last.
      text, place: text that both begin with, and how many of the ids it is.
      ids: of the whole conversation.
    """
    if not opening.startswith(text) or not (closed or opening).startswith(text):
        return None
    before = tokenizer.encode(opening[len(text) :], add_special_tokens=False)
    start, end = place + len(before), len(ids)
    if ids[place:start] != before:
        return None
    if closed is not None:
        after = tokenizer.encode(closed[len(text) :], add_special_tokens=False)
        same = _agreement(after, ids[place:])
        # What is written after a last turn only, such as <|endoftext|>.
        if not tokenizer.special_ids.issuperset(after[same:]):
            return None
        end = place + same
    return (start, end) if start < end else None


def _agreement(first: list[int], second: list[int]) -> int:
    """How many ids two rows have in common at their beginning."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))
