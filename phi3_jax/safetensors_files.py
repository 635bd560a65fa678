"""A folder of safetensors files, read and written with one tensor at a time in memory.

Nothing here needs JAX. bfloat16 is kept bit by bit through ml_dtypes.
"""

import json
import math
import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from phi3_jax.json_files import read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000

DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Leaf(NamedTuple):
    """What an array is, without its data."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


class Entry(NamedTuple):
    """Where one tensor lies in its file; the dtype is safetensors' name of it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def _read_header(path: Path) -> dict[str, Entry]:
    # The library checks the header against the file: truncation, overlaps, sizes.
    with safe_open(path, framework="np"):
        pass
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        name: Entry(path, entry["dtype"], tuple(entry["shape"]), 8 + size + begin, end - begin)
        for name, entry in header.items()
        for begin, end in [entry["data_offsets"]]
    }


def save_file(tensors: dict[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
    """Writes one file, as `safetensors.numpy.save_file`, that others may read as any new file.

    From 0.8 on safetensors by itself makes one that its owner alone may read.
    """
    path.touch()
    mode = path.stat().st_mode
    safetensors.numpy.save_file(tensors, path, metadata)
    path.chmod(mode)


class SafetensorsFolder:
    """The tensors of a folder's safetensors files, whatever they are; data is read when asked for.

    Attributes:
      entries: name -> where and what it is.
      problems: one line for everything wrong with the files themselves.
      unreadable: names that the index puts into files that cannot be read.
    """

    def __init__(self, folder: Path):
        self.entries: dict[str, Entry] = {}
        self.problems: list[str] = []
        self.unreadable: set[str] = set()
        index = self._read_index(folder)
        for file in sorted(set(index.values())) if index is not None else [SINGLE_FILE]:
            try:
                header = _read_header(folder / file)
            except (SafetensorError, OSError) as error:
                missing = isinstance(error, FileNotFoundError)
                self.problems.append(f"{file}: {'the file is not there' if missing else error}")
                self.unreadable |= {name for name, home in (index or {}).items() if home == file}
                continue
            if index is not None:
                held = {name for name, home in index.items() if home == file}
                for name in sorted(held - header.keys()):
                    self.problems.append(f"{name}: the index puts it into {file}, not so the file")
                    self.unreadable.add(name)
                for name in sorted(header.keys() - held):
                    self.problems.append(f"{name}: is in {file}, which the index does not say")
            self.entries.update(header)

    def _read_index(self, folder: Path) -> dict[str, str] | None:
        """tensor -> file; None for a folder with a single file."""
        # Where both are there, the single file counts, as in transformers.
        if (folder / SINGLE_FILE).is_file() or not (folder / INDEX_FILE).is_file():
            return None
        try:
            index = read_json_object(folder / INDEX_FILE)["weight_map"]
            # Files elsewhere are none of this folder's.
            homes = {str(name): Path(file).name for name, file in index.items()}
            if not all(homes.values()):
                raise ValueError("a tensor in no file; each must have one")
            return homes
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.problems.append(f"{INDEX_FILE}: not an index of safetensors ({error!r})")
            return {}

    def read_bytes(self, name: str) -> np.ndarray:
        """A tensor's bytes as a read-only map of its file, unmapped when its last view goes.

        Each tensor is mapped on its own, so that resident memory does not grow with the file.
        """
        entry = self.entries[name]
        inside = entry.start % mmap.ALLOCATIONGRANULARITY
        begin, size = entry.start - inside, entry.nbytes + inside
        with open(entry.file, "rb") as file:
            pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ, offset=begin)
        pages.madvise(mmap.MADV_WILLNEED)  # from the disk at once, not a fault at a time
        return np.frombuffer(pages, np.uint8, entry.nbytes, inside)

    def read(self, name: str) -> np.ndarray:
        """A tensor of one of DTYPES, mapped as by `read_bytes`."""
        entry = self.entries[name]
        return self.read_bytes(name).view(DTYPES[entry.dtype]).reshape(entry.shape)

    def read_into(self, name: str, blocks: Iterable[np.ndarray]) -> None:
        """Reads a tensor into contiguous arrays that, one after the other, have its bytes.

        Where the bytes are copied in any case, this is faster than a map of the file.

        Raises:
          ValueError: where the file has become shorter.
        """
        entry = self.entries[name]
        with open(entry.file, "rb") as file:
            file.seek(entry.start)
            for block in blocks:
                if file.readinto(block.reshape(-1).view(np.uint8).data) != block.nbytes:
                    raise ValueError(
                        f"{str(entry.file)!r} ended in the middle of {name}; write it again"
                    )


class SafetensorsWriter:
    """Writes safetensors files into a folder: first all headers, then each tensor as it comes.

    Files, names and index are those of `save_pretrained` in transformers. Tensors may come in any
    order; leaving the context without an error before all of them came is an AssertionError.
    """

    def __init__(
        self, folder: Path, tensors: Mapping[str, Leaf], max_shard_bytes: int = MAX_SHARD_BYTES
    ):
        self._tensors = tensors
        self._places: dict[str, tuple[IO[bytes], int]] = {}
        self._left = set(tensors)
        shards: list[list[str]] = [[]]
        room = max_shard_bytes
        for name, leaf in tensors.items():
            if leaf.nbytes > room and shards[-1]:
                shards.append([])
                room = max_shard_bytes
            shards[-1].append(name)
            room -= leaf.nbytes
        files = [
            f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
        ]
        if len(files) == 1:
            files = [SINGLE_FILE]
        else:
            homes = {name: f for f, names in zip(files, shards, strict=True) for name in names}
            total = sum(leaf.nbytes for leaf in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(homes.items()))}
            text = json.dumps(index, indent=2) + "\n"
            (folder / INDEX_FILE).write_text(text, encoding="utf-8")
        self._files = [open(folder / file, "wb") for file in files]
        for file, names in zip(self._files, shards, strict=True):
            self._write_header(file, names)

    def _write_header(self, file: IO[bytes], names: list[str]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        # Wider dtypes first: every tensor then starts at a multiple of its item size.
        for name in sorted(names, key=lambda name: -self._tensors[name].dtype.itemsize):
            leaf = self._tensors[name]
            header[name] = {
                "dtype": _DTYPE_NAMES[leaf.dtype],
                "shape": leaf.shape,
                "data_offsets": [offset, offset + leaf.nbytes],
            }
            self._places[name] = (file, offset)
            offset += leaf.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            self._places[name] = (file, self._places[name][1] + 8 + len(text))

    def write(self, name: str, tensor: np.ndarray) -> None:
        """Writes one tensor; shape and dtype must be those announced."""
        assert (tensor.shape, tensor.dtype) == self._tensors[name], name
        file, offset = self._places[name]
        file.seek(offset)
        file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        self._left.discard(name)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        for file in self._files:
            file.close()
        assert kind is not None or not self._left, f"never written: {sorted(self._left)}"
