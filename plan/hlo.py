"""Reads what a program costs out of its compiled text (`compiled.as_text()`).

The compilers' own cost analysis counts the body of a loop once, and layers are a loop. Here
everything is multiplied by how often it runs.
"""

import math
import re
from dataclasses import dataclass, field, replace

from plan.hlo_costs import MARKERS, channel, flops, hbm_bytes
from plan.hlo_text import Computation, Instruction, Program

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Shares of an array that each of n devices sends, by the ring algorithms, which send the least.
_SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
}
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# Of a transfer between slices: "all-reduce.2_0".
_TRANSFER = re.compile(r'_xla_host_transfer_rendezvous="([a-z\-]+)[^"]*",_xla_megascale')
_METADATA = re.compile(r", (?:metadata|backend_config|frontend_attributes)=.*", re.DOTALL)


@dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of KINDS.
      nbytes: of the whole array: the result of an all-gather, the operand of any other.
      sent: bytes that a device sends each time, at least.
      times: how often it runs; 0 in a branch that is not the dearest of its conditional.
      depth: how many loops it is in; 0 is run once.
      group: devices that take part together; of a collective-permute, the length of the ring;
        between slices, how many slices.
      network: "ici", the links within a slice, or "dcn", between slices. GPU programs do not say
        which devices share a host: all of theirs are "ici".
      asynchronous: whether the program goes on between its beginning and its end: a pair of
        -start and -done that the GPU compiler does not call is_sync; an async-start around it; or
        a TPU's fusions that begin it, do part of it beside other work, and end it.
      line: the instruction, without its metadata.
      op_name: where the program asked for it, as jax names it.
    """

    kind: str
    nbytes: int
    sent: int
    times: int
    depth: int
    group: int
    network: str
    asynchronous: bool
    line: str
    op_name: str


@dataclass(frozen=True)
class Kernel:
    """A custom call: its operations are in no count, its operands and results are, once.

    Attributes:
      target: "tpu_custom_call", "__cudnn$fmhaSoftmax", ...
      op_name: where the program asked for it.
      times: how often it runs.
    """

    target: str
    op_name: str
    times: int


@dataclass(frozen=True)
class Counts:
    """What one run of a program costs one device. A conditional costs its dearest branch.

    Attributes:
      flops: of matrix products and convolutions, two for each multiply-add.
      hbm_bytes: read from and written to main memory, padding to tiles included. An operand counts
        once, though a product whose operands do not fit on the chip reads them more often; of a
        slice, a gather or an update in place, what is read or written.
      cycles: the TPU compiler's estimate of all but collectives and kernels; None for other
        programs.
      collectives: each once, with how often it runs.
      kernels: custom calls.
      unbounded: loops whose trip count depends on data, as jax names them; they are counted once.
    """

    flops: float = 0
    hbm_bytes: float = 0
    cycles: float | None = None
    collectives: list[Collective] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    unbounded: list[str] = field(default_factory=list)


def read(text: str) -> Counts:
    """The counts of a compiled program."""
    program = Program(text)
    counts = _Reader(program).computation(program.entry)
    return counts if '"estimated_cycles"' in text else replace(counts, cycles=None)


def count(found: list[Collective], depth: int | None = None) -> dict[str, int]:
    """How many instructions there are of each kind of collective, in so many loops or in all."""
    kinds = [one.kind for one in found if depth is None or one.depth == depth]
    return {kind: kinds.count(kind) for kind in KINDS if kind in kinds}


def _add(*parts: Counts) -> Counts:
    return Counts(
        sum(part.flops for part in parts),
        sum(part.hbm_bytes for part in parts),
        sum(part.cycles or 0 for part in parts),
        [one for part in parts for one in part.collectives],
        [one for part in parts for one in part.kernels],
        [one for part in parts for one in part.unbounded],
    )


def _times(counts: Counts, times: int, loops: int = 0) -> Counts:
    return Counts(
        counts.flops * times,
        counts.hbm_bytes * times,
        (counts.cycles or 0) * times,
        [
            replace(one, times=one.times * times, depth=one.depth + loops)
            for one in counts.collectives
        ],
        [replace(one, times=one.times * times) for one in counts.kernels],
        counts.unbounded,
    )


class _Reader:
    """Adds up a program."""

    def __init__(self, program: Program):
        self._program = program

    def computation(self, name: str) -> Counts:
        """One run of a scheduled computation."""
        computation = self._program.computations[name]
        begun: set[tuple[str, str]] = set()  # collectives in fusions, by kind and channel
        parts = computation.instructions.values()
        return _add(*(self._instruction(computation, one, begun) for one in parts))

    def _instruction(
        self, computation: Computation, one: Instruction, begun: set[tuple[str, str]]
    ) -> Counts:
        cycles = _CYCLES.search(one.attributes)
        own = Counts(cycles=int(cycles.group(1)) if cycles else 0)
        if one.opcode == "while":
            trips = self._program.trips(one)
            bodies = [one.called("body"), one.called("condition")]
            inner = _add(*(self.computation(name) for name in bodies if name))
            lost = [one.op_name or one.name] if trips is None else []
            inner = _times(inner, 1 if trips is None else trips, loops=1)
            return _add(own, inner, Counts(unbounded=lost))
        if one.opcode == "conditional":
            branches = [self.computation(name) for name in one.branches]
            branches.sort(key=lambda part: (part.cycles or 0, part.flops, part.hbm_bytes))
            return _add(own, *(_times(part, 0) for part in branches[:-1]), branches[-1])
        if one.opcode in ("call", "async-start"):
            inner = self.computation(one.called("to_apply") or one.called("calls") or "")
            if one.opcode == "async-start":
                overlap = [replace(part, asynchronous=True) for part in inner.collectives]
                inner = replace(inner, collectives=overlap)
            return _add(own, inner)
        kernel = one.opcode == "custom-call" and one.target not in MARKERS
        return replace(
            own,
            flops=flops(self._program, computation, one),
            # Before its own collectives are added to what has begun.
            hbm_bytes=hbm_bytes(self._program, computation, one, begun),
            collectives=self._collectives(computation, one, begun),
            kernels=[Kernel(one.target, one.op_name, 1)] if kernel else [],
        )

    def _collectives(
        self, computation: Computation, one: Instruction, begun: set[tuple[str, str]]
    ) -> list[Collective]:
        """Those of an instruction: of a fusion, what it fuses and no earlier one has begun."""
        if one.opcode != "fusion":
            found = self._collective(computation, one)
            return [found] if found else []
        inner = self._program.fused(one)
        parts = inner.instructions.values()
        starts = any(part.target == "AsyncCollectiveStart" for part in parts)
        fused = []
        for part in parts:
            if channel(part) not in begun:
                fused += self._collectives(inner, part, begun)
            if part.opcode in KINDS:
                begun.add(channel(part))
        return [
            replace(
                each,
                asynchronous=each.asynchronous or starts,
                op_name=each.op_name or one.op_name,
            )
            for each in fused
        ]

    def _collective(self, computation: Computation, one: Instruction) -> Collective | None:
        kind = one.opcode.removesuffix("-start")
        network, operands = "ici", one.operands
        asynchronous = kind != one.opcode and '"is_sync":true' not in one.attributes
        if transfer := _TRANSFER.search(one.attributes) if kind == "send" else None:
            kind, network, asynchronous = transfer.group(1), "dcn", True
            operands, group = one.operands[:1], _slices(one)  # the other orders it
        elif kind not in KINDS:
            return None
        else:
            group = self._group(one)
        if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # the fusion keeps a share of the sum
        arrays = [array for name in operands for array in computation.instructions[name].result]
        nbytes = sum(array.nbytes for array in arrays) * (group if kind == "all-gather" else 1)
        share = _SENT[kind](group) if kind in _SENT else 1
        result = ", ".join(f"{array.dtype}{list(array.dims)}" for array in one.result)
        return Collective(
            kind=kind,
            nbytes=nbytes,
            sent=round(share * nbytes),
            times=1,
            depth=0,
            group=group,
            network=network,
            asynchronous=asynchronous,
            line=f"%{one.name} = {result} {one.opcode}({one.inside})"
            + _METADATA.sub("", one.attributes),
            op_name=one.op_name,
        )

    def _group(self, one: Instruction) -> int:
        """Devices that take part in a collective together."""
        if one.opcode.startswith("collective-permute"):
            listed = re.search(r"source_target_pairs=\{\{(.*?)\}\}", one.attributes)
            pairs = [pair.split(",") for pair in listed.group(1).split("},{")] if listed else []
            follows = {int(source): int(target) for source, target in pairs}
            ring = [next(iter(follows), 0)]
            while (after := follows.get(ring[-1])) not in (None, *ring):
                ring.append(after)
            return len(ring)
        if axes := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", one.attributes):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes.group(1)))
            # An axis, or a part of one: 'axis':(1)2.
            used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes.group(2))
            return math.prod(int(part or sizes[axis]) for axis, part in used)
        if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", one.attributes):
            return int(iota.group(1))
        listed = re.search(r"replica_groups=\{\{([\d,]+)\}", one.attributes)
        return listed.group(1).count(",") + 1 if listed else self._program.devices


def _slices(one: Instruction) -> int:
    """Slices between which a transfer goes: "{1,2}x{0:7}", or devices by slice {{1000,2000},..."""
    target = re.search(r'_xla_megascale_target=(?:"\{|\{\{)([\d,]+)\}', one.attributes)
    return target.group(1).count(",") + 1 if target else 2
