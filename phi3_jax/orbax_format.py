"""The converted format: an Orbax checkpoint, written and read a layer at a time.

A converted folder holds the files that travel along (config, tokenizer) and `params/`, a checkpoint
that plain Orbax restores as well. Its leaves are the stacked, unsharded, unpadded ones of model.py,
so that any mesh can load it. This is the only file that knows Orbax, and how its files are laid
out.
"""

import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore
from flax.traverse_util import unflatten_dict
from orbax.checkpoint import v1 as orbax

from phi3_jax.config import Phi3Config
from phi3_jax.folder import CHECKPOINT_FILE, PARAMS_FOLDER
from phi3_jax.hf_format import (
    QUANTIZATIONS,
    LeafPath,
    Stored,
    WeightTable,
    head_of,
    raise_problems,
)
from phi3_jax.json_files import read_json_object
from phi3_jax.safetensors_files import Leaf

# Kept in the checkpoint, with "quantized" where it is; a reader of another version refuses it.
_FORMAT: dict[str, Any] = {"format": "phi3-jax", "format_version": 2}

# Of layers that are being written while the next ones come.
_MAX_PENDING_BYTES = 1 << 28


def _store(params_folder: Path, inside: str) -> dict[str, Any]:
    """The TensorStore spec of the key-value store in which Orbax keeps all arrays."""
    base = {"driver": "file", "path": f"{params_folder.resolve()}/state/"}
    return {"driver": "ocdbt", "base": base, "path": inside}


def _array(params_folder: Path, name: str) -> dict[str, Any]:
    """The TensorStore spec of a leaf, as Orbax has it; data that is not there is an error."""
    store = _store(params_folder, f"{name}/")
    return {
        "driver": "zarr3",
        "kvstore": store,
        "fill_missing_data_reads": False,
        "context": {"file_io_mode": {"mode": "memmap"}},  # read without a copy in between
    }


def create_arrays(folder: Path, table: WeightTable, leaves: Mapping[LeafPath, Leaf]) -> None:
    """Makes a new `params/` inside a folder, with the leaves of a model and nothing in them.

    Orbax itself would want each stacked leaf whole in memory. So it is given a placeholder for each
    leaf and writes the tree; the first process then makes the arrays anew in its storage, in the
    same format. Orbax wants all processes of a run here.
    """
    params_folder = (folder / PARAMS_FOLDER).absolute()
    placeholders = {path: np.zeros((1,), leaf.dtype) for path, leaf in leaves.items()}
    kind = {} if table.quantized is None else {"quantized": table.quantized}
    orbax.save(str(params_folder), unflatten_dict(placeholders), custom_metadata=_FORMAT | kind)
    if jax.process_index() == 0:
        for path, leaf in leaves.items():
            tensorstore.open(
                _array(params_folder, ".".join(path)),
                create=True,
                delete_existing=True,
                dtype=tensorstore.dtype(leaf.dtype.name),
                shape=leaf.shape,
                chunk_layout=tensorstore.ChunkLayout(
                    chunk_shape=_chunk_shape(table.weights[path].axes, leaf.shape)
                ),
            ).result()


class OrbaxWriter:
    """Writes into the arrays that `create_arrays` made in a folder, a layer or a part at a time.

    Several processes may write at once, also into one chunk: each change of the storage is one
    atomic replacement of its manifest. What is not written yet is kept in memory, up to a limit;
    leaving the context waits for it.
    """

    def __init__(self, folder: Path, table: WeightTable):
        settings = {
            # Zeros are data too.
            "store_data_equal_to_fill_value": True,
            # Once at the end, by `staged_folder`, not after every layer.
            "context": {"file_io_sync": False},
        }
        params_folder = (folder / PARAMS_FOLDER).absolute()
        self._arrays = {
            path: tensorstore.open(
                _array(params_folder, ".".join(path)) | settings, open=True
            ).result()
            for path in table.weights
        }
        self._pending: deque[tuple[int, tensorstore.WriteFutures]] = deque()

    def write(
        self, path: LeafPath, layer: int | None, array: np.ndarray, index: tuple[slice, ...] = ()
    ) -> None:
        """Writes one layer of a leaf (a whole leaf that is not stacked), or the part at `index`.

        The array must stay as it is until the context ends.
        """
        place = index if layer is None else (layer, *index)
        target = self._arrays[path]
        # Several layers in one commit: each ends in a new manifest.
        running = (target[place] if place else target).write(
            array, can_reference_source_data_indefinitely=True
        )
        self._pending.append((array.nbytes, running))
        while sum(nbytes for nbytes, _ in self._pending) > _MAX_PENDING_BYTES:
            self._pending.popleft()[1].result()

    def __enter__(self) -> "OrbaxWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        # Also after an error: what runs on would write into a folder that is being removed.
        errors = [running.commit.exception() for _, running in self._pending]
        if kind is None:
            for failed in filter(None, errors):
                raise failed


