"""Token healing on a vocabulary small enough to try all continuations."""

import itertools

import numpy as np
import pytest

from phi3_jax.generation.token_healing import heal

VOCABULARY = (
    *(b"", b"<pad>", b"h", b"t", b"ht", b"http", b"://", b":"),
    *(b"http://", b"/", b" ", b"p", b"<end>", b"h", b" x", b"\xff", b"\xff\xff", b"<"),
)
SPECIAL = {1, 12}
PAD, TEXTLESS = 1, 0


class SmallTokenizer:
    special_ids = frozenset(SPECIAL)
    pad_token_id = PAD

    def token_bytes(self, vocab_size):
        return (VOCABULARY + (b"",) * vocab_size)[:vocab_size]


def healed(*rows):
    width = max(map(len, rows))
    ids = np.full((len(rows), width), PAD, np.int32)
    mask = np.zeros(ids.shape, bool)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :], mask[index, width - len(row) :] = row, True
    ids, mask, constraint = heal(SmallTokenizer(), ids, mask, len(VOCABULARY) + 20)
    assert ids.dtype == np.int32 and mask.dtype == bool and (ids[~mask] == PAD).all()
    return [row[own].tolist() for row, own in zip(ids, mask, strict=True)], constraint


def allowed(constraint, *sequences, step):
    bits = constraint.allowed([np.array(row, np.int32) for row in sequences], step)
    if bits is None:
        return None
    unpacked = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")
    return [set(np.flatnonzero(row)) for row in unpacked]


@pytest.mark.parametrize(
    "row, kept",
    [
        ([9, 5], 1),  # "http" is the beginning of "http://"
        ([9, 5, 7], 1),  # so is "http:"
        ([9, 4, 3, 11, 7, 9], 1),  # and "http:/" in other tokens
        ([9, 5, 6], 3),  # "http://" is a token, but none goes on after it
        ([9, 9, 10], 2),  # " " is the beginning of " x"
        ([9, 14], 2),  # none goes on after " x"
        ([5], 1),  # never a row's first token
        ([5, 7], 1),
        ([5, 12], 2),  # never a special token
        ([9, 12, 5], 2),
        ([9, 5, 0], 3),  # nor an id without text
        ([9, 15], 1),
        ([9, 16], 2),
        ([9, 17], 2),  # only special tokens go on after "<"
    ],
)
def test_what_a_longer_token_goes_on_after_is_taken_back(row, kept):
    assert healed(row)[0] == [row[:kept]]


def test_new_tokens_begin_with_the_text_that_was_taken_back():
    rows = [9, 5, 7], [2, 9, 10]
    (first, second), constraint = healed(*rows)
    text = b"http:"
    reached = set()
    ids = [id for id in range(len(VOCABULARY)) if id not in SPECIAL | {TEXTLESS}]
    for count in range(1, 5):
        for new in itertools.product(ids, repeat=count):
            before = b"".join(VOCABULARY[id] for id in new[:-1])
            if not text.startswith(before) or before == text:
                continue
            bits = allowed(constraint, [*first, *new[:-1]], [*second, *new[:-1]], step=count - 1)
            now = before + VOCABULARY[new[-1]]
            assert (new[-1] in bits[0]) == (now.startswith(text) or text.startswith(now))
            assert not bits[0] & (SPECIAL | {TEXTLESS, 20})
            if now.startswith(text):
                reached.add(new)
    assert reached >= {(8,), (5, 7), (5, 6), (4, 3, 11, 6), (4, 3, 11, 7)}


def test_each_row_has_its_own_text_and_beams_that_of_their_row():
    rows, constraint = healed([9, 5], [9, 9, 14], [2, 9, 10])
    assert rows == [[9], [9, 9, 14], [2, 9]]
    bits = allowed(constraint, *rows, step=0)
    assert bits[0] == {2, 4, 5, 8, 13} and len(bits[1]) >= 37 and bits[2] == {10, 14}
    beams = [[9, 4], [9, 5], [9, 9, 14, 1], [9, 9, 14, 2], [2, 9, 14], [2, 9, 10]]
    bits = allowed(constraint, *beams, step=1)
    assert bits[0] == {3} and all(len(row) >= 37 for row in bits[1:])
    assert allowed(constraint, *beams[1:4:2], beams[4], step=1) is None


def test_nothing_to_heal_costs_nothing():
    rows, constraint = healed([9, 14], [9, 5, 6])
    assert rows == [[9, 14], [9, 5, 6]]
    assert allowed(constraint, *rows, step=0) is None
