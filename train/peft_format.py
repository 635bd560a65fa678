"""Adapters in the files of PEFT: adapter_config.json and adapter_model.safetensors.

The names and layouts of the tensors follow from those of the weights (phi3_jax/hf_format.py): A
and B are a weight whose outputs, or inputs, are the rank r.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from safetensors import SafetensorError

from phi3_jax.config import Phi3Config
from phi3_jax.folder import ADAPTER_CONFIG_FILE as CONFIG_FILE
from phi3_jax.folder import check_finished
from phi3_jax.hf_format import LeafPath, Weight, WeightTable, raise_problems
from phi3_jax.json_files import read_json_object
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.processes import by_all, staged_by_all
from phi3_jax.safetensors_files import DTYPES, save_file
from train.config import TARGETS, LoraConfig
from train.lora import abstract_adapters, check_lora

WEIGHTS_FILE = "adapter_model.safetensors"

# Fields of PEFT's config that any adapter may have: read here, said by the tensors themselves, of
# use in training alone, or about the files.
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "init_lora_weights"}
_NO_MATTER = {
    "target_modules", "exclude_modules", "task_type", "base_model_name_or_path", "revision",
    "inference_mode", "auto_mapping", "peft_version", "megatron_core", "qalora_group_size",
    "runtime_config", "eva_config", "ensure_weight_tying",
}  # fmt: skip
# Beginnings that leave the model's own weights as they are; the others (pissa, olora, loftq, ...)
# change them.
_BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva")
# What numbers and flags may be, beside r.
_KINDS = {
    "lora_alpha": (int, float),
    "lora_dropout": (int, float, type(None)),
    "use_rslora": (bool, type(None)),
}


class AdapterTable(WeightTable):
    """The rows of a model's adapters, beside the rows of its weights."""

    def __init__(self, config: Phi3Config, targets: Iterable[str], rank: int):
        super().__init__(config)
        self.sizes["r"] = rank
        rows = [row for path, row in self.weights.items() if path[-2] in targets]
        self.weights = {half.path: half for row in rows for half in _halves(row)}
        self.parts = [(path, layer) for layer in range(self.sizes["L"]) for path in self.weights]


def _halves(row: Weight) -> tuple[Weight, Weight]:
    """The rows of A and B of a weight."""
    outputs, inputs = row.hf_axes
    name = "base_model.model." + row.hf_name.removesuffix("weight")
    a = Weight(f"{name}lora_A.weight", ("r", inputs), (*row.path[:-1], "lora_a"))
    b = replace(
        row,
        hf_name=f"{name}lora_B.weight",
        hf_axes=(outputs, "r"),
        path=(*row.path[:-1], "lora_b"),
    )
    return a, b


def save_adapter(
    folder: str | Path,
    model: Phi3ForCausalLM,
    adapters: Mapping[str, Any],
    lora: LoraConfig,
    base_model: str,
    force: bool = False,
) -> None:
    """Writes adapters as PEFT does, for `peft.PeftModel.from_pretrained`.

    In a run of several processes all of them must call this. The folder appears whole or not at
    all.

    Args:
      folder: the new folder.
      model: with the mesh of the adapters.
      adapters: float32, from `init_adapters`; they are saved as float32, without padding.
      lora: their settings.
      base_model: the path or hub id of the model that they belong to, as PEFT is to find it.
      force: replace a model or adapter folder that is already there.

    Raises:
      FileExistsError: where the folder exists, without force.
      ValueError: where the adapters are not those of the model and the settings.
      RuntimeError: in the processes that did not fail, where another one did.
    """
    leaves = flatten_dict(adapters)
    wanted = flatten_dict(abstract_adapters(model, lora))
    if {path: leaf.shape for path, leaf in leaves.items()} != {
        path: leaf.shape for path, leaf in wanted.items()
    }:
        shapes = jax.tree.map(np.shape, adapters)
        raise ValueError(
            f"adapters of the shapes {shapes} are not those of this "
            "model and these settings; give those that they were trained with"
        )
    table = AdapterTable(model.config, lora.targets, lora.rank)
    whole = {path: _to_host(leaf, table.shape(path)) for path, leaf in leaves.items()}
    tensors = {
        table.hf_name(path, layer): table.to_hf(path, whole[path][layer])
        for path, layer in table.parts
    }
    values = {
        "alpha_pattern": {},
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": list(lora.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": lora.rslora,
    }
    with staged_by_all(folder, force) as stage, by_all():
        if jax.process_index() == 0:
            text = json.dumps(values, indent=2) + "\n"
            (stage / CONFIG_FILE).write_text(text, encoding="utf-8")
            save_file(tensors, stage / WEIGHTS_FILE, {"format": "pt"})


