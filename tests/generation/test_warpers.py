"""The cuts on distributions that are exact in float32, and at their limits.

tests/parity/test_processors_parity.py compares them with the reference.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.generation import warpers

# softmax gives exactly 1/2, 1/4, 1/4
LOGITS = jnp.log(jnp.array([[0.25, 0.5, 0.25]]))
# The others are nearer to the expected surprise than the first.
UNTYPICAL = jnp.log(jnp.array([[0.4, 0.15, 0.15, 0.15, 0.15]]))


def kept(logits) -> list[int]:
    return np.flatnonzero(np.isfinite(np.asarray(logits)[0])).tolist()


@pytest.mark.parametrize("p, count", [(0.0, 1), (0.25, 1), (0.5, 1), (0.51, 2), (0.76, 3)])
def test_top_p_keeps_the_smallest_set_of_at_least_that_mass(p, count):
    survivors = kept(warpers.top_p(LOGITS, 1.0 - p))
    assert len(survivors) == count and 1 in survivors


@pytest.mark.parametrize("k, survivors", [(1, [1]), (2, [0, 1, 2]), (9, [0, 1, 2])])
def test_top_k_keeps_ties_with_the_last(k, survivors):
    assert kept(warpers.top_k(LOGITS, k)) == survivors


@pytest.mark.parametrize("p, survivors", [(0.5, [0, 1, 2]), (0.51, [1]), (1.0, [1])])
def test_min_p_is_relative_to_the_most_likely(p, survivors):
    assert kept(warpers.min_p(LOGITS, p)) == survivors


@pytest.mark.parametrize("share, count", [(0.01, 1), (0.34, 1), (0.6, 1), (0.7, 2), (0.99, 2)])
def test_top_h_keeps_a_share_of_the_entropy(share, count):
    """A third of it each; the most likely always stays."""
    survivors = kept(warpers.top_h(LOGITS, share))
    assert len(survivors) == count and 1 in survivors


def test_top_h_looks_at_a_hundred_tokens():
    logits = jnp.zeros((1, 130))
    assert len(kept(warpers.top_h(logits, 0.9951))) == 99


@pytest.mark.parametrize("mass, survivors", [(0.5, [1, 2, 3, 4]), (0.7, [0, 1, 2, 3, 4])])
def test_typical_may_remove_the_most_likely(mass, survivors):
    assert kept(warpers.typical(UNTYPICAL, mass)) == survivors


@pytest.mark.parametrize("cutoff, survivors", [(0.25, [0, 1, 2]), (0.26, [1]), (0.9, [1])])
def test_epsilon_is_a_probability(cutoff, survivors):
    assert kept(warpers.epsilon(LOGITS, cutoff)) == survivors


def test_eta_is_lower_where_much_is_possible():
    assert kept(warpers.epsilon(UNTYPICAL, 0.2)) == [0]
    assert kept(warpers.eta(UNTYPICAL, 0.2)) == [0, 1, 2, 3, 4]
    assert kept(warpers.eta(UNTYPICAL, 0.5)) == [0]
