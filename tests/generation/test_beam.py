"""Beam search against a plain one over the forward pass without a cache; its drivers; its draws."""

import functools
import itertools
from collections import Counter

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from reference import config_values, hf_weights, left_padded, on_mesh, params_of, prompts

import phi3_jax as phi3
from phi3_jax.cache import KVCache
from phi3_jax.generation import beam
from phi3_jax.generation.config import GenerationConfig
from phi3_jax.generation.decoding import Plan, StepOutputs, Wanted
from phi3_jax.generation.outputs import compute_transition_scores
from phi3_jax.generation.settings import Past, Settings
from phi3_jax.sharding import replicate
from plan.hlo import read

# How many programs were compiled.
COMPILED: Counter[str] = Counter()
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **facts: (
        COMPILED.update([facts.get("fun_name", "?")]) if "backend_compile" in event else None
    )
)

PAD, WIDTH = 1, 32
# Two rows cross the line of 16 at different steps, one is beyond it and one stays below.
LENGTHS = (12, 15, 18, 3)
# All stay below.
SHORT = (7, 3, 6, 2)
SEARCH = dict(
    num_beams=3, max_new_tokens=9, pad_token_id=PAD, eos_token_id=[5, 9, 14], num_return_sequences=3
)
# Drives the search from Python; shared, so that one set of programs serves all that do.
STEPPED = dict(
    output_scores=True,
    output_logits=True,
    renormalize_logits=True,
    prefix_allowed_tokens_fn=lambda item, ids: range(23),
)


@functools.cache
def model_and_params():
    values = config_values("longrope") | {"vocab_size": 23, "num_hidden_layers": 1}
    config = phi3.Phi3Config(**values)
    return phi3.Phi3ForCausalLM(config), params_of(config, hf_weights(config, "beams"))


def rows(lengths=LENGTHS) -> list[np.ndarray]:
    return [row % 23 for row in prompts(lengths)]


def generate(lengths=LENGTHS, **settings):
    return phi3.generate(*model_and_params(), *left_padded(rows(lengths)), **{**SEARCH, **settings})


@functools.cache
def forward():
    """Log-probabilities of the next token of rows of any length, each computed alone."""
    model, params = model_and_params()

    @jax.jit
    def run(ids, mask):
        out = model.apply({"params": params}, ids, attention_mask=mask)
        return jax.nn.log_softmax(out.logits, axis=-1)

    def log_probs(sequences: list[list[int]]) -> np.ndarray:
        ids, mask = np.zeros((2, SEARCH["num_beams"], WIDTH), np.int32)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
        ends = [len(sequence) - 1 for sequence in sequences]
        return np.asarray(run(ids, mask))[range(len(ends)), ends]

    return log_probs


def plain_search(log_probs, prompt, penalty=1.0, early=False, stops=None, **changes) -> list:
    """Beam search of one row in lists: (score, new tokens), best first."""
    asked = {**SEARCH, **changes}
    beams, most, ends = asked["num_beams"], asked["max_new_tokens"], asked["eos_token_id"]
    stops = stops or (lambda tokens: tokens[-1] in ends)
    running, finished = [(0.0, [])], []
    for length in range(1, most + 1):
        table = log_probs([[*prompt, *tokens] for _, tokens in running])
        every = [
            (score + new, [*tokens, token])
            for (score, tokens), row in zip(running, table, strict=True)
            for token, new in enumerate(row)
            if new > -np.inf
        ]
        found = sorted(every, key=lambda one: -one[0])[: (1 + len(ends)) * beams]
        stopped = [length == most or stops(tokens) for _, tokens in found]
        new = zip(found[:beams], stopped, strict=False)
        finished += [(score / length**penalty, tokens) for (score, tokens), stop in new if stop]
        finished = sorted(finished, key=lambda one: -one[0])[:beams]
        running = [one for one, stop in zip(found, stopped, strict=True) if not stop][:beams]
        if not running or early is True and len(finished) == beams:
            break
        horizon = most if early == "never" and penalty > 0 else length
        if len(finished) == beams and running[0][0] / horizon**penalty <= finished[-1][0]:
            break
    return finished


