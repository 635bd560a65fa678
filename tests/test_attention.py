"""The model computes the same with every attention implementation."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import config_values, hf_weights, on_mesh, params_of, tokens

import phi3_jax as phi3
from phi3_jax import attention
from phi3_jax import model as model_module
from phi3_jax.attention import SeenColumns, Visible, document_runs
from phi3_jax.sharding import make_mesh
from phi3_jax.slots import Quantized, quantize

# Real tokens are compared; what padding computes differs from one implementation to the other.
PADDED = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 10 + [0] * 3])
PACKED = np.array([[1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 3, 3, 0], [7] * 6 + [4] * 7])


@pytest.fixture(params=["splash", "cudnn"])
def fused(request, monkeypatch):
    """The fused implementations as a CPU can run them, chosen in place of "xla"."""
    interpreted = functools.partial(attention.splash_attention, interpret=True)
    monkeypatch.setattr(attention, "splash_attention", interpreted)
    plain = functools.partial(attention.cudnn_attention, implementation="xla")
    monkeypatch.setattr(attention, "cudnn_attention", plain)
    return lambda: monkeypatch.setattr(
        model_module, "choose_implementation", lambda *_: request.param
    )


@pytest.mark.parametrize(
    "case, inputs, sizes",
    [
        ("longrope_window", {}, None),
        ("mha_window", {"attention_mask": PADDED}, None),
        ("gqa", {"position_ids": np.array([[*range(5), *range(8)]])}, None),
        ("longrope_partial_tied", {"segment_ids": PACKED}, (2, 1, 4)),  # 3 groups on 4
    ],
)
def test_fused_attention_gives_the_same(fused, case, inputs, sizes):
    config = phi3.Phi3Config(**config_values(case))
    model, params = phi3.Phi3ForCausalLM(config), params_of(config, hf_weights(config, case))
    if sizes is not None:
        model, params = on_mesh(model, params, make_mesh(*sizes))
    ids = tokens(2, 13)
    real = np.ones(ids.shape, bool)
    for name in ("attention_mask", "segment_ids"):
        real &= np.asarray(inputs.get(name, real)) != 0
    labels = np.where(real, ids, -100)

    def run():
        def value(params):
            out = model.apply({"params": params}, ids, labels=labels, **inputs)
            return out.loss, out.logits

        return jax.jit(jax.value_and_grad(value, has_aux=True))(params)

    (loss, logits), gradients = run()
    fused()
    (same_loss, same_logits), others = run()
    np.testing.assert_allclose(same_loss, loss, rtol=1e-5)
    scale = np.abs(logits).max()
    np.testing.assert_allclose(same_logits[real], logits[real], rtol=0, atol=1e-5 * scale)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())  # noqa: E731
    jax.tree.map(close, others, gradients)


def test_prefill_is_fused_and_decoding_is_not(fused):
    """What continues a filled cache is XLA's."""
    config = phi3.Phi3Config(**config_values("longrope_window"))
    model, params = phi3.Phi3ForCausalLM(config), params_of(config, hf_weights(config, "x"))
    ids = tokens(2, 13)
    expected = phi3.generate(model, params, ids, max_new_tokens=6, eos_token_id=None).sequences
    fused()
    other = phi3.Phi3ForCausalLM(config, attn_implementation="other")  # compiles anew
    got = phi3.generate(other, params, ids, max_new_tokens=6, eos_token_id=None).sequences
    np.testing.assert_array_equal(got, expected)


def test_a_kernel_that_cannot_serve_is_refused_by_name():
    config = phi3.Phi3Config(**config_values("gqa"))
    model = phi3.Phi3ForCausalLM(config, attn_implementation="splash")
    params = params_of(config, hf_weights(config, "gqa"))
    for inputs, words in [
        ({}, "it runs on TPU and the device is 'cpu'"),
        ({"output_attentions": True}, "output_attentions=True"),
        ({"attention_mask": np.ones((1, 1, 4, 4), bool)}, "a 4D attention_mask"),
    ]:
        with pytest.raises(ValueError, match=f"'splash' cannot serve this call: {words}"):
            model.apply({"params": params}, tokens(1, 4), **inputs)
    unknown = model.clone(attn_implementation="flash")
    with pytest.raises(ValueError, match="'flash' is not known; it is one of 'auto', 'xla'"):
        unknown.apply({"params": params}, tokens(1, 4))


def test_runs_of_equal_ids():
    runs, offsets = document_runs(jnp.array([[5, 5, 2, 2, 2, 5], [0, 1, 1, 0, 0, 0]]))
    assert runs.tolist() == [[0, 0, 1, 1, 1, 2], [0, 1, 1, 2, 2, 2]]
    assert offsets.tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 1, 0, 1, 2]]


