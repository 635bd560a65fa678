"""JSON objects that can be hashed."""

from collections.abc import Iterator, Mapping
from typing import Any


class FrozenMapping(Mapping[Any, Any]):
    """A read-only, hashable mapping; lists inside become tuples and dicts become FrozenMappings.

    A config is a static argument of compiled functions, so all that it holds must have a hash.
    """

    def __init__(self, items: Mapping[Any, Any] | None = None):
        self._items = {key: freeze(value) for key, value in (items or {}).items()}

    def __getitem__(self, key: Any) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self.thaw())

    def thaw(self) -> dict[Any, Any]:
        """The same as plain dicts and lists, as JSON has them."""
        return {key: thaw(value) for key, value in self._items.items()}


def freeze(value: Any) -> Any:
    """Mappings and lists inside a value made read-only; the rest as it is."""
    if isinstance(value, Mapping):
        return FrozenMapping(value)
    if isinstance(value, list | tuple):
        return tuple(freeze(item) for item in value)
    return value


def thaw(value: Any) -> Any:
    """The opposite of `freeze`."""
    if isinstance(value, FrozenMapping):
        return value.thaw()
    if isinstance(value, tuple):
        return [thaw(item) for item in value]
    return value
