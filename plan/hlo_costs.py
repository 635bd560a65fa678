"""Operations and main-memory traffic of one instruction of a compiled program."""

import math
import re

import numpy as np

from plan.hlo_text import VIEWS, Computation, Instruction, Program

# What moves nothing itself: names, views, and calls, whose instructions count for themselves.
_STILL = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier"),
    *("after-all", "add-dependency", "partition-id", "replica-id", "recv", "send-done"),
    *("while", "conditional", "call", "async-start", "async-update", "async-done"),
)
# Custom calls that do no work.
MARKERS = (
    *("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "SliceId", "Sharding"),
    *("AsyncCollectiveStart", "AsyncCollectiveDone"),
)
_SLICES = ("dynamic-slice", "slice", "gather")
_ASYNC_SLICES = ("slice-start", "dynamic-slice-start")


def flops(program: Program, computation: Computation, one: Instruction) -> float:
    """Of the matrix products and convolutions of an instruction, two for each multiply-add."""
    if one.opcode == "fusion":
        inner = program.fused(one)
        return sum(flops(program, inner, part) for part in inner.instructions.values())
    if one.opcode not in ("dot", "convolution"):
        return 0
    left, right = (computation.instructions[name].result[0].dims for name in one.operands)
    out = one.result[0].dims
    if one.opcode == "dot":
        listed = re.search(r"\blhs_contracting_dims=\{([\d,]+)\}", one.attributes)
        dims = [int(dim) for dim in listed.group(1).split(",")] if listed else []
        return 2.0 * math.prod(out) * math.prod(left[dim] for dim in dims)
    return _convolution_flops(one.attributes, left, right, out)


def _convolution_flops(
    attributes: str, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]
) -> float:
    """Without the products with padding and with what dilation puts between: a TPU's products with
    batch dims are convolutions that have mostly those.
    """
    labels = re.search(r"\bdim_labels=(\w+)_(\w+)->(\w+)", attributes)
    assert labels is not None  # every convolution has them
    of_left, of_right, of_out = (
        dict(zip(names, sizes, strict=True))
        for names, sizes in zip(labels.groups(), (left, right, out), strict=True)
    )
    window = re.search(r"\bwindow=\{([^}]*)\}", attributes)
    parts = dict(part.split("=") for part in window.group(1).split()) if window else {}
    rank = len(out) - 2

    def listed(name: str, default: str) -> list[str]:
        return parts[name].split("x") if name in parts else [default] * rank

    products = 2.0 * of_out["b"] * of_out["f"] * of_right["i"]
    spatial = zip(
        listed("stride", "1"),
        listed("pad", "0_0"),
        listed("lhs_dilate", "1"),
        listed("rhs_dilate", "1"),
        strict=True,
    )
    for dim, (stride, pad, spread, dilation) in enumerate(spatial):
        place = (
            np.arange(of_out[str(dim)])[:, None] * int(stride)
            + np.arange(of_right[str(dim)]) * int(dilation)
            - int(pad.split("_")[0])
        )
        end = of_left[str(dim)] * int(spread)
        products *= int(np.count_nonzero((place >= 0) & (place < end) & (place % int(spread) == 0)))
    return products


def hbm_bytes(
    program: Program, computation: Computation, one: Instruction, begun: set[tuple[str, str]]
) -> int:
    """Read from and written to main memory by an instruction.

    Args:
      begun: kinds and channels of the collectives that an earlier fusion has begun; where this
        one does another part of them, they count no more.
    """
    if one.opcode in _STILL or one.target in MARKERS:
        return 0
    if one.opcode in _ASYNC_SLICES:  # ((operands), result, context)
        source = computation.instructions[one.operands[0]].result[0]
        return one.result[-2].nbytes if source.in_hbm else 0
    read, written = 0, 0
    if not one.opcode.endswith("-done"):
        for position, name in enumerate(one.operands):
            full = sum(array.stored for array in computation.instructions[name].result)
            if one.opcode == "fusion":
                inner = program.fused(one)
                parameter = inner.parameters[position].name
                read += _read_by_users(program, inner, parameter, full, begun)
            else:
                read += _read(computation, one, position, full, begun)
    if not one.opcode.endswith("-start") and one.opcode != "send":
        written = _written(program, computation, one, begun)
    return read + written


def channel(one: Instruction) -> tuple[str, str]:
    """What the parts of one collective have in common."""
    found = re.search(r"\bchannel_id=(\d+)", one.attributes)
    return one.opcode, found.group(1) if found else one.name


def _read_by_users(
    program: Program, computation: Computation, name: str, full: int, begun: set[tuple[str, str]]
) -> int:
    """Bytes of an array in main memory that a fused computation reads, at most all."""
    total = 0
    for user, position in computation.users[name]:
        if user.opcode in VIEWS:
            total += _read_by_users(program, computation, user.name, full, begun)
        elif user.opcode == "fusion":
            inner = program.fused(user)
            parameter = inner.parameters[position].name
            total += _read_by_users(program, inner, parameter, full, begun)
            if inner.source(inner.root.name, VIEWS).name == parameter:
                total += _read_by_users(program, computation, user.name, full, begun)
        elif user.opcode != "tuple":  # what is given back as it is stays where it is
            total += _read(computation, user, position, full, begun)
    return min(total, full)


def _read(
    computation: Computation,
    one: Instruction,
    position: int,
    full: int,
    begun: set[tuple[str, str]],
) -> int:
    """Bytes that an instruction, not a fusion, reads of an operand of so many in main memory."""
    if one.target in MARKERS or channel(one) in begun:
        return 0
    if position == 0 and one.opcode in _SLICES:
        return min(full, one.result[0].nbytes)
    if position == 0 and one.opcode == "dynamic-update-slice":
        return 0
    if position == 0 and one.opcode == "scatter":
        return min(full, computation.instructions[one.operands[2]].result[0].nbytes)
    return full


def _written(
    program: Program, computation: Computation, one: Instruction, begun: set[tuple[str, str]]
) -> int:
    """Bytes of an instruction's result that are written to main memory."""
    if one.opcode != "fusion":
        return sum(_changed(program, computation, one, array.stored, begun) for array in one.result)
    inner = program.fused(one)
    root = inner.root
    if root.target == "AsyncCollectiveStart":  # (operand, result, ...)
        return one.result[1].stored
    if root.opcode != "tuple":
        return sum(_changed(program, inner, root, array.stored, begun) for array in one.result)
    parts = (inner.instructions[name] for name in root.operands)
    return sum(
        _changed(program, inner, part, array.stored, begun)
        for part, array in zip(parts, one.result, strict=True)
    )


def _changed(
    program: Program,
    computation: Computation,
    one: Instruction,
    full: int,
    begun: set[tuple[str, str]],
) -> int:
    """Bytes that are new in a result of so many in main memory."""
    one = computation.source(one.name, VIEWS)
    if one.opcode == "parameter" or one.target in MARKERS or channel(one) in begun:
        return 0
    if one.opcode == "fusion":
        inner = program.fused(one)
        # What comes out of it as it went in is no part of a tuple.
        return _changed(program, inner, inner.root, full, begun) or full
    updates = {"dynamic-update-slice": 1, "scatter": 2}.get(one.opcode)
    if updates is None:
        return full
    return min(full, computation.instructions[one.operands[updates]].result[0].nbytes)
