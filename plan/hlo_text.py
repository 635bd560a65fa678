"""Takes the text of a compiled program (`compiled.as_text()`) apart: computations, their
instructions and arrays, and how often its loops run.

Written for what the TPU, GPU and CPU compilers print, all of them scheduled programs.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

VIEWS = ("bitcast", "get-tuple-element", "reshape")  # of the same bytes
_COPIES = ("copy", "copy-done", "copy-start", "convert", "bitcast", "reshape")

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_NAME = re.compile(r"%([\w.\-]+)")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BRANCHES = re.compile(
    r"\b(?:branch_computations=\{([^}]*)\}"
    r"|true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+))"
)


@dataclass(frozen=True)
class Array:
    """An array, or one part of a tuple.

    Attributes:
      dtype: as the compiler writes it.
      dims: logical sizes.
      layout: what stands in braces after them.
    """

    dtype: str
    dims: tuple[int, ...]
    layout: str

    @property
    def bits(self) -> int:
        """Of one element."""
        if self.dtype in ("token", "opaque"):
            return 0
        return 8 if self.dtype == "pred" else int(re.findall(r"\d+", self.dtype)[0])

    @property
    def nbytes(self) -> int:
        """Of its elements, without padding."""
        return math.prod(self.dims) * self.bits // 8

    @property
    def in_hbm(self) -> bool:
        """Not in on-chip memory, registers or the host's memory, which have numbers."""
        space = _SPACE.search(self.layout)
        return space is None or space.group(1) == "0"

    @property
    def stored(self) -> int:
        """Bytes in main memory: a TPU pads the minor dims to whole tiles; 0 if it is elsewhere."""
        if not self.in_hbm:
            return 0
        tile = _TILE.search(self.layout)
        if tile is None or not self.dims:
            return self.nbytes
        order = [int(dim) for dim in self.layout.split(":")[0].split(",")]
        sizes = [self.dims[dim] for dim in reversed(order)]
        for place, size in enumerate(reversed([int(size) for size in tile.group(1).split(",")])):
            if place < len(sizes):
                sizes[-1 - place] = math.ceil(sizes[-1 - place] / size) * size
        return math.prod(sizes) * self.bits // 8


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: without "%".
      opcode: "fusion", "all-gather-start", ...
      result: its array, or the parts of its tuple in order, nested ones flattened.
      operands: names.
      attributes: the text that follows them.
      inside: the text between the parentheses.
      root: whether it is what the computation gives back.
    """

    name: str
    opcode: str
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    inside: str
    root: bool

    def called(self, role: str) -> str | None:
        """The computation that an attribute such as "calls" or "body" names."""
        found = re.search(rf"\b{role}=%?([\w.\-]+)", self.attributes)
        return found and found.group(1)

    @property
    def branches(self) -> list[str]:
        """The computations of a conditional."""
        found = _BRANCHES.search(self.attributes)
        listed, *two = found.groups() if found else ("",)
        return two if listed is None else [name.strip(" %") for name in listed.split(",")]

    @property
    def index(self) -> int:
        """Of a get-tuple-element or a parameter."""
        found = re.search(r"\bindex=(\d+)", self.attributes)
        return int(found.group(1)) if found else int(self.inside)

    @property
    def target(self) -> str:
        """Of a custom call."""
        found = re.search(r'\bcustom_call_target="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    @property
    def op_name(self) -> str:
        """Where jax says that it comes from."""
        found = re.search(r'\bop_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""


@dataclass
class Computation:
    """A list of instructions, in the order in which they run."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @cached_property
    def root(self) -> Instruction:
        return next(one for one in self.instructions.values() if one.root)

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        found = (one for one in self.instructions.values() if one.opcode == "parameter")
        return {one.index: one for one in found}

    @cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """Who uses an instruction, and as which operand."""
        users = defaultdict(list)
        for one in self.instructions.values():
            for position, name in enumerate(one.operands):
                users[name].append((one, position))
        return users

    def source(self, name: str, through: tuple[str, ...]) -> Instruction:
        """What an instruction is a copy or a view of."""
        one = self.instructions[name]
        while one.opcode in through and one.operands:
            one = self.instructions[one.operands[0]]
        return one


