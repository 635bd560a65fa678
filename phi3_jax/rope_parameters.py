"""`rope_parameters` in one form, out of all the forms that a config.json may have."""

import math
import sys
from collections.abc import Mapping
from typing import Any

from phi3_jax.frozen_mapping import FrozenMapping

_LONGROPE_NAMES = ("longrope", "su", "yarn")
# JSON has integers beyond it, which are below infinity and no floats.
MAX_FLOAT = sys.float_info.max
_FACTORS = ("short_factor", "long_factor")


def standard_rope(
    config: Any,
    given: Mapping[str, Any] | None,
    rope_theta: float | None,
    partial_rotary_factor: float | None,
) -> FrozenMapping:
    """`rope_parameters` of a Phi3Config whose other sizes are filled in, in the one form used here.

    Raises:
      ValueError: for values that are no rope of Phi-3, or given twice.

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
    _check_number(rope, "rope_theta", "above 0", lambda x: 0 < x <= MAX_FLOAT)
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
            _check_number(rope, name, "above 0", lambda x: 0 < x <= MAX_FLOAT)
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
        if not number or not 0 < value <= MAX_FLOAT:
            raise ValueError(f"{name}[{index}] is {value!r}, must be a finite number above 0")
