"""Loading and saving models, from and to Hugging Face folders and converted ones, on any mesh.

On disk every leaf is whole and has its own shape. In memory it is cut over the mesh, and padded at
the end of the dimensions that the mesh does not divide; here is where one becomes the other, a
layer at a time, so that no host ever holds a whole stacked leaf beside those of its devices.
"""

import warnings
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh, SingleDeviceSharding

from phi3_jax.classification import Phi3ForSequenceClassification, Phi3ForTokenClassification
from phi3_jax.config import Phi3Config
from phi3_jax.folder import find_folder, flush, folder_kind
from phi3_jax.generation.config import GenerationConfig
from phi3_jax.hf_format import Head, HFWeights, LeafPath, WeightTable, raise_problems
from phi3_jax.load_leaves import Weights, load_leaves, ranges_of, stored_part
from phi3_jax.model import Model, Phi3ForCausalLM, Phi3Model
from phi3_jax.processes import by_all, staged_by_all
from phi3_jax.quantized import require_floats
from phi3_jax.safetensors_files import DTYPES, Leaf, SafetensorsWriter
from phi3_jax.sharding import abstract_params, default_device, init_params, plain_tree

_HEADS: dict[type[nn.Module], Head] = {
    Phi3Model: "none",
    Phi3ForCausalLM: "lm_head",
    Phi3ForSequenceClassification: "score",
    Phi3ForTokenClassification: "score_bias",
}


def open_weights(folder: Path, config: Phi3Config) -> Weights:
    """The weights of a model folder of either format.

    Raises:
      ValueError: where they are not those of the config, with all that is wrong in one message.
    """
    if folder_kind(folder) == "hf":
        return HFWeights(folder, config)
    from phi3_jax.orbax_format import OrbaxWeights  # loads Orbax, which takes a while

    return OrbaxWeights(folder, config)


# --- Loading ---------------------------------------------------------------------------------


