"""Guessed tokens change nothing: greedy ones are those of plain decoding, draws follow it."""

import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from no_cache import VOCAB, next_logits, small_model, small_prompts
from reference import left_padded

import phi3_jax as phi3
from phi3_jax.generation.prepare import prepare
from phi3_jax.generation.settings import Past
from phi3_jax.generation.speculative import _look_up, assisted_loop

# One row stays below the line of 16, two cross it at different steps, one is beyond it.
LENGTHS = (8, 12, 16, 17)
ROWS = small_prompts(LENGTHS)
# No multiple of what a round can give.
NEW = 7
# As many columns for all, with the room for guesses, so that they share their programs.
COLUMNS, BEFORE_GUESSES = 48, 37
CASE = "longrope_window"


def near():
    """A model that chooses much as the tested one does."""
    model, params = small_model(CASE)
    rng = np.random.default_rng(0)
    return model, jax.tree.map(
        lambda x: x + 0.03 * rng.normal(size=x.shape).astype(np.float32), params
    )


def of_another_line():
    """Rows cross it two tokens later."""
    return small_model("longrope", num_hidden_layers=1, original_max_position_embeddings=18)


DRAFTS = {"same": lambda: small_model(CASE), "near": near, "another line": of_another_line}


def generate(**settings):
    settings = {"max_new_tokens": NEW, "eos_token_id": None, "max_cache_len": COLUMNS, **settings}
    return phi3.generate(*small_model(CASE), *left_padded(ROWS), **settings)


@functools.cache
def plain():
    return generate(output_scores=True, output_logits=True)


def guessed(width: int, draft: str | None) -> dict:
    if draft is None:
        return dict(prompt_lookup_num_tokens=width, max_cache_len=BEFORE_GUESSES)
    return dict(
        assistant=DRAFTS[draft](),
        num_assistant_tokens=width,
        assistant_confidence_threshold=None,
        max_cache_len=BEFORE_GUESSES,
    )


WAYS = [(1, None), (3, None), (7, None), (7, "near"), (1, "another line")]


@pytest.mark.parametrize("width, draft", WAYS)
def test_greedy_tokens_are_those_of_plain_decoding(width, draft):
    """Of a batch whose rows cross the lines of both models at their own steps."""
    result = generate(**guessed(width, draft))
    np.testing.assert_array_equal(result.sequences, plain().sequences)
    assert int(result.cache.length) == max(LENGTHS) + NEW - 1


@pytest.mark.parametrize("width, draft", [(3, None), (3, "same")])
def test_with_all_that_changes_scores_and_ends_rows(width, draft):
    """Guidance by other prompts, a penalty, and rows that end inside a round."""
    letters = types.SimpleNamespace(
        token_bytes=lambda size: [bytes([65 + token]) for token in range(size)]
    )

    def run(ends, stop, **way):
        return generate(
            guidance_scale=1.1,
            negative_prompt_ids=small_prompts((9,)),
            repetition_penalty=1.2,
            eos_token_id=ends,
            stop_strings=bytes(65 + stop).decode(),
            pad_token_id=1,
            tokenizer=letters,
            **way,
        ).sequences

    never = np.array([VOCAB, VOCAB])
    new = run([VOCAB], never)[:, max(LENGTHS) :]
    assert new.shape == (len(ROWS), NEW)
    # Two rows end, in two ways; two others, one of them with the last token; all of them.
    for ends, stop in (
        (new[:1, 2], new[3, 1:3]),
        (new[1:2, 3], new[2, 4:6]),
        (new[[0, 1, 2, 3], [2, 1, 0, 1]], never),
    ):
        expected = run(ends, stop)
        tails = expected[:, max(LENGTHS) :]
        assert (tails == 1).any() and (stop is not never or tails.shape[1] < NEW)
        np.testing.assert_array_equal(run(ends, stop, **guessed(width, draft)), expected)


@pytest.mark.parametrize("draft", [None, "near"])
def test_outputs_are_those_of_every_token(draft):
    result = generate(output_scores=True, output_logits=True, **guessed(3, draft))
    for name in ("scores", "logits"):
        found, wanted = (np.stack(getattr(x, name)) for x in (result, plain()))
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)


def rounds(draft: str, width: int, **settings) -> list[tuple[int, int]]:
    """How many guesses each round could make, and the tokens it gave."""
    settings = dict(max_new_tokens=20, eos_token_id=None, num_assistant_tokens=3) | settings
    prompt = small_prompts((width,))
    request = prepare(*small_model(CASE), prompt, assistant=DRAFTS[draft](), **settings)
    request.start()
    found = []
    while request.goes_on:
        before, guesses = request.seen.step, int(request.assisted.guesses)
        request.step()
        found.append((guesses, request.seen.step - before))
    return found


def test_rounds():
    """A model agrees with its own guesses: up to the line, behind it, and up to the end."""
    found = rounds("same", 14, assistant_confidence_threshold=0)
    assert found == [(3, 2), *[(3, 4)] * 4, (3, 1)]
    # No token is certain, so that a draft ends with its first.
    assert rounds("same", 14, assistant_confidence_threshold=1) == [(3, 2)] * 9 + [(3, 1)]


def test_fewer_guesses_after_a_failure():
    heuristic = dict(num_assistant_tokens_schedule="heuristic", assistant_confidence_threshold=0)
    found = rounds("near", 18, **heuristic)
    for (guesses, new), (after, _) in itertools.pairwise(found):
        assert after == (min(guesses + 2, 3) if new == guesses + 1 else max(guesses - 1, 1))
    assert {guesses for guesses, _ in found} == {1, 2, 3}


