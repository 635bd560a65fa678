"""The sandbox of chat templates: jinja2's, with an end to the time and the memory of a render.

jinja2's keeps a template away from Python's objects. It leaves it free to loop without end, or to
make a text that fills the memory: "a" * 10 ** 10, or twenty lines that double a list and print it.
Here every loop, call, operator and filter is counted, before it makes something large. Of 82 such
templates none took more than 10.1 s or 0.4 GB (2026-11-23). Counting makes the rendering of 400
messages in Phi-3's format take 20 ms where it took 5 ms.
"""

import functools
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set, Sized, ValuesView
from contextvars import ContextVar
from types import GeneratorType
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, Macro
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 10.0
# Of all texts that a render makes, also in between; a list counts as 16 for each element. 128k
# tokens are about half a million.
MAX_CHARACTERS = 1 << 26

_ELEMENT = 16
_MAX_BITS = 4096  # of a number
# What may make a text as long as two of its arguments multiplied; a number counts as its value.
_MULTIPLYING = frozenset(
    "batch center expandtabs indent join ljust replace rjust round slice tojson translate truncate "
    "zfill".split()
)
_FORMATS = ("%", "format", "format_map")
_OPEN_WIDTH = re.compile(r"\{[^{}]*\{|%[^a-zA-Z%]*\*")  # one that is among the arguments
# Those of HTML and debugging, and sums: some take a time that grows with the square of the text.
_NOT_THERE = ("pprint", "striptags", "sum", "urlize", "wordwrap", "xmlattr")

_budget: ContextVar["_Budget"] = ContextVar("budget")


