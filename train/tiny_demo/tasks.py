"""Chats for training and grading a tiny model, drawn from kinds.py and split in two.

Everything is written here, so there is no data set and no licence to mind. Chats are drawn from a
`random.Random`: the same seed gives the same chats on every machine. A checksum of a question's
key alone decides whether it is held out, so a question is never on both sides of the split.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from train.tiny_demo import kinds
from train.tiny_demo.kinds import Question

HELD_OUT_ONE_IN = 8

# How often each kind is drawn: the open kinds need more examples than the lists that are learnt.
KINDS: dict[str, tuple[Callable[[random.Random], Question], int]] = {
    "greeting": (kinds.greeting, 2),
    "identity": (kinds.identity, 2),
    "capital": (kinds.capital, 3),
    "opposite": (kinds.opposite, 2),
    "calendar": (kinds.calendar, 2),
    "counting": (kinds.counting, 4),
    "addition": (kinds.addition, 6),
    "subtraction": (kinds.subtraction, 6),
    "comparison": (kinds.comparison, 4),
    "sorting": (kinds.sorting, 5),
    "repeating": (kinds.repeating, 2),
    "reversing": (kinds.reversing, 4),
    "picking": (kinds.picking, 3),
    "spelling": (kinds.spelling, 4),
    "color": (kinds.color, 1),
    "plural": (kinds.plural, 2),
    "story": (kinds.story, 2),
    "memory": (kinds.memory, 2),
}

ONE_WORD = "Answer with one word."
SYSTEMS = [
    "You are a helpful assistant.",
    "You are a tiny demo model.",
    "Answer the user's question.",
]


class Chat(NamedTuple):
    """A chat whose last message is the user's, and the one right answer to it."""

    kind: str
    key: tuple
    messages: tuple[dict[str, str], ...]
    answer: str


def is_held_out(key: tuple) -> bool:
    """Whether a question with this key is kept for grading; the same on every machine."""
    return zlib.crc32(repr(key).encode()) % HELD_OUT_ONE_IN == 0


def _draw_kind(rng: random.Random) -> str:
    (name,) = rng.choices(list(KINDS), weights=[weight for _, weight in KINDS.values()])
    return name


def _draw_question(rng: random.Random, kind: str, held_out: bool) -> Question:
    draw, _ = KINDS[kind]
    while is_held_out((question := draw(rng)).key) != held_out:
        pass
    return question


def _as_typed(rng: random.Random, text: str) -> str:
    """The question as people type it: now and then without its capital or its last mark."""
    if rng.random() < 0.1:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.1 and len(text) > 1:
        text = text.rstrip("?!.")
    return text


def draw_chat(rng: random.Random, held_out: bool = False, kind: str | None = None) -> Chat:
    """Draws one chat; sometimes with a system message, sometimes after another question.

    `held_out` says from which side of the split the last question comes; what stands before it is
    always from the training side. `kind` is a key of `KINDS`; None draws one by frequency.
    """
    kind = kind or _draw_kind(rng)
    question = _draw_question(rng, kind, held_out)
    answer = question.answer
    messages = []
    if question.word is not None and rng.random() < 0.12:
        messages.append({"role": "system", "content": ONE_WORD})
        answer = question.word
    elif rng.random() < 0.12:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    turns = list(question.before)
    if not turns and answer == question.answer and rng.random() < 0.08:
        other = _draw_question(rng, _draw_kind(rng), held_out=False)
        if not other.before:
            turns.append((other.text, other.answer))
    for asked, answered in turns:
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answered})
    messages.append({"role": "user", "content": _as_typed(rng, question.text)})
    return Chat(kind, question.key, tuple(messages), answer)


def training_chats(seed: int) -> Iterator[Chat]:
    """An endless stream of chats, none of which asks a held-out question."""
    rng = random.Random(seed)
    while True:
        yield draw_chat(rng)


def held_out_chats(per_kind: int = 30, seed: int = 0) -> list[Chat]:
    """Chats that ask held-out questions: at most `per_kind` of every kind, all keys different.

    A kind with fewer held-out keys than that gives what it has.
    """
    rng = random.Random(seed)
    chats = {}
    for kind in KINDS:
        found = {}
        for _ in range(200 * per_kind):
            chat = draw_chat(rng, held_out=True, kind=kind)
            found.setdefault(chat.key, chat)
            if len(found) == per_kind:
                break
        chats.update(found)
    return list(chats.values())
