"""The cuDNN request through the GPU compiler: it is taken, differentiates, and holds no scores."""

import jax
import jax.numpy as jnp
import pytest

from phi3_jax.attention_kernels import choose_implementation, cudnn_attention
from phi3_jax.sharding import named_sharding

GIB = 2**30


def compile_attention(mesh, B, T, K, G, H, window=None, segments=True, dtype=jnp.bfloat16):
    """The compiled forward, and the forward with the gradients of q, k and v."""

    def abstract(names, shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(names, shape, mesh))

    names = ("batch", None, "kv_heads", None, None)
    q = abstract(names, (B, T, K, G, H), dtype)
    kv = abstract(names[:4], (B, T, K, H), dtype)
    segment = abstract(names[:2], (B, T), jnp.int32) if segments else None

    def forward(q, k, v, segment):
        return cudnn_attention(q, k, v, segment, window)

    def backward(q, k, v, segment, grad_out):
        out, vjp = jax.vjp(lambda q, k, v: forward(q, k, v, segment), q, k, v)
        return out, *vjp(grad_out)

    return (
        jax.jit(forward).lower(q, kv, kv, segment).compile(),
        jax.jit(backward).lower(q, kv, kv, segment, q).compile(),
    )


def kernels(compiled):
    return compiled.as_text().count('custom_call_target="__cudnn$fmha')


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "K, G, H, window, segments",
    [(32, 1, 96, None, False), (32, 1, 96, 2047, True), (10, 4, 128, 2047, False)],
)
def test_compiles_without_holding_scores(gpu_mesh, K, G, H, window, segments, dtype):
    forward, backward = compile_attention(
        gpu_mesh(), 1, 4096, K, G, H, window=window, segments=segments, dtype=dtype
    )
    assert kernels(forward) == 1 and kernels(backward) == 2
    # XLA's scores are 3 GiB forward and 5 with gradients at 32 heads; segments cost a mask of
    # one head, 0.03 GiB.
    temp = backward.memory_analysis().temp_size_in_bytes
    assert temp / GIB < (0.15 if segments else 0.1)


@pytest.mark.parametrize("segments", [False, True])
def test_odd_lengths_differentiate(gpu_mesh, segments):
    _, backward = compile_attention(gpu_mesh(), 2, 257, 2, 3, 96, window=5, segments=segments)
    assert kernels(backward) == 2


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 8)])
def test_the_compiler_divides_it_over_batch_and_heads(gpu_mesh, shape):
    for compiled in compile_attention(gpu_mesh(shape), 4, 4096, 8, 3, 128, window=2047):
        assert kernels(compiled) > 0
        text = compiled.as_text()
        for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
            assert collective not in text


def test_it_is_what_is_chosen_there(gpu_mesh):
    device = gpu_mesh().devices.flat[0]
    assert choose_implementation("auto", device, jnp.bfloat16, 96, 4096) == "cudnn"
