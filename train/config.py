"""What a fine-tuning run is told: one frozen dataclass a section, read from a page in configs/.

`phi3-train CONFIG section.name=value ...`: CONFIG names a page of the `configs` package or is the
path of one, a Python file with `get_config() -> TrainConfig`.
"""

import dataclasses
import difflib
import importlib
import pkgutil
import runpy
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


@dataclass(frozen=True)
class ModelConfig:
    """Where the run starts from, and how it computes.

    Attributes:
      path: a model folder of either format, or a hub id; None for the embedded phi3-tiny-demo.
      dtype: of activations. Weights that are trained, gradients and optimizer state are float32.
      frozen_dtype: of weights that are not trained: under LoRA, all of the model's own.
      remat: what is kept of each layer for the backward pass, as in Phi3Model.
      attention: who computes it, as attn_implementation of Phi3Model.
    """

    path: str | None = None
    dtype: str = "bfloat16"
    frozen_dtype: str = "bfloat16"
    remat: str = "full"
    attention: str = "auto"


@dataclass(frozen=True)
class DataConfig:
    """What is learnt.

    Attributes:
      path: a folder with train.jsonl (and valid.jsonl, test.jsonl), or a file, or a glob; also
        .parquet and .arrayrecord.
      valid: the file or glob to evaluate on; by default the valid.* of a folder.
      sequence_length: tokens a row.
      packing: several documents a row; else one, padded.
      mask_prompt: learn the answers only, each with the token that ends it; else all tokens.
      long_documents: what becomes of documents longer than a row: "drop", or "split" into rows.
    """

    path: str
    valid: str | None = None
    sequence_length: int = 2048
    packing: bool = True
    mask_prompt: bool = True
    long_documents: Literal["drop", "split"] = "drop"


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights change.

    Attributes:
      name: "adamw", "adafactor", "lion" or "muon" (matrices; the rest by adamw).
      learning_rate: the highest one.
      schedule: what follows the warm-up: "cosine" to the end, "wsd" (constant, then linear over
        the last decay_steps), or "constant".
      warmup_steps: linear from 0.
      decay_steps: of "wsd".
      final_fraction: of the learning rate, at the end of "cosine" and "wsd".
      weight_decay: of matrices; norms and biases have none.
      b1, b2, eps: of adamw, lion and muon's adamw; b1 of muon's momentum.
      clip_norm: the largest global norm of a gradient; None: any.
      ema_decay: also keep the moving average of the trained weights, and evaluate and export it.
      freeze: patterns (* and ?) of Hugging Face's weight names that are not trained, such as
        "model.embed_tokens.*" or "model.layers.0.*".
    """

    name: Literal["adamw", "adafactor", "lion", "muon"] = "adamw"
    learning_rate: float = 2e-5
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0
    final_fraction: float = 0.1
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    ema_decay: float | None = None
    freeze: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv:2106.09685), parametrised as PEFT does.

    Attributes:
      rank: r. alpha: the update is scaled with alpha / r, or alpha / sqrt(r) with rslora
        (arXiv:2312.03732).
      dropout: of what enters an adapter.
      targets: the projections that have one, in every layer.
      quantize: hold the model's own matrices in "nf4" or "int8" (QLoRA, arXiv:2305.14314; extra
        `quant`).
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS
    rslora: bool = False
    quantize: Literal["nf4", "int8"] | None = None

    @property
    def scale(self) -> float:
        """What the product of the two adapter matrices is multiplied with."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclass(frozen=True)
class MeshConfig:
    """The mesh (`phi3_jax.make_mesh`); one size may be -1: all devices that are left.

    Attributes:
      data: whole copies of the model, each with its share of the rows.
      fsdp: rows too, and the weights along their width.
      sequence: the tokens of long rows, and the weights as fsdp does.
      tensor: heads, mlp and vocabulary.
    """

    data: int = 1
    fsdp: int = -1
    sequence: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved.

    Attributes:
      every: steps between checkpoints; the last step and a preemption save one besides.
      keep: how many of the latest stay.
      keep_every: those at multiples of this many steps stay as well.
    """

    every: int = 100
    keep: int = 2
    keep_every: int | None = None


@dataclass(frozen=True)
class EvaluationConfig:
    """What is looked at while training.

    Attributes:
      every: steps between evaluations on data.valid; the last step has one besides.
      batches: how many batches of it, None for all.
      samples: prompts that are answered, greedily, at each evaluation.
      sample_tokens: the longest answer.
    """

    every: int = 100
    batches: int | None = None
    samples: tuple[str, ...] = ()
    sample_tokens: int = 64


@dataclass(frozen=True)
class TrainConfig:
    """A fine-tuning run.

    Attributes:
      folder: where the run keeps its checkpoints and metrics; one that has checkpoints goes on.
      data, model, optimizer, mesh, checkpoint, evaluation: sections, each with its own fields.
      lora: train adapters beside the model's weights; None: train the weights.
      steps, epochs: how long; one of the two.
      batch_size: rows a step, over all devices.
      accumulate: parts that a step's rows are computed in, one after the other; the result is the
        same, the memory smaller.
      seed: of order, dropout and new weights.
      tensorboard: also write TensorBoard events (extra `tensorboard`).
      profile: first and last step of a profile, written into the run's folder.
    """

    folder: str
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig | None = None
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    seed: int = 0
    tensorboard: bool = False
    profile: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of plain JSON values."""
        return dataclasses.asdict(self)

    def __post_init__(self):
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"steps is {self.steps} and epochs is {self.epochs}; give one of the two"
            )
        at_least = {
            "steps": self.steps,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "accumulate": self.accumulate,
            "checkpoint.every": self.checkpoint.every,
            "checkpoint.keep": self.checkpoint.keep,
            "checkpoint.keep_every": self.checkpoint.keep_every,
            "evaluation.every": self.evaluation.every,
            "evaluation.batches": self.evaluation.batches,
        }
        for name, value in at_least.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, must be at least 1")
        if self.data.sequence_length < 2:
            raise ValueError(
                f"data.sequence_length is {self.data.sequence_length}, must be at least 2: a token "
                "and the one that follows it"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}; "
                "a step's rows are computed in that many equal parts"
            )
        if self.lora is not None and self.optimizer.freeze:
            raise ValueError(
                "optimizer.freeze has no use under lora, which trains the adapters alone; choose "
                "lora.targets"
            )


