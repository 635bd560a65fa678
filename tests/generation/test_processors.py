"""The rules of the cuts on distributions that are exact in float32."""

import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.generation.config import GenerationConfig
from phi3_jax.generation.processors import Settings, min_p, top_k

# softmax gives exactly 1/2, 1/4, 1/4
LOGITS = jnp.log(jnp.array([[0.25, 0.5, 0.25]]))


def kept(logits) -> list[int]:
    return np.flatnonzero(np.isfinite(np.asarray(logits)[0])).tolist()


def settings_of(**settings) -> Settings:
    return Settings.of(GenerationConfig(do_sample=True, top_k=None, **settings), vocab_size=3)


@pytest.mark.parametrize("p, count", [(0.0, 1), (0.25, 1), (0.5, 1), (0.51, 2), (0.76, 3)])
def test_top_p_keeps_the_smallest_set_of_at_least_that_mass(p, count):
    survivors = kept(settings_of(top_p=p).process(LOGITS))
    assert len(survivors) == count and 1 in survivors


@pytest.mark.parametrize("p", [0.8, 0.6])
def test_top_p_at_the_mass_of_the_first_token(p):
    """As in the reference, whose 1 - p is a float64: one token is enough."""
    logits = jnp.log(jnp.array([[p, 1 - p]], jnp.float32))
    assert kept(settings_of(top_p=p).process(logits)) == [0]


@pytest.mark.parametrize("k, survivors", [(1, [1]), (2, [0, 1, 2]), (9, [0, 1, 2])])
def test_top_k_keeps_ties_with_the_last(k, survivors):
    assert kept(top_k(LOGITS, k)) == survivors


@pytest.mark.parametrize("p, survivors", [(0.5, [0, 1, 2]), (0.51, [1]), (1.0, [1])])
def test_min_p_is_relative_to_the_most_likely(p, survivors):
    assert kept(min_p(LOGITS, p)) == survivors
