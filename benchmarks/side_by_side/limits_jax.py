"""What JAX's matrix products reach, in GFLOP/s (int8: GOP/s)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from worker import Settings, median_s

PACKAGES = ("jax",)
SIZE = 2048
KINDS = {
    "float32": (jnp.float32, jnp.float32),
    "bfloat16": (jnp.bfloat16, jnp.float32),
    "int8": (jnp.int8, jnp.int32),
}


def measure(settings: Settings) -> dict[str, Any]:
    values = np.random.default_rng(0).uniform(-100, 100, (SIZE, SIZE))
    figures = {}
    for name, (dtype, sums) in KINDS.items():
        # With the second factor as weights are stored, [out, in].
        numbers = (((1,), (1,)), ((), ()))
        product = jax.jit(
            lambda a, b, sums=sums, numbers=numbers: jax.lax.dot_general(
                a, b, numbers, preferred_element_type=sums
            )
        )
        a, b = jnp.asarray(values, dtype), jnp.asarray(values.T, dtype)
        run = lambda product=product, a=a, b=b: jax.block_until_ready(product(a, b))  # noqa: E731
        run()
        figures[f"gemm_{name}_gflops"] = 2 * SIZE**3 / median_s(run, 5) / 1e9
    return figures