# --- Reading ---------------------------------------------------------------------------------


def load_config(name: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """The run that a page describes, with changes.

    Args:
      name: of a page in configs/, or the path of a Python file with get_config().
      overrides: "section.name=value" each; a tuple's values are separated by commas, "none" is
        None, and "lora.rank=8" makes a section that the page leaves out.

    Raises:
      ValueError: for a page that is not there, names that are not known and values of another
        type.
    """
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise ValueError(f"there is no file {name!r}")
        page: Mapping[str, Any] = runpy.run_path(name)
    else:
        if name not in config_names():
            raise ValueError(
                f"{name!r} is no config{_did_you_mean(name, config_names())}; there are "
                f"{', '.join(config_names())}, or give the path of a .py file"
            )
        page = vars(importlib.import_module(f"configs.{name}"))
    if "get_config" not in page:
        raise ValueError(f"config {name!r} has no function get_config()")
    config = page["get_config"]()
    values = config.to_dict()
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"{override!r} is no change of the config; write section.name=value")
        _set(values, TrainConfig, key, key.split("."), text)
    return from_dict(values)


def config_names() -> list[str]:
    """The pages in configs/."""
    # By name: its pages import this module, and a test lets doors open one way only.
    pages = importlib.import_module("configs").__path__
    return sorted(module.name for module in pkgutil.iter_modules(pages))


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """The inverse of `TrainConfig.to_dict`, after JSON too.

    Raises:
      ValueError: for names that are not known, and as TrainConfig.
    """
    return _build(TrainConfig, values, "")


def _build(kind: Any, values: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(kind)
    known = [entry.name for entry in dataclasses.fields(kind)]
    for name in values:
        if name not in known:
            raise ValueError(_unknown(prefix + name, name, known))
    built = {}
    for name, value in values.items():
        section = _section(hints[name])
        if section is not None and isinstance(value, Mapping):
            value = _build(section, value, f"{prefix}{name}.")
        elif isinstance(value, list):
            value = tuple(value)
        built[name] = value
    return kind(**built)


def _section(hint: Any) -> Any:
    """The dataclass among the alternatives of a type, or None."""
    return next((kind for kind in _alternatives(hint) if dataclasses.is_dataclass(kind)), None)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if is_union else (hint,)


def _set(values: dict[str, Any], kind: Any, key: str, names: list[str], text: str) -> None:
    """Puts the value of `text` where the names lead."""
    name, *rest = names
    known = [entry.name for entry in dataclasses.fields(kind)]
    if name not in known:
        raise ValueError(_unknown(key, name, known))
    hint = typing.get_type_hints(kind)[name]
    section = _section(hint)
    if rest and section is None:
        raise ValueError(f"{key!r}: {name!r} is a value and has no parts")
    if rest:
        if values.get(name) is None:
            values[name] = {}
        _set(values[name], section, key, rest, text)
    elif section is not None and text.lower() != "none":
        fields = ", ".join(f"{name}.{entry.name}" for entry in dataclasses.fields(section))
        raise ValueError(f"{key!r} is a section; set its parts: {fields}")
    else:
        values[name] = _parse(key, text, hint)


def _parse(key: str, text: str, hint: Any) -> Any:
    """The value that a text has as a type of the config."""
    kinds = _alternatives(hint)
    if type(None) in kinds and text.lower() in ("none", "null"):
        return None
    kind = next(kind for kind in kinds if kind is not type(None))
    if typing.get_origin(kind) is Literal:
        if text not in (choices := typing.get_args(kind)):
            raise ValueError(
                f"{key} is {text!r}{_did_you_mean(text, choices)}; it is one of "
                f"{', '.join(choices)}"
            )
        return text
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if inner[-1] is not Ellipsis and len(parts) != len(inner):
            raise ValueError(f"{key} is {text!r}, it takes {len(inner)} values with commas between")
        return tuple(_parse(key, part, inner[0]) for part in parts)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{key} is {text!r}, must be true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{key} is {text!r}, must be {_NAMES[kind]}") from None


_NAMES = {int: "a whole number", float: "a number", str: "a text"}


def _unknown(key: str, name: str, known: Sequence[str]) -> str:
    return f"the config has no {key!r}{_did_you_mean(name, known)}; known are {', '.join(known)}"


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
