"""The rules of the processors on short rows.

tests/parity/test_processors_parity.py compares them with the reference.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.generation import processors


def kept(logits) -> list[int]:
    return np.flatnonzero(np.isfinite(np.asarray(logits)[0])).tolist()


@pytest.mark.parametrize(
    "n, banned",
    [(1, [[1, 2, 3], [4, 5]]), (2, [[3], []]), (3, [[3], []]), (4, [[], []]), (9, [[], []])],
)
def test_no_ngram_comes_twice(n, banned):
    """1 2 3 1 2: after 1 2 came 3, after 2 too; what stands behind a row's end is none of it."""
    tokens = jnp.array([[1, 2, 3, 1, 2, 7, 7, 7], [5, 4, 0, 5, 4, 0, 5, 4]])
    logits = processors.no_repeat_ngram(
        jnp.zeros((2, 9)), tokens, jnp.array([5, 2]), jnp.array([5, 2]), n
    )
    assert [np.flatnonzero(np.isinf(row)).tolist() for row in np.asarray(logits)] == banned


def test_ngrams_of_the_prompt_alone():
    """1 2 0 | 1 3 1: after 1 the prompt goes on with 2."""
    tokens, length, prompt = jnp.array([[1, 2, 0, 1, 3, 1, -1]]), jnp.array([6]), jnp.array([3])
    logits = processors.no_repeat_ngram(jnp.zeros((1, 5)), tokens, length, prompt, 2)
    assert np.flatnonzero(np.isinf(np.asarray(logits)[0])).tolist() == [2]


def test_sequence_bias_adds_up_where_the_prefix_stands():
    pairs = [((2,), 1.0), ((5, 2), 0.5), ((3, 5, 2), 0.25), ((4, 5, 2), 8.0), ((5, 0), 2.0)]
    pairs += [((5, 5, 2), 16.0), ((5, 3, 5, 2), 32.0)]  # longer than the rows that end so
    bias = processors.SequenceBias.of(pairs, 6)
    tokens = jnp.array([[3, 5], [5, -1], [5, 3]])
    added = np.asarray(bias.add(jnp.zeros((3, 6)), tokens, jnp.array([2, 1, 2])))
    assert added[:, 2].tolist() == [1.75, 1.5, 1.0]
    assert added[:, 0].tolist() == [2.0, 2.0, 0.0]


def test_allowed_tokens_are_bits():
    bits = np.array([[1 << 31, 1 << 7], [1, 0]], np.uint32)
    logits = processors.only_allowed(jnp.ones((2, 40)), jnp.asarray(bits))
    assert [np.flatnonzero(np.asarray(row) == 1).tolist() for row in logits] == [[31, 39], [0]]


def test_what_is_allowed_wins_over_what_is_removed():
    """For an item none of whose beams has a token left."""
    allowed = jnp.full((4, 1), 0b110, jnp.uint32)
    logits = jnp.zeros((4, 4)).at[:3, 1:3].set(-jnp.inf)
    out = np.asarray(processors.only_allowed(logits, allowed, num_beams=2))
    assert [kept(row[None]) for row in out] == [[1, 2], [1, 2], [], [1, 2]]


def test_invalid_values():
    out = processors.remove_invalid_values(jnp.array([[jnp.nan, jnp.inf, -jnp.inf, 2.0]]))
    most = np.finfo(np.float32).max
    assert out.tolist() == [[0, most, -most, 2]]
