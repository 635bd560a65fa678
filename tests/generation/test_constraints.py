"""Constraints: which tokens may come next, as bits."""

import numpy as np
import pytest

from phi3_jax.generation.constraints import All, PrefixAllowed, allowed_bits

SEQUENCES = [np.array(row, np.int32) for row in ([5, 6], [5, 7, 8], [9], [9, 1])]


def ids_of(bits_BW) -> list[list[int]]:
    unpacked = np.unpackbits(bits_BW.view(np.uint8), axis=1, bitorder="little")
    return [np.flatnonzero(row).tolist() for row in unpacked]


def test_a_function_sees_its_prompts_number_and_own_tokens():
    seen = []

    def function(batch_id, tokens):
        seen.append((batch_id, tokens.tolist()))
        return [int(tokens[-1]), 69, 0] if batch_id else np.array([31, 32])

    bits = PrefixAllowed(function, vocab_size=70, copies=2).allowed(SEQUENCES, step=1)
    assert bits.dtype == np.uint32 and bits.shape == (4, 3)
    assert ids_of(bits) == [[31, 32], [31, 32], [0, 9, 69], [0, 1, 69]]
    assert seen == [(0, [5, 6]), (0, [5, 7, 8]), (1, [9]), (1, [9, 1])]


@pytest.mark.parametrize(
    "answer, words",
    [
        ([], "allows no token for batch id 0 after 2 tokens"),
        ([3, 70], "allows 70, outside the vocabulary of 70"),
        ([-1], "allows -1"),
        ([1.5], "returned float64"),
        ([[1]], r"shape \(1, 1\)"),
    ],
)
def test_answers_that_are_none(answer, words):
    with pytest.raises(ValueError, match=words):
        PrefixAllowed(lambda batch_id, tokens: answer, vocab_size=70).allowed(SEQUENCES, 1)


class Fixed:
    def __init__(self, *ids):
        self.bits = np.stack([allowed_bits(row, 40) for row in ids]) if ids else None

    def allowed(self, sequences, step):
        return self.bits


def test_several_allow_what_all_of_them_allow():
    first, second = Fixed([1, 39, 2], [3]), Fixed([39, 2], [3, 4])
    assert ids_of(All([first, Fixed(), second]).allowed(SEQUENCES, 1)) == [[2, 39], [3]]
    assert All([Fixed(), Fixed()]).allowed(SEQUENCES, 1) is None
    with pytest.raises(ValueError, match="no token in common for row 1 after 6 new tokens"):
        All([first, Fixed([1], [2])]).allowed(SEQUENCES, 6)
    # A row that one constraint has given up already is no contradiction.
    assert ids_of(All([first, Fixed([1], [])]).allowed(SEQUENCES, 6)) == [[1], []]
