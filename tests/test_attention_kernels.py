"""Fused attention against a plain float32 softmax: splash interpreted, cuDNN's request by XLA."""

import math
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    LocalMask,
    MultiHeadMask,
    make_splash_mha_single_device,
)
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType

from phi3_jax import attention_kernels
from phi3_jax.attention_kernels import choose_implementation, cudnn_attention, splash_attention
from phi3_jax.sharding import named_sharding

splash = partial(splash_attention, mesh=None, interpret=True)
cudnn_request = partial(cudnn_attention, implementation="xla")

# B, T, K, G, H, window, segments. Lengths of one block and of several, even and odd.
CASES = [
    (2, 70, 2, 3, 96, None, None),
    (1, 130, 1, 4, 64, 5, "packed"),
    (2, 257, 2, 1, 128, 1, "left"),
    (2, 130, 2, 3, 96, 5, "right"),
    (2, 70, 3, 1, 96, None, "hole"),
    (1, 257, 1, 3, 128, None, "packed"),
    (1, 600, 2, 2, 96, 130, "left"),  # two blocks of 384: the window crosses from one to the other
    (1, 1300, 1, 2, 128, 5, None),  # three blocks of 512: the first is hidden from the last
    (1, 70, 2, 1, 64, 69, None),  # a window that hides one key from one query
    (1, 600, 2, 1, 64, 600, None),  # and one that hides nothing
]


def plain(q_BTKGH, k_BTKH, v_BTKH, segment_BT, window):
    """Every score in float32, every rule written out."""
    q, k, v = (x.astype(jnp.float32) for x in (q_BTKGH, k_BTKH, v_BTKH))
    T = q.shape[1]
    query, key = np.arange(T)[:, None], np.arange(T)[None, :]
    seen = key <= query
    if window is not None:
        seen = seen & (query - window < key)
    seen = seen[None]
    if segment_BT is not None:
        seen = seen & (segment_BT[:, :, None] == segment_BT[:, None, :])
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k) / math.sqrt(q.shape[-1])
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    return jnp.einsum("BKGTS,BSKH->BTKGH", jax.nn.softmax(scores, axis=-1), v)


def segments_of(kind, B, T):
    if kind is None:
        return None
    segment_BT = np.ones((B, T), np.int32)
    for row, segment_T in enumerate(segment_BT):
        cut = T // 3 + row  # each row its own
        if kind == "packed":
            segment_T[cut:] = 2
            segment_T[2 * cut :] = 3
        elif kind == "left":
            segment_T[:cut] = 0
        elif kind == "right":
            segment_T[cut:] = 0
        else:
            segment_T[cut : 2 * cut] = 0
    return jnp.asarray(segment_BT)


def arrays(B, T, K, G, H, dtype=jnp.float32):
    """q, k, v and a gradient of the output."""
    rng = np.random.default_rng(T + K)
    shapes = (B, T, K, G, H), (B, T, K, H), (B, T, K, H), (B, T, K, G, H)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def value_and_gradients(attention, q, k, v, segment, window, grad_out):
    def run(q, k, v, segment, grad_out):
        out, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, segment, window=window), q, k, v)
        return out, *vjp(grad_out.astype(out.dtype))

    return jax.jit(run)(q, k, v, segment, grad_out)


def assert_close(actual, expected, tolerance):
    """The largest difference against the largest value (at least 1), for out, dq, dk and dv."""
    for name, a, e in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
        assert a.shape == e.shape and np.isfinite(a).all(), name
        assert np.abs(a - e).max() <= tolerance * max(np.abs(e).max(), 1), name


@pytest.mark.parametrize("attention", [splash, cudnn_request], ids=["splash", "cudnn"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_equals_a_plain_softmax_forward_and_backward(case, attention):
    *sizes, window, kind = case
    *qkv, grad_out = arrays(*sizes)
    segment = segments_of(kind, *sizes[:2])
    expected = value_and_gradients(plain, *qkv, segment, window, grad_out)
    actual = value_and_gradients(attention, *qkv, segment, window, grad_out)
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("attention", [splash, cudnn_request], ids=["splash", "cudnn"])
@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[5]], ids=str)
def test_bfloat16_is_as_close_as_its_roundings_allow(case, attention):
    *sizes, window, kind = case
    *qkv, grad_out = arrays(*sizes, jnp.bfloat16)
    segment = segments_of(kind, *sizes[:2])
    expected = value_and_gradients(plain, *qkv, segment, window, grad_out)
    actual = value_and_gradients(attention, *qkv, segment, window, grad_out)
    assert {x.dtype for x in actual} == {jnp.dtype(jnp.bfloat16)}
    # A rounding to 8 bits is off by up to 2^-9. The result has one; before it the scaled query has
    # one (scores up to 4 move by 2^-7) or the probabilities have; gradients meet three or four.
    assert_close(actual, expected, 2**-6)


