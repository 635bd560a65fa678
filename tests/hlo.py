"""Reads the collectives out of a compiled program's text (`compiled.as_text()`), CPU, GPU or TPU.

What the compilers do that a search for words would miss or count twice:
an asynchronous collective is a pair of -start and -done, or a computation of its own that three
instructions call (start, update, done); a reduce-scatter may be an all-reduce inside a fusion
named all-reduce-scatter; a combined one has a tuple as its result.
"""

import math
import re
from typing import NamedTuple

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_CALLS = re.compile(
    r"\b(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start|-done)?\(")
_RESULT = re.compile(r" = (.*?) [\w\-]+\(")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")  # f8e4m3fn[2,8]
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_BITS = re.compile(r"\d+")


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      kind: one of KINDS.
      nbytes: of its result on a device, all parts of a tuple together.
      depth: how many loops it is in; 0 is run once.
      line: the instruction.
    """

    kind: str
    nbytes: int
    depth: int
    line: str


def collectives(text: str) -> list[Collective]:
    """All collectives of a compiled program, each once."""
    computations = _computations(text)
    depths = _depths(computations)
    found, seen = [], set()
    for name, lines in computations.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            if match is None:
                continue
            result, kind, half = match.groups()
            if half == "-done":
                continue
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
                result = _RESULT.findall(lines[-1])[0]  # a share of it
            shapes = [_nbytes(*array) for array in _ARRAY.findall(result)]
            if half == "-start" and kind in ("all-gather", "collective-permute"):
                # (operands, results, ...): the results follow the operands.
                shapes = shapes[len(shapes) // 2 :] if kind == "all-gather" else shapes[1:2]
            one = Collective(kind, sum(shapes), depths.get(name, 0), line.strip())
            channel = _CHANNEL.search(line)
            key = (kind, channel.group(1), one.depth) if channel else one
            if key not in seen:
                seen.add(key)
                found.append(one)
    return found


def count(found: list[Collective], depth: int | None = None) -> dict[str, int]:
    """How many there are of each kind, at one depth or at all."""
    kinds = [one.kind for one in found if depth is None or one.depth == depth]
    return {kind: kinds.count(kind) for kind in KINDS if kind in kinds}


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation. A body ends with a line that is "}" and nothing else: the
    text of a kernel may hold lines that begin so.
    """
    computations: dict[str, list[str]] = {}
    name = None
    for line in text.splitlines():
        if name is None:
            if match := _HEADER.match(line):
                name = match.group(1)
                computations[name] = []
        elif line == "}":
            name = None
        else:
            computations[name].append(line)
    return computations


def _depths(computations: dict[str, list[str]]) -> dict[str, int]:
    """Loops around each computation, counted from the entry."""
    callees: dict[str, set[tuple[str, int]]] = {}
    for name, lines in computations.items():
        called = callees.setdefault(name, set())
        for line in lines:
            for role, other in _CALLS.findall(line):
                called.add((other, int(role in ("body", "condition"))))
            for group in _BRANCHES.findall(line):
                called.update((other.strip(" %"), 0) for other in group.split(","))
    inner = {other for called in callees.values() for other, _ in called}
    depths: dict[str, int] = {}
    todo = [(name, 0) for name in computations if name not in inner]
    while todo:
        name, depth = todo.pop()
        if depths.get(name, -1) < depth:
            depths[name] = depth
            todo += [(other, depth + more) for other, more in callees.get(name, ())]
    return depths


def _nbytes(dtype: str, sizes: str) -> int:
    bits = 8 if dtype == "pred" else int(_BITS.findall(dtype)[0])
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