def load_adapter(folder: str | Path, model: Phi3ForCausalLM) -> tuple[LoraConfig, dict[str, Any]]:
    """Reads adapters that PEFT or `save_adapter` wrote, laid out on the model's mesh.

    float16 and bfloat16 become float32, which changes no number. The targets are those that the
    file has tensors of, however target_modules chose them.

    Raises:
      FileNotFoundError: where a file is missing.
      ValueError: for what an interrupted run left behind, for settings that the model's adapters do
        not have (DoRA, rank_pattern, modules_to_save, ...), and with all that is missing,
        unexpected or mis-shaped.
    """
    folder = Path(folder).expanduser()
    check_finished(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{str(folder)!r} has no {name}; an adapter of PEFT has {CONFIG_FILE} and "
                f"{WEIGHTS_FILE}"
            )
    try:
        values = read_json_object(folder / CONFIG_FILE)
        tensors = safetensors.numpy.load_file(folder / WEIGHTS_FILE)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"the adapter in {str(folder)!r} cannot be read: {error}") from None
    what = f"the adapter in {str(folder)!r}"
    raise_problems(what, _unknown_settings(values))
    targets = tuple(name for name in TARGETS if any(f".{name}.lora_" in key for key in tensors))
    lora = LoraConfig(
        rank=values["r"],
        alpha=values["lora_alpha"],
        dropout=values.get("lora_dropout") or 0.0,
        targets=targets,
        rslora=bool(values.get("use_rslora")),
    )
    table = AdapterTable(model.config, targets, lora.rank)
    raise_problems(what, _differences(table, tensors))
    check_lora(lora)

    def leaf(path: LeafPath, target: jax.ShapeDtypeStruct) -> jax.Array:
        layers = [table.from_hf(path, tensors[table.hf_name(path, n)]) for n in table.layers(path)]
        whole = np.stack(layers).astype(target.dtype)
        ends = [(0, b - a) for a, b in zip(whole.shape, target.shape, strict=True)]
        padded = np.pad(whole, ends)
        return jax.make_array_from_callback(
            padded.shape, target.sharding, lambda index: padded[index]
        )

    wanted = flatten_dict(abstract_adapters(model, lora))
    return lora, unflatten_dict({path: leaf(path, target) for path, target in wanted.items()})


def _unknown_settings(values: Any) -> list[str]:
    """One line for each setting of PEFT's that changes what an adapter is."""
    kind = values.get("peft_type") if isinstance(values, dict) else None
    if kind != "LORA":
        return [f"{CONFIG_FILE}: peft_type is {kind!r}, must be 'LORA'"]
    lines = []
    if type(values.get("r")) is not int or values["r"] < 1:
        lines.append(f"r is {values.get('r')!r}, must be an int of at least 1")
    for name, kinds in _KINDS.items():
        if type(values.get(name)) not in kinds:
            known = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            lines.append(f"{name} is {values.get(name)!r}, must be {known}")
    if (values.get("bias") or "none") != "none":
        lines.append(f"bias is {values['bias']!r}; biases have no place in this model")
    if values.get("init_lora_weights", True) not in _BEGINNINGS:
        lines.append(
            f"init_lora_weights is {values['init_lora_weights']!r}, which changes the model's own "
            "weights; convert it to a plain LoRA when PEFT saves it "
            "(path_initial_model_for_weight_conversion)"
        )
    return lines + [
        f"{name} is {value!r}; adapters here have no such setting"
        for name, value in values.items()
        if name not in _READ | _NO_MATTER and value
    ]


def _differences(table: AdapterTable, tensors: Mapping[str, np.ndarray]) -> list[str]:
    """One line for everything in which the tensors are not those of the table."""
    expected = {table.hf_name(path, layer): table.hf_shape(path) for path, layer in table.parts}
    ranks = {tensors[n].shape[:1] for n in expected.keys() & tensors.keys() if ".lora_A." in n}
    rank = table.sizes["r"]
    if len(ranks) == 1 and ranks != {(rank,)}:
        # Said of every tensor, this would hide what else there is.
        return [f"r is {rank} in {CONFIG_FILE}, but the tensors have rank {ranks.pop()[0]}"]
    lines = []
    for name, shape in expected.items():
        if name not in tensors:
            lines.append(f"{name}: missing")
        elif tensors[name].shape != shape:
            lines.append(f"{name}: shape {tensors[name].shape}, model and rank make it {shape}")
        elif tensors[name].dtype not in DTYPES.values():
            lines.append(f"{name}: dtype {tensors[name].dtype}, must be one of {', '.join(DTYPES)}")
    return lines + [
        f"{name}: unexpected; adapters are on {', '.join(TARGETS)} of every layer"
        for name in sorted(tensors.keys() - expected.keys())
    ]


def _to_host(array: jax.Array, shape: tuple[int, ...]) -> np.ndarray:
    """An array without its padding, in every process."""
    if not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)[tuple(map(slice, shape))]
