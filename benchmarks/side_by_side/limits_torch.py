"""What torch's matrix products reach, in GFLOP/s (int8: GOP/s)."""

from collections.abc import Callable
from typing import Any

import torch
from worker import Settings, median_s

PACKAGES = ("torch",)
SIZE = 2048
# Where torch has no kernel for the processor it takes minutes at that size.
SMALL = 256


def measure(settings: Settings) -> dict[str, Any]:
    figures = {
        "float32": rate(lambda size: torch.randn(size, size), torch.mm),
        "bfloat16": rate(lambda size: torch.randn(size, size).bfloat16(), torch.mm),
        "int8": rate(
            lambda size: torch.randint(-100, 100, (size, size), dtype=torch.int8),
            lambda a, b: torch._int_mm(a, b.t()),
        ),
    }
    return {f"gemm_{name}_gflops": figure for name, figure in figures.items()}


def rate(make: Callable[[int], Any], product: Callable[[Any, Any], Any]) -> float:
    """At SIZE, or at SMALL where that is a hundredth of float32's usual speed."""
    for size in (SMALL, SIZE):
        a, b = make(size), make(size)
        product(a, b)
        reached = 2 * size**3 / median_s(lambda a=a, b=b: product(a, b), 5) / 1e9
        if reached < 2:
            break
    return reached
