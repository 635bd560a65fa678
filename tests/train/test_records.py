"""Records of files: which, in what order, and what is said of files that are none."""

import json
import pickle
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train import records as records_module
from train.records import has_split, open_records


def write_jsonl(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


def write_parquet(path, values):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(values), path)


def write_arrayrecord(path, values):
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(path), "group_size:2")
    for value in values:
        writer.write(json.dumps(value).encode())
    writer.close()


WRITERS = {"jsonl": write_jsonl, "parquet": write_parquet, "arrayrecord": write_arrayrecord}

LINES = [b'{"text": "%d"}' % number for number in range(3)] + [
    b' {"text": "one space before"}',
    '{"text": "\u2028 is no end of a line"}'.encode(),
    b"",
    b" \t",
    b"\r",
]


@settings(deadline=None)
@given(
    lines=st.lists(st.sampled_from(LINES), min_size=1, max_size=12),
    end=st.sampled_from([b"\n", b"\r\n"]),
    mark=st.booleans(),
    last_end=st.booleans(),
    at_once=st.integers(1, 50),
)
def test_jsonl_is_read_as_by_lines(tmp_path_factory, lines, end, mark, last_end, at_once):
    raw = end.join(lines) + (end if last_end else b"")
    expected = [
        (json.loads(line), number)
        for number, line in enumerate(raw.split(b"\n"), start=1)
        if line.strip()
    ]
    path = tmp_path_factory.mktemp("jsonl") / "some.jsonl"
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records_module, "_BYTES_AT_ONCE", at_once)
        if not expected:
            with pytest.raises(ValueError, match="no records"):
                open_records(str(path))
            return
        records = open_records(str(path))
    found = [(records[index], records.where(index)) for index in range(len(records))]
    assert found == [(value, f"{path}:{number}") for value, number in expected]


@pytest.mark.parametrize("ending", WRITERS)
def test_files_of_a_split_follow_one_another(tmp_path, monkeypatch, ending):
    for name, texts in {"train-1": "bcd", "train-0": "a", "valid": "e", "notes": "f"}.items():
        WRITERS[ending](tmp_path / f"{name}.{ending}", [{"text": text} for text in texts])
    (tmp_path / "train.txt").touch()
    records = open_records(str(tmp_path), "train")
    assert [records[index]["text"] for index in range(4)] == list("abcd")
    assert len(open_records(str(tmp_path), "valid")) == 1
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_records("~", "train")) == 4
    assert len(open_records(str(tmp_path / f"*[0-9].{ending}"))) == 4
    second = {"jsonl": ":2", "parquet": " row 1", "arrayrecord": " row 1"}[ending]
    assert records.where(2) == str(tmp_path / f"train-1.{ending}") + second
    for index in (-1, 4):
        with pytest.raises(IndexError, match="at least 0 and below 4"):
            records[index]


@pytest.mark.parametrize(
    ("files", "split", "taken"),
    [
        (["train.jsonl", "train-1.jsonl", "train_small.jsonl"], "train", ["train.jsonl"]),
        (["train_1.jsonl", "train-0.jsonl", "training.jsonl"], "train", ["train-0", "train_1"]),
        (["train.old.jsonl", "train.txt", "train.jsonl.gz"], "train", []),
        (["valid.jsonl", "val.jsonl"], "valid", ["valid.jsonl"]),
        (["val.jsonl", "validate.jsonl"], "valid", ["val.jsonl"]),
        (["validation-0.jsonl", "validation-1.jsonl"], "valid", ["validation-0", "validation-1"]),
    ],
)
def test_a_split_is_its_file_or_its_parts(tmp_path, files, split, taken):
    for name in files:
        write_jsonl(tmp_path / name, [{"text": "a"}])
    assert has_split(str(tmp_path), split) == bool(taken)
    if taken:
        found = [file.path.name for file in open_records(str(tmp_path), split).files]
        assert [name.removesuffix(".jsonl") for name in found] == [
            name.removesuffix(".jsonl") for name in taken
        ]
    else:
        with pytest.raises(FileNotFoundError, match="in it"):
            open_records(str(tmp_path), split)


@pytest.mark.parametrize("ending", WRITERS)
def test_any_thread_and_process_may_read(tmp_path, ending):
    values = [{"text": str(number) * (number % 37)} for number in range(200)]
    WRITERS[ending](tmp_path / f"some.{ending}", values)
    records = open_records(str(tmp_path / f"some.{ending}"))
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(records.__getitem__, [*range(200)] * 5)) == values * 5
    copy = pickle.loads(pickle.dumps(records))
    assert [copy[index] for index in range(200)] == values


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"text": "a"', "is not JSON: Expecting ',' delimiter at character 13$"),
        (b"[1, 2]", "is a JSON list, must be an object"),
        (b'{"text": "\xff"}', "is not UTF-8: invalid start byte at byte 10"),
        (b"[" * 100_000, "^nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "digits"),
    ],
)
def test_a_bad_line_is_an_error_of_its_own(tmp_path, raw, message):
    path = tmp_path / "some.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + raw + b"\n")
    records = open_records(str(path))
    assert records[0] == {"text": "good"}
    with pytest.raises(ValueError, match=message):
        records[1]


def test_what_is_no_data_is_refused(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "a"}])
    (tmp_path / "valid.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "broken.arrayrecord").write_bytes(b"no such thing")
    (tmp_path / "train.csv").touch()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no match of a glob .*missing"):
        open_records(str(tmp_path / "missing.jsonl"))
    with pytest.raises(FileNotFoundError, match="no match"):
        open_records(str(tmp_path / "fol*er"))
    with pytest.raises(FileNotFoundError, match=r"no test or test-\*.*in it: .*train.jsonl"):
        open_records(str(tmp_path), "test")
    with pytest.raises(FileNotFoundError, match="in it: nothing"):
        open_records(str(tmp_path / "folder"), "train")
    with pytest.raises(ValueError, match="is a folder"):
        open_records(str(tmp_path))
    with pytest.raises(ValueError, match=r"ending of .*train\.csv.*is not known"):
        open_records(str(tmp_path / "*.csv"))
    with pytest.raises(ValueError, match=r"no records in .*empty\.jsonl"):
        open_records(str(tmp_path / "*.jsonl"))
    with pytest.raises(ValueError, match=r"several kinds \(\.jsonl, \.parquet\)"):
        (tmp_path / "train.parquet").touch()
        open_records(str(tmp_path), "train")
    for name, library in (("valid.parquet", "pyarrow"), ("broken.arrayrecord", "array_record")):
        pytest.importorskip(library)
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            open_records(str(tmp_path / name))


@pytest.mark.parametrize(
    ("ending", "module", "extra"),
    [("parquet", "pyarrow", "parquet"), ("arrayrecord", "array_record.python", "arrayrecord")],
)
def test_a_missing_library_is_named(tmp_path, monkeypatch, ending, module, extra):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert extra in project["project"]["optional-dependencies"]
    (tmp_path / f"some.{ending}").touch()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"pip install 'phi3-jax\[{extra}\]'"):
        open_records(str(tmp_path / f"some.{ending}"))
