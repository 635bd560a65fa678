"""Tokenizers and chat templates, wrong in every way: `phi3-generate` says what is, and answers
nothing.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
from small_tokenizers import save_tokenizer

from phi3_jax import cli

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"


def file(name: str, content: str | bytes):
    """A fault that is the whole content of a file."""

    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def config(**changes):
    """A fault in tokenizer_config.json."""

    def spoil(folder: Path) -> None:
        values = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**values, **changes}))

    return spoil


def added(id: str, **entry):
    """An added token in tokenizer_config.json."""

    def spoil(folder: Path) -> None:
        values = json.loads((folder / CONFIG).read_text())
        values["added_tokens_decoder"][id] = entry
        (folder / CONFIG).write_text(json.dumps(values))

    return spoil


def gone(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()


def directory(folder: Path) -> None:
    gone(folder)
    (folder / "tokenizer.model").mkdir()


def cut_short(folder: Path) -> None:
    path = folder / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:5000])


def json_file(change):
    """A fault in a tokenizer.json that is otherwise whole."""

    def spoil(folder: Path) -> None:
        kept = (folder / "config.json").read_bytes()
        save_tokenizer(folder, "byte level")
        (folder / "config.json").write_bytes(kept)
        path = folder / "tokenizer.json"
        values = json.loads(path.read_text())
        changed = change(values)
        path.write_text(changed if isinstance(changed, str) else json.dumps(values))

    return spoil


VOCABULARIES = {
    "gone": (gone, "neither tokenizer.json nor tokenizer.model"),
    "a directory": (directory, "neither tokenizer.json nor tokenizer.model"),
    "empty": (file("tokenizer.model", b""), "tokenizer.model"),
    "cut short": (cut_short, "tokenizer.model"),
    "noise": (file("tokenizer.model", bytes(range(256)) * 40), "tokenizer.model"),
    "a pointer to a file": (
        file("tokenizer.model", "version https://git-lfs.github.com/spec/v1\noid sha256:9e55\n"),
        "tokenizer.model",
    ),
    "tokenizer.json empty": (file("tokenizer.json", ""), "tokenizer.json"),
    "tokenizer.json not JSON": (file("tokenizer.json", "{"), "tokenizer.json"),
    "tokenizer.json of nothing": (file("tokenizer.json", "{}"), "tokenizer.json"),
    "tokenizer.json a list": (file("tokenizer.json", "[]"), "tokenizer.json"),
    "tokenizer.json too deep": (file("tokenizer.json", "[" * 100_000), "tokenizer.json"),
    "no model in it": (json_file(lambda values: values.pop("model") and None), "tokenizer.json"),
    "unknown model": (
        json_file(lambda values: values["model"].update(type="Telepathy")),
        "tokenizer.json",
    ),
    "ids of text": (
        json_file(lambda values: values["model"]["vocab"].update(a="one")),
        "tokenizer.json",
    ),
    "merges of what is not there": (
        json_file(lambda values: values["model"].update(merges=[["nowhere", "never"]])),
        "tokenizer.json",
    ),
    "an unknown decoder": (
        json_file(lambda values: values.update(decoder={"type": "Nothing"})),
        "tokenizer.json",
    ),
    "more ids than the model has": (
        json_file(lambda values: values["added_tokens"][0].update(id=10**6)),
        "1000000|tokenizer.json",
    ),
}

TOKENS = {
    "config empty": (file(CONFIG, ""), f"{CONFIG} is not JSON"),
    "config a list": (file(CONFIG, "[]"), f"{CONFIG} holds a list"),
    "config not UTF-8": (file(CONFIG, b'{"a": "\xff"}'), f"{CONFIG} is not JSON"),
    "config too deep": (file(CONFIG, '{"a":' * 100_000), "nested too deeply"),
    "map cut short": (file(MAP, '{"eos_token": "</s'), f"{MAP} is not JSON"),
    "map a text": (file(MAP, '"</s>"'), f"{MAP} holds a str"),
    "added tokens a list": (file(ADDED, '["<|end|>"]'), f"{ADDED} holds a list"),
    "added id a text": (file(ADDED, '{"<|new|>": "first"}'), f"{ADDED}: 'first'"),
    "added id below 0": (file(ADDED, '{"<|new|>": -1}'), f"{ADDED}: -1"),
    "added id taken": (file(ADDED, '{"<|new|>": 7}'), "the added token '<|new|>' of id 7 collides"),
    "added token twice": (file(ADDED, '{"<|end|>": 1023}'), "'<|end|>' of id .* collides"),
    "added token of a word": (added("1023", content="\u2581the"), "collides"),
    "added id not a number": (added("1.5", content="<|new|>"), "'1.5': .* is no added token"),
    "added token without text": (added("1023"), "is no added token"),
    "added token empty": (added("1023", content=""), "is no added token"),
    "added token a number": (added("1023", content=3), "is no added token"),
    "added tokens a list too": (config(added_tokens_decoder=[1, 2]), "added_tokens_decoder"),
    "added tokens a text": (config(added_tokens_decoder="<|end|>"), "added_tokens_decoder"),
    "id outside of the model": (
        added("5000", content="<|far|>", special=True),
        r"'<\|far\|>' of id 5000, outside the model's vocabulary of 1024",
    ),
    "eos unknown": (config(eos_token="<|fin|>"), r"eos_token is '<\|fin\|>', which is in no"),
    "eos a number": (config(eos_token=2), "eos_token"),
    "eos a list": (config(eos_token=["</s>"]), "eos_token"),
    "eos without content": (config(eos_token={"special": True}), "eos_token"),
    "pad unknown": (config(pad_token="<pad>"), "pad_token is '<pad>'"),
    "specials a number": (config(additional_special_tokens=3), "additional_special_tokens"),
    "specials of numbers": (config(additional_special_tokens=[3]), "additional_special_tokens"),
    "specials without content": (config(additional_special_tokens=[{}]), "additional_special"),
}

TEMPLATES = {
    "a number": (config(chat_template=3), "chat_template in .* is a int"),
    "a list of texts": (config(chat_template=["a"]), "none named 'default'"),
    "none by default": (
        config(chat_template=[{"name": "tool_use", "template": "x"}]),
        "none named 'default'",
    ),
    "default a number": (
        config(chat_template=[{"name": "default", "template": 3}]),
        "chat_template in .* is a int",
    ),
    "not closed": (config(chat_template="{% for m in messages %}"), "chat template failed"),
    "unknown tag": (config(chat_template="{% shout %}"), "chat template failed"),
    "unknown filter": (config(chat_template="{{ messages | shout }}"), "chat template failed"),
    "unknown name": (config(chat_template="{{ nothing.at.all }}"), "chat template failed"),
    "text and number": (config(chat_template="{{ 1 + 'a' }}"), "chat template failed"),
    "nothing over nothing": (config(chat_template="{{ 1 // 0 }}"), "chat template failed"),
    "raises": (
        config(chat_template="{{ raise_exception('Roles must alternate') }}"),
        "Roles must alternate",
    ),
    "not UTF-8": (file("chat_template.jinja", b"\xff\xfe{{ messages }}"), "chat_template.jinja"),
}


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded model, to be spoilt."""
    shutil.copytree(cli.EMBEDDED_MODEL, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("kind", VOCABULARIES | TOKENS | TEMPLATES)
def test_it_is_refused(refused, folder, kind):
    spoil, words = (VOCABULARIES | TOKENS | TEMPLATES)[kind]
    spoil(folder)
    error = refused(cli.generate_command, "Hello", "--model", folder)
    assert re.search(words, error), error


def test_a_text_of_half_a_character(refused):
    """An argument of the command line that is not UTF-8 comes as half of a surrogate pair."""
    error = refused(cli.generate_command, "caf\udce9", "--model", cli.EMBEDDED_MODEL)
    assert "half of a surrogate pair" in error
