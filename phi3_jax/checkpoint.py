"""Converted checkpoints (Orbax), and loading and saving models from and to both formats.

A converted folder holds the files that travel along (config, tokenizer) and `params/`, a checkpoint
that plain Orbax restores as well. Its leaves are the stacked, unsharded ones of model.py, so that
any mesh can load it. This is the only file that knows Orbax, and how its files are laid out.
"""

import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import tensorstore
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from orbax.checkpoint import v1 as orbax

from phi3_jax.config import Phi3Config
from phi3_jax.folder import PARAMS_FOLDER, find_folder, folder_kind, staged_folder
from phi3_jax.generation.config import GenerationConfig
from phi3_jax.hf_format import EMBEDDING, HFWeights, LeafPath, WeightTable, raise_problems
from phi3_jax.model import Phi3ForCausalLM, Phi3Model
from phi3_jax.safetensors_files import DTYPES, Leaf, SafetensorsWriter
from phi3_jax.sharding import abstract_params

# Kept in the checkpoint; a reader of another version refuses it.
_FORMAT: dict[str, Any] = {"format": "phi3-jax", "format_version": 1}

_READERS = 4


# --- The converted format --------------------------------------------------------------------


def _store(params_folder: Path, inside: str) -> dict[str, Any]:
    """The TensorStore spec of the key-value store in which Orbax keeps all arrays."""
    base = {"driver": "file", "path": f"{params_folder.resolve()}/state/"}
    return {"driver": "ocdbt", "base": base, "path": inside}


def _array(params_folder: Path, name: str) -> dict[str, Any]:
    """The TensorStore spec of a leaf, as Orbax has it; data that is not there is an error."""
    store = _store(params_folder, f"{name}/")
    return {"driver": "zarr3", "kvstore": store, "fill_missing_data_reads": False}


class OrbaxWriter:
    """Writes the leaves of a config into a new `params/` inside a folder, a layer at a time.

    Orbax itself would want each stacked leaf whole in memory. So it is given a placeholder for each
    leaf and writes the tree, and the arrays are then made anew in its storage, in the same format.
    """

    def __init__(self, folder: Path, table: WeightTable, leaves: Mapping[LeafPath, Leaf]):
        params_folder = (folder / PARAMS_FOLDER).absolute()
        placeholders = {path: np.zeros((1,), leaf.dtype) for path, leaf in leaves.items()}
        orbax.save(str(params_folder), unflatten_dict(placeholders), custom_metadata=_FORMAT)
        settings = {
            # Zeros are data too.
            "store_data_equal_to_fill_value": True,
            # Once at the end, by `staged_folder`, not after every layer.
            "context": {"file_io_sync": False},
        }
        self._arrays = {
            path: tensorstore.open(
                _array(params_folder, ".".join(path)) | settings,
                create=True,
                delete_existing=True,
                dtype=tensorstore.dtype(leaf.dtype.name),
                shape=leaf.shape,
                chunk_layout=tensorstore.ChunkLayout(
                    chunk_shape=_chunk_shape(table.weights[path].axes, leaf.shape)
                ),
            ).result()
            for path, leaf in leaves.items()
        }

    def write(self, path: LeafPath, layer: int | None, array: np.ndarray) -> None:
        """Writes one layer of a leaf, or a whole leaf that is not stacked."""
        target = self._arrays[path]
        (target if layer is None else target[layer]).write(array).result()


