"""What comes out of a call: states, logits, tuples, losses; against transformers, live."""

import jax.numpy as jnp
import numpy as np
import pytest
from reference import tokens

import phi3_jax as phi3
from phi3_jax.attention import Visible, attend

torch = pytest.importorskip("torch")
hf = pytest.importorskip("torch_reference")
pytestmark = pytest.mark.parity

LOWEST = np.finfo(np.float32).min


@pytest.mark.parametrize("case", ["gqa", "longrope_window"])
@pytest.mark.parametrize("width", [7, 18])
def test_hidden_states_and_attentions(case, width):
    """L + 1 states, the last one normed (trap 28); L times [B, N, T, T]."""
    reference, model, params = hf.case(case)
    ids, mask = tokens(2, width), np.ones((2, width), np.int32)
    mask[0, :3], mask[1, :1] = 0, 0
    asked = {"attention_mask": mask, "output_hidden_states": True, "output_attentions": True}
    expected = hf.run(reference, ids, **asked)
    out = hf.apply(model, params, ids, **asked)
    real = mask.astype(bool)
    assert len(out.hidden_states) == len(expected.hidden_states) == 4
    assert len(out.attentions) == len(expected.attentions) == 3
    for ours, theirs in zip(out.hidden_states, expected.hidden_states, strict=True):
        hf.assert_same(ours, theirs, real)
    for ours, theirs in zip(out.attentions, expected.attentions, strict=True):
        hf.assert_same(np.moveaxis(ours, 1, 2), theirs.transpose(1, 2), real)
    hf.assert_same(out.logits, expected.logits, real)


@pytest.mark.parametrize(
    "keep",
    [
        0,
        1,
        3,
        9,
        np.array([4, 1, 1]),
        np.array([-1]),
        np.array([[0, 5, 5], [6, 2, 1]]),
        np.random.default_rng(5).random((2, 7)) < 0.4,
    ],
    ids=str,
)
def test_logits_to_keep(keep):
    reference, model, params = hf.case("gqa")
    ids = tokens(2, 7)
    expected = hf.run(reference, ids, logits_to_keep=keep).logits
    out = model.apply({"params": params}, ids, logits_to_keep=keep)
    hf.assert_same(out.logits, expected)


CLASSES = [
    "Phi3Model",
    "Phi3ForCausalLM",
    *(f"Phi3For{x}Classification" for x in ("Sequence", "Token")),
]


@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.parametrize("loss", [False, True])
@pytest.mark.parametrize("more", [False, True])
def test_tuples(class_name, loss, more):
    """return_dict=False: the same things in the same order."""
    reference, model, params = hf.case("gqa", class_name)
    ids = tokens(2, 5)
    asked = {"return_dict": False, "output_hidden_states": more, "output_attentions": more}
    if loss and class_name != "Phi3Model":
        asked["labels"] = np.array([0, 1]) if "Sequence" in class_name else ids % 2
    expected = hf.run(reference, ids, **asked)
    out = hf.apply(model, params, ids, **asked)
    assert type(out) is tuple and len(out) == len(expected)
    for ours, theirs in zip(out, expected, strict=True):
        if isinstance(theirs, torch.Tensor):
            hf.assert_same(ours, theirs)
        else:
            assert len(ours) == len(theirs)
            for one, other in zip(ours, theirs, strict=True):
                hf.assert_same(one, other)


def test_tuples_hold_the_cache_third():
    reference, model, params = hf.case("gqa")
    ids = tokens(1, 5)
    theirs = hf.run(reference, ids, labels=ids, use_cache=True, return_dict=False)
    cache = phi3.KVCache.init(model.config, 1, 5, jnp.float32)
    ours = hf.apply(model, params, ids, labels=ids, cache=cache, return_dict=False)
    assert len(ours) == len(theirs) == 3
    assert int(ours[2].length) == theirs[2].get_seq_length() == 5


@pytest.mark.parametrize("case", ["gqa", "mqa_tied_window1"])
def test_losses(case):
    """Shifted, -100 left out, the padding's id counted, divided by what is asked (trap 29)."""
    reference, model, params = hf.case(case)
    ids = tokens(3, 8)
    labels = ids.copy()
    labels[0, 2:], labels[1, 5], labels[2, 3] = -100, -100, 0
    for count in (None, 1, 7, 40):
        asked = {"labels": labels, "num_items_in_batch": count}
        hf.assert_same(
            hf.apply(model, params, ids, **asked).loss, hf.run(reference, ids, **asked).loss
        )
    nothing = np.full_like(ids, -100)
    assert hf.run(reference, ids, labels=nothing).loss.isnan()
    assert hf.apply(model, params, ids, labels=nothing).loss == 0


def test_bfloat16_attention_probabilities():
    """Softmax is float32, cast before it meets the values, as torch has it (trap 26).

    Queries and keys of small integers, whose scores bfloat16 holds exactly: what is left is the
    softmax.
    """
    from transformers.models.phi3.modeling_phi3 import eager_attention_forward

    rng, (B, T, K, G, H) = np.random.default_rng(0), (2, 64, 2, 3, 16)
    q, k = rng.integers(-2, 3, (B, T, K, G, H)), rng.integers(-2, 3, (B, T, K, H))
    v = rng.normal(size=(B, T, K, H))
    seen = np.tri(T, dtype=bool)

    as_bf16 = lambda x: torch.from_numpy(x).to(torch.bfloat16)  # noqa: E731
    module = torch.nn.Module()
    module.num_key_value_groups = G
    expected, probs = eager_attention_forward(
        module.eval(),
        as_bf16(q).reshape(B, T, K * G, H).transpose(1, 2),
        as_bf16(k).transpose(1, 2),
        as_bf16(v).transpose(1, 2),
        torch.where(torch.from_numpy(seen), 0.0, LOWEST).to(torch.bfloat16),
        H**-0.5,
    )
    ours, our_probs = attend(
        *[jnp.asarray(q, jnp.bfloat16), [jnp.asarray(k, jnp.bfloat16)]],
        [jnp.asarray(v, jnp.bfloat16)],
        Visible(None, (jnp.asarray(seen)[None, None, None],), None, "xla"),
    )
    assert our_probs.dtype == ours.dtype == jnp.bfloat16
    our_probs = np.asarray(our_probs, np.float32).reshape(B, K * G, T, T)
    probs = probs.float().numpy()
    assert (our_probs == probs).mean() > 0.999
    np.testing.assert_allclose(our_probs, probs, rtol=2**-7)
    assert np.abs(our_probs.sum(axis=-1) - 1).max() < 2**-8
    np.testing.assert_allclose(
        np.asarray(ours, np.float32).reshape(B, T, K * G, H), expected.float().numpy(), atol=2**-6
    )
