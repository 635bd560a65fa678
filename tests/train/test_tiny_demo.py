"""The embedded default model: its tasks, the script that makes it, and the shipped folder."""

import itertools
import json
import re
from collections import Counter
from importlib import resources

import numpy as np
import pytest

import phi3_jax as phi3
from phi3_jax.loss import IGNORED_LABEL
from train.tiny_demo import build, tasks

FOLDER = resources.files("phi3_jax") / "tiny_demo"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build.write_tokenizer(folder)
    return phi3.Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def shipped():
    model, params = phi3.from_pretrained(FOLDER, dtype="float32")
    return model, params, phi3.Tokenizer.from_pretrained(FOLDER)


def training(seed, count):
    return list(itertools.islice(tasks.training_chats(seed), count))


def test_the_same_seed_gives_the_same_chats():
    assert training(seed=3, count=200) == training(seed=3, count=200)
    assert training(seed=3, count=200) != training(seed=4, count=200)
    assert tasks.held_out_chats() == tasks.held_out_chats()


def test_the_split_is_the_same_in_every_process():
    # Python's own hash() of a text is not.
    assert [n for n in range(40) if tasks.is_held_out(("addition", 3, n))] == [1, 9, 17, 26, 31, 39]


def test_no_held_out_question_is_ever_trained_on():
    held_out = tasks.held_out_chats()
    keys = {chat.key for chat in held_out}
    questions = {chat.messages[-1]["content"].lower().rstrip("?!.") for chat in held_out}
    # What memory asks is held out together with what was told before.
    open_texts = {q for q in questions if "my" not in q.split()}
    for chat in training(seed=2, count=20_000):
        assert chat.key not in keys
        for message in chat.messages:
            assert message["content"].lower().rstrip("?!.") not in open_texts


def test_held_out_questions_are_many_distinct_and_of_every_kind():
    chats = tasks.held_out_chats()
    assert len(chats) >= 300
    assert len({chat.key for chat in chats}) == len(chats)
    assert Counter(chat.kind for chat in chats).keys() == tasks.KINDS.keys()


@pytest.mark.parametrize("kind", ["addition", "subtraction", "comparison", "sorting", "counting"])
def test_answers_about_numbers_are_right(kind):
    for chat in [chat for chat in training(seed=5, count=4000) if chat.kind == kind]:
        text = chat.messages[-1]["content"]
        if chat.messages[0]["content"] == tasks.ONE_WORD:
            continue
        asked, said = ([int(n) for n in re.findall(r"\d+", t)] for t in (text, chat.answer))
        if kind == "addition":
            assert said == [*asked, sum(asked)]
        elif kind == "subtraction":
            assert said == [*asked, asked[0] - asked[1]]
        elif kind == "comparison":
            assert said == sorted(asked, reverse="larger" in text)
        elif kind == "sorting":
            assert said == sorted(asked)
        else:
            assert (said[0], said[-1]) == tuple(asked)
            assert {abs(b - a) for a, b in itertools.pairwise(said)} == {1}


def test_the_tokenizer_gives_back_any_text_and_splits_digits(tokenizer):
    for text in ["Hello there", "two  spaces\nand a line", "naïve 日本 🙂", "x = {y: 1_000}"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    pieces = [tokenizer.id_to_token(id) for id in tokenizer.encode("1024 48")]
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == list("102448")


def test_chats_are_in_the_format_of_phi3(tokenizer):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == (
        "<|system|>\nBe kind.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n"
    )
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    newline = tokenizer.token_to_id("<0x0A>")
    assert newline is not None and newline not in ids
    assert len(tokenizer) <= build.model_config().vocab_size


def test_batches_hold_whole_chats_and_only_answers_are_learnt(tokenizer):
    chats = {chat.answer for chat in training(seed=2, count=3000)}
    end = tokenizer.token_to_id("<|end|>")
    for input_ids, labels in itertools.islice(build.batches(tokenizer, seed=2), 6):
        assert input_ids.shape[1] in build.WIDTHS
        for row, row_labels in zip(input_ids, labels, strict=True):
            learnt = np.flatnonzero(row_labels != IGNORED_LABEL)
            assert (np.diff(learnt) == 1).all()
            assert (row[learnt] == row_labels[learnt]).all() and row[learnt[-1]] == end
            assert tokenizer.decode(row[learnt[:-1]]) in chats
            assert row[learnt[0] - 1] == tokenizer.token_to_id("<|assistant|>")
            assert (row[learnt[-1] + 1 :] == tokenizer.pad_token_id).all()


def test_a_few_steps_of_training_lower_the_loss(tokenizer, monkeypatch):
    monkeypatch.setattr(build, "TOKENS_A_BATCH", 256)
    monkeypatch.setattr(build, "WIDTHS", (40,))
    sizes = {"hidden_size": 48, "intermediate_size": 96, "head_dim": 8}
    config = phi3.Phi3Config.from_dict({**build.model_config().to_dict(), **sizes})
    _, losses = build.train(phi3.Phi3ForCausalLM(config), tokenizer, steps=25)
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 1


def test_the_shipped_folder_is_small_and_says_what_it_is(shipped):
    model, params, tokenizer = shipped
    files = {file.name: len(file.read_bytes()) for file in FOLDER.iterdir()}
    assert files.keys() == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    assert sum(files.values()) <= 4_000_000
    settings = json.loads((FOLDER / "generation_config.json").read_text())
    ends = [tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|end|>")]
    assert settings["eos_token_id"] == ends
    text = (FOLDER / "README.md").read_text()
    assert "It is not Phi-3" in text
    overall = re.search(r"\*\*overall\*\* \| (\d+) \| (\d+) \| ([\d.]+) \|", text)
    right, asked, share = overall.groups()
    assert int(asked) == len(tasks.held_out_chats()) >= 300
    assert float(share) == round(int(right) / int(asked), 3) >= 0.95


def test_the_shipped_model_answers_held_out_questions(shipped):
    chats = tasks.held_out_chats()[::20]
    answers = build.answers(*shipped, chats)
    right = sum(answer == chat.answer for answer, chat in zip(answers, chats, strict=True))
    assert right >= 0.85 * len(chats), list(zip(answers, chats, strict=True))
