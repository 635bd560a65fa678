"""The model computes the same with every attention implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import config_values, hf_weights, on_mesh, params_of, tokens

import phi3_jax as phi3
from phi3_jax import attention
from phi3_jax import model as model_module
from phi3_jax.attention import document_runs
from phi3_jax.sharding import make_mesh

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
