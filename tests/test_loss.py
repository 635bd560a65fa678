"""Losses in chunks, over padded vocabularies, and over several batches."""

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax import head_loss
from phi3_jax.loss import causal_lm_loss, cross_entropy

B, T, D, V = 3, 11, 8, 29


def batch(dtype=jnp.float32, words=V):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    table = jnp.asarray(rng.normal(size=(words, D)), jnp.float32)
    labels = rng.integers(0, V, (B, T))
    labels[0, 4:] = -100
    labels[2, :7] = -100
    return hidden, table, jnp.asarray(labels)


def plain_loss(hidden, table, labels, per=None):
    """Mean over all labels but the first of each row, written as the definition says it."""
    logits = jnp.einsum("BTD,VD->BTV", hidden, table.astype(hidden.dtype)).astype(jnp.float32)
    log_probs = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    targets = labels[:, 1:]
    picked = jnp.take_along_axis(log_probs, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    counted = targets != -100
    return -jnp.where(counted, picked, 0).sum() / (counted.sum() if per is None else per)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("chunk", [None, 1, 3, 4, 11, 100])
def test_chunks_give_the_plain_loss(chunk, dtype):
    """Value within 1e-6 relative; gradients within 1e-6 of their largest in float32."""
    hidden, table, labels = batch(dtype)
    chunked = lambda h, w: causal_lm_loss(h, w, labels, V, chunk=chunk)  # noqa: E731
    got, gradients = jax.value_and_grad(chunked, (0, 1))(hidden, table)
    expected, wanted = jax.value_and_grad(plain_loss, (0, 1))(hidden, table, labels)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    tolerance = 1e-6 if dtype == jnp.float32 else 2**-8  # of one bfloat16 product
    for a, b in zip(gradients, wanted, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def largest_array(jaxpr) -> int:
    """Elements of the largest array in a program, inner programs included."""
    sizes = [var.aval.size for eqn in jaxpr.eqns for var in eqn.outvars]
    programs = (jax.extend.core.jaxprs_in_params(eqn.params) for eqn in jaxpr.eqns)
    return max([0, *sizes, *(largest_array(inner) for some in programs for inner in some)])


def test_the_logits_of_all_tokens_never_exist():
    hidden, table, labels = batch()
    step = jax.grad(lambda h, w, chunk: causal_lm_loss(h, w, labels, V, chunk=chunk), (0, 1))
    sizes = {
        c: largest_array(jax.make_jaxpr(step, static_argnums=2)(hidden, table, c).jaxpr)
        for c in (11, 2)
    }
    assert sizes[11] >= B * T * V > 3 * sizes[2], sizes


@pytest.mark.parametrize(
    "rows, words, columns",
    [(1, 200_064, 128), (8, 200_064, 20), (2, 100_032, 128), (10**6, 200_064, 1)],
)
def test_chunks_fit_the_limit(rows, words, columns):
    """128 MiB of float32 logits: 167 columns of 200,064 words, in whole registers 128."""
    assert head_loss._fitting(rows, words) == columns


@pytest.mark.parametrize("chunk", [None, 4])
def test_padded_words_are_not_in_the_sum(chunk):
    """Trap 36: the padding's logits are 0, not nothing."""
    hidden, table, labels = batch(words=V + 3)
    got = causal_lm_loss(hidden, table, labels, V, chunk=chunk)
    np.testing.assert_allclose(got, plain_loss(hidden, table[:V], labels), rtol=1e-6)
    unknown = labels.at[1, 5].set(V)
    assert np.isnan(causal_lm_loss(hidden, table, unknown, V, chunk=chunk))


def test_accumulated_batches_equal_a_large_one():
    """Sums over num_items_in_batch; the mean of means would weigh rows unequally (trap 29)."""
    hidden, table, labels = batch()
    whole = causal_lm_loss(hidden, table, labels, V)
    items = int((labels[:, 1:] != -100).sum())
    row = lambda i: (hidden[i : i + 1], table, labels[i : i + 1], V)  # noqa: E731
    parts = [causal_lm_loss(*row(i), num_items_in_batch=items) for i in range(B)]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-6)
    means = np.mean([causal_lm_loss(*row(i)) for i in range(B)])
    assert abs(means - whole) > 1e-3


def test_neither_the_first_token_of_a_document_nor_padding_is_a_label():
    hidden, table, labels = batch()
    documents = jnp.asarray(np.repeat([[1, 2, 3, 0]], [4, 2, 3, 2], axis=1).repeat(B, axis=0))
    got = causal_lm_loss(hidden, table, labels, V, document_BT=documents)
    cut = labels.at[:, jnp.array([4, 6, 9, 10])].set(-100)
    np.testing.assert_allclose(got, plain_loss(hidden, table, cut), rtol=1e-6)


def test_no_label_is_zero_and_moves_nothing():
    """Trap 30: NaN in the reference, which a step would spread to all parameters."""
    hidden, table, labels = batch()
    nothing = jnp.full_like(labels, -100)
    for items in (None, 0):
        value = lambda w: causal_lm_loss(hidden, w, nothing, V, num_items_in_batch=items)  # noqa: B023, E731
        got, gradient = jax.value_and_grad(value)(table)
        assert got == 0 and not gradient.any()


def test_cross_entropy_counts():
    logits = jnp.asarray([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0], [5.0, 5.0, 5.0]])
    total, count = cross_entropy(logits, jnp.array([0, -100, 2]))
    assert count == 2
    expected = np.log(np.exp([2, 0, -1]).sum()) - 2 + np.log(3)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert np.isnan(cross_entropy(logits, jnp.array([0, -1, 2]))[0])