def assert_finds(result, expected: list[list], width: int) -> None:
    """The hypotheses of each prompt, and nothing in the places where there are none."""
    returned = len(result.sequences) // len(expected)
    for index, (row, score) in enumerate(
        zip(result.sequences[:, width:], result.sequences_scores, strict=True)
    ):
        item, place = divmod(index, returned)
        found = expected[item]
        wanted, tokens = found[place] if place < len(found) else (-np.inf, [])
        np.testing.assert_allclose(score, wanted, rtol=1e-3)
        assert row.tolist() == [*tokens, *[PAD] * (len(row) - len(tokens))]
        assert (result.beam_indices[index] >= 0).sum() == len(tokens)


def test_equals_a_plain_search_without_a_cache():
    """Also for rows that cross the longrope line, each at its own step; and what varies between
    these searches compiles nothing.
    """
    ended, compiled, scores = set(), None, {}
    for penalty, early in itertools.product((-0.5, 1.0, 2.0), (False, True, "never")):
        found = generate(early_stopping=early, length_penalty=penalty)
        expected = [plain_search(forward(), row, penalty, early) for row in rows()]
        assert_finds(found, expected, max(LENGTHS))
        ended |= {len(tokens) for item in expected for _, tokens in item}
        scores[penalty, early] = found.sequences_scores.sum()
        compiled = compiled or COMPILED.copy()
    assert len(ended) > 3 and len({scores[1.0, early] for early in (False, True, "never")}) == 3
    generate((10, 16, 17, 5), max_new_tokens=7, eos_token_id=[3, 4, 6], pad_token_id=2)
    assert compiled == COMPILED and compiled["jit(beam_loop)"]


@pytest.mark.parametrize("ends, candidates", [(None, 6), (2, 6), ([2, 5, 7], 12), ([2] * 30, 69)])
def test_enough_candidates_to_go_on_with(ends, candidates):
    config = GenerationConfig(num_beams=3, eos_token_id=ends)
    assert beam.Search.of(config, 23, 8).candidates == candidates


@pytest.mark.parametrize(
    "early, penalty, best, worst, goes_on",
    [
        # After 2 tokens of at most 8
        (False, 1.0, -6.0, -4.0, True),
        (False, 1.0, -8.0, -4.0, False),
        (False, 1.0, -6.0, -np.inf, True),
        (False, -1.0, -6.0, -13.0, True),
        (True, 1.0, -6.0, -4.0, False),
        (True, 1.0, -6.0, -np.inf, True),
        ("never", 1.0, -31.0, -4.0, True),
        ("never", 1.0, -33.0, -4.0, False),
        ("never", -1.0, -6.0, -13.0, True),
        ("never", -1.0, -6.0, -12.0, False),
        ("never", 0.0, -6.0, -7.0, True),
        ("never", 1.0, -np.inf, -np.inf, False),
    ],
)
def test_when_an_item_ends(early, penalty, best, worst, goes_on):
    config = GenerationConfig(num_beams=2, early_stopping=early, length_penalty=penalty)
    search = beam.Search.of(config, 23, 8)
    assert beam._can_get_better(search, best, worst, 2.0) == goes_on


def test_scores_of_every_step_lead_to_those_of_the_sequences():
    """Driven from Python, the search is the compiled one."""
    looped, stepped = generate(), generate(**STEPPED)
    np.testing.assert_array_equal(stepped.sequences, looped.sequences)
    np.testing.assert_array_equal(stepped.beam_indices, looped.beam_indices)
    np.testing.assert_allclose(stepped.sequences_scores, looped.sequences_scores, rtol=1e-5)
    for scores, logits in zip(stepped.scores, stepped.logits, strict=True):
        np.testing.assert_allclose(scores, jax.nn.log_softmax(logits), rtol=1e-5, atol=1e-5)
    chosen = compute_transition_scores(stepped.sequences, stepped.scores, stepped.beam_indices)
    length = (stepped.beam_indices >= 0).sum(axis=1)
    np.testing.assert_allclose(chosen.sum(axis=1) / length, stepped.sequences_scores, rtol=1e-4)


