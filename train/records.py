"""Records of jsonl, Parquet and ArrayRecord files, read one by one in any order."""

import glob
import itertools
import json
import os
import weakref
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from phi3_jax.json_files import parse_json

_BYTES_AT_ONCE = 1 << 24
_BLANKS = b" \t\r\n"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# What a split may be called in a folder, where not by its own name alone.
_NAMES = {"valid": ("valid", "validation", "val")}


class RecordFile(Protocol):
    """One file: how many records it has, each of them, and where a message says that it is."""

    path: Path

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def where(self, index: int) -> str: ...


class Records:
    """The records of several files, one file after the other.

    Reading is safe in threads, and copies may be sent to other processes.
    """

    def __init__(self, files: Sequence[RecordFile]):
        self.files = files
        self._starts = list(itertools.accumulate(map(len, files), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A record.

        Raises:
          IndexError: where there is none.
          ValueError: where what is there is no JSON object, with the reason and not the place.
        """
        file, index = self._find(index)
        return file[index]

    def where(self, index: int) -> str:
        """The place of a record for messages: "train.jsonl:17" is a line, counted from 1, and
        "train.parquet row 16" a row, counted from 0.
        """
        file, index = self._find(index)
        return file.where(index)

    def _find(self, index: int) -> tuple[RecordFile, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"the record is {index}, must be at least 0 and below {len(self)}")
        number = bisect_right(self._starts, index) - 1
        return self.files[number], index - self._starts[number]


def open_records(path: str, split: str | None = None) -> Records:
    """The records of a file, of a folder's split, or of the files that a glob finds, by name.

    Args:
      path: of .jsonl, .parquet (extra `parquet`; held in memory) or .arrayrecord (JSON in each
        record) files.
      split: "train", "valid" or "test": of a folder, train.EXT alone if there is one, so that a
        copy or a part beside it is not learnt twice; else all train-*.EXT and train_*.EXT.
        "validation" and "val" stand for "valid" where nothing is named so.

    Raises:
      FileNotFoundError: where there is no such path, or no file of the split in the folder.
      ValueError: for files of other or of several kinds, empty ones, ones that cannot be read, and
        where a library is missing.
    """
    paths = _files_of(os.path.expanduser(path), split)
    if strange := [str(path) for path in paths if path.suffix not in _KINDS]:
        raise ValueError(
            f"the ending of {', '.join(strange)} is not known; data is in {', '.join(_KINDS)} "
            "(unpacked, jsonl with one JSON object a line)"
        )
    if len(kinds := sorted({path.suffix for path in paths})) > 1:
        raise ValueError(
            f"{path!r} has files of several kinds ({', '.join(kinds)}): "
            f"{', '.join(map(str, paths))}; name those of one kind by a glob such as '*{kinds[0]}'"
        )
    files = [_KINDS[path.suffix](path) for path in paths]
    if empty := [str(path) for path, file in zip(paths, files, strict=True) if not len(file)]:
        raise ValueError(f"there are no records in {', '.join(empty)}; fill or remove the file")
    return Records(files)


def _files_of(path: str, split: str | None) -> list[Path]:
    if os.path.isdir(path):
        if split is None:
            raise ValueError(f"{path!r} is a folder; name a file in it, or a glob")
        found = _files_of_split(Path(path), split)
        if not found:
            there = ", ".join(sorted(os.listdir(path))) or "nothing"
            endings = " or ".join(_KINDS)
            raise FileNotFoundError(
                f"the folder {path!r} has no {split} or {split}-* that ends with {endings}; in it: "
                f"{there}"
            )
        return found
    if os.path.exists(path):
        return [Path(path)]
    found = [Path(name) for name in glob.glob(path, recursive=True) if os.path.isfile(name)]
    if not found:
        raise FileNotFoundError(
            f"there is no file, no folder and no match of a glob {path!r}; relative paths begin in "
            f"{os.getcwd()!r}"
        )
    return sorted(found)


def has_split(path: str, split: str) -> bool:
    """Whether a path is a folder that `open_records` finds the split in."""
    folder = Path(path).expanduser()
    return folder.is_dir() and bool(_files_of_split(folder, split))


def _files_of_split(folder: Path, split: str) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.suffix in _KINDS and path.is_file())
    for name in _NAMES.get(split, (split,)):
        whole = [path for path in files if path.stem == name]
        if found := whole or [
            path for path in files if path.stem.startswith((f"{name}-", f"{name}_"))
        ]:
            return found
    return []


class JsonLines:
    """A file with a JSON object a line, in UTF-8; blank lines do not count."""

    def __init__(self, path: Path):
        self.path = path
        # Reads name their offset (pread), so that threads share no position. A memory map would
        # end the process where somebody shortens the file meanwhile.
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        size = os.fstat(self._descriptor).st_size
        start = len(_BYTE_ORDER_MARK) if self._read(0, 3) == _BYTE_ORDER_MARK else 0
        lines = [np.array([start])]
        first_bytes = [np.frombuffer(self._read(start, start + 1), np.uint8)]
        for offset in range(0, size, _BYTES_AT_ONCE):
            # With one byte more, each line's first byte is read together with the newline before.
            chunk = np.frombuffer(self._read(offset, offset + _BYTES_AT_ONCE + 1), np.uint8)
            after = np.flatnonzero(chunk[:_BYTES_AT_ONCE] == ord("\n")) + 1
            after = after[offset + after < size]
            lines.append(offset + after)
            first_bytes.append(chunk[after])
        starts = np.append(np.concatenate(lines), size)
        firsts = np.concatenate(first_bytes)
        filled = np.full(len(starts) - 1, size > start)
        for line in np.flatnonzero(np.isin(firsts, list(_BLANKS))):
            filled[line] = bool(self._read(*starts[line : line + 2]).strip(_BLANKS))
        # A record reaches to the next one: JSON has nothing against white space at its end.
        self._numbers = np.flatnonzero(filled)
        self._starts = np.append(starts[self._numbers], size)

    def _read(self, start: int, stop: int) -> bytes:
        return os.pread(self._descriptor, stop - start, start)

    def __reduce__(self):
        return JsonLines, (self.path,)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _parse(self._read(*self._starts[index : index + 2].tolist()))

    def where(self, index: int) -> str:
        return f"{self.path}:{self._numbers[index] + 1}"


class ParquetRows:
    """A Parquet file, whole in memory: rows in any order would read whole row groups each."""

    def __init__(self, path: Path):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ValueError(
                f"{path} needs pyarrow, which is not installed: pip install 'phi3-jax[parquet]'"
            ) from error
        self.path = path
        try:
            self._table = pyarrow.parquet.read_table(path)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path} cannot be read as Parquet: {error}") from error

    def __reduce__(self):
        return ParquetRows, (self.path,)

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._table.slice(index, 1).to_pylist()[0]

    def where(self, index: int) -> str:
        return f"{self.path} row {index}"


class ArrayRecords:
    """An ArrayRecord file with a JSON object in each record."""

    def __init__(self, path: Path):
        try:
            from array_record.python import array_record_data_source
        except ImportError as error:
            raise ValueError(
                f"{path} needs array_record, which is not installed: "
                "pip install 'phi3-jax[arrayrecord]'"
            ) from error
        self.path = path
        try:
            self._source = array_record_data_source.ArrayRecordDataSource(str(path))
            self._length = len(self._source)
        except Exception as error:
            raise ValueError(f"{path} cannot be read as ArrayRecord: {error}") from error

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _parse(self._source[index])

    def where(self, index: int) -> str:
        return f"{self.path} row {index}"


_KINDS: dict[str, Callable[[Path], RecordFile]] = {
    ".jsonl": JsonLines,
    ".parquet": ParquetRows,
    ".arrayrecord": ArrayRecords,
}


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        value = parse_json(raw.rstrip(_BLANKS).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at character {error.pos + 1}") from error
    if not isinstance(value, dict):
        raise ValueError(f"is a JSON {type(value).__name__}, must be an object")
    return value