class Program:
    """All computations of a text.

    Attributes:
      computations: by name.
      entry: the name of the one that is run.
      devices: how many run the program together.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        for name, is_entry, lines in _bodies(text):
            self.computations[name] = Computation(
                name, {one.name: one for one in map(_instruction, lines)}
            )
            if is_entry:
                self.entry = name
        counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text.split("\n", 1)[0])
        self.devices = math.prod(map(int, counts))
        self._loops = {
            body: (computation, one)
            for computation in self.computations.values()
            for one in computation.instructions.values()
            if one.opcode == "while" and (body := one.called("body"))
        }

    def fused(self, fusion: Instruction) -> Computation:
        """What a fusion computes."""
        return self.computations[fusion.called("calls") or ""]

    def trips(self, loop: Instruction) -> int | None:
        """How often the body of a while runs; None where that depends on data.

        GPU and CPU compilers write it down. For a TPU it follows from the condition, a comparison
        of a counter with a number; a start or a step that is not found counts as 0 or 1.
        """
        if known := _KNOWN_TRIPS.search(loop.attributes):
            return int(known.group(1))
        body, condition = loop.called("body"), loop.called("condition")
        if body is None or condition is None:
            return None
        test = self.computations[condition]
        compare = test.source(test.root.name, _COPIES)
        direction = re.search(r"\bdirection=(\w+)", compare.attributes)
        if compare.opcode != "compare" or direction is None:
            return None
        counter, bound = (test.source(name, _COPIES) for name in compare.operands)
        if counter.opcode != "get-tuple-element":
            return None
        end = self._value(test, bound.name, body)
        if end is None:
            return None
        caller, _ = self._loops[body]
        start = self._value(caller, self._carried(caller, loop, counter.index)) or 0
        step = self._step(self.computations[body], counter.index)
        ahead = (end - start) * (1 if step > 0 else -1)
        ahead += direction.group(1) in ("LE", "GE")
        return max(0, math.ceil(ahead / abs(step)))

    def _carried(self, caller: Computation, loop: Instruction, index: int) -> str:
        """What a loop gets as one part of its state."""
        state = caller.instructions[loop.operands[0]]
        return state.operands[index] if state.opcode == "tuple" else state.name

    def _step(self, body: Computation, index: int) -> int:
        """What a loop's body adds to its counter."""
        if body.root.opcode != "tuple":
            return 1
        change = body.source(body.root.operands[index], _COPIES)
        if change.opcode not in ("add", "subtract") or len(change.operands) != 2:
            return 1
        sign = 1 if change.opcode == "add" else -1
        values = [self._value(body, name) for name in change.operands]
        return next((sign * value for value in values if value), 1)

    def _value(self, computation: Computation, name: str, body: str | None = None) -> int | None:
        """The integer that an instruction always has, also as what a loop carries unchanged.

        Args:
          body: of the loop, where the computation is its condition.
        """
        one = computation.source(name, _COPIES)
        if one.opcode == "constant":
            return int(one.inside) if re.fullmatch(r"-?\d+", one.inside) else None
        if one.opcode != "get-tuple-element":
            return None
        state = computation.instructions[one.operands[0]]
        if state.opcode == "tuple":
            return self._value(computation, state.operands[one.index])
        body = body or computation.name
        if state.opcode != "parameter" or body not in self._loops:
            return None
        inner = self.computations[body]
        if inner.root.opcode != "tuple":
            return None
        kept = inner.source(inner.root.operands[one.index], _COPIES)
        if kept.opcode != "get-tuple-element" or kept.index != one.index:
            return None
        caller, loop = self._loops[body]
        carried = self._carried(caller, loop, one.index)
        return self._value(caller, carried)


def _bodies(text: str) -> Iterator[tuple[str, bool, list[str]]]:
    """Name and instructions of each computation, and whether it is the entry.

    A body ends with a line that is "}" and nothing else, or the name of the thread that runs it
    (`}, execution_thread="sparsecore"`); the text of a kernel may hold lines that begin so, and an
    instruction may go on over several lines.
    """
    name, is_entry, lines = None, False, []
    for line in text.splitlines():
        if name is None:
            if match := _HEADER.match(line):
                name, is_entry, lines = match.group(1), line.startswith("ENTRY "), []
        elif line == "}" or line.startswith("}, execution_thread="):
            yield name, is_entry, lines
            name = None
        elif _INSTRUCTION.match(line):
            lines.append(line)
        elif lines:
            lines[-1] += line


def _instruction(line: str) -> Instruction:
    begin = _INSTRUCTION.match(line)
    assert begin is not None  # _bodies saw to it
    rest = line[begin.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opening = rest.index("(", end)
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    arrays = _ARRAY.findall(rest[:end])
    return Instruction(
        name=begin.group(2),
        opcode=rest[end:opening].strip(),
        result=tuple(
            Array(dtype, tuple(int(size.strip("<=")) for size in sizes.split(",") if size), layout)
            for dtype, sizes, layout in arrays
        ),
        operands=tuple(_NAME.findall(inside)),
        attributes=rest[closing + 1 :],
        inside=inside.strip(),
        root=begin.group(1) is not None,
    )


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis that opens there is closed."""
    depth = 0
    for match in re.finditer(r"[()]", text[opening:]):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return opening + match.start()
    raise ValueError(f"no closing parenthesis in {text[:200]!r}; is this another jax than 0.10?")