@pytest.mark.parametrize("window", [None, 1, 5, 512, 513, 1022, 1023, 1024])
def test_table_of_blocks_is_that_of_the_masks_of_jax(window):
    T, block = 1536, 512
    ours = attention_kernels._splash_kernel(T, block, window, False, False)
    mask = CausalMask((T, T)) if window is None else LocalMask((T, T), (window - 1, 0), 0)
    theirs = make_splash_mha_single_device(
        MultiHeadMask([mask]), block_sizes=BlockSizes(*[block] * 8)
    )
    assert jax.tree.structure(ours.fwd_mask_info) == jax.tree.structure(theirs.fwd_mask_info)
    for info in ("fwd_mask_info", "dq_mask_info", "dkv_mask_info"):
        jax.tree.map(np.testing.assert_array_equal, getattr(ours, info), getattr(theirs, info))


@pytest.mark.parametrize("tokens", [1, 70, 128, 130, 512, 513, 600, 4096, 4097, 16385, 131_072])
def test_blocks_waste_less_than_a_register_each(tokens):
    padded, block = attention_kernels._splash_blocks(tokens)
    assert block % 128 == 0 and padded % block == 0 and block <= 1024
    assert 0 <= padded - tokens < 128 * (padded // block)


def test_nothing_of_size_tokens_by_tokens_is_made():
    T = 2048
    shapes = (1, T, 2, 2, 96), (1, T, 2, 96), (1, T, 2, 96)
    qkv = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    segment = jax.ShapeDtypeStruct((1, T), jnp.int32)

    def largest(attention):
        def loss(q, k, v, segment):
            return attention(q, k, v, segment, 300).astype(jnp.float32).sum()

        jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*qkv, segment)
        return max(math.prod(shape) for shape in shapes_in(jaxpr.jaxpr))

    assert largest(partial(splash_attention, mesh=None)) < T * T
    assert largest(plain) >= T * T


def shapes_in(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in (*equation.invars, *equation.outvars))
        for inner in jaxprs_in_params(equation.params):
            yield from shapes_in(inner)


MESH_CASES = [
    (4, 2, 3),  # batch over data and fsdp, key-value heads over tensor
    (2, 2, 1),  # batch over data alone
    (1, 4, 2),  # one row: on every device
    (4, 3, 2),  # heads that tensor=2 does not divide
]


@pytest.mark.parametrize("B, K, G", MESH_CASES)
def test_on_a_mesh_equals_one_device(B, K, G):
    names = ("data", "fsdp", "tensor")
    mesh = jax.make_mesh((2, 2, 2), names, axis_types=(AxisType.Auto,) * 3)
    *qkv, grad_out = arrays(B, 130, K, G, 96)
    segment = segments_of("left", B, 130)
    expected = value_and_gradients(splash, *qkv, segment, 40, grad_out)

    q_names = ("batch", None, "kv_heads", None, None)
    every = (q_names, q_names[:4], q_names[:4], q_names, q_names[:2])
    placed = [
        jax.device_put(x, named_sharding(names, x.shape, mesh))
        for names, x in zip(every, (*qkv, grad_out, segment), strict=True)
    ]
    on_mesh = partial(splash_attention, mesh=mesh, interpret=True)
    actual = value_and_gradients(on_mesh, *placed[:3], placed[4], 40, placed[3])
    assert_close(actual, expected, 1e-6)
    assert actual[0].sharding.is_equivalent_to(placed[0].sharding, 5)


@pytest.mark.parametrize("sharded", [False, True])
def test_inside_a_rematerialised_scan(sharded):
    mesh = None
    if sharded:
        names = ("data", "fsdp", "tensor")
        mesh = jax.make_mesh((2, 1, 4), names, axis_types=(AxisType.Auto,) * 3)
    q, k, v, _ = arrays(2, 70, 4, 1, 64)
    segment = segments_of("packed", 2, 70)

    def loss(q, k, v, attention):
        @jax.checkpoint
        def layer(x, scale):
            return x + attention(x * scale, k, v, segment, 9), None

        return jnp.square(jax.lax.scan(layer, q, jnp.asarray([0.5, 2.0]))[0]).sum()

    gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)), static_argnums=3)
    value, actual = gradients(q, k, v, partial(splash_attention, mesh=mesh, interpret=True))
    expected_value, expected = gradients(q, k, v, plain)
    assert_close((value, *actual), (expected_value, *expected), 1e-5)


