"""The splash kernel through the TPU compiler: it compiles, it is the kernel, it holds no scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.attention_kernels import choose_implementation, splash_attention
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
        return splash_attention(q, k, v, segment, window, mesh)

    def backward(q, k, v, segment, grad_out):
        out, vjp = jax.vjp(lambda q, k, v: forward(q, k, v, segment), q, k, v)
        return out, *vjp(grad_out)

    return (
        jax.jit(forward).lower(q, kv, kv, segment).compile(),
        jax.jit(backward).lower(q, kv, kv, segment, q).compile(),
    )


def temp_gib(compiled):
    return compiled.memory_analysis().temp_size_in_bytes / GIB


def kernels(compiled):
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    "K, G, H, window, segments",
    [(32, 1, 96, None, False), (32, 1, 96, 2047, True), (8, 3, 128, 2047, True)],
)
def test_compiles_without_holding_scores(tpu_mesh, K, G, H, window, segments, dtype):
    forward, backward = compile_attention(
        tpu_mesh(), 1, 4096, K, G, H, window=window, segments=segments, dtype=dtype
    )
    assert kernels(forward) == 1
    assert kernels(backward) == 3  # forward, dq, dk with dv
    # The scores of one layer are K * G * 4096 * 4096 float32: 2 GiB for 32 heads.
    q_gib = 4096 * K * G * H * np.dtype(dtype).itemsize / GIB
    assert temp_gib(backward) < 6 * q_gib


def test_head_dim_96_is_not_copied_to_128(tpu_mesh):
    forward, _ = compile_attention(tpu_mesh(), 1, 4096, 32, 1, 96)
    assert temp_gib(forward) < 0.005  # one padded copy of q is 0.031


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 2), (1, 1, 8)])
def test_devices_of_a_mesh_do_not_talk(tpu_mesh, shape):
    for compiled in compile_attention(tpu_mesh(shape=shape), 4, 4096, 8, 3, 128, window=2047):
        assert kernels(compiled) > 0
        text = compiled.as_text()
        for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
            assert collective not in text


def test_the_longest_rows_of_the_family_compile(tpu_mesh):
    _, backward = compile_attention(tpu_mesh(), 1, 131_072, 4, 1, 96)
    assert temp_gib(backward) < 1  # the scores would be 256


@pytest.mark.parametrize("topology", ["v4:2x2x2", "v5p:2x2x1", "v6e:2x4"])
def test_other_generations_compile(tpu_mesh, topology):
    compile_attention(tpu_mesh(topology), 1, 4096, 4, 3, 96, window=2047)


@pytest.mark.parametrize("precision", ["highest", "tensorfloat32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_chosen_is_what_compiles(tpu_mesh, precision, dtype):
    mesh = tpu_mesh()
    with jax.default_matmul_precision(precision):
        chosen = choose_implementation("auto", mesh.devices.flat[0], dtype, 96, 256)
        try:
            compile_attention(mesh, 1, 256, 2, 1, 96, dtype=dtype)
        except Exception:  # of a kind that differs from one libtpu to the next
            assert chosen == "xla"
        else:
            assert chosen == "splash"
