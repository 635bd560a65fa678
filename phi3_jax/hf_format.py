"""Hugging Face safetensors: names, layouts, and a reader and a writer that hold one tensor at a time.

Nothing here needs JAX. bfloat16 is read and written bit by bit through ml_dtypes.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from phi3_jax.config import Phi3Config

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000

DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

LeafPath = tuple[str, ...]


class Leaf(NamedTuple):
    """What an array is before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


# --- The table: one row a weight, read in both directions ------------------------------------


def _axis_sizes(config: Phi3Config) -> dict[str, int]:
    """The letters of model.py's legend; C is q heads, k and v of one key-value group."""
    groups = config.num_key_value_heads
    heads = config.num_attention_heads // groups
    return {
        "L": config.num_hidden_layers,
        "D": config.hidden_size,
        "V": config.vocab_size,
        "F": config.intermediate_size,
        "H": config.head_dim,
        "K": groups,
        "G": heads,
        "C": heads + 2,
        "2": 2,
    }


def _qkv_rows(sizes: Mapping[str, int]) -> np.ndarray:
    """For each row of HF's qkv_proj (all queries, all keys, all values) its row in group order."""
    heads = sizes["G"]
    grouped = np.arange(sizes["K"] * sizes["C"] * sizes["H"])
    grouped = grouped.reshape(sizes["K"], sizes["C"], sizes["H"])
    parts = (grouped[:, :heads], grouped[:, heads], grouped[:, heads + 1])
    return np.concatenate([part.reshape(-1) for part in parts])