def _chunk_shape(axes: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """One layer, cut so that a mesh of up to eight along an axis reads only what it needs."""
    if axes in ("D", "LD"):
        return shape
    pieces = {"L": shape[0]} | {
        axis: math.gcd(size, 8) for axis, size in zip(axes, shape, strict=True) if axis in "DKFVdf"
    }
    return tuple(size // pieces.get(axis, 1) for axis, size in zip(axes, shape, strict=True))


def open_arrays(
    folder: Path,
) -> tuple[dict[LeafPath, tensorstore.TensorStore], str | None, list[str]]:
    """The arrays in a converted folder, of a whole model or not; no data is read.

    Returns:
      path -> array, the kind of what is quantised, and one line for each that cannot be opened.

    Raises:
      ValueError: where it is no checkpoint, or one of another format or version.
    """
    params_folder = folder / PARAMS_FOLDER
    try:
        metadata = read_json_object(params_folder / CHECKPOINT_FILE)
        written = dict(metadata["custom_metadata"])
        keys = tensorstore.KvStore.open(_store(params_folder, "")).result().list().result()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(params_folder)!r} is not a checkpoint: {_brief(error)}") from error
    quantized = written.get("quantized")
    known = quantized in (None, *QUANTIZATIONS)
    if not known or written | {"quantized": None} != _FORMAT | {"quantized": None}:
        raise ValueError(
            f"{str(params_folder)!r} has the format {written}, this version of the library reads "
            f"{_FORMAT}, quantised or not ({', '.join(QUANTIZATIONS)}); convert the original "
            "weights again"
        )
    arrays, problems = {}, []
    for key in keys:
        name, _, file = key.decode().partition("/")
        if file == "zarr.json":
            try:
                array = tensorstore.open(_array(params_folder, name), open=True).result()
                arrays[tuple(name.split("."))] = array
            except ValueError as error:
                problems.append(f"{name}: {_brief(error)}")
    return arrays, quantized, problems


def _brief(error: Exception) -> str:
    """An error without the spec that TensorStore adds to it."""
    return str(error).partition(" [tensorstore_spec=")[0]


def leaf_of(array: tensorstore.TensorStore) -> Leaf:
    """What a stored array is."""
    return Leaf(tuple(array.shape), array.dtype.numpy_dtype)


class OrbaxWeights(Stored):
    """The weights in a converted folder, checked against its config and read a layer at a time.

    Raises:
      ValueError: with all that is missing, unexpected, mis-shaped or broken, in one message.
    """

    def __init__(self, folder: Path, config: Phi3Config):
        self._folder = folder
        self._arrays, quantized, problems = open_arrays(folder)
        head = head_of(".".join(path) for path in self._arrays)
        self.table = WeightTable(config, head, quantized)
        self.leaves = {path: leaf_of(array) for path, array in self._arrays.items()}
        # What is there and does not open is not missing besides.
        differences = [] if problems else self.table.differences(self.leaves)
        raise_problems(f"the weights in {str(folder)!r}", problems + differences)

    def read(self, path: LeafPath, layer: int | None, index: tuple[slice, ...] = ()) -> np.ndarray:
        """One layer of a leaf, or the part of it at `index`."""
        part = self._part(path, layer, index)
        out = np.empty(part.shape, self.leaves[path].dtype)
        self._copy(path, part, out)
        return out

    def read_into(self, path: LeafPath, layer: int | None, out: np.ndarray) -> None:
        """Reads one layer of a leaf into a contiguous array of its shape and dtype."""
        self._copy(path, self._part(path, layer), out)

    def _part(
        self, path: LeafPath, layer: int | None, index: tuple[slice, ...] = ()
    ) -> tensorstore.TensorStore:
        place = index if layer is None else (layer, *index)
        return self._arrays[path][place] if place else self._arrays[path]

    def _copy(self, path: LeafPath, part: tensorstore.TensorStore, out: np.ndarray) -> None:
        # An array of the storage's own would be one more copy.
        try:
            tensorstore.array(out).write(part).result()
        except ValueError as error:
            place = f"{'.'.join(path)} in {str(self._folder)!r}"
            raise ValueError(f"{place} cannot be read: {_brief(error)}") from error
