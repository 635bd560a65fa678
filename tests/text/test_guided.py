"""Grammars on random walks through the tokens they allow."""

import json
import os
import re
import sys

import numpy as np
import pytest
from small_tokenizers import KINDS, save_tokenizer

from phi3_jax.cli import EMBEDDED_MODEL
from phi3_jax.text.guided import Grammar
from phi3_jax.text.tokenizer import Tokenizer

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "tags": {"type": "array", "items": {"enum": ["a", "b\u00fc", "\u4f60"]}, "maxItems": 3},
        "count": {"type": "integer", "minimum": 5, "maximum": 120},
    },
    "required": ["name", "tags", "count"],
    "additionalProperties": False,
}
PROMPT = np.array([5, 6], np.int32)


@pytest.fixture(scope="module", params=[*KINDS, "demo", "phi-3"])
def tokenizer(request, tmp_path_factory):
    if request.param in KINDS:
        folder = save_tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param)
    elif request.param == "demo":
        folder = EMBEDDED_MODEL
    elif not (folder := os.environ.get("PHI3_TOKENIZER_DIR")):
        pytest.skip("PHI3_TOKENIZER_DIR names no folder with Phi-3's tokenizer files")
    return Tokenizer.from_pretrained(folder)


def constraint_of(grammar, tokenizer, beams=False):
    # Wider than the vocabulary, as Phi-3's embedding is; the last id is beyond that, too.
    ends = [tokenizer.eos_token_id, 10**6]
    return grammar.constraint(tokenizer, len(tokenizer) + 45, ends, beams)


def allowed(constraint, *rows) -> list[list[int]]:
    sequences = [np.concatenate([PROMPT, np.array(row, np.int32)]) for row in rows]
    bits = constraint.allowed(sequences, len(rows[0]))
    unpacked = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")
    return [np.flatnonzero(row).tolist() for row in unpacked]


def walk(constraint, tokenizer, rng) -> str:
    """The text of random allowed tokens, until the end token is one of them."""
    end, words, row = tokenizer.eos_token_id, tokenizer.token_bytes(len(tokenizer)), []
    while len(row) < 300:
        (ids,) = allowed(constraint, row)
        assert ids and all(id == end or words[id] for id in ids)
        assert not set(ids) & (tokenizer.special_ids - {end})
        if end in ids:
            return tokenizer.decode(row)
        row.append(rng.choice([id for id in ids if words[id].strip()] or ids))
    raise AssertionError(tokenizer.decode(row))


def test_any_walk_writes_json_of_the_schema(tokenizer):
    rng = np.random.default_rng(3)
    grammar = Grammar.from_json_schema(json.dumps(SCHEMA))
    for _ in range(4):
        value = json.loads(walk(constraint_of(grammar, tokenizer), tokenizer, rng))
        assert set(value) == {"name", "tags", "count"}
        assert isinstance(value["name"], str) and len(value["name"]) <= 6
        assert set(value["tags"]) <= {"a", "b\u00fc", "\u4f60"} and len(value["tags"]) <= 3
        assert isinstance(value["count"], int) and 5 <= value["count"] <= 120


def test_whitespace_comes_to_an_end(tokenizer):
    words, end = tokenizer.token_bytes(len(tokenizer)), tokenizer.eos_token_id
    for schema, comes in ((SCHEMA, True), ({**SCHEMA, "x-guidance": {}}, False)):
        constraint, row, ids = constraint_of(Grammar.from_json_schema(schema), tokenizer), [], []
        while end not in ids and len(row) < 150:
            (ids,) = allowed(constraint, row)
            blank = [id for id in ids if row and id != end and not words[id].strip()]
            row.append((blank or ids)[-1])
        assert (end in ids) == comes


def test_any_walk_writes_text_of_a_lark_grammar(tokenizer):
    grammar = Grammar.from_lark('start: sum\nsum: NUMBER ("+" sum)?\nNUMBER: /[0-9]{1,2}/')
    for seed in range(4):
        text = walk(constraint_of(grammar, tokenizer), tokenizer, np.random.default_rng(seed))
        assert re.fullmatch(r"[0-9]{1,2}(\+[0-9]{1,2})*", text)


def test_just_the_tokens_that_go_on_with_a_match_are_allowed(tokenizer):
    # stop, stopping and their like: a text can still be completed if one of these begins with it.
    texts = [prefix + word for prefix in ("", "The ") for word in ("stop", "stopping", "b\u00fc")]
    grammar = Grammar.from_regex("(The )?(stop(ping)?|b\u00fc)")
    words, constraint = tokenizer.token_bytes(len(tokenizer)), constraint_of(grammar, tokenizer)
    ways = {text.encode() for text in texts}
    if tokenizer.leading_spaces:
        ways |= {b" " + way for way in ways}
    beginnings = {way[:length] for way in ways for length in range(len(way) + 1)}
    rows = {b"": []}
    for before in (queue := [b""]):  # every way to begin a text, once
        row = rows[before]
        expected = {id for id, word in enumerate(words) if word and before + word in beginnings}
        expected -= tokenizer.special_ids
        for id in expected:
            if (now := before + words[id]) not in rows:
                rows[now] = [*row, id]
                queue.append(now)
        if before in ways:
            expected.add(tokenizer.eos_token_id)
        assert allowed(constraint, row) == [sorted(expected)]
    assert ways <= set(queue)