def pieces(rng, T, G=2, B=2, K=3, S=11, H=8, quantized=False):
    """Queries, and keys and values of a cache and of the call, as `attend` takes them."""
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    q_BTKGH, keys, values = normal(B, T, K, G, H), *[[normal(B, K, S, H)] for _ in "kv"]
    if quantized:
        keys, values = ([quantize(piece) for piece in part] for part in (keys, values))
    return q_BTKGH, [*keys, normal(B, T, K, H)], [*values, normal(B, T, K, H)]


def seen_columns(rng, T, window, B=2, S=11):
    """Of a cache of S slots, 9 of them used, some of those padding; the tokens' last is padding."""
    column_BT = jnp.arange(9, 9 + T)[None]
    valid_BS = jnp.asarray(rng.random((B, S)) < 0.7).at[:, 9:].set(False)
    ones_BT = jnp.ones((1, T), bool)
    segment_BT = jnp.ones((B, T), jnp.int32).at[1, -1].set(0)
    return [
        SeenColumns(column_BT, jnp.arange(S)[None], ones_BT, valid_BS, window),
        SeenColumns(column_BT, column_BT, segment_BT, segment_BT, window),
    ]


def by_hand(q_BTKGH, keys, values, masks):
    """One softmax over all pieces put together, in float64: the mix, and the probabilities."""
    whole = lambda part: np.concatenate(  # noqa: E731
        [
            np.asarray(piece.values * piece.scale[..., None] if is_eight_bits(piece) else piece)
            for piece in (part[0], part[1].swapaxes(1, 2))
        ],
        axis=2,
    ).astype(np.float64)
    k_BKSH, v_BKSH = whole(keys), whole(values)
    arrays = [mask.array() if isinstance(mask, SeenColumns) else mask for mask in masks]
    seen = np.concatenate([np.asarray(mask) for mask in arrays], axis=-1)
    score = np.einsum("BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH) / q_BTKGH.shape[-1] ** 0.5
    score = np.where(seen, score, -np.inf) if seen.dtype == bool else score + seen
    probs = np.exp(score - score.max(axis=-1, keepdims=True))
    probs /= probs.sum(axis=-1, keepdims=True)
    return np.einsum("BKGTS,BKSH->BTKGH", probs, v_BKSH), probs


def is_eight_bits(piece):
    return isinstance(piece, Quantized)


def assert_as_by_hand(call, visible):
    out, probs = attention.attend(*call, visible)
    wanted, wanted_probs = by_hand(*call, visible.masks)
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    np.testing.assert_allclose(probs, wanted_probs, atol=1e-5)


@pytest.mark.parametrize(
    "T, window, quantized",
    [(13, None, False), (24, 4, True)],  # 13: the last piece begins in the one before
)
def test_many_queries_are_computed_in_pieces(monkeypatch, T, window, quantized):
    rng = np.random.default_rng(0)
    call = pieces(rng, T, quantized=quantized)
    visible = Visible(None, seen_columns(rng, T, window), window, "xla")
    assert_as_by_hand(call, visible)
    value = lambda q: jnp.square(attention.attend(q, *call[1:], visible)[0]).sum()  # noqa: E731
    whole = jax.grad(value)(call[0])
    monkeypatch.setattr(attention, "SCORE_BYTES", 0)
    assert_as_by_hand(call, visible)
    np.testing.assert_allclose(jax.grad(value)(call[0]), whole, atol=1e-5)
    # Of a mask [T, S], as of the scores, there are 8 rows at a time.
    out = lambda q: attention.attend(q, *call[1:], visible)[0]  # noqa: E731
    text = jax.jit(out).lower(call[0]).compile().as_text()
    assert re.search(r"\[(\d+,)*8,11\]", text)
    assert not re.search(rf"\[(\d+,)*{T},11\]", text)


def test_a_given_mask_is_cut_too(monkeypatch):
    rng, T = np.random.default_rng(0), 13
    call = pieces(rng, T)
    bias = jnp.asarray(rng.normal(size=(2, 3, 2, T, 11 + T)), jnp.float32)
    visible = Visible(None, [bias[..., :11], bias[..., 11:]], None, "xla")
    monkeypatch.setattr(attention, "SCORE_BYTES", 0)
    assert_as_by_hand(call, visible)


@pytest.mark.parametrize("G, T", [(1, 1), (4, 1), (3, 2), (1, 8)])
def test_on_a_tpu_few_queries_get_company(monkeypatch, G, T):
    """And it changes nothing."""
    rng = np.random.default_rng(0)
    call = pieces(rng, T, G, quantized=True)
    visible = Visible(None, seen_columns(rng, T, 4), 4, "xla")
    rows = []

    def on_a_tpu(*arguments, default, tpu=None, cuda=None, cpu=None):
        rows.extend([] if tpu is None else [tpu])
        return (tpu or default)(*arguments)

    monkeypatch.setattr(attention.lax, "platform_dependent", on_a_tpu)
    assert_as_by_hand(call, visible)
    assert len(rows) == (G * T < 8)
