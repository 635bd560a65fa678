"""The model's configuration: Hugging Face's config.json of `model_type: phi3`, checked, frozen."""

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from phi3_jax.frozen_mapping import FrozenMapping, freeze, thaw

MODEL_TYPE = "phi3"
CONFIG_FILE = "config.json"

# What `hidden_act` may be; model.py holds the functions under the same names.
ACTIVATIONS = (
    "gelu",
    "gelu_new",
    "gelu_pytorch_tanh",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "sigmoid",
    "silu",
    "swish",
    "tanh",
)

_LONGROPE_NAMES = ("longrope", "su", "yarn")
_FACTORS = ("short_factor", "long_factor")


@dataclass(frozen=True)
class Phi3Config:
    """Sizes and settings of a Phi-3 model, with the field names and defaults of HF transformers.

    `num_key_value_heads` and `head_dim` may be left None and are then filled in. The three legacy
    arguments `rope_scaling`, `rope_theta` and `partial_rotary_factor` are folded into
    `rope_parameters`, which always holds rope_type ("default" or "longrope"), rope_theta and
    partial_rotary_factor. "su" is another name of longrope. "yarn" is stored as longrope with the
    attention factor 0.1 * ln(max / original) + 1 of Microsoft's original model code; transformers
    from version 5 on computes sqrt(1 + ln(max / original) / ln(original)) for it instead.

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
    # Three fields may be left None and are resolved; whoever reads them finds a value.
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
    extra: Mapping[str, Any] = FrozenMapping()

    rope_scaling: InitVar[Mapping[str, Any] | None] = None
    rope_theta: InitVar[float | None] = None
    partial_rotary_factor: InitVar[float | None] = None

    def __post_init__(self, rope_scaling, rope_theta, partial_rotary_factor):
        _check_fields(self)
        fill = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        if self.num_key_value_heads is None:
            fill("num_key_value_heads", self.num_attention_heads)
        _check_heads(self)
        if self.head_dim is None:
            fill("head_dim", self.hidden_size // self.num_attention_heads)
        fill("eos_token_id", freeze(self.eos_token_id))
        fill("extra", FrozenMapping(self.extra))
        # The reference lets rope_scaling win where both are given.
        rope = rope_scaling or self.rope_parameters
        fill("rope_parameters", _standard_rope(self, rope, rope_theta, partial_rotary_factor))

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
                f"model_type is {model_type!r}, but this library runs {MODEL_TYPE!r} models only "
                "(Phi-3 mini and medium, Phi-3.5-mini, Phi-4, Phi-4-mini and their fine-tunes)"
            )
        names = {field.name for field in dataclasses.fields(cls)} | set(_INIT_ONLY)
        known = {key: value for key, value in values.items() if key in names and key != "extra"}
        extra = {key: value for key, value in values.items() if key not in known}
        # In a file the reference lets what is inside win; in a call two values are a mistake.
        inside = known.get("rope_scaling") or known.get("rope_parameters")
        for name in ("rope_theta", "partial_rotary_factor"):
            if isinstance(inside, Mapping) and name in inside:
                known.pop(name, None)
        return cls(**known, extra=extra)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Phi3Config":
        """Reads `config.json` in a folder.

        Raises:
          FileNotFoundError: where there is none.
          ValueError: where it is not JSON, or not a Phi-3 config.
        """
        path = Path(folder) / CONFIG_FILE
        if not path.is_file():
            raise FileNotFoundError(f"no {CONFIG_FILE} in {str(folder)!r}")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds a {type(values).__name__}, expected a JSON object")
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def preset(cls, name: str) -> "Phi3Config":
        """The config of a published family member, e.g. "phi-3-mini-4k-instruct".

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
        head = {"architectures": ["Phi3ForCausalLM"], "model_type": MODEL_TYPE}
        return {**head, **fields, **thaw(self.extra)}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` into a folder, which is made if it is not there."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


# The init-only arguments leave their default behind as a class attribute; readers get the value
# in force instead. rope_scaling has no such reader: its content is rope_parameters.
_INIT_ONLY = ("rope_scaling", "rope_theta", "partial_rotary_factor")
for _name in ("rope_theta", "partial_rotary_factor"):
    setattr(Phi3Config, _name, property(lambda self, name=_name: self.rope_parameters[name]))


def as_token_ids(value: int | list[int] | tuple[int, ...] | None) -> tuple[int, ...]:
    """Token ids given as one id, several or None, as a tuple."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def unknown_name(kind: str, name: str, known: list[str]) -> str:
    """The message for a name that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(sorted(known))}"
    return f"unknown {kind} {name!r}{hint}"


def _check_fields(config: Phi3Config) -> None:
    """Type and range of every field taken alone."""
    positive = ("at least 1", lambda x: x >= 1)
    rate = ("in [0, 1)", lambda x: 0 <= x < 1)
    above_zero = ("a finite number above 0", lambda x: 0 < x < math.inf)
    table = [
        (int, ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), positive),
        (int, ("num_attention_heads", "max_position_embeddings"), positive),
        (int, ("original_max_position_embeddings",), positive),
        (int | None, ("num_key_value_heads", "head_dim", "sliding_window"), positive),
        (int | None, ("bos_token_id", "pad_token_id"), ("at least 0", lambda x: x >= 0)),
        (float, ("resid_pdrop", "embd_pdrop", "attention_dropout"), rate),
        (float, ("rms_norm_eps",), above_zero),
        (float, ("initializer_range",), ("0 or above", lambda x: 0 <= x < math.inf)),
        (bool, ("use_cache", "tie_word_embeddings"), None),
        (str, ("hidden_act",), (f"one of {', '.join(ACTIVATIONS)}", ACTIVATIONS.__contains__)),
        (Mapping | None, ("rope_parameters",), None),
        (Mapping, ("extra",), None),
    ]
    for kind, names, limit in table:
        for name in names:
            value = getattr(config, name)
            accepted = kind | int if kind is float else kind
            if not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool)):
                words = str(kind) if "|" in str(kind) else getattr(kind, "__name__", "")
                raise ValueError(f"{name} is {value!r}, expected {words}")
            if limit and value is not None and not limit[1](value):
                raise ValueError(f"{name} is {value!r}, must be {limit[0]}")
    for token in as_token_ids(config.eos_token_id):
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise ValueError(
                f"eos_token_id is {config.eos_token_id!r}, expected an id, a list of ids or None"
            )
    if config.pad_token_id is not None and config.pad_token_id >= config.vocab_size:
        raise ValueError(
            f"pad_token_id is {config.pad_token_id}, outside the vocabulary of "
            f"{config.vocab_size} (vocab_size); give an id below it, or None"
        )


def _check_heads(config: Phi3Config) -> None:
    width, heads, kv_heads = (
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    if config.head_dim is None and width % heads:
        raise ValueError(
            f"hidden_size {width} does not divide into num_attention_heads {heads}; "
            f"use {_divisors(width, heads)} heads, or give head_dim"
        )
    if heads % kv_heads:
        raise ValueError(
            f"num_attention_heads {heads} does not divide into num_key_value_heads {kv_heads}; "
            f"use {_divisors(heads, kv_heads)} key-value heads"
        )


def _divisors(number: int, near: int) -> str:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = max(d for d in divisors if d <= near) if near <= number else number
    above = min((d for d in divisors if d > near), default=below)
    return f"{below}" if above == below else f"{below} or {above}"


def _standard_rope(
    config: Phi3Config,
    given: Mapping[str, Any] | None,
    rope_theta: float | None,
    partial_rotary_factor: float | None,
) -> FrozenMapping:
    """`rope_parameters` in the one form used from here on.

    Reference: RotaryEmbeddingConfigMixin of transformers 5 (`convert_rope_params_to_dict`,
    `standardize_rope_params`, `validate_rope`).
    """
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"rope_parameters is {given!r}, expected a mapping or None")
    rope = dict(given or {})
    for name, outside, default in (
        ("rope_theta", rope_theta, 10000.0),
        ("partial_rotary_factor", partial_rotary_factor, 1.0),
    ):
        if outside is not None and rope.get(name, outside) != outside:
            raise ValueError(
                f"{name} is {outside!r}, and {rope[name]!r} in rope_parameters; give it once"
            )
        rope.setdefault(name, default if outside is None else outside)
    old_name = rope.pop("type", None)
    rope_type = rope.get("rope_type") or old_name
    if rope_type is None:
        if factors := [name for name in _FACTORS if name in rope]:
            raise ValueError(
                f"rope_parameters holds {' and '.join(factors)} but no rope_type; "
                "add rope_type 'longrope', or remove the factors for plain rope"
            )
        rope_type = "default"
    if rope_type != "default" and rope_type not in _LONGROPE_NAMES:
        raise ValueError(
            f"rope_type is {rope_type!r}; Phi-3 has 'default' and 'longrope' "
            "(also written 'su' or 'yarn')"
        )
    _check_number(rope, "rope_theta", "above 0", lambda x: 0 < x < math.inf)
    _check_number(rope, "partial_rotary_factor", "in (0, 1]", lambda x: 0 < x <= 1)
    rotary_dim = int(config.head_dim * rope["partial_rotary_factor"])
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(
            f"head_dim {config.head_dim} times partial_rotary_factor "
            f"{rope['partial_rotary_factor']} rotates {rotary_dim} dimensions; "
            "it must be an even number of at least 2"
        )
    if rope_type == "default":
        return FrozenMapping({**rope, "rope_type": "default"})

    for name in _FACTORS:
        _check_factors(rope, rope_type, name, rotary_dim // 2)
    for name in ("factor", "attention_factor"):
        if rope.get(name) is None:
            rope.pop(name, None)
        else:
            _check_number(rope, name, "above 0", lambda x: 0 < x < math.inf)
    # The reference lets the top-level field win over one inside.
    original = config.original_max_position_embeddings
    if original < 2:
        raise ValueError(
            f"original_max_position_embeddings is {original}, longrope needs at least 2"
        )
    rope["original_max_position_embeddings"] = original
    if rope_type == "yarn" and "attention_factor" not in rope:
        scale = rope.get("factor", config.max_position_embeddings / original)
        rope["attention_factor"] = 1.0 if scale <= 1 else 0.1 * math.log(scale) + 1.0
    return FrozenMapping({**rope, "rope_type": "longrope"})


def _check_number(rope: dict[str, Any], name: str, limit: str, holds) -> None:
    value = rope[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not holds(value):
        raise ValueError(f"{name} is {value!r}, must be a number {limit}")


def _check_factors(rope: dict[str, Any], rope_type: str, name: str, length: int) -> None:
    if name not in rope:
        raise ValueError(f"rope_type {rope_type!r} needs {name}, a list of {length} numbers")
    factors = rope[name]
    if not isinstance(factors, list | tuple):
        raise ValueError(f"{name} is {factors!r}, expected a list of {length} numbers")
    if len(factors) != length:
        raise ValueError(
            f"{name} has {len(factors)} numbers, expected {length}: one for each pair of rotated "
            "dimensions, int(head_dim * partial_rotary_factor) // 2"
        )
    for index, value in enumerate(factors):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise ValueError(f"{name}[{index}] is {value!r}, must be a finite number above 0")
