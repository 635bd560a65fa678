"""Phi-3's weights by Hugging Face's names and layouts, and by ours.

Nothing here needs JAX.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from phi3_jax.config import Phi3Config
from phi3_jax.safetensors_files import DTYPES, Leaf, SafetensorsFolder

LeafPath = tuple[str, ...]

# What stands on the decoder. "score" is a sequence classifier's head, "score_bias" that of a token
# classifier. "none" is the decoder alone, whose names have no "model." in front, in HF's files as
# in our trees; with each of the others they have.
Head = Literal["lm_head", "score", "score_bias", "none"]


@dataclass(frozen=True)
class Weight:
    """One row of the table that names every weight; it is read in both directions.

    Letters are those of model.py's legend: D width, V vocabulary, F mlp width, H head dim,
    K key-value groups, G query heads a group, C = G + 2, L layers; n labels.

    Attributes:
      hf_name: HF's name, "{}" standing for the layer.
      hf_axes: HF's dimensions, each the product of its letters, the outermost first. Ours are the
        letters one by one, in the same order.
      path: where the weight is in our tree.
      fused_qkv: HF has all queries, then all keys, then all values, where we have them by group.
      integers: the dtype of the values of a quantised weight; None for floats.
    """

    hf_name: str
    hf_axes: tuple[str, ...]
    path: LeafPath
    fused_qkv: bool = False
    integers: np.dtype | None = None

    @property
    def axes(self) -> str:
        """Our dimensions, a letter each; "L" in front where the leaf stacks the layers."""
        return ("L" if "{}" in self.hf_name else "") + "".join(self.hf_axes)


def _layer_weight(name: str, hf_axes: tuple[str, ...], fused_qkv: bool = False) -> Weight:
    path = ("model", "layers", *name.split("."), "weight")
    return Weight(f"model.layers.{{}}.{name}.weight", hf_axes, path, fused_qkv)


EMBEDDING = Weight("model.embed_tokens.weight", ("V", "D"), ("model", "embed_tokens", "weight"))
LAYER_WEIGHTS = (
    _layer_weight("input_layernorm", ("D",)),
    _layer_weight("self_attn.qkv_proj", ("KCH", "D"), fused_qkv=True),
    _layer_weight("self_attn.o_proj", ("D", "KGH")),
    _layer_weight("post_attention_layernorm", ("D",)),
    _layer_weight("mlp.gate_up_proj", ("2F", "D")),
    _layer_weight("mlp.down_proj", ("D", "F")),
)
FINAL_NORM = Weight("model.norm.weight", ("D",), ("model", "norm", "weight"))
LM_HEAD = Weight("lm_head.weight", ("V", "D"), ("lm_head", "weight"))
SCORE = Weight("score.weight", ("n", "D"), ("score", "weight"))
SCORE_BIAS = Weight("score.bias", ("n",), ("score", "bias"))
HEAD_WEIGHTS: dict[Head, tuple[Weight, ...]] = {
    "lm_head": (LM_HEAD,),
    "score": (SCORE,),
    "score_bias": (SCORE, SCORE_BIAS),
    "none": (),
}

# What converted folders hold in 8 or 4 bits where they are quantised: the matrices that a token is
# multiplied with. The letters of what is smaller there are those of `WeightTable.sizes`.
QUANTIZATIONS = ("int8", "nf4")
QUANTIZED = {row.path: row for row in (*LAYER_WEIGHTS, LM_HEAD) if len(row.hf_axes) == 2}
_PAIRS, _TILES = {"D": "d", "F": "f", "H": "h"}, {"D": "x", "F": "y", "H": "z"}
_MAX_TILE = 64  # the most inputs that share a scale in nf4


def tile_of(inputs: int) -> int:
    """How many inputs share a scale in nf4: the largest divisor of their number that is at most 64.

    64 as in QLoRA (arXiv:2305.14314).
    """
    return next(tile for tile in range(_MAX_TILE, 0, -1) if inputs % tile == 0)


# Buffers that old checkpoints carry; they follow from the config.
DROPPED = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def quantized_rows(row: Weight, kind: str) -> tuple[Weight, Weight]:
    """The rows of a weight's values and scales, for "int8" or "nf4"."""
    outputs, inputs = row.hf_axes
    if kind == "int8":
        values, scales, dtype = inputs, "1" * len(inputs), np.int8
    else:
        values, scales = (inputs[:-1] + small[inputs[-1]] for small in (_PAIRS, _TILES))
        dtype = np.uint8

    def part(name: str, axes: str, integers: np.dtype | None) -> Weight:
        own = (*outputs, *axes)
        return Weight(f"{row.hf_name}.{name}", own, (*row.path, name), integers=integers)

    return part("values", values, np.dtype(dtype)), part("scales", scales, None)