@dataclass(frozen=True)
class Weight:
    """One row of the table.

    Attributes:
      hf_name: HF's name; "{}" is the layer.
      hf_axes: HF's dimensions, each the product of its letters, outermost first.
      path: where it is in our tree.
      axes: our dimensions, a letter each; "L" in front where layers are stacked.
      hf_rows: where HF's rows stand in another order than the letters say, their places.
    """

    hf_name: str
    hf_axes: tuple[str, ...]
    path: LeafPath
    axes: str
    hf_rows: Callable[[Mapping[str, int]], np.ndarray] | None = None

    @property
    def stacked(self) -> bool:
        """Whether the leaf holds all layers, one HF tensor each."""
        return self.axes[0] == "L"

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of our leaf, layers included."""
        return tuple(sizes[letter] for letter in self.axes)

    def hf_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of one HF tensor."""
        return tuple(math.prod(sizes[letter] for letter in axis) for axis in self.hf_axes)

    def from_hf(self, tensor: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """An HF tensor in our layout (of one layer); a view where that is possible."""
        if self.hf_rows:
            tensor = tensor[np.argsort(self.hf_rows(sizes))]
        letters = "".join(self.hf_axes)
        order = [letters.index(letter) for letter in self.axes.removeprefix("L")]
        return tensor.reshape([sizes[letter] for letter in letters]).transpose(order)

    def to_hf(self, array: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Our array (of one layer) in HF's layout, contiguous."""
        axes = self.axes.removeprefix("L")
        order = [axes.index(letter) for letter in "".join(self.hf_axes)]
        # safetensors holds raw C-ordered memory: a strided view written as it is would be garbage.
        tensor = _contiguous(array.transpose(order)).reshape(self.hf_shape(sizes))
        return tensor[self.hf_rows(sizes)] if self.hf_rows else tensor


_LAYER, _LAYERS = "model.layers.{}.", ("model", "layers")
_WEIGHTS = (
    Weight("model.embed_tokens.weight", ("V", "D"), ("model", "embed_tokens", "weight"), "VD"),
    Weight(
        _LAYER + "input_layernorm.weight", ("D",), (*_LAYERS, "input_layernorm", "weight"), "LD"
    ),
    Weight(
        _LAYER + "self_attn.qkv_proj.weight",
        ("KCH", "D"),
        (*_LAYERS, "self_attn", "qkv_proj", "weight"),
        "LDKCH",
        _qkv_rows,
    ),
    Weight(
        _LAYER + "self_attn.o_proj.weight",
        ("D", "KGH"),
        (*_LAYERS, "self_attn", "o_proj", "weight"),
        "LKGHD",
    ),
    Weight(
        _LAYER + "post_attention_layernorm.weight",
        ("D",),
        (*_LAYERS, "post_attention_layernorm", "weight"),
        "LD",
    ),
    Weight(
        _LAYER + "mlp.gate_up_proj.weight",
        ("2F", "D"),
        (*_LAYERS, "mlp", "gate_up_proj", "weight"),
        "LD2F",
    ),
    Weight(
        _LAYER + "mlp.down_proj.weight",
        ("D", "F"),
        (*_LAYERS, "mlp", "down_proj", "weight"),
        "LFD",
    ),
    Weight("model.norm.weight", ("D",), ("model", "norm", "weight"), "D"),
)
_LM_HEAD = Weight("lm_head.weight", ("V", "D"), ("lm_head", "weight"), "VD")

# Buffers that old checkpoints carry; they follow from the config.
_DROPPED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


class WeightTable:
    """The weights of one config: the rows that apply, with their sizes filled in."""

    def __init__(self, config: Phi3Config):
        self.sizes = _axis_sizes(config)
        rows = _WEIGHTS if config.tie_word_embeddings else (*_WEIGHTS, _LM_HEAD)
        self.by_path: dict[LeafPath, Weight] = {row.path: row for row in rows}

    def shape(self, path: LeafPath) -> tuple[int, ...]:
        """The shape of a leaf."""
        return self.by_path[path].shape(self.sizes)

    def layers(self, path: LeafPath) -> list[int | None]:
        """The layers that a leaf holds; [None] for one that is not stacked."""
        return list(range(self.sizes["L"])) if self.by_path[path].stacked else [None]

    def hf_name(self, path: LeafPath, layer: int | None) -> str:
        """HF's name of one layer of a leaf."""
        return self.by_path[path].hf_name.format(layer)

    def hf_shape(self, path: LeafPath) -> tuple[int, ...]:
        """The shape of one layer of a leaf in HF's file."""
        return self.by_path[path].hf_shape(self.sizes)

    def from_hf(self, path: LeafPath, tensor: np.ndarray) -> np.ndarray:
        """An HF tensor as one layer of a leaf; a view where that is possible."""
        return self.by_path[path].from_hf(tensor, self.sizes)

    def to_hf(self, path: LeafPath, array: np.ndarray) -> np.ndarray:
        """One layer of a leaf as an HF tensor, contiguous."""
        return self.by_path[path].to_hf(array, self.sizes)

    def hf_leaves(self, leaves: Mapping[LeafPath, Leaf]) -> dict[str, Leaf]:
        """Names, shapes and dtypes of the HF tensors that the leaves make, in the model's order."""
        parts = [(path, layer) for path in leaves for layer in self.layers(path)]
        first, last = ("model", "embed_tokens", "weight"), ("model", "norm", "weight")
        rank = {first: -1, last: self.sizes["L"], _LM_HEAD.path: self.sizes["L"]}
        parts.sort(key=lambda part: rank.get(part[0], part[1]))
        return {
            self.hf_name(path, layer): Leaf(self.hf_shape(path), leaves[path].dtype)
            for path, layer in parts
        }


def _contiguous(view: np.ndarray, block: int = 64) -> np.ndarray:
    """A C-ordered copy, made in blocks: a plain copy of a transposed matrix thrashes the cache."""
    if view.flags.c_contiguous or view.ndim < 2:
        return np.ascontiguousarray(view)
    out = np.empty(view.shape, view.dtype)
    inner = int(np.argmin(view.strides))
    for start in range(0, view.shape[-1], block):
        for row in range(0, view.shape[inner], 8 * block):
            part = [slice(None)] * view.ndim
            part[inner] = slice(row, row + 8 * block)
            part[-1] = slice(start, start + block)
            out[tuple(part)] = view[tuple(part)]
    return out


# --- Reading ---------------------------------------------------------------------------------


class _Entry(NamedTuple):
    """Where one tensor lies in its file; the dtype is safetensors' name of it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def _read_header(path: Path) -> dict[str, _Entry]:
    # The library checks the header against the file: truncation, overlaps, sizes.
    with safe_open(path, framework="np"):
        pass
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        name: _Entry(path, entry["dtype"], tuple(entry["shape"]), 8 + size + begin, end - begin)
        for name, entry in header.items()
        for begin, end in [entry["data_offsets"]]
    }


class SafetensorsFolder:
    """The tensors of a folder's safetensors files, whatever they are; data is read when asked for.

    Attributes:
      entries: name -> where and what it is.
      problems: one line for everything wrong with the files themselves.
      unreadable: names that the index puts into files that cannot be read.
    """

    def __init__(self, folder: Path):
        self.entries: dict[str, _Entry] = {}
        self.problems: list[str] = []
        self.unreadable: set[str] = set()
        index = self._read_index(folder)
        for file in sorted(set(index.values())) if index is not None else [SINGLE_FILE]:
            try:
                header = _read_header(folder / file)
            except (SafetensorError, OSError) as error:
                missing = isinstance(error, FileNotFoundError)
                reason = "the index names it, but it is not there" if missing else error
                self.problems.append(f"{file}: {reason}")
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
        if not (folder / INDEX_FILE).is_file():
            return None
        try:
            index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
            # Files elsewhere are none of this folder's.
            return {str(name): Path(file).name for name, file in index.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.problems.append(f"{INDEX_FILE}: not an index of safetensors ({error!r})")
            return {}

    def read(self, name: str) -> np.ndarray:
        """A tensor as a read-only view of its file, unmapped when the last view of it goes.

        Each is mapped on its own, so that resident memory does not grow with the file.
        """
        entry = self.entries[name]
        data = np.memmap(entry.file, np.uint8, "r", entry.start, (entry.nbytes,))
        return data.view(np.ndarray).view(DTYPES[entry.dtype]).reshape(entry.shape)


class HFWeights:
    """The weights of an HF folder as leaves of our tree, read one layer at a time.

    Attributes:
      leaves: path -> Leaf, of stacked shape.
      table: the WeightTable of the config.

    Raises:
      ValueError: with everything that is missing, unexpected, mis-shaped or broken, in one message.
    """

    def __init__(self, folder: Path, config: Phi3Config):
        self.table = WeightTable(config)
        self._files = SafetensorsFolder(folder)
        self.leaves: dict[LeafPath, Leaf] = {}
        problems = list(self._files.problems)
        found = {n: e for n, e in self._files.entries.items() if not _DROPPED.fullmatch(n)}
        if config.tie_word_embeddings and _LM_HEAD.hf_name in found:
            problems += self._check_tied_head()
            del found[_LM_HEAD.hf_name]
        file_lost = bool(self._files.problems) and not found
        for path in self.table.by_path:
            dtypes: dict[str, list[int | None]] = {}
            for layer in self.table.layers(path):
                name, shape = self.table.hf_name(path, layer), self.table.hf_shape(path)
                entry = found.pop(name, None)
                if entry is None:
                    if not file_lost and name not in self._files.unreadable:
                        problems.append(f"{name}: missing{_missing_hint(name)}")
                    continue
                if entry.shape != shape:
                    problems.append(f"{name}: shape {entry.shape}, config.json makes it {shape}")
                if entry.dtype not in DTYPES:
                    known = ", ".join(DTYPES)
                    problems.append(f"{name}: dtype {entry.dtype}, can be one of {known}")
                dtypes.setdefault(entry.dtype, []).append(layer)
            if len(dtypes) > 1:
                kinds = "; ".join(f"{dtype} in layers {places}" for dtype, places in dtypes.items())
                problems.append(f"{self.table.by_path[path].hf_name}: differing dtypes: {kinds}")
            elif dtypes and next(iter(dtypes)) in DTYPES:
                self.leaves[path] = Leaf(self.table.shape(path), DTYPES[next(iter(dtypes))])
        problems += [f"{name}: unexpected" for name in sorted(found)]
        raise_problems(folder, problems)

    def read(self, path: LeafPath, layer: int | None, index: Any = ()) -> np.ndarray:
        """One layer of a leaf (layer None: of one that is not stacked), or the part of it at index."""
        return self.table.from_hf(path, self._files.read(self.table.hf_name(path, layer)))[index]

    def _check_tied_head(self) -> list[str]:
        head, embed = _LM_HEAD.hf_name, _WEIGHTS[0].hf_name
        entries = self._files.entries
        if embed not in entries:
            return []
        same = entries[head][1:3] == entries[embed][1:3] and np.array_equal(
            self._files.read(head).view(np.uint8), self._files.read(embed).view(np.uint8)
        )
        if same:
            return []
        return [
            f"{head}: differs from {embed}, but config.json ties them; set tie_word_embeddings "
            "to false to keep both, or remove the tensor"
        ]


def _missing_hint(name: str) -> str:
    if name != _LM_HEAD.hf_name:
        return ""
    return "; if the head shares the embedding, config.json must say tie_word_embeddings: true"


def raise_problems(folder: Path, problems: list[str]) -> None:
    """Raises one ValueError with all problems, if there are any."""
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        lines = "\n  ".join(problems)
        raise ValueError(f"{count} with the weights in {str(folder)!r}:\n  {lines}")


# --- Writing ---------------------------------------------------------------------------------


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