def test_rows_that_change_places_are_as_good_as_new(tokenizer):
    grammar = Grammar.from_json_schema({"type": "array", "items": SCHEMA})
    constraint = constraint_of(grammar, tokenizer)
    rng = np.random.default_rng(1)
    rows = [[], [], []]
    for _ in range(25):
        found = allowed(constraint, *rows)
        for row, ids in zip(rows, found, strict=True):
            assert allowed(constraint_of(grammar, tokenizer), row) == [ids]
        parents = rng.integers(0, 3, 3)  # as in a beam search
        rows = [[*rows[parent], rng.choice(found[parent])] for parent in parents]
        if any(tokenizer.eos_token_id in row for row in rows):
            break


def test_a_row_that_has_ended_hinders_nobody(tokenizer):
    constraint = constraint_of(Grammar.from_regex("1+"), tokenizer)
    one, end = tokenizer.encode("The1")[-1], tokenizer.eos_token_id
    (expected,) = allowed(constraint, [one, one, one])
    # What follows an end token is padding, or a beam's that is given up.
    assert allowed(constraint, [one, end, end], [one, one, one])[1] == expected
    assert allowed(constraint, [one, one, one], [end, 0, 7])[0] == expected


def test_beams_that_are_given_up_are_allowed_nothing(tokenizer):
    constraint = constraint_of(Grammar.from_regex("1+"), tokenizer, beams=True)
    (one, two), end = (tokenizer.encode(f"The{n}")[-1] for n in "12"), tokenizer.eos_token_id
    (expected,) = allowed(constraint, [one, one])
    rows = [one, two], [one, end], [one, one], [two, one]
    assert allowed(constraint, *rows) == [[], [], expected, []]
    assert allowed(constraint, *rows[::-1]) == [[], expected, [], []]


def test_a_token_that_is_not_allowed_is_refused(tokenizer):
    constraint = constraint_of(Grammar.from_regex("1+"), tokenizer)
    one, two = (tokenizer.encode(text)[-1] for text in ("The1", "The2"))
    assert one in allowed(constraint, [one])[0]
    with pytest.raises(ValueError, match=f"row 0: the grammar does not allow the token {two}"):
        allowed(constraint, [one, two])
    assert one in allowed(constraint, [one, one])[0]


def test_a_vocabulary_without_the_text():
    class Letters:
        special_ids, leading_spaces = frozenset({2}), 0

        def token_bytes(self, vocab_size):
            return (b"a", b"b", b"<end>", b"")

    constraint = Grammar.from_regex("abc").constraint(Letters(), 4, [2])
    assert allowed(constraint, [0]) == [[1]]
    with pytest.raises(ValueError, match="row 0: there is no token to go on with after 2 new"):
        allowed(constraint, [0, 1])
    assert allowed(constraint, [0]) == [[1]]
    constraint = Grammar.from_regex("abc|aba").constraint(Letters(), 4, [2], beams=True)
    assert allowed(constraint, [0, 1], [0, 0]) == [[0], []]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Grammar.from_json_schema({"type": "nope"}), "not valid: Invalid type: nope"),
        (lambda: Grammar.from_json_schema({"uniqueItems": True, "type": "array"}), "uniqueItems"),
        (lambda: Grammar.from_json_schema("{type: 1}"), "not JSON: .*line 1 column 2"),
        (lambda: Grammar.from_json_schema([1]), "is a list, must be an object"),
        (lambda: Grammar.from_json_schema(False), "not valid"),
        (lambda: Grammar.from_regex("(a"), "unclosed group"),
        (lambda: Grammar.from_regex(None), "regular expression is a NoneType, must be a string"),
        (lambda: Grammar.from_lark(b"start: x"), "Lark grammar is a bytes, must be a string"),
        (lambda: Grammar.from_lark("start: other"), "unknown name: .other"),
    ],
)
def test_grammars_that_are_none(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_grammar_needs_an_end(tokenizer):
    with pytest.raises(ValueError, match="needs an end token"):
        Grammar.from_regex("a").constraint(tokenizer, 300, [300])


def test_without_llguidance_its_name_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"pip install 'phi3-jax\[guided\]'"):
        Grammar.from_regex("a")
