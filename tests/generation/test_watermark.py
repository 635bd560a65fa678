"""Green lists as torch's shuffle gives them, and watermarks that are found again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.generation.config import GenerationConfig, WatermarkingConfig
from phi3_jax.generation.settings import Past, Settings
from phi3_jax.generation.watermark import (
    SelfHash,
    Watermark,
    WatermarkDetector,
    green_list,
    shuffled,
)


@pytest.mark.parametrize(
    "seed, shuffle",
    [
        (0, [4, 1, 7, 5, 3, 9, 0, 8, 6, 2]),
        (15485863, [10, 11, 1, 3, 5, 7, 4, 6, 2, 0, 9, 8]),
        (2**40 + 3, [5, 3, 4, 6, 0, 2, 1]),
    ],
)
def test_shuffles_are_torchs(seed, shuffle):
    """torch.randperm with a CPU generator, recorded from torch 2.13."""
    assert shuffled(seed, len(shuffle), len(shuffle)) == shuffle
    assert shuffled(seed, len(shuffle), 4) == shuffle[:4]


def test_shuffles_longer_than_the_generators_state():
    assert shuffled(5, 2000, 2000)[-8:] == [167, 1565, 148, 1751, 1089, 487, 738, 152]


@pytest.mark.parametrize("size", [0, 1, 340, 700, 1361])
def test_green_lists_are_the_start_of_the_shuffle(size):
    """Of a vocabulary that needs three blocks of random words."""
    seeds = np.array([0, 1, 123456789, 2**31, 2**32 - 1], np.uint32)
    green = np.asarray(GREEN(seeds, size))
    for seed, row in zip(seeds.tolist(), green, strict=True):
        assert set(np.flatnonzero(row).tolist()) == set(shuffled(seed, 1361, size))


GREEN = jax.jit(lambda seeds, size: green_list(seeds, size, 1361))


@pytest.mark.parametrize("key, both", [(3, False), (15485863, True), (2**62 + 12345, True)])
def test_self_hashes_overflow_as_int64(key, both):
    config = WatermarkingConfig(seeding_scheme="selfhash", context_width=3, hashing_key=key)
    seeding = Watermark.of(config, 50).seeding
    assert isinstance(seeding, SelfHash)
    tokens, length = np.array([[9, 40, 3, 7, -1]]), np.array([4])
    candidates = np.arange(50)[None]
    seeds = np.asarray(seeding.seeds(jnp.asarray(tokens), jnp.asarray(length), candidates))[0]
    table = shuffled(key, 1000003, 50)
    signs = set()
    for candidate, seed in enumerate(seeds.tolist()):
        numbers = [table[token] + 1 for token in (3, 7, candidate)]
        products = [(key * a * numbers[-1] + 2**63) % 2**64 - 2**63 for a in numbers]
        signs.add(min(products) < 0)
        assert seed == min(products) % (2**64 - 1) % 2**32
    assert signs == ({True, False} if both else {False})


def written(config: WatermarkingConfig, rows: int, tokens: int, vocab_size: int) -> np.ndarray:
    """The likeliest tokens of random logits, watermarked."""
    mark = Watermark.of(config, vocab_size)
    text = np.full((rows, tokens), -1, np.int32)
    text[:, 0] = np.arange(rows)
    logits = np.random.default_rng(0).normal(0, 1, (tokens, rows, vocab_size))
    add = jax.jit(mark.add)
    for step in range(1, tokens):
        scores = add(jnp.asarray(logits[step], jnp.float32), text, np.full(rows, step))
        text[:, step] = np.argmax(scores, axis=-1)
    return text


@pytest.mark.parametrize("scheme, context", [("lefthash", 1), ("selfhash", 2)])
def test_a_watermark_is_found_again(scheme, context):
    config = WatermarkingConfig(bias=1.5, seeding_scheme=scheme, context_width=context)
    text = written(config, 3, 60, 97)
    found = WatermarkDetector(97, None, config)(text)
    assert found.prediction.all() and (found.z_score > 5).all() and (found.p_value < 1e-6).all()
    assert found.num_tokens_scored.tolist() == [60 - 1] * 3
    np.testing.assert_allclose(found.confidence, 1 - found.p_value)
    other = WatermarkingConfig(1 / 4, 1.5, 15485867, scheme, context)
    assert not WatermarkDetector(97, None, other)(text).prediction.any()


def test_a_detectors_config_may_be_a_dict():
    text, fields = written(WatermarkingConfig(bias=3.0), 2, 20, 50), {"bias": 3.0}
    one, other = (WatermarkDetector(50, None, c)(text) for c in (fields, WatermarkingConfig()))
    np.testing.assert_array_equal(one.z_score, other.z_score)
    with pytest.raises(ValueError, match="did you mean 'greenlist_ratio'"):
        WatermarkDetector(50, None, {"green_list_ratio": 0.5})


@pytest.mark.parametrize("scheme", ["lefthash", "selfhash"])
@pytest.mark.parametrize(
    "ids, words",
    [
        ([1, 2, 3], r"input_ids has shape \(3,\) .* one text is \[\[id"),
        (np.zeros((2, 0), int), r"shape \(2, 0\)"),
        ([[1.0, 2.0]], "dtype float64, must be integers"),
        ([[1, 2, 50]], "input_ids holds 50, outside the vocabulary of 50"),
        ([[1, -1, 5]], "input_ids holds -1"),
    ],
)
def test_texts_that_are_none(scheme, ids, words):
    detect = WatermarkDetector(50, None, WatermarkingConfig(seeding_scheme=scheme))
    with pytest.raises(ValueError, match=words):
        detect(ids)


def test_repeated_ngrams_may_count_once():
    text = np.array([[1, 2, 1, 2, 1, 2, 3]])
    config = WatermarkingConfig()
    every = WatermarkDetector(50, None, config)(text)
    once = WatermarkDetector(50, None, config, ignore_repeated_ngrams=True)(text)
    assert every.num_tokens_scored == 6 and once.num_tokens_scored == 3


def test_the_beginning_token_is_no_text():
    detect, text = WatermarkDetector(50, 1, WatermarkingConfig()), np.array([[5, 6, 7], [8, 9, 4]])
    begun = np.concatenate([np.ones((2, 1), int), text], axis=1)
    np.testing.assert_array_equal(detect(begun).z_score, detect(text).z_score)
    with pytest.raises(ValueError, match="1 of 2 rows begin with bos_token_id 1"):
        detect(np.array([[1, 6, 7], [8, 9, 4]]))
    with pytest.raises(ValueError, match="rows have 1 tokens, must have more than context_width 1"):
        detect(begun[:, :2])


@pytest.mark.parametrize("scheme", ["lefthash", "selfhash"])
def test_padded_and_short_rows(scheme):
    """A padded row gets the list that it gets alone; one shorter than the context gets none.

    The bias comes after the temperature and the cuts.
    """
    mark = {"seeding_scheme": scheme, "context_width": 2, "bias": 3.0}
    config = GenerationConfig(do_sample=True, temperature=2.0, watermarking_config=mark)
    settings = Settings.of(config, 50)
    ids = np.array([[0, 0, 0, 9], [0, 0, 4, 9], [8, 7, 4, 9]], np.int32)
    mask = np.array([[0, 0, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]], bool)
    logits = jnp.broadcast_to(jnp.linspace(0, 5, 50), (3, 50))
    scores = jax.jit(settings.process)(Past.of(settings, ids, mask, 6), logits)
    gained = np.asarray(scores - logits / 2)
    assert not gained[0].any() and set(gained[1].round(5).tolist()) == {0, 3}
    np.testing.assert_array_equal(gained[1], gained[2])