def test_criteria_of_the_caller_stop_candidates():
    ends = {2, 7, *SEARCH["eos_token_id"]}
    criterion = lambda sequences, scores: np.isin(sequences[:, -1], [2, 7])  # noqa: E731
    found = generate(**STEPPED, stopping_criteria=[criterion])
    expected = [
        plain_search(forward(), row, stops=lambda tokens: tokens[-1] in ends) for row in rows()
    ]
    assert_finds(found, expected, max(LENGTHS))


def test_no_step_is_made_after_the_last_item_has_ended():
    found = generate(**STEPPED, early_stopping=True, length_penalty=-4.0, eos_token_id=[3, 4, 6])
    longest = (found.beam_indices >= 0).sum(axis=1).max()
    assert len(found.scores) == longest < SEARCH["max_new_tokens"]


def test_time_that_is_up_ends_the_beams():
    found = generate(**STEPPED, max_time=1e-9)
    expected = [plain_search(forward(), row, max_new_tokens=2) for row in rows()]
    assert_finds(found, expected, max(LENGTHS))


def test_fewer_continuations_than_beams():
    """Places that nothing is found for stay empty, with the score -inf."""
    ways = {0: [7], 1: [8, 11], 2: [5]}
    allowed = lambda item, ids: ways.get(len(ids) - LENGTHS[item], [5])  # noqa: E731
    found = generate(**STEPPED | {"prefix_allowed_tokens_fn": allowed})

    def log_probs(sequences, row):
        allowed = ways[len(sequences[0]) - len(row)]
        chances = np.exp(forward()(sequences)) * np.isin(range(23), allowed)
        with np.errstate(divide="ignore"):
            return np.log(chances / chances.sum(axis=1, keepdims=True))

    expected = [plain_search(functools.partial(log_probs, row=row), row) for row in rows()]
    assert [len(item) for item in expected] == [2] * len(LENGTHS)
    assert_finds(found, expected, max(LENGTHS))


class Letters:
    """A tokenizer whose every token is a letter."""

    def token_bytes(self, vocab_size: int) -> list[bytes]:
        return [bytes([97 + token]) for token in range(vocab_size)]


def test_all_that_a_beam_takes_along_on_a_mesh():
    """Two caches, seen ids, the end of its text; drawn, at a temperature that leaves no choice."""
    scale, penalty, temperature = 1.5, 1.3, 1e-5
    model, params = model_and_params()
    _, sharded = on_mesh(model, params, phi3.make_mesh(2, 1, 1, devices=jax.devices()[:2]))
    settings = SEARCH | dict(
        guidance_scale=scale, repetition_penalty=penalty, do_sample=True, temperature=temperature,
        tokenizer=Letters(),
    )  # fmt: skip
    prompt = left_padded(rows(SHORT))
    free = phi3.generate(model, sharded, *prompt, **settings, stop_strings=["zzz"])
    pair = free.sequences[3, max(SHORT) + 1 :][:2].tolist()
    stop = bytes(97 + token for token in pair).decode()
    found = phi3.generate(model, sharded, *prompt, **settings, stop_strings=[stop])

    def log_probs(sequences, row):
        full, part = forward()(sequences), forward()([ids[len(row) - 1 :] for ids in sequences])
        guided = scale * (full - part) + part
        for ids, scores in zip(sequences, guided, strict=True):
            seen = np.unique(ids)
            scores[seen] *= np.where(scores[seen] < 0, penalty, 1 / penalty)
        return guided / temperature

    def stops(tokens, row):
        return tokens[-1] in SEARCH["eos_token_id"] or [row[-1], *tokens][-2:] == pair

    expected = [
        plain_search(
            functools.partial(log_probs, row=row), row, stops=functools.partial(stops, row=row)
        )
        for row in rows(SHORT)
    ]
    assert_finds(found, expected, max(SHORT))
    assert any(tokens[-2:] == pair for item in expected for _, tokens in item)


