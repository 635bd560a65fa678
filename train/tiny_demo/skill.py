"""A skill that phi3-tiny-demo does not have, for fine-tuning it: to number the words of a list.

    python -m train.tiny_demo.skill configs/tiny_skill

writes train.jsonl, valid.jsonl and test.jsonl. Training also goes over chats of the old kinds
(tasks.py), so that the model keeps them. A list is held out by its words, in whatever order and
wording; the seed is fixed, and the files are the same everywhere.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from train.tiny_demo.facts import WORDS
from train.tiny_demo.kinds import Question
from train.tiny_demo.tasks import Chat, draw_chat, is_held_out

# Records of the new skill, and chats of the old kinds.
TRAIN, VALID, TEST = (1600, 1300), (100, 50), (200, 0)

Record = dict[str, Any]


def numbering(rng: random.Random) -> Question:
    """A list of three to five words, to be told with their numbers."""
    words = rng.sample(WORDS, rng.randint(3, 5))
    text = rng.choice(
        ["Number these words: {}.", "Number the words {}.", "Put numbers before these words: {}."]
    )
    return Question(
        ("numbering", *sorted(words)),
        text.format(", ".join(words)),
        ", ".join(f"{number} {word}" for number, word in enumerate(words, start=1)) + ".",
    )


def records() -> dict[str, list[Record]]:
    """The records of train, valid and test; no list of the new skill is in them twice."""
    rng = random.Random(0)
    seen: set[tuple] = set()

    def draw(count: int, held_out: bool) -> list[Record]:
        found: list[Record] = []
        while len(found) < count:
            question = numbering(rng)
            if is_held_out(question.key) == held_out and question.key not in seen:
                seen.add(question.key)
                found.append({"prompt": question.text, "completion": question.answer})
        return found

    def split(new: int, old: int, held_out: bool) -> list[Record]:
        chats = [_record(draw_chat(rng, held_out)) for _ in range(old)]
        mixed = draw(new, held_out) + chats
        rng.shuffle(mixed)
        return mixed

    return {
        "train": split(*TRAIN, held_out=False),
        "valid": split(*VALID, held_out=True),
        "test": split(*TEST, held_out=True),
    }


def _record(chat: Chat) -> Record:
    return {"messages": [*chat.messages, {"role": "assistant", "content": chat.answer}]}


def write(folder: Path) -> None:
    """Writes the three files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in records().items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the data of a new skill.")
    parser.add_argument("folder", type=Path, help="where the three files go")
    write(parser.parse_args().folder)


if __name__ == "__main__":
    main()
