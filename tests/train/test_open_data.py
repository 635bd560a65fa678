"""The data of a run: read once for all its starts, all errors at once, and what `check` says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from train_runs import small_run, write_chat_model, write_documents, write_page

import train.batches
import train.loop
from train.cli import main
from train.loop import load_tokenizer, open_data

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open_data")
    write_chat_model(folder / "model")
    return folder / "model"


@pytest.fixture
def place(model, tmp_path):
    """A model, documents, and an empty folder for what was found."""
    shutil.copytree(model, tmp_path / "model")
    write_documents(tmp_path / "data", train=40, valid=7)
    (tmp_path / "cache").mkdir()
    return tmp_path


@pytest.fixture
def made(monkeypatch):
    """Grows by one for each document that is made."""
    calls = []
    real = train.batches.make_example

    def make_example(*arguments):
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(train.batches, "make_example", make_example)
    return calls


def open_run(config, cache=None):
    return open_data(config, load_tokenizer(config)[1], cache)


def start(config, place):
    """Opens the data as a run does, and keeps what was found."""
    found = open_run(config, place / "cache")
    for batches in found:
        batches.save_cache()
    return found


def told(batches):
    names = ("documents", "dropped", "tokens", "learnt_tokens", "longest", "rows", "steps")
    return [getattr(batches, name) for name in (*names, "fingerprint")]


@pytest.mark.parametrize("long_documents", ["drop", "split"])
def test_unchanged_data_is_read_once(place, made, long_documents):
    data = dict(sequence_length=32, long_documents=long_documents)
    config = small_run(place, data=data, steps=None, epochs=2)
    first = start(config, place)
    assert len(made) == 47 and (first[0].dropped or long_documents == "split")
    assert sorted(os.listdir(place / "cache")) == ["data-train.npz", "data-valid.npz"]
    made.clear()
    second = start(config, place)
    assert not made
    for before, after in zip(first, second, strict=True):
        assert told(before) == told(after)
        assert before.steps is not None
        for step in range(before.steps):
            some, others = before.batch(step, range(8)), after.batch(step, range(8))
            assert all(np.array_equal(some[name], others[name]) for name in some)
    # What does not matter to the documents, and is told apart all the same.
    made.clear()
    other = start(small_run(place, data=data, steps=9, batch_size=4, seed=3), place)
    assert not made and other[0].fingerprint != first[0].fingerprint


def rewrite(place):
    path = place / "data" / "train.jsonl"
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(1, 1))


def exchange(place):
    """Other content of the same size and time, as from an archive whose times are all one."""
    path = place / "data" / "train.jsonl"
    found = path.stat()
    first, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*others, first]))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def grow(place):
    path = place / "data" / "train.jsonl"
    found = path.stat()
    with open(path, "ab") as file:
        file.write(b"\n")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def template(place):
    path = place / "model" / "tokenizer_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "chat_template": "{{ messages[0].content }}"}))


def truncate(place):
    path = place / "cache" / "data-train.npz"
    path.write_bytes(path.read_bytes()[:-300])


def spoil(place):
    path = place / "cache" / "data-train.npz"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def empty(place):
    (place / "cache" / "data-train.npz").write_bytes(b"")


CHANGES = {
    "time": (rewrite, {}),
    "content": (exchange, {}),
    "size": (grow, {}),
    "tokenizer": (template, dict(mask_prompt=False)),
    "truncated": (truncate, {}),
    "spoilt": (spoil, {}),
    "empty": (empty, {}),
    "rows": (lambda place: None, dict(sequence_length=47)),
    "mask": (lambda place: None, dict(mask_prompt=False)),
    "split": (lambda place: None, dict(long_documents="split")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_data_is_read_again(place, made, name):
    change, data = CHANGES[name]
    start(small_run(place, data=data if name == "tokenizer" else {}), place)
    change(place)
    made.clear()
    config = small_run(place, data=data)
    again = start(config, place)
    assert len(made) >= 40
    assert told(again[0]) == told(open_run(config)[0])
    made.clear()
    start(config, place)
    assert not made


def test_what_cannot_be_kept_is_made_again(place, made):
    config = small_run(place)
    for _ in range(2):
        made.clear()
        learnt, _ = open_run(config, place / "missing")
        learnt.save_cache()
        assert len(made) == 47 and not (place / "missing").exists()
    (place / "file").touch()
    open_run(config, place / "file")[0].save_cache()
    (place / "cache" / "data-train.npz").mkdir()
    learnt, _ = open_run(config, place / "cache")
    learnt.save_cache()
    assert os.listdir(place / "cache") == ["data-train.npz"]


def test_errors_of_all_data_come_together(place):
    for name in ("train", "valid"):
        with open(place / "data" / f"{name}.jsonl", "a") as file:
            file.write("{}\n")
    with pytest.raises(ValueError) as caught:
        open_run(small_run(place))
    assert "train.jsonl:41" in str(caught.value) and "valid.jsonl:8" in str(caught.value)
    with pytest.raises(ValueError, match=r"(?s)train\.jsonl:41.*no match of a glob .*missing"):
        open_run(small_run(place, data=dict(valid=str(place / "missing"))))


def test_reading_that_takes_long_is_told(place, monkeypatch, capsys):
    config = small_run(place)
    open_run(config)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(train.loop, "_TELL_EVERY", 0.0)
    monkeypatch.setattr(train.batches, "_AT_ONCE", 25)
    open_run(config)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2] for line in lines] == [
        "read 25 of 40 records",
        "read 40 of 40 records",
        "read 7 of 7 records",
    ]


def run_check(monkeypatch, capsys, page, *changes):
    monkeypatch.setattr(sys, "argv", ["phi3-train", "check", str(page), *changes])
    try:
        main()
    except SystemExit as stop:
        assert stop.code in (0, None, 1)
    return capsys.readouterr()


def test_check_says_which_files_are_read(place, monkeypatch, capsys):
    page = write_page(small_run(place, steps=None, epochs=3))
    out = run_check(monkeypatch, capsys, page).out
    assert f"{place / 'data' / 'train.jsonl'}: 40 records" in out
    assert f"{place / 'data' / 'valid.jsonl'}: 7 records" in out
    config = small_run(place, steps=None, epochs=3)
    assert f"steps: {open_run(config)[0].steps}, of 8 rows each" in out
    (place / "data" / "valid.jsonl").rename(place / "data" / "val.jsonl")
    assert "val.jsonl: 7 records" in run_check(monkeypatch, capsys, page).out
    (place / "data" / "val.jsonl").unlink()
    assert "valid: none" in run_check(monkeypatch, capsys, page).out


def test_check_leaves_accelerators_alone(place):
    page = place / "page.py"
    page.write_text(
        "import os, sys\n"
        "assert os.environ['JAX_PLATFORMS'] == 'cpu' and 'jax' not in sys.modules\n"
        + write_page(small_run(place)).read_text()
    )
    environ = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    command = [sys.executable, "-m", "train.cli", "check", page]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0 and "steps: 6" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.sequence_length=4096", "max_position_embeddings"),
        ("optimizer.warmup_steps=100", "do not fit a run of 6 steps"),
        ("optimizer.freeze=model.none", "names no weight"),
        ("lora.rank=0", "rank"),
    ],
)
def test_check_refuses_what_a_run_refuses(place, monkeypatch, capsys, change, words):
    page = write_page(small_run(place, optimizer=dict(schedule="cosine")))
    found = run_check(monkeypatch, capsys, page, change)
    assert found.err.startswith("error: ") and words in found.err
    assert not (place / "run").exists()