class _Budget:
    """What is left to one render."""

    def __init__(self):
        self._end = time.monotonic() + MAX_SECONDS
        self._characters = MAX_CHARACTERS

    def check_time(self) -> None:
        if time.monotonic() > self._end:
            raise SecurityError(f"it takes too long; it must end within {MAX_SECONDS:g} s")

    def check_room(self, characters: int) -> None:
        if characters > self._characters:
            raise SecurityError(
                f"it makes too much text; it must be at most {MAX_CHARACTERS:,} characters, with "
                "those of texts that are not printed"
            )

    def spend(self, characters: int) -> None:
        self.check_room(characters)
        self._characters -= characters

    def weigh(self, value: Any) -> int:
        """The characters that a value has when it is printed, about; what would never end, or have
        more than are left, is refused."""
        weight, waiting = 0, [(value, 1)]
        while waiting:
            one, depth = waiting.pop()
            if isinstance(one, str):
                weight += len(one) + depth
            elif isinstance(one, Mapping):
                waiting += [(part, depth + 1) for pair in one.items() for part in pair]
                weight += _ELEMENT + depth
            elif isinstance(one, list | tuple | Set | ValuesView):
                waiting += [(part, depth + 1) for part in one]
                weight += _ELEMENT + depth
            elif isinstance(one, range):
                weight += _ELEMENT * len(one)
            elif isinstance(one, int) and one.bit_length() > _MAX_BITS:
                raise SecurityError(
                    f"it makes a huge number; it must have at most {_MAX_BITS} bits"
                )
            else:
                weight += depth
            self.check_room(weight)
            if waiting:
                self.check_time()
        return weight

    def made(self, value: Any) -> Any:
        """A value that is new, counted."""
        self.check_time()
        if isinstance(value, GeneratorType):
            return self._each(value)
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, Sized):
            self.spend(_ELEMENT * len(value))
        self.weigh(value)
        return value

    def check_product(self, operation: str, first: Any, rest: tuple[Any, ...]) -> None:
        """Refuses what may multiply its values to more than there is room for."""
        if operation in _FORMATS:
            text = str(first)
            if _OPEN_WIDTH.search(text):
                raise SecurityError(f"widths in {text[:40]!r} must be written out")
            widths = map(int, re.findall(r"\d{1,18}", text))
            sizes = [len(text) + max(widths, default=0), self.weigh(rest)]
        else:
            numbers = [abs(value) for value in rest if isinstance(value, int)]
            if max(numbers, default=0) > MAX_RANGE:
                raise SecurityError(f"{operation} got {max(numbers)}, must be at most {MAX_RANGE}")
            sizes = sorted([self.weigh(first), *map(self.weigh, rest), *numbers, 1])[-2:]
        self.check_room(math.prod(sizes))

    def _each(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.check_time()
            yield value


class _Counting(NodeTransformer):
    """Has the sandbox see loops, comparisons, slices, literals and what ~ joins."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _through("each", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        node.nodes = [_through("printed", self.visit(part)) for part in node.nodes]
        return _through("made", node)

    def visit_List(self, node: nodes.List | nodes.Dict | nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        # An empty one is what most templates begin a list with.
        return _through("made", node) if node.items else node

    visit_Dict = visit_List

    def visit_Compare(self, node: nodes.Compare) -> nodes.Expr:
        self.generic_visit(node)
        return _through("made", node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return _through("made", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        return self.visit_List(node) if node.ctx == "load" else node


def _through(method: str, node: Any) -> nodes.Expr:
    function = nodes.EnvironmentAttribute(method)
    return nodes.Call(function, [node], [], None, None, lineno=node.lineno)


class _Namespace(Namespace):
    def __repr__(self) -> str:
        return "<Namespace>"  # what is in it may refer to itself


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment whose renders, inside `limited`, end with a SecurityError where they take more
    than MAX_SECONDS or make more than MAX_CHARACTERS."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, **settings: Any):
        super().__init__(finalize=self.printed, **settings)
        for name in _NOT_THERE:
            del self.filters[name]
        del self.globals["lipsum"]
        self.globals["namespace"] = _Namespace  # ty: ignore[invalid-assignment]
        self.filters = {name: _counted(name, run) for name, run in self.filters.items()}
        self.tests = {name: _counted(name, run) for name, run in self.tests.items()}

    def add_filter(self, name: str, run: Callable[..., Any]) -> None:
        """Adds a filter, counted as jinja2's own are."""
        self.filters[name] = _counted(name, run)

    def each(self, values: Any) -> Any:
        return _budget.get()._each(values)

    def made(self, value: Any) -> Any:
        return _budget.get().made(value)

    def printed(self, value: Any) -> Any:
        if not isinstance(value, str):
            budget = _budget.get()
            budget.spend(budget.weigh(value))
        return value

    def concat(self, pieces: Iterable[str]) -> str:
        budget, kept = _budget.get(), []
        for piece in pieces:
            budget.check_time()
            budget.spend(len(piece))
            kept.append(piece)
        return "".join(kept)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, int | float | bytes) or attr == "encode":
            return False  # bytes in any number
        return super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902
        budget = _budget.get()
        budget.check_time()
        if getattr(__obj, "__self__", None) is __self:
            return __obj(*args)
        method = getattr(__obj, "__wrapped__", __obj)  # by jinja2 where it formats
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str) and (name in _MULTIPLYING or name in _FORMATS):
            budget.check_product(name, owner, (*args, *kwargs.values()))
        result = super().call(__context, __obj, *args, **kwargs)
        return result if isinstance(__obj, Macro) else budget.made(result)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget.get()
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * right > _MAX_BITS:
                raise SecurityError(
                    f"it makes a huge number; it must have at most {_MAX_BITS} bits"
                )
        elif operator == "%" and isinstance(left, str):
            budget.check_product("%", left, (right,))
        elif operator == "*":
            for some, times in ((left, right), (right, left)):
                if isinstance(some, str | list | tuple) and isinstance(times, int):
                    budget.check_room(budget.weigh(some) * times)
        return budget.made(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = _Counting().visit(super()._parse(source, name, filename))
        return template.set_environment(self)


def _counted(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or a test, counted."""
    start = int(hasattr(run, "jinja_pass_arg"))  # after what jinja2 itself passes

    @functools.wraps(run)
    def counted(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        if name in _MULTIPLYING or name in _FORMATS:
            given, value, rest = args[:start], args[start], args[start + 1 :]
            if isinstance(value, GeneratorType):
                value = list(value)
            budget.check_product(name, value, (*rest, *kwargs.values()))
            args = (*given, value, *rest)
        return budget.made(run(*args, **kwargs))

    return counted


def limited(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function that compiles and renders a template, with a budget of its own."""
    before = _budget.set(_Budget())
    try:
        return run(*args, **kwargs)
    finally:
        _budget.reset(before)
