"""How many operations a model asks for, and how many its attention kernels do.

A multiply-add counts as two. Of attention only the pairs of a query and a key that it sees count:
causal, within the window.
"""

import math
from collections.abc import Iterable

from jax.sharding import Mesh

import phi3_jax as phi3
from phi3_jax.sharding import named_sharding, padded_shape
from plan.hlo import Kernel
from train.metrics import layer_weights

# What a kernel does with the pairs of its rows and heads, as multiples of the forward pass, which
# has two products (scores; probabilities times values), by a part of its name; the first that fits
# counts. A backward pass computes the scores again. That of splash attention is two kernels, each
# of which does so: dq has three products (scores, dP, dQ), dkv four (scores, dV, dP, dK). cuDNN's
# is one, of five.
_ATTENTION = {
    "dkv": 2.0,
    "dq": 1.5,
    "SoftmaxBackward": 2.5,
    "fmha": 1.0,
    "splash": 1.0,
    "decod": 1.0,
}


def kernel_flops(kernels: Iterable[Kernel], attention_flops: float) -> tuple[float, list[str]]:
    """Operations of the kernels that a program runs on one device, which no compiler tells.

    Args:
      kernels: of the program.
      attention_flops: of one layer's attention forward on that device.

    Returns:
      The sum, and the names of the kernels that are no attention: they count nothing.
    """
    total, unknown = 0.0, []
    for kernel in kernels:
        name = f"{kernel.target} {kernel.op_name}"
        factor = next((factor for part, factor in _ATTENTION.items() if part in name), None)
        if factor is None:
            unknown.append(kernel.op_name or kernel.target)
        else:
            total += factor * attention_flops * kernel.times
    return total, unknown


def causal_pairs(config: phi3.Phi3Config, tokens: int) -> int:
    """Pairs of a query and a key that a row's mask and window leave."""
    window = min(tokens, config.sliding_window or tokens)
    return window * (window + 1) // 2 + (tokens - window) * window


def attention_flops(config: phi3.Phi3Config, pairs: int, head_rows: int) -> int:
    """One layer's attention forward, for so many pairs in each of so many heads and rows."""
    return 4 * pairs * head_rows * config.head_dim


def forward_flops(config: phi3.Phi3Config, tokens: int, pairs: int) -> int:
    """All that a row of so many tokens asks for, where only its last one needs logits."""
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    head = config.vocab_size * config.hidden_size
    weights = layers * layer_weights(config) * tokens + head
    return 2 * weights + layers * attention_flops(config, pairs, heads)


def head_rows(config: phi3.Phi3Config, mesh: Mesh, rows: int) -> int:
    """Heads times rows that one device attends for, with the heads that the mesh pads."""
    groups = config.num_attention_heads // config.num_key_value_heads
    shape = (rows, config.num_key_value_heads, groups)
    shape = padded_shape(("batch", "kv_heads", None), shape, mesh)
    place = named_sharding(("batch", "attention_heads", None), shape, mesh)
    return math.prod(place.shard_shape(shape))