def head_of(names: Iterable[str]) -> Head:
    """What the names of weights, HF's or of our leaves, say of the head; "lm_head" if nothing."""
    names = {re.sub(r"\.(values|scales)$", "", name) for name in names}
    if SCORE_BIAS.hf_name in names:
        return "score_bias"
    if SCORE.hf_name in names:
        return "score"
    decoder = re.compile(r"(embed_tokens|layers|norm)\.")
    bare = LM_HEAD.hf_name not in names and any(map(decoder.match, names))
    return "none" if bare else "lm_head"


class WeightTable:
    """The rows that one model has, with the sizes of its config filled in.

    Attributes:
      head: which head the model has; a tied "lm_head" has no row.
      quantized: the kind of the QUANTIZED weights, "int8" or "nf4", each of which has two rows, or
        None for floats.
      weights: path -> row.
      parts: (path, layer) of every HF tensor, in the order of the model; layer is None outside
        the layers.
    """

    def __init__(self, config: Phi3Config, head: Head = "lm_head", quantized: str | None = None):
        self.head, self.quantized = head, quantized
        groups = config.num_key_value_heads
        heads = config.num_attention_heads // groups
        self.sizes = {
            "L": config.num_hidden_layers,
            "D": config.hidden_size,
            "V": config.vocab_size,
            "F": config.intermediate_size,
            "H": config.head_dim,
            "K": groups,
            "G": heads,
            "C": heads + 2,
            "n": config.num_labels,
            "2": 2,
            "1": 1,
        }
        for letter, pair in _PAIRS.items():
            size = self.sizes[letter]
            self.sizes |= {pair: -(-size // 2), _TILES[letter]: size // tile_of(size)}
        self._last: dict[LeafPath, int] = {}  # sizes of quantised weights, of the last dimension
        tied = head == "lm_head" and config.tie_word_embeddings
        first, layers = self._rows([EMBEDDING]), self._rows(LAYER_WEIGHTS)
        last = self._rows([FINAL_NORM, *(() if tied else HEAD_WEIGHTS[head])])
        self.weights = {row.path: row for row in (*first, *layers, *last)}
        self.parts: list[tuple[LeafPath, int | None]] = [
            *((row.path, None) for row in first),
            *((row.path, layer) for layer in range(self.sizes["L"]) for row in layers),
            *((row.path, None) for row in last),
        ]

    def _rows(self, rows: Iterable[Weight]) -> list[Weight]:
        """With the names that this model has, and two for each weight that is quantised."""
        own = []
        for row in rows:
            kind = self.quantized if row.path in QUANTIZED else None
            own += [row] if kind is None else quantized_rows(row, kind)
            if kind is not None:
                self._last[self._row(row).path] = self.sizes[row.axes[-1]]
        return [self._row(row) for row in own]

    def _row(self, row: Weight) -> Weight:
        if self.head != "none":
            return row
        return replace(row, hf_name=row.hf_name.removeprefix("model."), path=row.path[1:])

    def stored(self, path: LeafPath) -> tuple[LeafPath, ...]:
        """Where a weight of the model is: at its path, or in values and scales below it."""
        below = ((*path, "values"), (*path, "scales"))
        return below if below[0] in self.weights else (path,)

    def tile(self, path: LeafPath) -> int:
        """How many inputs along the last dimension of a quantised weight share a scale."""
        last = self._last[path]
        return last if self.quantized == "int8" else tile_of(last)

    @property
    def embedding(self) -> LeafPath:
        """Where the embedding is, whose dtype is taken for that of the model."""
        return self._row(EMBEDDING).path

    def layers(self, path: LeafPath) -> list[int | None]:
        """The layers in a leaf; [None] for one that does not stack them."""
        return [layer for other, layer in self.parts if other == path]

    def shape(self, path: LeafPath) -> tuple[int, ...]:
        """The shape of our leaf, all layers of it."""
        return tuple(self.sizes[letter] for letter in self.weights[path].axes)

    def layer_shape(self, path: LeafPath) -> tuple[int, ...]:
        """The shape of one layer of our leaf; of all of it where it does not stack them."""
        return tuple(self.sizes[letter] for letter in self.weights[path].axes.removeprefix("L"))

    def hf_name(self, path: LeafPath, layer: int | None) -> str:
        """HF's name of one layer of a leaf."""
        return self.weights[path].hf_name.format(layer)

    def hf_shape(self, path: LeafPath) -> tuple[int, ...]:
        """The shape of the HF tensor of one layer of a leaf."""
        axes = self.weights[path].hf_axes
        return tuple(math.prod(self.sizes[letter] for letter in axis) for axis in axes)

    def hf_leaves(self, leaves: Mapping[LeafPath, Leaf]) -> dict[str, Leaf]:
        """What the HF tensors of the leaves are, by name and in the order of the model."""
        return {
            self.hf_name(path, layer): Leaf(self.hf_shape(path), leaves[path].dtype)
            for path, layer in self.parts
        }

    def differences(self, leaves: Mapping[LeafPath, Leaf]) -> list[str]:
        """One line for everything in which the leaves are not those of the config."""
        lines = []
        for path in self.weights:
            name, shape, leaf = ".".join(path), self.shape(path), leaves.get(path)
            if leaf is None:
                lines.append(f"{name}: missing")
            elif leaf.shape != shape:
                lines.append(f"{name}: shape {leaf.shape}, the config makes it {shape}")
            elif (known := self.weights[path].integers) is not None and leaf.dtype != known:
                lines.append(f"{name}: dtype {leaf.dtype}, must be {known}")
            elif known is None and leaf.dtype not in DTYPES.values():
                lines.append(f"{name}: dtype {leaf.dtype}, must be one of {', '.join(DTYPES)}")
        return lines + sorted(
            f"{'.'.join(path)}: unexpected" for path in leaves.keys() - self.weights.keys()
        )

    def from_hf(
        self, path: LeafPath, tensor: np.ndarray, index: tuple[slice, ...] = ()
    ) -> np.ndarray:
        """An HF tensor in the layout of one layer of our leaf, or the part of that at `index`; a
        view, but for qkv_proj.
        """
        shape = self.layer_shape(path)
        if not self.weights[path].fused_qkv:
            return tensor.reshape(shape)[index]
        groups, heads, *rest = shape
        of_groups, of_heads, *of_rest = index or [slice(None)] * len(shape)
        rows = tensor.reshape(-1, *rest)
        q_k_v = np.split(rows, [groups * (heads - 2), groups * (heads - 1)])
        parts = [part.reshape(groups, -1, *rest)[of_groups, :, *of_rest] for part in q_k_v]
        return np.concatenate(parts, axis=1)[:, of_heads]

    def to_hf(self, path: LeafPath, array: np.ndarray) -> np.ndarray:
        """One layer of our leaf as an HF tensor, contiguous."""
        if not self.weights[path].fused_qkv:
            return np.ascontiguousarray(array).reshape(self.hf_shape(path))
        inputs = self.hf_shape(path)[1:]
        return np.concatenate([block.reshape(-1, *inputs) for block in self.blocks(path, array)])

    def blocks(self, path: LeafPath, array: np.ndarray) -> list[np.ndarray]:
        """Views of one layer of our leaf that, one after the other, are the HF tensor."""
        if not self.weights[path].fused_qkv:
            return [array]
        return [*array[:, :-2], *array[:, -2], *array[:, -1]]


class Stored:
    """What the weights of both kinds of folders have in common.

    Attributes:
      table: the WeightTable of the config, with the head that the names of the weights say.
      leaves: path -> Leaf of our tree.
    """

    table: WeightTable
    leaves: dict[LeafPath, Leaf]

    def dtype(self, path: LeafPath) -> np.dtype | None:
        """That of a weight, of its scales where it is quantised; None where it is not there."""
        leaf = self.leaves.get(self.table.stored(path)[-1])
        return None if leaf is None else leaf.dtype


class HFWeights(Stored):
    """The weights in an HF folder, checked against its config and read a layer at a time.

    Raises:
      ValueError: with all that is missing, unexpected, mis-shaped or broken, in one message.
    """

    def __init__(self, folder: Path, config: Phi3Config):
        self._files = SafetensorsFolder(folder)
        names = self._files.entries.keys() | self._files.unreadable
        self.table = WeightTable(config, head_of(names))
        self.leaves = {}
        problems = list(self._files.problems)
        found = {n: e for n, e in self._files.entries.items() if not DROPPED.fullmatch(n)}
        if config.tie_word_embeddings and found.pop(LM_HEAD.hf_name, None):
            problems += self._check_tied_head()
        # Where no file could be read, naming every tensor as missing would bury the reason.
        nothing_read = bool(problems) and not found
        dtypes: dict[LeafPath, dict[str, list[int | None]]] = {}
        for path, layer in self.table.parts:
            name, shape = self.table.hf_name(path, layer), self.table.hf_shape(path)
            entry = found.pop(name, None)
            if entry is not None:
                dtypes.setdefault(path, {}).setdefault(entry.dtype, []).append(layer)
                if entry.shape != shape:
                    problems.append(f"{name}: shape {entry.shape}, the config makes it {shape}")
            elif not nothing_read and name not in self._files.unreadable:
                hint = "; a tied model has tie_word_embeddings true in its config.json"
                problems.append(f"{name}: missing{hint if name == LM_HEAD.hf_name else ''}")
        for path, layers in dtypes.items():
            name = self.table.weights[path].hf_name
            if len(layers) > 1:
                kinds = "; ".join(f"{dtype} in layers {some}" for dtype, some in layers.items())
                problems.append(f"{name}: its layers differ in dtype: {kinds}")
            elif (dtype := next(iter(layers))) not in DTYPES:
                problems.append(f"{name}: dtype {dtype}, must be one of {', '.join(DTYPES)}")
            else:
                self.leaves[path] = Leaf(self.table.shape(path), DTYPES[dtype])
        problems += [f"{name}: unexpected" for name in sorted(found)]
        raise_problems(f"the weights in {str(folder)!r}", problems)

    def read(self, path: LeafPath, layer: int | None, index: tuple[slice, ...] = ()) -> np.ndarray:
        """One layer of a leaf, or the part of it at `index`, contiguous; a map of the file where
        that is possible.
        """
        tensor = self._files.read(self.table.hf_name(path, layer))
        return np.ascontiguousarray(self.table.from_hf(path, tensor, index))

    def read_into(self, path: LeafPath, layer: int | None, out: np.ndarray) -> None:
        """Reads one layer of a leaf into a contiguous array of its shape and dtype."""
        self._files.read_into(self.table.hf_name(path, layer), self.table.blocks(path, out))

    def _check_tied_head(self) -> list[str]:
        """A head beside the embedding that it is tied to may be there, if it is the same."""
        files, head, embedding = self._files, LM_HEAD.hf_name, EMBEDDING.hf_name
        if embedding not in files.entries:
            return []
        kinds = [
            (entry.dtype, entry.shape) for entry in (files.entries[head], files.entries[embedding])
        ]
        if kinds[0] == kinds[1]:
            if np.array_equal(files.read_bytes(head), files.read_bytes(embedding)):
                return []
        return [
            f"{head}: differs from {embedding}, but config.json has tie_word_embeddings true; "
            "set it to false to keep both, or remove the tensor"
        ]


# The kind of trouble shows in fewer; a file may name any number of tensors.
_PROBLEMS_SHOWN = 40


def raise_problems(what: str, problems: list[str]) -> None:
    """Raises one ValueError that lists the problems of what is named, if there are any."""
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        more = len(problems) - _PROBLEMS_SHOWN
        shown = problems[:_PROBLEMS_SHOWN] + [f"and {more} more"] * (more > 0)
        lines = "\n  ".join(shown)
        raise ValueError(
            f"{count} with {what}; mend the config, or what does not fit it:\n  {lines}"
        )