def _chunk_shape(axes: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """One layer, cut so that a mesh of up to eight along an axis reads only what it needs."""
    if axes in ("D", "LD"):
        return shape
    pieces = {"L": shape[0]} | {
        axis: math.gcd(size, 8) for axis, size in zip(axes, shape, strict=True) if axis in "DKFV"
    }
    return tuple(size // pieces.get(axis, 1) for axis, size in zip(axes, shape, strict=True))


def open_arrays(folder: Path) -> tuple[dict[LeafPath, tensorstore.TensorStore], list[str]]:
    """The arrays in a converted folder, of a whole model or not; no data is read.

    Returns:
      path -> array, and one line for each that cannot be opened.

    Raises:
      ValueError: where it is no checkpoint, or one of another format or version.
    """
    params_folder = folder / PARAMS_FOLDER
    try:
        metadata = json.loads((params_folder / "_CHECKPOINT_METADATA").read_text(encoding="utf-8"))
        written = metadata["custom_metadata"]
        keys = tensorstore.KvStore.open(_store(params_folder, "")).result().list().result()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(params_folder)!r} is not a checkpoint: {_brief(error)}") from error
    if written != _FORMAT:
        raise ValueError(
            f"{str(params_folder)!r} has the format {written}, this version of the library reads "
            f"{_FORMAT}; convert the original weights again"
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
    return arrays, problems


def _brief(error: Exception) -> str:
    """An error without the spec that TensorStore adds to it."""
    return str(error).partition(" [tensorstore_spec=")[0]


def leaf_of(array: tensorstore.TensorStore) -> Leaf:
    """What a stored array is."""
    return Leaf(tuple(array.shape), array.dtype.numpy_dtype)


class OrbaxWeights:
    """The weights in a converted folder, checked against its config and read a layer at a time.

    Attributes:
      table: the WeightTable of the config.
      leaves: path -> Leaf of our tree.

    Raises:
      ValueError: with all that is missing, unexpected, mis-shaped or broken, in one message.
    """

    def __init__(self, folder: Path, config: Phi3Config):
        self.table = WeightTable(config)
        self._folder = folder
        self._arrays, problems = open_arrays(folder)
        self.leaves = {path: leaf_of(array) for path, array in self._arrays.items()}
        # What is there and does not open is not missing besides.
        differences = [] if problems else self.table.differences(self.leaves)
        raise_problems(f"the weights in {str(folder)!r}", problems + differences)

    def read(self, path: LeafPath, layer: int | None, index: Any = ()) -> np.ndarray:
        """One layer of a leaf, or the part of it at `index`."""
        array = self._arrays[path]
        part = array[index] if layer is None else array[(layer, *index)]
        try:
            return part.read().result()
        except ValueError as error:
            place = f"{'.'.join(path)} in {str(self._folder)!r}"
            raise ValueError(f"{place} cannot be read: {_brief(error)}") from error


Weights = HFWeights | OrbaxWeights


def open_weights(folder: Path, config: Phi3Config) -> Weights:
    """The weights of a model folder of either format.

    Raises:
      ValueError: where they are not those of the config, with all that is wrong in one message.
    """
    return (HFWeights if folder_kind(folder) == "hf" else OrbaxWeights)(folder, config)


# --- Models ----------------------------------------------------------------------------------


def from_pretrained(
    folder: str | Path,
    model_class: type[nn.Module] = Phi3ForCausalLM,
    dtype: Any = "float32",
    mesh: Mesh | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Loads a model and its parameters, from safetensors or a converted checkpoint.

    Each leaf goes straight into its shards; beside the parameters the host holds one leaf at most,
    and each process reads what its own devices need.

    Args:
      folder: a model folder of either format, or the id of one on the Hugging Face hub.
      model_class: Phi3ForCausalLM, or Phi3Model to leave the head out.
      dtype: of parameters and activations; None for the stored one.
      mesh: where the parameters go; by default on the first device.

    Returns:
      The module, with its `generation_config` from the folder, and the nested dict of parameters.

    Raises:
      FileNotFoundError: where there is no such folder, or no config.json in it.
      ValueError: where the folder's weights are not those of its config.
    """
    folder = find_folder(folder)
    config = Phi3Config.from_pretrained(folder)
    weights = open_weights(folder, config)
    inside = ("model",) if issubclass(model_class, Phi3Model) else ()
    kind = weights.leaves[EMBEDDING.path].dtype if dtype is None else _float_dtype(dtype)
    model = model_class(
        config,
        dtype=kind,
        param_dtype=kind,
        generation_config=GenerationConfig.from_pretrained(folder),
    )
    params = {}
    for name, leaf in flatten_dict(abstract_params(model, mesh)).items():
        path = (*inside, *name)
        stored = weights.leaves[path]
        assert leaf.shape == stored.shape, path
        leaf_dtype = stored.dtype if dtype is None else kind
        params[name] = _load_leaf(weights, path, leaf.sharding, leaf_dtype)
    return model, unflatten_dict(params)


def _float_dtype(dtype: Any) -> np.dtype:
    for known in DTYPES.values():
        if dtype in (known, known.name, known.type):
            return known
    names = ", ".join(sorted(known.name for known in DTYPES.values()))
    raise ValueError(f"dtype is {dtype!r}, must be one of {names}, or None for the stored one")


def _load_leaf(weights: Weights, path: LeafPath, sharding, dtype: np.dtype) -> jax.Array:
    shape = weights.leaves[path].shape
    # Devices that hold the same part are given the same array.
    parts: dict[tuple, np.ndarray] = {}

    def part(index) -> np.ndarray:
        ranges = tuple(axis.indices(size) for axis, size in zip(index, shape, strict=True))
        if ranges not in parts:
            parts[ranges] = np.empty([len(range(*axis)) for axis in ranges], dtype)
            _read_into(parts[ranges], weights, path, index)
        return parts[ranges]

    # Waiting keeps the copies of two leaves from being in memory at once.
    return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, part, dtype=dtype))


def _read_into(out: np.ndarray, weights: Weights, path: LeafPath, index) -> None:
    """Fills `out`, of any dtype, with the part of a leaf at `index`."""
    layers = weights.table.layers(path)
    if layers == [None]:
        out[...] = weights.read(path, None, index)
        return

    def fill(place: int, layer: int | None) -> None:
        out[place] = weights.read(path, layer, index[1:])

    # NumPy and TensorStore copy without holding the interpreter.
    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(fill, *zip(*enumerate(layers[index[0]]), strict=True)))


def save_pretrained(
    folder: str | Path, model: nn.Module, params: Mapping[str, Any], force: bool = False
) -> None:
    """Writes config.json, generation_config.json and safetensors, as transformers loads them.

    Sharded parameters are gathered a leaf at a time; in a run of several processes all of them must
    call this, and the first one writes. The folder appears whole or not at all.

    Args:
      folder: the new folder.
      model: a Phi3ForCausalLM.
      params: its parameters, of any sharding; they are saved in their own dtype.
      force: replace a model folder that is already there.

    Raises:
      FileExistsError: where the folder exists, without force.
      ValueError: where the parameters are not those of the model's config.
    """
    table = WeightTable(model.config)
    arrays = flatten_dict(params)
    leaves = {path: Leaf(tuple(a.shape), np.dtype(a.dtype)) for path, a in arrays.items()}
    raise_problems("the parameters to save", table.differences(leaves))
    if jax.process_index() == 0:
        with staged_folder(folder, force) as stage:
            _config_to_save(model.config, leaves).save_pretrained(stage)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(stage)
            with SafetensorsWriter(stage, table.hf_leaves(leaves)) as writer:
                for path in table.weights:
                    array = _to_host(arrays[path])
                    for layer in table.layers(path):
                        part = array if layer is None else array[layer]
                        writer.write(table.hf_name(path, layer), table.to_hf(path, part))
                    del array  # before the next leaf comes
    else:
        for path in table.weights:  # gathering takes all processes
            _to_host(arrays[path])
    multihost_utils.sync_global_devices("phi3_jax.save_pretrained")


def _config_to_save(config: Phi3Config, leaves: Mapping[LeafPath, Leaf]) -> Phi3Config:
    """The config with the dtype that is saved, as which transformers would load it."""
    values = config.to_dict()
    values.pop("dtype", None)  # the newer name, which would win over the one that all versions read
    return Phi3Config.from_dict({**values, "torch_dtype": leaves[EMBEDDING.path].dtype.name})


def _to_host(array: Any) -> np.ndarray:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
