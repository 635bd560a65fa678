"""What settings of a generation are refused, alone and together, and which are in vain."""

import math
from typing import Any

import pytest

from phi3_jax.generation import config_checks
from phi3_jax.generation.config import SAMPLING_SETTINGS, GenerationConfig

TEXTS = ("stop_strings", "cache_implementation")


@pytest.mark.parametrize(
    "name, value",
    [
        *[(name, 0) for name, limit in config_checks.LIMITS.items() if "[1, 2**31)" in limit[0]],
        *[(name, -1) for name, limit in config_checks.LIMITS.items() if "[0, 2**31)" in limit[0]],
        *[(name, 1) for name, limit in config_checks.LIMITS.items() if "True" in limit[0]],
        *[(name, math.nan) for name in sorted(config_checks.FLOATS)],
        *[(name, True) for name in sorted(config_checks.FLOATS)],
        *[(name, -0.5) for name, limit in config_checks.LIMITS.items() if "above 0" in limit[0]],
        *[(name, "x") for name in config_checks.LIMITS if name not in TEXTS],
        ("watermarking_config", "x"),
        ("max_time", math.inf),
        ("max_time", 0.0),
        ("max_time", -2.5),
        ("num_beams", 2.0),
        ("num_beams", 2**31),
        ("temperature", 10**400),
        ("early_stopping", "always"),
        ("stop_strings", ""),
        ("stop_strings", ["a", ""]),
        ("stop_strings", [3]),
        ("cache_implementation", 3),
        ("assistant_confidence_threshold", 1.5),
        ("eos_token_id", [2, -1]),
        ("suppress_tokens", 5),
        ("bad_words_ids", [5]),
        ("bad_words_ids", [[]]),
        ("sequence_bias", {5: 1.0}),
        ("sequence_bias", {"(5, 6)": 1.0}),
        ("sequence_bias", {(): 1.0}),
        ("sequence_bias", {(5,): math.inf}),
        ("sequence_bias", {(5,): math.nan}),
        ("sequence_bias", [[[5], 1.0, 2.0]]),
        ("exponential_decay_length_penalty", (3,)),
        ("exponential_decay_length_penalty", (3, 0.0)),
        ("exponential_decay_length_penalty", (-3, 1.1)),
        ("exponential_decay_length_penalty", (0.5, 1.1)),
    ],
)
def test_what_no_use_could_accept(name, value):
    with pytest.raises(ValueError, match=f"^{name} is .*must be") as error:
        GenerationConfig(**{name: value})
    assert str(error.value).isascii()


@pytest.mark.parametrize(
    "name, value, limit",
    [
        ("do_sample", 1, "True or False"),
        ("use_cache", 1, "True or False"),
        ("early_stopping", "x", "True, False or 'never'"),
        ("max_time", math.inf, "a finite number of seconds above 0, or None"),
        ("eos_token_id", -1, "an id, a list of ids, or None"),
    ],
)
def test_limits_are_sentences(name, value, limit):
    with pytest.raises(ValueError) as error:
        GenerationConfig(**{name: value})
    assert str(error.value) == f"{name} is {value!r}, must be {limit}"


@pytest.mark.parametrize("name", config_checks.ABSENT)
def test_settings_without_a_meaning_here(name):
    neutral, reason = config_checks.ABSENT[name]
    for value in (None, [], *neutral):
        GenerationConfig.from_call({name: value}).check()
    config = GenerationConfig.from_call({name: 7})
    assert config.extra[name] == 7 and name not in config.given
    with pytest.raises(ValueError, match=f"{name} is 7, which is not supported") as error:
        config.check()
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"temperature": 0.0}, "do_sample=False takes the most likely"),
        ({"temperature": -1.0}, "temperature is -1.0, must be above 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"top_h": 0.0}, "top_h is 0.0"),
        ({"top_h": 1.1}, "top_h is 1.1"),
        ({"typical_p": 0.0}, "typical_p is 0.0"),
        ({"epsilon_cutoff": 1.0}, "epsilon_cutoff is 1.0"),
        ({"eta_cutoff": -0.1}, "eta_cutoff is -0.1"),
    ],
)
def test_limits_of_sampling_count_where_there_is_sampling(settings, words):
    GenerationConfig(**settings).check()
    with pytest.raises(ValueError, match=words):
        GenerationConfig(do_sample=True, **settings).check()