def test_the_cache_of_a_beam_stays_on_its_device():
    model, _ = model_and_params()
    mesh = phi3.make_mesh(2, 1, 1, devices=jax.devices()[:2])
    cache = KVCache.init(model.config, 12, 16, jnp.float32, mesh)
    parent_IM = replicate(np.zeros((4, 3), np.int32), mesh)
    moved = jax.jit(beam._take_within).lower(cache, parent_IM).compile()
    assert read(moved.as_text()).collectives == []


def test_candidates_are_drawn_without_replacement():
    """20,000 times four of two beams' three tokens, by a chi-square test; what the others hold does
    not matter.
    """
    items, beams, vocab = 20_000, 2, 3
    config = GenerationConfig(do_sample=True, num_beams=beams, top_k=0)
    search, settings = beam.Search.of(config, vocab, 9), Settings.of(config, vocab)

    @jax.jit
    def draw(key, step, logits_BV, before_IM):
        running = beam.Hypotheses(
            tokens_IXS=jnp.zeros((items, beams, 2), jnp.int32),
            source_IXS=jnp.zeros((items, beams, 2), jnp.int32),
            score_IX=before_IM,
        )
        state = beam.BeamState(
            running=running, past=Past(step=step), key=key,
            **dict.fromkeys(("cache", "position_R", "long_R", "finished", "open_I", "stop_B")),
        )  # fmt: skip
        plan = Plan(settings, None)
        found, _ = beam._candidates(state, logits_BV, plan, search, None, Wanted(), StepOutputs())
        drawn = found.hypotheses
        beam_IC = drawn.source_IXS[:, :, step] - beams * jnp.arange(items)[:, None]
        return vocab * beam_IC + drawn.tokens_IXS[:, :, step], drawn.score_IX

    logits = np.array([[0.0, 1.0, -1.0], [0.5, 0.0, 2.0]], np.float32)
    before = np.log(np.array([0.7, 0.3], np.float32))
    logits_BV, before_IM = np.tile(logits, (items, 1)), np.tile(before, (items, 1))
    key = jax.random.key(5)
    drawn, score_IC = map(np.asarray, draw(key, 0, logits_BV, before_IM))
    total = np.asarray(jax.nn.log_softmax(logits) + before[:, None]).reshape(-1)
    np.testing.assert_allclose(score_IC, total[drawn], rtol=1e-5)
    assert (draw(key, 1, logits_BV, before_IM)[0] != drawn).any()
    logits_BV[8:], before_IM[4:] = -logits_BV[8:], -before_IM[4:]
    others, _ = draw(key, 0, logits_BV, before_IM)
    np.testing.assert_array_equal(others[:4], drawn[:4])
    # A beam without a hypothesis has none for a child, whatever its scores are.
    logits_BV[1::2], before_IM[:, 1] = np.nan, -np.inf
    others, _ = draw(key, 0, logits_BV, before_IM)
    assert (others[:, :vocab] < vocab).all()

    chances, expected = np.exp(total) / np.exp(total).sum(), {}
    for order in itertools.permutations(range(beams * vocab), search.candidates):
        left = 1 - np.cumsum([0, *chances[list(order[:-1])]])
        expected[order] = items * np.prod(chances[list(order)] / left)
    assert sum(expected.values()) == pytest.approx(items)
    counts = Counter(map(tuple, drawn.tolist()))
    often = [order for order, number in expected.items() if number >= 5]
    numbers = np.array([expected[order] for order in often])
    seen = np.array([counts[order] for order in often])
    # 99.99 % of the normal distribution that chi-square comes to with many degrees of freedom
    limit = len(often) + 3.72 * np.sqrt(2 * len(often))
    assert ((seen - numbers) ** 2 / numbers).sum() < limit
