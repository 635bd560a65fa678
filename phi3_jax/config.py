"""The model's configuration: Hugging Face's config.json of `model_type: phi3`, checked, frozen."""

import dataclasses
import difflib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from phi3_jax.config_checks import as_token_ids, check_fields, check_heads
from phi3_jax.frozen_mapping import FrozenMapping, freeze, thaw
from phi3_jax.json_files import read_json_object
from phi3_jax.rope_parameters import standard_rope

MODEL_TYPE = "phi3"
CONFIG_FILE = "config.json"

# What a config says that was not made for another class.
_ARCHITECTURES = ["Phi3ForCausalLM"]
_MAX_LABELS = 1_000_000

# Microsoft's model code, which most folders of the family name and this library does the work of.
_PHI3_CODE = {"configuration_phi3", "modeling_phi3"}


@dataclass(frozen=True)
class Phi3Config:
    """Sizes and settings of a Phi-3 model, with the field names and defaults of HF transformers.

    `num_key_value_heads` and `head_dim` may be left None and are then filled in. The three legacy
    arguments `rope_scaling`, `rope_theta` and `partial_rotary_factor` are folded into
    `rope_parameters`, which always holds rope_type ("default" or "longrope"), rope_theta and
    partial_rotary_factor. "su" is another name of longrope. "yarn" is stored as longrope with the
    attention factor 0.1 * ln(max / original) + 1 of Microsoft's original model code; transformers
    from version 5 on computes sqrt(1 + ln(max / original) / ln(original)) for it instead.

    The classification heads have as many labels as `id2label`, two by default; `num_labels`, which
    can be read as well, gives LABEL_0 and so on in its place. Beside names of another number it is
    refused, where transformers drops the names. Without `label2id` that is the inverse.

    Keys of a config.json that are not fields are kept in `extra` and saved again. To change sizes
    of a config, pass `{**config.to_dict(), ...}` to `from_dict`: dataclasses.replace keeps what was
    filled in for the old ones.

    Raises:
      ValueError: naming field, value, limit and way out, where a value or a combination of
        values cannot be a Phi-3 model.
    """

    vocab_size: int = 32064
    hidden_size: int = 3072
    intermediate_size: int = 8192
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    # Some fields may be left None and are resolved; whoever reads them finds a value.
    num_key_value_heads: int = None  # ty: ignore[invalid-assignment]
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0  # declared by the reference and never applied there, nor here
    attention_dropout: float = 0.0
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    original_max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: Mapping[str, Any] = None  # ty: ignore[invalid-assignment]
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | list[int] | None = 32000
    pad_token_id: int | None = 32000
    sliding_window: int | None = None
    head_dim: int = None  # ty: ignore[invalid-assignment]
    id2label: Mapping[int, str] = None  # ty: ignore[invalid-assignment]
    label2id: Mapping[str, int] = None  # ty: ignore[invalid-assignment]
    problem_type: str | None = None
    # Of the token classifier: the first that is not None counts, else 0.1.
    classifier_dropout: float | None = None
    hidden_dropout: float | None = None
    token_classification_bias: bool = True
    extra: Mapping[str, Any] = FrozenMapping()

    num_labels: InitVar[int] = None  # ty: ignore[invalid-assignment]
    rope_scaling: InitVar[Mapping[str, Any] | None] = None
    rope_theta: InitVar[float | None] = None
    partial_rotary_factor: InitVar[float | None] = None

    def __post_init__(self, num_labels, rope_scaling, rope_theta, partial_rotary_factor):
        check_fields(self)
        fill = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        if self.num_key_value_heads is None:
            fill("num_key_value_heads", self.num_attention_heads)
        check_heads(self)
        if self.head_dim is None:
            fill("head_dim", self.hidden_size // self.num_attention_heads)
        fill("eos_token_id", freeze(self.eos_token_id))
        fill("extra", FrozenMapping(self.extra))
        fill("id2label", _standard_id2label(self.id2label, num_labels))
        label2id = _inverse(self.id2label) if self.label2id is None else self.label2id
        fill("label2id", FrozenMapping(label2id))
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ValueError(
                "problem_type is 'single_label_classification', which needs at least 2 labels, and "
                "num_labels is 1; use num_labels=2, or problem_type='regression'"
            )
        # The reference lets rope_scaling win where both are given.
        rope = rope_scaling or self.rope_parameters
        fill("rope_parameters", standard_rope(self, rope, rope_theta, partial_rotary_factor))

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of each head that are rotated; the rest passes through."""
        return int(self.head_dim * self.rope_parameters["partial_rotary_factor"])

    @property
    def is_longrope(self) -> bool:
        """Whether rows beyond original_max_position_embeddings use other rope factors."""
        return self.rope_parameters["rope_type"] == "longrope"

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-text ids as a tuple, empty where there is none."""
        return as_token_ids(self.eos_token_id)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Phi3Config":
        """The config that a config.json's content describes, of transformers 4 or 5.

        Raises:
          ValueError: for another model type or values that cannot be a Phi-3 model.
        """
        values = dict(values)
        model_type = values.pop("model_type", MODEL_TYPE)
        if model_type != MODEL_TYPE:
            raise ValueError(
                f"model_type is {model_type!r}, must be {MODEL_TYPE!r} "
                "(Phi-3 mini and medium, Phi-3.5-mini, Phi-4, Phi-4-mini and their fine-tunes)"
            )
        names = _names()
        known = {key: value for key, value in values.items() if key in names}
        extra = {key: value for key, value in values.items() if key not in known}
        if extra.get("architectures") == _ARCHITECTURES:
            del extra["architectures"]  # what `to_dict` says of itself
        # In a file the reference lets what is inside win; in a call two values are a mistake.
        inside = known.get("rope_scaling") or known.get("rope_parameters")
        for name in ("rope_theta", "partial_rotary_factor"):
            if isinstance(inside, Mapping) and name in inside:
                known.pop(name, None)
        return cls(**known, extra=extra)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **overrides: Any) -> "Phi3Config":
        """Reads `config.json` in a folder, with the overrides, fields by name, laid over it.

        Raises:
          FileNotFoundError: where there is none.
          ValueError: where it is not JSON, or not a Phi-3 config; for an unknown name, with the
            nearest one that exists.
        """
        path = Path(folder) / CONFIG_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"no {CONFIG_FILE} in {str(folder)!r}; name the folder of a model"
            )
        values = read_json_object(path)
        warn_of_code(path, values)
        for name in overrides:
            if name not in _names():
                raise ValueError(unknown_name("config field", name, sorted(_names())))
        try:
            return cls.from_dict(_overridden(values, overrides))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def preset(cls, name: str) -> "Phi3Config":
        """The config of a published family member, e.g. "phi-3-mini-4k-instruct".

        The others are "phi-3-medium-4k-instruct", "phi-3.5-mini-instruct", "phi-4-mini-instruct"
        and "phi-4"; "-instruct" may be left out.

        Raises:
          ValueError: for an unknown name, with the known ones.
        """
        presets = {
            path.name.removesuffix(".json"): path
            for path in resources.files("phi3_jax").joinpath("presets").iterdir()
        }
        path = presets.get(name) or presets.get(f"{name}-instruct")
        if path is None:
            raise ValueError(f"no preset {name!r}; there are {', '.join(sorted(presets))}")
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json that transformers 5 loads as the same model."""
        fields = {
            field.name: thaw(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name not in ("extra", "head_dim")
        }
        # head_dim is not a field of the reference, but is honoured there where it is present.
        if self.head_dim * self.num_attention_heads != self.hidden_size:
            fields["head_dim"] = self.head_dim
        # As in transformers, a file says of classification only what is not default.
        if self.id2label == _label_names(2) and self.label2id == _inverse(self.id2label):
            del fields["id2label"], fields["label2id"]
        for name in _CLASSIFICATION:
            if fields[name] == getattr(Phi3Config, name):
                del fields[name]
        head = {"architectures": _ARCHITECTURES, "model_type": MODEL_TYPE}
        return {**head, **fields, **thaw(self.extra)}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` into a folder, which is made if it is not there.

        It has no `auto_map`: the model code that this names would not be in the folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        values = self.to_dict()
        values.pop("auto_map", None)
        text = json.dumps(values, indent=2, sort_keys=True, allow_nan=False)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


# The init-only arguments leave their default behind as a class attribute; readers get the value
# in force instead. rope_scaling has no such reader: its content is rope_parameters.
_INIT_ONLY = ("num_labels", "rope_scaling", "rope_theta", "partial_rotary_factor")
for _name in ("rope_theta", "partial_rotary_factor"):
    setattr(Phi3Config, _name, property(lambda self, name=_name: self.rope_parameters[name]))
Phi3Config.num_labels = property(lambda self: len(self.id2label))  # ty: ignore
_CLASSIFICATION = (
    "problem_type",
    "classifier_dropout",
    "hidden_dropout",
    "token_classification_bias",
)


def _names() -> set[str]:
    """All that a config can be given by name."""
    fields = {field.name for field in dataclasses.fields(Phi3Config)}
    return fields - {"extra"} | set(_INIT_ONLY)


def warn_of_code(path: Path, values: Mapping[str, Any]) -> None:
    """Warns where a file's auto_map names other code than Phi-3's own: none is ever run."""
    named = json.dumps(values.get("auto_map"))
    if set(re.findall(r'"(?:[^"]*--)?(\w+)\.\w+"', named)) - _PHI3_CODE:
        warnings.warn(
            f"{path}: auto_map names code, which is not run; the model is Phi-3 as it is here: "
            f"{named}",
            stacklevel=3,
        )


def unknown_name(kind: str, name: str, known: list[str]) -> str:
    """The message for a name that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(sorted(known))}"
    return f"unknown {kind} {name!r}{hint}"


