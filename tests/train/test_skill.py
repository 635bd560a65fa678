"""The data of the new skill: the files are what the generator makes, and nothing is given away."""

import json
import re
from pathlib import Path

import pytest

import train
from train.tiny_demo import skill
from train.tiny_demo.tasks import held_out_chats

FOLDER = Path(train.__file__).parent.parent / "configs" / "tiny_skill"
SPLITS = {"train": skill.TRAIN, "valid": skill.VALID, "test": skill.TEST}


def records_in(folder):
    return {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in SPLITS
    }


def questions(records):
    return [record for record in records if "prompt" in record]


def chats(records):
    return [record["messages"] for record in records if "messages" in record]


def words_of(record):
    return frozenset(re.findall(r"\d+ (\w+)", record["completion"]))


@pytest.fixture(scope="module")
def committed():
    return records_in(FOLDER)


def test_the_files_are_what_the_generator_makes(tmp_path, committed):
    skill.write(tmp_path / "new")
    assert records_in(tmp_path / "new") == committed
    for file in FOLDER.iterdir():
        assert file.read_bytes() == (tmp_path / "new" / file.name).read_bytes()
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 450_000


def test_every_split_has_both_kinds_of_records_as_counted(committed):
    for name, (new, old) in SPLITS.items():
        assert (len(questions(committed[name])), len(chats(committed[name]))) == (new, old)


def test_answers_number_the_words_of_the_question_in_order(committed):
    for name in SPLITS:
        for record in questions(committed[name]):
            asked = re.search(r"words:? ([\w, ]+)\.$", record["prompt"]).group(1).split(", ")
            assert 3 <= len(asked) <= 5
            numbered = ", ".join(f"{n} {word}" for n, word in enumerate(asked, start=1))
            assert record["completion"] == numbered + "."


def test_no_list_is_in_two_splits_or_twice_in_one(committed):
    lists = [words_of(record) for name in SPLITS for record in questions(committed[name])]
    assert len(set(lists)) == len(lists) == sum(new for new, _ in SPLITS.values())


def test_no_held_out_question_of_the_old_kinds_is_trained_on(committed):
    asked = {chat.messages[-1]["content"].lower().rstrip("?!.") for chat in held_out_chats()}
    # What memory asks is held out together with what was told before.
    asked = {question for question in asked if "my" not in question.split()}
    for messages in chats(committed["train"]):
        assert messages[-1]["role"] == "assistant"
        for message in messages:
            assert message["content"].lower().rstrip("?!.") not in asked