def from_pretrained(
    folder: str | Path,
    model_class: type[nn.Module] = Phi3ForCausalLM,
    dtype: Any = "float32",
    mesh: Mesh | None = None,
    **config_overrides: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """Loads a model and its parameters, from safetensors or a converted checkpoint.

    Each layer goes straight into its shards; beside the parameters the host holds a few layers'
    tensors, no two of one leaf, and each process reads what its own devices need.

    The decoder of any folder serves any class. A classifier whose head is not in the folder gets a
    new one, as the module's own `init` makes it, and a warning that names it.

    Args:
      folder: a model folder of either format, or the id of one on the Hugging Face hub.
      model_class: Phi3ForCausalLM, Phi3ForSequenceClassification, Phi3ForTokenClassification, or
        Phi3Model for the decoder alone.
      dtype: of parameters and activations; None for the stored one.
      mesh: where the parameters go; by default on the first device.
      config_overrides: fields of Phi3Config, laid over those of the folder: num_labels=5. How a
        model computes is no part of its config: `model.clone(attn_implementation=..., remat=...)`.

    Returns:
      The module, with its `generation_config` from the folder, and the nested dict of parameters;
      matrices that are quantised there are QuantizedWeight, with scales of the dtype.

    Raises:
      FileNotFoundError: where there is no such folder, or no config.json in it.
      ValueError: where the folder's weights are not those of its config with the overrides, or a
        causal model's head is not there; for an override that is no field.
    """
    if not isinstance(model_class, type) or not issubclass(model_class, Model):
        names = ", ".join(known.__name__ for known in _HEADS)
        raise ValueError(f"model_class is {model_class!r}, must be one of {names}")
    folder = find_folder(folder)
    config = Phi3Config.from_pretrained(folder, **config_overrides)
    weights = open_weights(folder, config)
    kind = weights.dtype(weights.table.embedding) if dtype is None else _float_dtype(dtype)
    model = model_class(
        config,
        dtype=kind,
        param_dtype=kind,
        generation_config=GenerationConfig.from_pretrained(folder),
        mesh=mesh,
    )
    leaves = _expected(model)
    places = {name: _stored_path(name, model, weights.table) for name in leaves}
    kinds = {name: weights.dtype(path) for name, path in places.items()}
    missing = [name for name, stored in kinds.items() if stored is None]
    _check_head(folder, model, kinds, weights)
    targets = {
        places[name]: jax.ShapeDtypeStruct(
            leaf.shape, kinds[name] if dtype is None else kind, sharding=leaf.sharding
        )
        for name, leaf in leaves.items()
        if name not in missing
    }
    loaded = load_leaves(weights, targets)
    params = {name: loaded[path] for name, path in places.items() if path in loaded}
    if missing:
        names = ", ".join(".".join(name) for name in missing)
        warnings.warn(f"{str(folder)!r} has no {names}: new, and to be trained", stacklevel=2)
        new = lambda: {name: flatten_dict(init_params(model))[name] for name in missing}  # noqa: E731
        # The rest of what is initialised has no use in the program, and is not in it.
        params |= jax.jit(new, out_shardings={name: leaves[name].sharding for name in missing})()
    return model, unflatten_dict(params)


def _float_dtype(dtype: Any) -> np.dtype:
    for known in DTYPES.values():
        if dtype in (known, known.name, known.type):
            return known
    names = ", ".join(sorted(known.name for known in DTYPES.values()))
    raise ValueError(f"dtype is {dtype!r}, must be one of {names}, or None for the stored one")


def _stored_path(name: LeafPath, model: nn.Module, table: WeightTable) -> LeafPath:
    """Where a leaf of the model is in the folder: the decoder's have "model" in front, or not."""
    if isinstance(model, Phi3Model):
        name = ("model", *name)
    return name[1:] if table.head == "none" and name[0] == "model" else name


def _check_head(
    folder: Path,
    model: nn.Module,
    stored: Mapping[LeafPath, np.dtype | None],
    weights: Weights,
) -> None:
    """Only a classifier's head may be new, and a classifier may not lose half of a stored one."""
    problems = [
        f"{'.'.join(name)}: missing"
        for name, dtype in stored.items()
        if dtype is None and name[0] != "score"
    ]
    if weights.table.head == "score_bias":
        if ("score", "weight") in stored and ("score", "bias") not in stored:
            problems.append("score.bias: unexpected, the model has a head without it")
    raise_problems(f"{type(model).__name__} from the weights in {str(folder)!r}", problems)


def _expected(model: nn.Module) -> dict[LeafPath, jax.ShapeDtypeStruct]:
    """`abstract_params` by path; without a mesh those of the table, and the model is not traced."""
    if model.mesh is not None:
        return flatten_dict(abstract_params(model))
    table, place = _table(model), SingleDeviceSharding(default_device())
    return {
        path: jax.ShapeDtypeStruct(table.shape(path), model.param_dtype, sharding=place)
        for path in sorted(table.weights)  # as JAX orders a tree
    }


# --- Saving ----------------------------------------------------------------------------------


def save_pretrained(
    folder: str | Path, model: nn.Module, params: Mapping[str, Any], force: bool = False
) -> None:
    """Writes config.json, generation_config.json and safetensors, as transformers loads them.

    Sharded parameters are gathered a layer at a time; in a run of several processes all of them
    must call this, and the first one writes. The folder appears whole or not at all.

    Args:
      folder: the new folder.
      model: one of the four model classes, with the mesh of the parameters.
      params: its parameters, of any sharding; they are saved in their own dtype.
      force: replace a model folder that is already there.

    Raises:
      FileExistsError: where the folder exists, without force.
      ValueError: where the parameters are not those of the model, or are quantised.
      RuntimeError: in the processes that did not fail, where another one did.
    """
    table, arrays, leaves = _check_params(model, params)
    with staged_by_all(folder, force) as stage:
        tensors = (
            (table.hf_name(path, layer), path, _to_host(array, table.layer_shape(path)))
            for path, layer, array in _layers(table, arrays)
        )
        if jax.process_index() == 0:
            _write_configs(stage, model, leaves[table.embedding].dtype)
            try:
                with SafetensorsWriter(stage, table.hf_leaves(leaves)) as writer:
                    for name, path, array in tensors:
                        writer.write(name, table.to_hf(path, array))
            except Exception:
                _run_out(tensors)
                raise
        else:
            _run_out(tensors)


def save_checkpoint(
    folder: str | Path, model: nn.Module, params: Mapping[str, Any], force: bool = False
) -> None:
    """Writes a converted folder: an Orbax checkpoint, config.json and generation_config.json.

    Each process writes the shards that its devices hold, without padding, so that any mesh can
    load the folder. In a run of several processes all of them must call this, with a folder on a
    file system that they share. The folder appears whole or not at all.

    Args:
      folder: the new folder.
      model: one of the four model classes, with the mesh of the parameters.
      params: its parameters, of any sharding; they are saved in their own dtype.
      force: replace a model folder that is already there.

    Raises:
      FileExistsError: where the folder exists, without force.
      ValueError: where the parameters are not those of the model, or are quantised.
      RuntimeError: in the processes that did not fail, where another one did.
    """
    from phi3_jax.orbax_format import OrbaxWriter, create_arrays  # loads Orbax: a while

    table, arrays, leaves = _check_params(model, params)
    with staged_by_all(folder, force) as stage:
        with by_all():
            if jax.process_index() == 0:
                _write_configs(stage, model, leaves[table.embedding].dtype)
            create_arrays(stage, table, leaves)
        with by_all(), OrbaxWriter(stage, table) as writer:
            for path, layer, array in _layers(table, arrays):
                for shard in _own_shards(array):
                    ranges = ranges_of(shard.index, array.shape)
                    inside = stored_part(ranges, table.layer_shape(path))
                    stored = tuple(slice(axis.stop - axis.start) for axis in inside)
                    writer.write(path, layer, np.asarray(shard.data)[stored], inside)
        if jax.process_index() != 0:
            flush(stage)  # what this host wrote; the first process waits for its own


def _table(model: nn.Module) -> WeightTable:
    """The weights that a model has."""
    head = next(head for known, head in _HEADS.items() if isinstance(model, known))
    if head == "score_bias" and not model.config.token_classification_bias:
        head = "score"
    return WeightTable(model.config, head)


def _check_params(
    model: nn.Module, params: Mapping[str, Any]
) -> tuple[WeightTable, dict[LeafPath, jax.Array], dict[LeafPath, Leaf]]:
    """The model's table, its parameters by path, and what they are without padding."""
    table = _table(model)
    padded = {path: leaf.shape for path, leaf in _expected(model).items()}
    require_floats(plain_tree(params), "saving")
    arrays = flatten_dict(plain_tree(params))
    leaves = {
        path: Leaf(
            table.shape(path) if array.shape == padded.get(path) else tuple(array.shape),
            np.dtype(array.dtype),
        )
        for path, array in arrays.items()
    }
    raise_problems("the parameters to save", table.differences(leaves))
    return table, {path: jnp.asarray(array) for path, array in arrays.items()}, leaves


def _write_configs(stage: Path, model: nn.Module, dtype: np.dtype) -> None:
    values = model.config.to_dict()
    values.pop("dtype", None)  # the newer name, which would win over the one that all versions read
    known = next(known for known in _HEADS if isinstance(model, known))
    values |= {"architectures": [known.__name__], "torch_dtype": dtype.name}
    Phi3Config.from_dict(values).save_pretrained(stage)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(stage)


def _layers(
    table: WeightTable, arrays: Mapping[LeafPath, jax.Array]
) -> Generator[tuple[LeafPath, int | None, jax.Array]]:
    """Path, layer and padded array of each part; cutting a layer out takes all processes."""
    for path, layer in table.parts:
        yield path, layer, arrays[path] if layer is None else arrays[path][layer]


def _to_host(array: jax.Array, shape: tuple[int, ...]) -> np.ndarray:
    """An array without its padding, in every process."""
    if not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)[tuple(map(slice, shape))]


def _own_shards(array: jax.Array) -> list[Any]:
    """The shards that this process has to write, so that all processes write each part once."""
    if array.is_fully_addressable and jax.process_index() != 0:
        return []
    return [shard for shard in array.addressable_shards if shard.replica_id == 0]


def _run_out(tensors: Iterable[Any]) -> None:
    """Gathers what is left to gather, for the processes that are still at it."""
    for _ in tensors:
        pass
