"""The values of a config's fields: of the right types, and read from the command line."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

from phi3_jax.json_files import parse_json

_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def check_types(config: Any, prefix: str = "") -> None:
    """Refuses values of other types than a dataclass and its sections say.

    A whole number is a float too, and a list a tuple.

    Raises:
      ValueError: with the name of the field.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if value is not None or type(None) not in _alternatives(hint):
            _check_type(prefix + name, value, _kind(hint))


def _check_type(key: str, value: Any, kind: Any) -> None:
    if dataclasses.is_dataclass(kind):
        if type(value) is not kind:
            raise ValueError(f"{key} is {value!r}, must be a section ({kind.__name__})")
        check_types(value, f"{key}.")
    elif typing.get_origin(kind) is Literal:
        if value not in (choices := typing.get_args(kind)):
            raise ValueError(
                f"{key} is {value!r}{did_you_mean(value, choices)}; it is one of "
                f"{', '.join(choices)}"
            )
    elif typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"{key} is {value!r}, must be a tuple")
        if inner[-1] is not Ellipsis and len(value) != len(inner):
            raise ValueError(f"{key} is {value!r}, must have {len(inner)} values")
        for item in value:
            _check_type(key, item, inner[0])
    elif not isinstance(value, (int, float) if kind is float else kind) or (
        isinstance(value, bool) and kind is not bool
    ):
        raise ValueError(f"{key} is {value!r}, must be {_NAMES[kind]}")


def parse(key: str, text: str, hint: Any) -> Any:
    """The value that a text has as a type of the config.

    Raises:
      ValueError: where it has none, with the key.
    """
    if type(None) in _alternatives(hint) and text.lower() in ("none", "null"):
        return None
    kind = _kind(hint)
    value: Any = text
    if typing.get_origin(kind) is tuple:
        if text.startswith("["):
            value = _parse_json(key, text)
        else:
            parts = [part.strip() for part in text.split(",") if part.strip()]
            value = [parse(key, part, typing.get_args(kind)[0]) for part in parts]
    elif kind is bool:
        value = {"true": True, "false": False}.get(text.lower(), text)
    elif kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            raise ValueError(f"{key} is {text!r}, must be {_NAMES[kind]}") from None
    _check_type(key, value, kind)
    return tuple(value) if isinstance(value, list) else value


def _parse_json(key: str, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(
            f"{key} is {text!r}, which begins as a JSON list and is none ({error}); write "
            '["one", "two"]'
        ) from None


def section_of(hint: Any) -> Any:
    """The dataclass among the alternatives of a type, or None."""
    return next((kind for kind in _alternatives(hint) if dataclasses.is_dataclass(kind)), None)


def _kind(hint: Any) -> Any:
    """The alternative of a type that is not None."""
    return next(kind for kind in _alternatives(hint) if kind is not type(None))


def _alternatives(hint: Any) -> tuple[Any, ...]:
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if is_union else (hint,)


def did_you_mean(name: Any, known: Sequence[str]) -> str:
    """A hint at the name that is most like one, in parentheses, or nothing."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