def _label_names(count: int) -> dict[int, str]:
    return {index: f"LABEL_{index}" for index in range(count)}


def _inverse(id2label: Mapping[int, str]) -> dict[str, int]:
    return {label: index for index, label in id2label.items()}


def _standard_id2label(given: Mapping[Any, str] | None, num_labels: int | None) -> FrozenMapping:
    """`id2label` with ints as keys, which JSON has as strings."""
    # A name is made for each.
    if num_labels is not None and (
        type(num_labels) is not int or not 1 <= num_labels <= _MAX_LABELS
    ):
        raise ValueError(
            f"num_labels is {num_labels!r}, must be an int of at least 1, at most {_MAX_LABELS}"
        )
    if given is None:
        return FrozenMapping(_label_names(2 if num_labels is None else num_labels))
    for key, label in given.items():
        if not str(key).isdecimal() or not isinstance(label, str):
            raise ValueError(f"id2label has {key!r}: {label!r}, expected a number and a name")
    labels = {int(key): label for key, label in given.items()}
    if len(labels) != len(given) or not labels:
        raise ValueError(f"id2label is {dict(given)!r}, expected at least 1 label, each id once")
    if num_labels not in (None, len(labels)):
        raise ValueError(
            f"num_labels is {num_labels}, but id2label names {len(labels)} labels; give only one "
            "of the two (num_labels with id2label=None for LABEL_0 and so on)"
        )
    return FrozenMapping(labels)


def _overridden(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json's content with overrides laid over it, less what would stand against them."""
    values = dict(values)
    gone: tuple[str, ...] = ()
    if "rope_parameters" in overrides or "rope_scaling" in overrides:
        gone += ("rope_parameters", "rope_scaling")
    if "id2label" in overrides:
        gone += ("num_labels", "label2id")
    elif "num_labels" in overrides:
        named = values.get("id2label")
        if named is not None and len(named) != overrides["num_labels"]:
            gone += ("id2label", "label2id")
    for name in gone:
        values.pop(name, None)
    for name in ("rope_parameters", "rope_scaling"):
        # What is inside would win.
        if isinstance(inside := values.get(name), Mapping):
            values[name] = {key: value for key, value in inside.items() if key not in overrides}
    return {**values, **overrides}
