"""The processors together: which are on, in what order and when; and what is drawn in the end.

tests/parity/test_processors_parity.py compares the whole chain with the reference's.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.generation.config import GenerationConfig
from phi3_jax.generation.settings import Past, Settings

# softmax gives exactly 1/2, 1/4, 1/4
LOGITS = jnp.log(jnp.array([[0.25, 0.5, 0.25]]))
ZEROS = jnp.zeros((1, 9))

run = jax.jit(lambda settings, past, logits: settings.process(past, logits))


draw = jax.jit(Settings.of(GenerationConfig(do_sample=True), 11).draw)


def kept(logits) -> list[int]:
    return np.flatnonzero(np.isfinite(np.asarray(logits)[0])).tolist()


def settings_of(vocab_size=3, prompt_width=1, max_new_tokens=None, **settings) -> Settings:
    config = GenerationConfig(**{"do_sample": True, "top_k": None} | settings)
    return Settings.of(config, vocab_size, prompt_width, max_new_tokens)


def after(steps: int) -> Past:
    return Past(jnp.int32(steps))


@pytest.mark.parametrize("p", [0.8, 0.6])
def test_top_p_at_the_mass_of_the_first_token(p):
    """As in the reference, whose 1 - p is a float64: one token is enough."""
    logits = jnp.log(jnp.array([[p, 1 - p]], jnp.float32))
    assert kept(run(settings_of(2, top_p=p), after(0), logits)) == [0]


@pytest.mark.parametrize(
    "cut", [{"top_k": 1}, {"top_p": 0.1}, {"min_p": 1.0}, {"epsilon_cutoff": 0.9}]
)
@pytest.mark.parametrize("eos, count", [([0, 1, 2], 4), ([0], 2), (None, 2)])
def test_beams_keep_one_token_that_is_no_end(cut, eos, count):
    logits = jnp.arange(7.0)[None]
    settings = settings_of(7, num_beams=3, eos_token_id=eos, **cut)
    assert kept(run(settings, after(0), logits)) == list(range(7 - count, 7))


def test_a_bad_word_that_is_an_end_is_left_out():
    settings = settings_of(9, bad_words_ids=[[3], [4], [4, 5], [7]], eos_token_id=[4, 8])
    past = Past.of(settings, np.array([[1, 4]], np.int32), np.ones((1, 2), bool), 5)
    assert kept(settings.process(past, jnp.zeros((1, 9)))) == [0, 1, 2, 4, 6, 8]


def test_exponential_decay_raises_the_ends():
    settings = settings_of(5, exponential_decay_length_penalty=(2, 1.5), eos_token_id=[1, 3, 4])
    logits = jnp.array([[1.0, 2.0, 3.0, -4.0, -jnp.inf]])
    for step, growth in ((1, 0), (2, 0), (3, 0.5), (5, 2.375)):
        expected = [1, 2 + 2 * growth, 3, -4 + 4 * growth, -np.inf]
        np.testing.assert_allclose(run(settings, after(step), logits)[0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "settings, steps",
    [
        ({"min_new_tokens": 3}, {0, 1, 2}),
        ({"min_length": 9}, {0, 1}),
        ({"min_new_tokens": 1, "min_length": 9}, {0}),
        ({"min_length": 7}, set()),
    ],
)
def test_no_end_before_the_least_length(settings, steps):
    """Of a prompt of seven columns."""
    settings = settings_of(9, 7, eos_token_id=[2, 5], **settings)
    removed = {n for n in range(5) if not {2, 5} & set(kept(run(settings, after(n), ZEROS)))}
    assert removed == steps
    assert all({0, 1, 3} <= set(kept(run(settings, after(n), ZEROS))) for n in range(5))


def test_forced_and_suppressed_tokens():
    settings = settings_of(
        9, 1, 4, forced_bos_token_id=2, forced_eos_token_id=[3, 4], suppress_tokens=[0, 99],
        begin_suppress_tokens=[1, 5],
    )  # fmt: skip
    rows = [kept(run(settings, after(step), ZEROS)) for step in range(4)]
    assert rows == [[2], [2, 3, 4, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8], [3, 4]]
    # A first token that is the last as well has to end the row.
    one = settings_of(9, 1, 1, forced_bos_token_id=2, forced_eos_token_id=3)
    assert kept(run(one, after(0), ZEROS)) == [3]
    # Behind a longer prompt nothing is forced first, and the text begins at once.
    longer = settings_of(9, 2, 4, forced_bos_token_id=2, begin_suppress_tokens=[1, 5])
    assert kept(longer.process(after(0), ZEROS)) == [0, 2, 3, 4, 6, 7, 8]


def wrong_shape(tokens, lengths, logits):
    return logits[:, :2]


def a_list(tokens, lengths, logits):
    return [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "processor, words",
    [
        (wrong_shape, r"wrong_shape returned shape \(1, 2\), must return .* of shape \(1, 3\)"),
        (a_list, r"a_list returned a list, must return logits of shape \(1, 3\)"),
        (lambda *_: None, "lambda.* returned a NoneType"),
    ],
)
def test_what_a_processor_returns(processor, words):
    settings = Settings.of(GenerationConfig(), 3, logits_processor=[processor])
    past = Past.of(settings, np.ones((1, 2), np.int32), np.ones((1, 2), bool), 4)
    with pytest.raises(ValueError, match=words):
        run(settings, past, LOGITS)


def test_processors_are_functions_and_scores_float32():
    with pytest.raises(ValueError, match="logits_processor holds 'x', must hold functions"):
        Settings.of(GenerationConfig(), 3, logits_processor=["x"])
    half = [lambda tokens, lengths, logits: logits.astype(jnp.bfloat16)]
    settings = Settings.of(GenerationConfig(), 3, logits_processor=half)
    past = Past.of(settings, np.ones((1, 2), np.int32), np.ones((1, 2), bool), 4)
    assert run(settings, past, LOGITS).dtype == jnp.float32


def test_renormalized_at_the_end():
    settings = settings_of(renormalize_logits=True, temperature=0.5)
    np.testing.assert_allclose(
        jnp.exp(settings.process(after(0), LOGITS)), [[1 / 6, 4 / 6, 1 / 6]], rtol=1e-6
    )


MANY = {
    "repetition_penalty": 1.3, "encoder_repetition_penalty": 0.8, "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 3, "bad_words_ids": [[3], [1, 2]],
    "sequence_bias": {(4,): 1.0, (2, 5): -1.0, (1, 2, 6): 2.0}, "eos_token_id": [0, 7],
    "min_new_tokens": 2, "min_p": 0.01,
}  # fmt: skip


def test_padding_changes_nothing():
    """What looks at tokens sees a padded row as it is alone, and as it grows."""
    settings = settings_of(9, **MANY)
    rows = [[1, 2, 5, 1, 2], [4, 4, 1]]
    ids = np.array([[8, 8, *rows[0]], [6, 1, 2, 8, *rows[1]]], np.int32)
    mask = np.array([[0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1]], bool)
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 2, (2, 9)), jnp.float32)

    def scores(ids, mask, logits):
        past, several = jax.tree.map(jnp.asarray, Past.of(settings, ids, mask, 12)), []
        for token in (4, 1, 2):
            several.append(run(settings, past, logits))
            past = past.append(jnp.full(len(ids), token))
        return np.stack(several, axis=1)

    together = scores(ids, mask, logits)
    for row, own in enumerate(rows):
        alone = np.array([own], np.int32)
        one = scores(alone, np.ones_like(alone, bool), logits[row : row + 1])
        np.testing.assert_array_equal(one[0], together[row])


def test_the_past_grows_and_is_taken():
    settings = settings_of(9, **MANY)
    ids, mask = np.array([[8, 1, 2], [3, 4, 5]], np.int32), np.array([[0, 1, 1], [1, 1, 1]], bool)
    past = jax.tree.map(jnp.asarray, Past.of(settings, ids, mask, 5))
    past = past.take(jnp.array([1, 1, 0])).append(jnp.array([6, 7, 0]))
    assert past.step == 1
    rows = [[3, 4, 5, 6, -1], [3, 4, 5, 7, -1], [1, 2, 0, -1, -1]]
    assert past.tokens_BS.tolist() == rows
    assert past.length_B.tolist() == [4, 4, 3] and past.prompt_B.tolist() == [3, 3, 2]
    held = [np.flatnonzero(row).tolist() for row in past.seen_BV]
    assert held == [[3, 4, 5, 6], [3, 4, 5, 7], [0, 1, 2]]
    prompt = [np.flatnonzero(row).tolist() for row in past.prompt_seen_BV]
    assert prompt == [[3, 4, 5], [3, 4, 5], [1, 2]]


def test_what_is_off_costs_nothing():
    config = GenerationConfig(eos_token_id=2)
    settings = Settings.of(config, 9, 4, 10)
    assert len(jax.tree.leaves(settings)) == 2
    past = Past.of(settings, np.ones((2, 4), np.int32), np.ones((2, 4), bool), 14)
    assert jax.tree.leaves(past) == [0]
    program = jax.make_jaxpr(settings.process)(past, jnp.zeros((2, 9)))
    assert not program.eqns


def test_other_values_compile_nothing():
    def call(**settings):
        compiled = settings_of(9, **MANY | settings)
        ids = np.arange(8, dtype=np.int32).reshape(2, 4)
        past = Past.of(compiled, ids, np.ones_like(ids, bool), 12)
        return run(compiled, past, jnp.zeros((2, 9)))

    call()
    programs = run._cache_size()
    call(
        repetition_penalty=2.0, no_repeat_ngram_size=4, encoder_no_repeat_ngram_size=1, min_p=0.5,
        bad_words_ids=[[1, 2, 3], [4], [5, 6], [7]], sequence_bias={(2, 4, 4, 6): 1.0},
        eos_token_id=3, min_new_tokens=7,
    )  # fmt: skip
    assert run._cache_size() == programs


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.8, "top_k": 5},
        {"top_p": 0.8, "min_p": 0.04, "sequence_bias": {(3,): 1.5}},
        {"typical_p": 0.7, "temperature": 1.3},
        {"top_h": 0.8, "eta_cutoff": 0.1, "suppress_tokens": [6]},
    ],
)
def test_draws_follow_the_distribution(settings):
    """20,000 of them against the softmax of the scores, by a chi-square test."""
    settings = settings_of(11, **settings)
    logits = jnp.broadcast_to(jnp.linspace(-1.5, 1.5, 11), (1000, 11))
    scores = run(settings, after(0), logits)
    drawn = np.concatenate([draw(scores, jax.random.key(seed)) for seed in range(20)])
    expected = len(drawn) * np.asarray(jax.nn.softmax(scores[0]))
    counts, possible = np.bincount(drawn, minlength=11), expected > 0
    assert 2 < possible.sum() < 11 and not counts[~possible].any()
    distance = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert jax.scipy.stats.chi2.sf(distance, possible.sum() - 1) > 1e-4


def test_a_rows_draws_do_not_depend_on_the_others():
    scores, key = jax.random.normal(jax.random.key(0), (1000, 11)), jax.random.key(3)
    together = draw(scores, key)
    assert draw(scores[:2], key).tolist() == together[:2].tolist()
    alike = np.asarray(draw(jnp.zeros((1000, 11)), key))
    assert set(alike.tolist()) == set(range(11)) and (alike[::2] != alike[1::2]).any()