@pytest.mark.parametrize(
    "settings, words, way_out",
    [
        ({"num_return_sequences": 3}, "greedy decoding has only one", {"do_sample": True}),
        ({"num_return_sequences": 3}, "num_beams=3 or more", {"num_beams": 3}),
        ({"num_return_sequences": 3, "num_beams": 2}, "and num_beams 2", {"num_beams": 4}),
        (
            {"num_return_sequences": 3, "num_beams": 2, "do_sample": True},
            "no more sequences than beams",
            {"num_beams": 1},
        ),
        ({"cache_implementation": "offloaded"}, "stays on the devices", {}),
        ({"cache_implementation": "offloaded_static"}, "'quantized' make it smaller", {}),
        ({"cache_implementation": "paged"}, "must be one of dynamic, static", {}),
        (
            {"cache_config": {"nbits": 8}},
            "for the cache None",
            {"cache_implementation": "quantized"},
        ),
        (
            {"cache_implementation": "quantized", "cache_config": {"nbits": 4}},
            "there is only {'nbits': 8}",
            {"cache_config": {"nbits": 8}},
        ),
        (
            {"cache_implementation": "quantized", "cache_config": {"nbits": 8, "backend": "x"}},
            "'backend': 'x'",
            {"cache_config": {}},
        ),
        (
            {"prompt_lookup_num_tokens": 3, "num_beams": 2},
            "prompt_lookup_num_tokens is 3 and num_beams 2",
            {"num_beams": 1},
        ),
        (
            {"forced_eos_token_id": [2, 3], "suppress_tokens": [3, 2, 4]},
            "leaves no token to choose",
            {"suppress_tokens": [3, 4]},
        ),
        (
            {"forced_bos_token_id": 2, "suppress_tokens": [2]},
            "forced_bos_token_id is 2",
            {"forced_bos_token_id": None},
        ),
    ],
)
def test_contradictions(settings, words, way_out):
    config = GenerationConfig(**settings)
    with pytest.raises(ValueError, match=words):
        config.check()
    if way_out:
        GenerationConfig(**way_out).over(config).check()


def test_ids_outside_the_vocabulary():
    inside: dict[str, Any] = {
        "pad_token_id": 9,
        "forced_bos_token_id": 9,
        "forced_eos_token_id": (1, 9),
        "bad_words_ids": ((9, 2), (9,)),
        "sequence_bias": {(2, 9): 1.0},
    }
    GenerationConfig(**inside).check_ids(10)
    GenerationConfig().check_ids(10)
    for name in inside:
        with pytest.raises(ValueError, match=f"{name} (is|holds) 9, outside the vocabulary of 9"):
            GenerationConfig(**{name: inside[name]}).check_ids(9)
    # They cannot come up, so there is nothing to refuse.
    GenerationConfig(
        eos_token_id=(2, 9), suppress_tokens=(9,), begin_suppress_tokens=(9,)
    ).check_ids(9)


def test_suppressed_tokens_leave_one():
    GenerationConfig(suppress_tokens=[*range(8), 99, 7]).check_ids(9)
    with pytest.raises(ValueError, match="^suppress_tokens hold the whole vocabulary of 9"):
        GenerationConfig(suppress_tokens=list(range(12))).check_ids(9)
    both = GenerationConfig(suppress_tokens=list(range(5)), begin_suppress_tokens=[8, 7, 6, 5])
    both.check_ids(10)
    with pytest.raises(ValueError, match="^suppress_tokens and begin_suppress_tokens hold"):
        both.check_ids(9)


def test_settings_in_vain():
    def idle(*unnamed, eos_token_id=2, **settings):
        config = GenerationConfig(eos_token_id=eos_token_id, **settings)
        return config.idle_settings(config.given - set(unnamed))

    cuts = dict.fromkeys(SAMPLING_SETTINGS, 0.75) | {"top_k": 3}
    assert idle(**cuts) == dict.fromkeys(cuts, "no effect without do_sample=True")
    assert idle(**cuts, do_sample=True) == {}
    assert idle("top_k", top_k=3) == {}, "what the call does not name is not its business"
    assert idle(temperature=1.0, top_k=50, min_p=None, early_stopping=False) == {}
    beams = {"early_stopping": True, "length_penalty": 2.0}
    assert idle(**beams) == dict.fromkeys(beams, "no effect without num_beams > 1")
    assert idle(**beams, num_beams=2) == {}
    cache = {"prefill_chunk_size": 4, "cache_implementation": "quantized"}
    assert idle(**cache, use_cache=False) == {}, "the tokens are computed with that cache"
    both = {"max_length": 9, "max_new_tokens": 4, "min_length": 3, "min_new_tokens": 2}
    assert idle(**both) == {
        "max_length": "no effect beside max_new_tokens",
        "min_length": "no effect beside min_new_tokens",
    }
    assert idle(max_matching_ngram_size=3) == {
        "max_matching_ngram_size": "no effect without prompt_lookup_num_tokens"
    }
    ends = {"min_length": 3, "exponential_decay_length_penalty": (1, 1.5)}
    assert idle(**ends, eos_token_id=None) == dict.fromkeys(ends, "no effect without eos_token_id")
    assert idle(**ends) == {}
