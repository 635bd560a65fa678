"""What torch's matrix products reach, in GFLOP/s (int8: GOP/s)."""

from typing import Any

import torch
from worker import Settings, median_s

PACKAGES = ("torch",)
SIZE = 2048


def measure(settings: Settings) -> dict[str, Any]:
    figures = {}
    left, right = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = left.to(dtype), right.to(dtype)
        figures[name] = rate(lambda a=a, b=b: torch.mm(a, b))
    whole = torch.randint(-100, 100, (SIZE, SIZE), dtype=torch.int8)
    figures["int8"] = rate(lambda: torch._int_mm(whole, whole.t()))
    return {f"gemm_{name}_gflops": figure for name, figure in figures.items()}


def rate(product: Any) -> float:
    product()
    return 2 * SIZE**3 / median_s(product, 5) / 1e9
