"""jsonl, wrong in every way: `phi3-train` names file and line, and begins nothing."""

import json
import re

import pytest
from train_runs import small_run, use_devices, write_chat_model, write_documents, write_page

from train import cli

USER = {"role": "user", "content": "How many?"}
ASSISTANT = {"role": "assistant", "content": "Three."}


def messages(*turns, **others) -> str:
    return json.dumps({"messages": list(turns), **others})


# A line -> what is said of it.
LINES = {
    "half": ('{"text": "a"', "is not JSON: .* at character 13"),
    "two on a line": ('{"text": "a"} {"text": "b"}', "is not JSON: Extra data"),
    "a comma after it": ('{"text": "a"},', "is not JSON: Extra data"),
    "quotes of Python": ("{'text': 'a'}", "is not JSON"),
    "a list": ('["text", "a"]', "is a JSON list, must be an object"),
    "a text": ('"text"', "is a JSON str"),
    "null": ("null", "is a JSON NoneType"),
    "a number": ("3.5", "is a JSON float"),
    "a word": ("text", "is not JSON"),
    "not UTF-8": (b'{"text": "\xff"}', "is not UTF-8: .* at byte 10"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16-le"), "is not JSON|is not UTF-8"),
    "nested": ("[" * 100_000, "nested too deeply"),
    "many digits": ('{"text": ' + "1" * 5000 + "}", "digits"),
    "a line break in a text": ('{"text": "a\n b"}', "is not JSON"),
    "empty": ("{}", r"the keys \(none\)"),
    "other keys": ('{"Text": "a", "id": 3}', "the keys Text, id"),
    "two kinds": ('{"text": "a", "prompt": "b", "completion": "c"}', "prompt/completion and text"),
    "prompt alone": ('{"prompt": "a"}', "the keys prompt"),
    "completion null": ('{"prompt": "a", "completion": null}', "the keys prompt, completion"),
    "text null": ('{"text": null}', "the keys text"),
    "text empty": ('{"text": ""}', "its text is ''"),
    "text a number": ('{"text": 3}', "its text is 3"),
    "text a list": ('{"text": ["a"]}', r"its text is \['a'\]"),
    "text of half a character": ('{"text": "\\ud800"}', "half of a surrogate pair"),
    "prompt a number": ('{"prompt": 3, "completion": "a"}', "content of type int"),
    "prompt of blanks": ('{"prompt": " ", "completion": "a"}', "message 0 .* is empty"),
    "completion empty": ('{"prompt": "a", "completion": ""}', "message 1 .* is empty"),
    "messages a text": ('{"messages": "a"}', "must be a list"),
    "messages an object": ('{"messages": {"role": "user"}}', "must be a list"),
    "no messages": (messages(), "must be a list of at least one"),
    "message a text": (messages("a"), "message 0 is a str"),
    "message null": (messages(USER, None), "message 1 is a NoneType"),
    "no role": (messages({"content": "a"}), "message 0 has the role None"),
    "unknown role": (messages({"role": "human", "content": "a"}), "role 'human'"),
    "role a number": (messages({"role": 1, "content": "a"}), "role 1"),
    "role a list": (messages({"role": ["user"], "content": "a"}), "role "),
    "no content": (messages(USER, {"role": "assistant"}), "message 1 .* type NoneType"),
    "content a list": (
        messages(USER, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}),
        "message 1 .* type list",
    ),
    "no assistant": (messages(USER), "must have a message of the assistant"),
    "assistant first": (messages(ASSISTANT, USER), "begins with the assistant"),
    "a tool": (messages(USER, {"role": "tool", "content": "3"}, ASSISTANT), "tool"),
    "tool calls": (messages(USER, {**ASSISTANT, "tool_calls": [{"id": 1}]}), "tool"),
    "tools": (messages(USER, ASSISTANT, tools=[{}]), "has tools"),
}

GOOD = json.dumps({"prompt": "Count: 1 to 2.", "completion": "1, 2."})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    parent = tmp_path_factory.mktemp("model")
    write_chat_model(parent / "model")
    return parent / "model"


@pytest.fixture
def run(tmp_path, model, monkeypatch):
    """A run on good data, to be spoilt."""
    use_devices(monkeypatch, 1)
    write_documents(tmp_path / "data")
    config = small_run(tmp_path, model=dict(path=str(model)))
    write_page(config)
    return config


def said(refused, config) -> str:
    return refused(cli.main, f"{config.folder}.py")


@pytest.mark.parametrize("kind", LINES)
def test_a_line(refused, tmp_path, run, kind):
    line, words = LINES[kind]
    raw = line if isinstance(line, bytes) else line.encode()
    good = GOOD.encode()
    file = tmp_path / "data" / "train.jsonl"
    file.write_bytes(b"\n".join([good, b"", good, raw, good]) + b"\n")
    error = said(refused, run)
    assert re.search(words, error), error
    assert f"{file}:4: " in error


FILES = {
    "not there": (lambda data: (data / "train.jsonl").unlink(), "has no train"),
    "a directory": (
        lambda data: ((data / "train.jsonl").unlink(), (data / "train.jsonl").mkdir()),
        "has no train",
    ),
    "empty": (lambda data: (data / "train.jsonl").write_bytes(b""), "no records in"),
    "blanks": (lambda data: (data / "train.jsonl").write_bytes(b"\n \r\n\t\n"), "no records in"),
    "byte order mark alone": (
        lambda data: (data / "train.jsonl").write_bytes(b"\xef\xbb\xbf"),
        "no records in",
    ),
    "zeros": (lambda data: (data / "train.jsonl").write_bytes(bytes(100)), "train.jsonl:1: "),
    "a broken parquet": (
        lambda data: (
            (data / "train.jsonl").unlink(),
            (data / "train.parquet").write_bytes(b"PAR1PAR1"),
        ),
        "cannot be read as Parquet",
    ),
    "two kinds": (
        lambda data: (data / "train.parquet").write_bytes(b"PAR1"),
        "several kinds",
    ),
    "packed": (
        lambda data: (data / "train.jsonl").rename(data / "train.jsonl.gz"),
        "has no train",
    ),
    "validation broken": (
        lambda data: (data / "valid.jsonl").write_text("{"),
        "valid.jsonl:1: ",
    ),
    "no folder": (lambda data: data.rename(data.with_name("moved")), "there is no file, no folder"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file(refused, tmp_path, run, kind):
    spoil, words = FILES[kind]
    spoil(tmp_path / "data")
    assert words in said(refused, run)
