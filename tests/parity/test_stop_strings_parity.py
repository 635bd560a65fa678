"""Where a row stops, against transformers' StopStringCriteria."""

import numpy as np
import pytest
from small_tokenizers import KINDS, TEXTS, save_tokenizer

from phi3_jax.generation.stop_strings import StopStrings
from phi3_jax.text.tokenizer import Tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

STRINGS = [
    ["stop"],
    [" of", "\nr"],
    ["\u00e9", "\u4f60\u597d", "f("],
    ["e", "x\n", "pping; \u017c"],
    ["<|end|>", "ab\u00fc"],
    ["aa", "\u00fc\u00fc", "  "],
]


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    folder = save_tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param)
    return Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)


def stops(both, strings, rows, prompt) -> tuple[list, list]:
    """Per row and new token whether it stops there: ours and theirs."""
    ours, theirs = both
    table = StopStrings.of(strings, ours.token_bytes(len(ours)))
    criteria = transformers.StopStringCriteria(theirs, strings)
    state_B = table.start(rows[:, :prompt], np.ones((len(rows), prompt), bool))
    mine, reference = [], []
    for column in range(prompt, rows.shape[1]):
        state_B, stopped_B = table.advance(state_B, rows[:, column])
        mine.append(np.asarray(stopped_B).tolist())
        reference.append(criteria(torch.tensor(rows[:, : column + 1]), None).tolist())
    return mine, reference


@pytest.mark.parametrize("strings", STRINGS, ids=repr)
def test_rows_stop_where_theirs_do(both, strings):
    ours, rng = both[0], np.random.default_rng(0)
    for text in TEXTS:
        ids = ours.encode(f"stop{text}<|end|>")
        mine, theirs = stops(both, strings, np.asarray([ids]), 1)
        assert mine == theirs
    # Random tokens, and such as pieces of the strings are made of.
    few = [id for string in strings for id in ours.encode(string)]
    for ids in (np.arange(len(ours)), few):
        mine, theirs = stops(both, strings, rng.choice(ids, (6, 60)), 7)
        assert mine == theirs
        assert np.any(mine) or len(ids) > 20


def test_padding_is_no_text_though_the_reference_takes_it_for_some(both):
    ours = both[0]
    rows = np.asarray([[ours.pad_token_id, *ours.encode("stop")]])
    string = "|>" + " " * ours.leading_spaces + "stop"
    table = StopStrings.of(string, ours.token_bytes(len(ours)))
    state_B = table.start(rows[:, :1], np.zeros((1, 1), bool))
    for token_B in rows[:, 1:].T:
        state_B, stopped_B = table.advance(state_B, token_B)
        assert not stopped_B.any()
    criteria = transformers.StopStringCriteria(both[1], string)
    assert criteria(torch.tensor(rows), None).tolist() == [True]
