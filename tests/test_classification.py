"""Heads that classify: which token speaks for a row, losses, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import config_values, hf_weights, on_mesh, params_of, tokens

import phi3_jax as phi3
from phi3_jax.classification import sequence_classification_loss
from phi3_jax.sharding import init_params, make_mesh

SEQUENCE, TOKEN = phi3.Phi3ForSequenceClassification, phi3.Phi3ForTokenClassification


@functools.cache
def model_and_params(model_class, labels=3, **changes):
    config = phi3.Phi3Config(**{**config_values("gqa"), "num_labels": labels, **changes})
    model = model_class(config)
    decoder = params_of(config, hf_weights(config, "gqa"))["model"]
    return model, {**init_params(model, seed=1), "model": decoder}


# One program is compiled much faster than each operation alone.
@functools.partial(jax.jit, static_argnames=("model", "deterministic"))
def run(model, params, ids, seed=0, **inputs):
    rngs = {"dropout": jax.random.key(seed)}
    return model.apply({"params": params}, ids, rngs=rngs, **inputs)


def test_the_last_token_that_is_no_padding_speaks_for_the_row():
    """By its id, whatever the mask says; ends that equal the padding are skipped; a row of nothing
    but padding is read at its first column (trap 39).
    """
    model, params = model_and_params(SEQUENCE)
    ids = np.array([
        [5, 7, 9, 0, 0],
        [0, 0, 6, 0, 8],
        [4, 0, 3, 0, 0],
        [0, 0, 0, 0, 0],
        [9, 9, 9, 9, 9],
        [3, 8, 0, 0, 0],
    ])  # fmt: skip
    columns = [2, 4, 2, 0, 4, 1]
    decoder = phi3.Phi3Model(model.config)
    hidden = run(decoder, params["model"], ids).last_hidden_state
    expected = hidden[np.arange(6), columns] @ params["score"]["weight"].T
    got = run(model, params, ids).logits
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    mask = np.ones_like(ids)
    mask[:, 2:] = 0
    masked = run(model, params, ids[4:5], attention_mask=mask[4:5]).logits
    last = run(decoder, params["model"], ids[4:5], attention_mask=mask[4:5])
    wanted = last.last_hidden_state[:, 4] @ params["score"]["weight"].T
    np.testing.assert_allclose(masked, wanted, rtol=1e-5, atol=1e-5)


def test_rows_without_a_padding_id_are_refused_but_for_one():
    model, params = model_and_params(SEQUENCE, pad_token_id=None)
    with pytest.raises(ValueError, match="2 rows cannot be classified without a pad_token_id"):
        model.apply({"params": params}, tokens(2, 4))
    ids = tokens(1, 4)
    one = run(model, params, ids).logits
    hidden = run(phi3.Phi3Model(model.config), params["model"], ids).last_hidden_state
    np.testing.assert_allclose(one, hidden[:, -1] @ params["score"]["weight"].T, atol=1e-5)


def test_embeddings_are_read_at_their_last_token_with_a_warning():
    model, params = model_and_params(SEQUENCE)
    ids = tokens(2, 4)
    embeds = params["model"]["embed_tokens"]["weight"][ids]
    with pytest.warns(UserWarning, match="padding cannot be seen in inputs_embeds"):
        got = model.apply({"params": params}, inputs_embeds=embeds).logits
    np.testing.assert_allclose(got, run(model, params, ids).logits, atol=1e-5)


def test_losses_of_rows():
    logits = jnp.asarray([[0.5, -1.0, 2.0], [1.5, 0.25, -0.5]])
    log_probs = jax.nn.log_softmax(logits)
    single = -(log_probs[0, 2] + log_probs[1, 0]) / 2
    classes, floats = jnp.array([2, 0]), jnp.array([[1.0, 0.0, 1.0], [0.0, 0.5, 1.0]])
    chance = 1 / (1 + jnp.exp(-logits))
    several = -jnp.mean(floats * jnp.log(chance) + (1 - floats) * jnp.log(1 - chance))
    for labels, kind, expected in [
        (classes, None, single),
        (classes[:, None], "single_label_classification", single),
        (floats, None, several),
        (floats.astype(jnp.bfloat16), "multi_label_classification", several),
        (floats, "regression", jnp.mean((logits - floats) ** 2)),
        (jnp.array([-100, 0]), None, -log_probs[1, 0]),
        (jnp.array([-100, -100]), None, 0.0),
    ]:
        got = sequence_classification_loss(logits, labels, kind)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    one = sequence_classification_loss(logits[:, :1], jnp.array([1, 2]), None)
    np.testing.assert_allclose(one, np.mean((np.array([0.5, 1.5]) - [1, 2]) ** 2))


@pytest.mark.parametrize(
    "labels, kind, expected",
    [
        (jnp.zeros((3,), int), None, r"\(2,\)"),
        (jnp.zeros((2,)), None, r"\(2, 3\)"),
        (jnp.zeros((3, 2)), "regression", r"\(2, 3\)"),
        (jnp.zeros((2,), int), "multi_label_classification", r"\(2, 3\)"),
    ],
)
def test_labels_of_another_shape_are_refused(labels, kind, expected):
    with pytest.raises(ValueError, match=f"labels have shape .* expected {expected} for"):
        sequence_classification_loss(jnp.zeros((2, 3)), labels, kind)


def test_token_labels_count_but_for_minus_100():
    """No shift, and padding counts where it has a label (trap 40)."""
    model, params = model_and_params(TOKEN)
    ids, labels = tokens(2, 5), np.array([[0, 2, -100, 1, 1], [-100, -100, -100, -100, 2]])
    out = model.apply({"params": params}, ids, labels=labels)
    log_probs = jax.nn.log_softmax(out.logits)
    picked = [log_probs[r, c, labels[r, c]] for r, c in zip(*np.nonzero(labels >= 0), strict=True)]
    np.testing.assert_allclose(out.loss, -np.mean(picked), rtol=1e-6)
    assert model.apply({"params": params}, ids, labels=np.full((2, 5), -100)).loss == 0
    with pytest.raises(ValueError, match=r"labels have shape \(2, 4\), expected \(2, 5\)"):
        model.apply({"params": params}, ids, labels=labels[:, 1:])


def test_the_token_head_has_a_bias_and_dropout():
    model, params = model_and_params(TOKEN)
    ids = tokens(2, 5)
    plain = run(model, params, ids).logits
    shifted = {**params, "score": {**params["score"], "bias": jnp.arange(3.0)}}
    moved = run(model, shifted, ids).logits
    np.testing.assert_allclose(moved - plain, np.broadcast_to(np.arange(3), (2, 5, 3)), atol=1e-5)
    assert not params["score"]["bias"].any()
    dropped = lambda model, seed: run(model, params, ids, seed, deterministic=False).logits  # noqa: E731
    assert (dropped(model, 0) != plain).any()
    assert (dropped(model, 0) != dropped(model, 1)).any()
    for none in ({"classifier_dropout": 0.0}, {"hidden_dropout": 0.0}):
        np.testing.assert_array_equal(dropped(model_and_params(TOKEN, **none)[0], 0), plain)
    _, without = model_and_params(TOKEN, token_classification_bias=False)
    assert "bias" not in without["score"]


@pytest.mark.parametrize("model_class", [SEQUENCE, TOKEN])
def test_heads_on_a_mesh(model_class):
    model, params = model_and_params(model_class)
    ids = tokens(2, 6)
    labels = np.array([0, 2]) if model_class is SEQUENCE else ids % 3
    value = lambda model: jax.value_and_grad(  # noqa: E731
        lambda params: model.apply({"params": params}, ids, labels=labels).loss
    )
    loss, gradients = jax.jit(value(model))(params)
    laid_out, sharded = on_mesh(model, params, make_mesh(1, 4, 2))
    meshed, others = jax.jit(value(laid_out))(sharded)
    np.testing.assert_allclose(meshed, loss, rtol=1e-5)
    for name in params["score"]:
        np.testing.assert_allclose(
            others["score"][name], gradients["score"][name], rtol=1e-4, atol=1e-5
        )


def test_outputs_as_tuples():
    sequence, params = model_and_params(SEQUENCE)
    ids = tokens(2, 4)
    out = sequence.apply({"params": params}, ids, labels=[1, 0], return_dict=False)
    assert [x.shape for x in out] == [(), (2, 3)]
    token, params = model_and_params(TOKEN)
    out = token.apply({"params": params}, ids, output_hidden_states=True, return_dict=False)
    assert out[0].shape == (2, 4, 3) and len(out) == 2 and len(out[1]) == 4