def reference_rule(tokens: list[int], guesses: int, max_ngram: int) -> list[int]:
    """PromptLookupCandidateGenerator: what follows the first match of the longest n-gram."""
    length = len(tokens)
    for n in range(min(max_ngram, length - 1), 0, -1):
        for start in range(n, length):
            if tokens[start - n : start] == tokens[length - n :]:
                return tokens[start : start + guesses]
    return []


def test_looked_up_guesses_are_those_of_the_reference():
    guesses, rows, columns = 4, 5, 19
    drafter = types.SimpleNamespace(width=guesses)
    rng = np.random.default_rng(0)

    @jax.jit
    def look_up(tokens_BS, length_B, done_B, max_ngram, most):
        state = types.SimpleNamespace(
            history=Past(jnp.int32(0), tokens_BS, length_B),
            decode=types.SimpleNamespace(done_B=done_B),
        )
        drafter.max_ngram = max_ngram
        return _look_up(state, drafter, most)

    lengths = []
    for _ in range(60):
        length_B, max_ngram = rng.integers(1, columns + 1, rows), int(rng.integers(1, 5))
        tokens_BS = rng.integers(0, 6, (rows, columns)).astype(np.int32)
        tokens_BS = np.where(np.arange(columns) < length_B[:, None], tokens_BS, -1)
        done_B = rng.random(rows) < 0.3
        guess_BG, count = look_up(tokens_BS, length_B, done_B, max_ngram, np.int32(3))
        expected = [
            [] if done else reference_rule(tokens[:length].tolist(), 3, max_ngram)
            for tokens, length, done in zip(tokens_BS, length_B, done_B, strict=True)
        ]
        assert count == max(map(len, expected))
        assert (np.asarray(guess_BG) >= 0).all()
        for found, wanted in zip(np.asarray(guess_BG), expected, strict=True):
            assert found[: len(wanted)].tolist() == wanted
        lengths += map(len, expected)
    assert set(lengths) == {0, 1, 2, 3}


# -- draws

SIZE, DRAWS = 6, 20_000
TINY = dict(
    vocab_size=SIZE, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1,
)  # fmt: skip
SAMPLE = dict(do_sample=True, temperature=1.6, top_k=5, eos_token_id=None, max_new_tokens=4)
PROMPT = [3, 1, 4, 1, 5, 3, 1]
DRAWN = {
    "lookup": dict(prompt_lookup_num_tokens=3),
    "draft": dict(num_assistant_tokens=3, assistant_confidence_threshold=0.25),
}


def tiny(name: str) -> tuple:
    model, params = small_model("gqa", name, **TINY)
    return model, jax.tree.map(lambda x: 2 * x, params)


def with_draft(way: str) -> dict:
    return {**SAMPLE, **DRAWN[way], **({"assistant": tiny("draft")} if way == "draft" else {})}


def chances(prompt: list[int]) -> np.ndarray:
    """Of all continuations by three tokens, from a forward without a cache: [V, V, V]."""
    total = np.ones((1, 1))
    for count in range(3):
        held = [[*prompt, *more] for more in itertools.product(range(SIZE), repeat=count)]
        logits = next_logits(*tiny("drawn"), held) / SAMPLE["temperature"]
        logits[logits < np.sort(logits)[:, -SAMPLE["top_k"], None]] = -np.inf
        total = total.reshape(-1, 1) * np.asarray(jax.nn.softmax(logits))
    return total.reshape((SIZE,) * 3)


def assert_drawn(tokens: np.ndarray, expected: np.ndarray) -> None:
    """A chi-square test of continuations [draws, 3]."""
    counts = np.zeros_like(expected)
    np.add.at(counts, tuple(tokens.T), 1)
    expected = len(tokens) * expected
    assert not counts[expected == 0].any()
    often = expected >= 5
    expected, counts = (np.append(x[often], x[~often].sum()) for x in (expected, counts))
    # 99.99 % of the normal distribution that chi-square comes to with many degrees of freedom
    limit = len(expected) + 3.72 * np.sqrt(2 * len(expected))
    assert ((counts - expected) ** 2 / expected).sum() < limit


@pytest.mark.parametrize("way", DRAWN)
def test_draws_of_a_batch(way):
    """Rows of a batch end their rounds together, with the first that departs from its guesses."""
    ids = np.tile(PROMPT, (DRAWS, 1)).astype(np.int32)
    result = phi3.generate(*tiny("drawn"), ids, **with_draft(way))
    assert_drawn(result.sequences[:, len(PROMPT) :][:, :3], chances(PROMPT))


@pytest.mark.parametrize("way", DRAWN)
def test_draws_of_one_row(way):
    """A row alone, with 20,000 keys: rounds are as long as its guesses hold."""
    request = prepare(*tiny("drawn"), [PROMPT], **with_draft(way))
    request.start()
    model, params, plan = request.model, request.params, request.plan
    # The drafter says nothing of its values to jit, which sees it as part of this function.
    drafter, state, limit = request.drafter, request.assisted, np.int32(4)

    @jax.jit
    @jax.vmap
    def draw(key):
        decode = dataclasses.replace(state.decode, key=key)
        begun = dataclasses.replace(state, decode=decode)
        return assisted_loop(model, params, begun, plan, drafter, limit, limit).decode.new_BS[0]

    tokens = np.asarray(draw(jax.random.split(jax.random.key(1), DRAWS)))
    first = int(request.seen.new_BS[0, 0])
    assert (tokens[:, 0] == first).all()
    assert_drawn(tokens[:, 1:4], chances([*PROMPT, first]))


def test_a_draft_model_has_the_models_vocabulary():
    model, params = small_model(CASE)
    with pytest.raises(
        ValueError, match="the assistant has a vocabulary of 6 and the model one of"
    ):
        phi3.generate(model, params, [[3]], assistant=tiny("draft"))
