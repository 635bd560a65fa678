"""Stop strings against a plain search in the text of random tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.generation.stop_strings import StopStrings

# Tokens over two letters and two bytes of one character, so that strings often end inside one.
VOCABULARY = (b"", b"a", b"b", b"ab", b"ba", b"aab", b"\xc3", b"\xbc", b"b\xc3", b"bbab", b"", b"c")


def stopping_steps(strings, prompt, new) -> list[bool]:
    """For each new token whether a string ends inside it, by searching the whole text."""
    text = b"".join(VOCABULARY[id] for id in prompt)
    found = []
    for id in new:
        before, text = len(text), text + VOCABULARY[id]
        found.append(
            any(
                text.startswith(string.encode(), start) and start + len(string.encode()) > before
                for string in strings
                for start in range(len(text) - len(string.encode()) + 1)
            )
        )
    return found


@pytest.mark.parametrize(
    "strings",
    [["ab"], ["a"], ["abab", "ba"], ["b\u00fc", "aaba", "aab"], ["bbabb", "abba", "c"], ["d"]],
    ids=",".join,
)
def test_a_row_stops_where_a_search_finds_a_string(strings):
    rng = np.random.default_rng(len(strings[0]))
    prompts = [rng.integers(0, 12, length) for length in (9, 1, 4, 6, 2)]
    new = rng.integers(0, 12, (5, 300)).astype(np.int32)
    ids, mask = np.full((5, 9), 1, np.int32), np.zeros((5, 9), bool)  # padding is text, too
    for row, prompt in enumerate(prompts):
        ids[row, 9 - len(prompt) :], mask[row, 9 - len(prompt) :] = prompt, True
    table = StopStrings.of(strings, VOCABULARY)
    advance = jax.jit(StopStrings.advance)
    state_B, stopped = jnp.asarray(table.start(ids, mask)), []
    for token_B in new.T:
        state_B, stopped_B = advance(table, state_B, token_B)
        stopped.append(np.asarray(stopped_B))
    expected = [stopping_steps(strings, *row) for row in zip(prompts, new, strict=True)]
    np.testing.assert_array_equal(np.stack(stopped, axis=1), expected)
    assert np.any(expected) == (strings != ["d"])


def test_a_match_goes_on_from_a_long_prompt():
    # More tokens than the table has states, some of them without text at the end.
    table = StopStrings.of("aab" + "ba" * 20, VOCABULARY)
    prompt = np.array([[4] * 200 + [5] + [4] * 19 + [0] * 90], np.int32)
    state_B = table.start(prompt, np.ones(prompt.shape, bool))
    for token, expected in ((2, False), (0, False), (1, True)):
        state_B, stopped_B = table.advance(state_B, np.array([token]))
        assert stopped_B.tolist() == [expected]


def test_padding_is_no_text():
    table, ids = StopStrings.of("aab", VOCABULARY), np.ones((2, 2), np.int32)
    state_B = table.start(ids, np.array([[False, True], [True, True]]))
    assert table.advance(state_B, np.array([2, 2]))[1].tolist() == [False, True]


def test_other_strings_of_much_the_same_length_compile_nothing():
    traced = []

    @jax.jit
    def step(table, state_B, token_B):
        traced.append(1)
        return table.advance(state_B, token_B)

    for strings in ("ab", ["abba", "bab"], ["c" * 60]):
        step(StopStrings.of(strings, VOCABULARY), np.zeros(2, np.int32), np.ones(2, np.int32))
    assert len(traced) == 1
    assert StopStrings.of("ab", VOCABULARY).next_QV is StopStrings.of(["ab"], VOCABULARY).next_QV


@pytest.mark.parametrize("strings", [[], "", ["a", ""], [3], ["a" * 2000, "b" * 2096]], ids=str)
def test_what_cannot_stop_is_refused(strings):
    with pytest.raises(ValueError, match="stop_strings"):
        StopStrings.of(strings, VOCABULARY)
