"""What a fine-tuning run is told: one frozen dataclass a section, read from a page in configs/.

`phi3-train CONFIG section.name=value ...`: CONFIG names a page of the `configs` package or is the
path of one, a Python file with `get_config() -> TrainConfig`.
"""

import dataclasses
import importlib
import math
import operator
import pkgutil
import runpy
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from train.config_values import check_types, did_you_mean, parse, section_of

TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ModelConfig:
    """Where the run starts from, and how it computes.

    Attributes:
      path: a model folder of either format, or a hub id; None for the embedded phi3-tiny-demo.
      dtype: of activations. Weights that are trained, gradients and optimizer state are float32.
      frozen_dtype: of weights that are not trained: under LoRA, all of the model's own.
      remat: what is kept of each layer for the backward pass, as in Phi3Model: "none" (all of it),
        "dots", "attention" or "full" (its input alone).
      attention: who computes it, as attn_implementation of Phi3Model: "auto", "xla", "splash" or
        "cudnn".
    """

    path: str | None = None
    dtype: Dtype = "bfloat16"
    frozen_dtype: Dtype = "bfloat16"
    remat: str = "full"
    attention: str = "auto"


@dataclass(frozen=True)
class DataConfig:
    """What is learnt.

    Attributes:
      path: a folder with train.jsonl (and valid.jsonl, test.jsonl) or train-*.jsonl, or a file, or
        a glob; also .parquet and .arrayrecord.
      valid: the file or glob to evaluate on; by default a folder's own, if it has some.
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
        "model.embed_tokens.*" or "model.layers.0.*". Where only some layers of a weight are, the
        optimizer's state still has room for all of them.
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
      rank: r, the inner size of an adapter's two matrices.
      alpha: the update is scaled with alpha / r, or alpha / sqrt(r) with rslora.
      dropout: of what enters an adapter.
      targets: the projections that have one, in every layer.
      rslora: the scale of rank-stabilised LoRA (arXiv:2312.03732).
      quantize: hold the model's own matrices in "nf4" or "int8" (QLoRA, arXiv:2305.14314).
      path: a PEFT adapter folder that A and B begin from; its rank, alpha, targets and rslora are
        to be the same.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS
    rslora: bool = False
    quantize: Literal["nf4", "int8"] | None = None
    path: str | None = None

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
        check_types(self)
        if not self.folder:
            raise ValueError("folder is empty, must name where the run keeps its checkpoints")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"steps is {self.steps} and epochs is {self.epochs}; give one of the two"
            )
        for names, must, fits in _LIMITS:
            for name in names.split():
                value = operator.attrgetter(name)(self)
                if value is not None and not fits(value):
                    raise ValueError(f"{name} is {value}, must be {must}")
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


# Which fields, where they are not None, must be what.
_LIMITS: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("steps epochs batch_size accumulate", "at least 1", lambda value: value >= 1),
    ("checkpoint.every checkpoint.keep", "at least 1", lambda value: value >= 1),
    ("checkpoint.keep_every evaluation.every", "at least 1", lambda value: value >= 1),
    ("evaluation.batches evaluation.sample_tokens", "at least 1", lambda value: value >= 1),
    ("optimizer.learning_rate", "finite and at least 0", lambda value: 0 <= value < math.inf),
    ("optimizer.weight_decay", "finite and at least 0", lambda value: 0 <= value < math.inf),
    ("optimizer.b1 optimizer.b2", "at least 0 and less than 1", lambda value: 0 <= value < 1),
    ("optimizer.eps optimizer.clip_norm", "more than 0", lambda value: value > 0),
    ("optimizer.final_fraction", "from 0 to 1", lambda value: 0 <= value <= 1),
    ("optimizer.ema_decay", "between 0 and 1", lambda value: 0 < value < 1),
    ("seed", "from 0 to 2**63 - 1", lambda value: 0 <= value < 2**63),
    ("profile", "a step from 1 on and one not before it", lambda value: 1 <= value[0] <= value[1]),
)


# --- Reading ---------------------------------------------------------------------------------


def load_config(name: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """The run that a page describes, with changes.

    Args:
      name: of a page in configs/, or the path of a Python file with get_config().
      overrides: "section.name=value" each; a tuple's values are separated by commas, or are a JSON
        list; "none" is None, and "lora.rank=8" makes a section that the page leaves out.

    Raises:
      ValueError: for a page that is not there, names that are not known and values of another
        type.
    """
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise ValueError(
                f"there is no file {name!r}; give a .py file that is there, or one of "
                f"{', '.join(config_names())}"
            )
        page: Mapping[str, Any] = runpy.run_path(name)
    else:
        if name not in config_names():
            raise ValueError(
                f"{name!r} is no config{did_you_mean(name, config_names())}; there are "
                f"{', '.join(config_names())}, or give the path of a .py file"
            )
        page = vars(importlib.import_module(f"configs.{name}"))
    if "get_config" not in page:
        raise ValueError(
            f"config {name!r} has no function get_config(); write one that returns a TrainConfig"
        )
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
        section = section_of(hints[name])
        if section is not None and isinstance(value, Mapping):
            value = _build(section, value, f"{prefix}{name}.")
        elif isinstance(value, list):
            value = tuple(value)
        built[name] = value
    return kind(**built)


def _set(values: dict[str, Any], kind: Any, key: str, names: list[str], text: str) -> None:
    """Puts the value of `text` where the names lead."""
    name, *rest = names
    known = [entry.name for entry in dataclasses.fields(kind)]
    if name not in known:
        raise ValueError(_unknown(key, name, known))
    hint = typing.get_type_hints(kind)[name]
    section = section_of(hint)
    if rest and section is None:
        raise ValueError(f"{key!r}: {name!r} is a value and has no parts; set it as a whole")
    if rest:
        if values.get(name) is None:
            values[name] = {}
        _set(values[name], section, key, rest, text)
    elif section is not None and text.lower() != "none":
        fields = ", ".join(f"{name}.{entry.name}" for entry in dataclasses.fields(section))
        raise ValueError(f"{key!r} is a section; set its parts: {fields}")
    else:
        values[name] = parse(key, text, hint)


def _unknown(key: str, name: str, known: Sequence[str]) -> str:
    return f"the config has no {key!r}{did_you_mean(name, known)}; known are {', '.join(known)}"