TPU = SimpleNamespace(platform="tpu")
CPU = SimpleNamespace(platform="cpu")
H100 = SimpleNamespace(platform="gpu", compute_capability="9.0")
T4 = SimpleNamespace(platform="gpu", compute_capability="7.5")
MI300 = SimpleNamespace(platform="gpu", compute_capability="gfx942")


@pytest.fixture
def default_precision():
    """What users have; the tests of this project run with "highest"."""
    with jax.default_matmul_precision("default"):
        yield


@pytest.mark.usefixtures("default_precision")
@pytest.mark.parametrize(
    "chosen, device, dtype, head_dim, tokens",
    [
        ("splash", TPU, "bfloat16", 96, 4096),
        ("splash", TPU, "float32", 128, 128),
        ("xla", TPU, "bfloat16", 96, 127),
        ("xla", TPU, "float16", 96, 4096),
        ("cudnn", H100, "bfloat16", 96, 4096),
        ("cudnn", H100, "float16", 128, 1),
        ("xla", H100, "float32", 96, 4096),
        ("xla", H100, "bfloat16", 100, 4096),
        ("xla", H100, "bfloat16", 136, 4096),
        ("xla", T4, "bfloat16", 96, 4096),
        ("xla", MI300, "bfloat16", 96, 4096),
        ("xla", CPU, "bfloat16", 96, 4096),
    ],
)
def test_auto_takes_the_kernel_that_can(chosen, device, dtype, head_dim, tokens):
    assert choose_implementation("auto", device, dtype, head_dim, tokens) == chosen
    obstacle = "output_attentions=True"
    assert choose_implementation("auto", device, dtype, head_dim, tokens, obstacle) == "xla"
    assert choose_implementation("xla", device, dtype, head_dim, tokens) == "xla"
    if chosen != "xla":
        assert choose_implementation(chosen, device, dtype, head_dim, tokens) == chosen


@pytest.mark.usefixtures("default_precision")
def test_splash_asked_for_by_name_serves_short_calls():
    assert choose_implementation("splash", TPU, "bfloat16", 96, 5) == "splash"


@pytest.mark.usefixtures("default_precision")
@pytest.mark.parametrize(
    "asked, device, dtype, head_dim, obstacle, words",
    [
        ("splash", CPU, "float32", 96, None, "runs on TPU and the device is 'cpu'"),
        ("splash", TPU, "float16", 96, None, "dtype is float16"),
        ("splash", TPU, "bfloat16", 96, "a 4D attention_mask", "a 4D attention_mask"),
        ("cudnn", TPU, "bfloat16", 96, None, "runs on NVIDIA GPUs and the device is 'tpu'"),
        ("cudnn", MI300, "bfloat16", 96, None, "runs on NVIDIA GPUs"),
        ("cudnn", T4, "bfloat16", 96, None, "compute capability 7.5"),
        ("cudnn", H100, "float32", 96, None, "dtype is float32, it takes bfloat16 and float16"),
        ("cudnn", H100, "bfloat16", 100, None, "head_dim is 100, it takes multiples of 8"),
        ("cudnn", H100, "bfloat16", 136, None, "head_dim is 136"),
        ("cudnn", H100, "bfloat16", 96, "output_attentions=True", "output_attentions=True"),
    ],
)
def test_a_kernel_asked_for_by_name_says_what_stands_in_its_way(
    asked, device, dtype, head_dim, obstacle, words
):
    with pytest.raises(ValueError, match="cannot serve this call") as error:
        choose_implementation(asked, device, dtype, head_dim, 4096, obstacle)
    assert words in str(error.value) and "'auto'" in str(error.value)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'flash' is not known.*'auto', 'xla', 'splash', 'cudnn'"):
        choose_implementation("flash", CPU, "float32", 96, 4096)


@pytest.mark.parametrize(
    "precision, dtype, chosen",
    [
        ("highest", "bfloat16", "xla"),
        ("highest", "float32", "splash"),
        ("tensorfloat32", "float32", "xla"),
        ("bfloat16", "bfloat16", "splash"),
    ],
)
def test_a_matmul_precision_that_splash_does_not_compile_with(precision, dtype, chosen):
    with jax.default_matmul_precision(precision):
        assert choose_implementation("auto", TPU, dtype, 96, 4096) == chosen
        if chosen == "xla":
            with pytest.raises(ValueError, match=f"matmul_precision is '{precision}'"):
                choose_implementation("splash", TPU, dtype, 96, 4096)
