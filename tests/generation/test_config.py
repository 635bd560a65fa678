"""GenerationConfig: forms that values are kept in, what is refused, what a file says."""

import dataclasses
import inspect
import json
import math

import numpy as np
import pytest

import phi3_jax as phi3
from phi3_jax.generation import config_checks
from phi3_jax.generation.config import GenerationConfig
from phi3_jax.generation.watermarking_config import WatermarkingConfig

FIELDS = [field.name for field in dataclasses.fields(GenerationConfig)]
NEVER_NONE = (
    "use_cache",
    "length_penalty",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
)

# A value of every setting that is not its default, in the form that it is kept in.
OTHER = {
    "max_length": 33,
    "max_new_tokens": 9,
    "min_length": 4,
    "min_new_tokens": 2,
    "early_stopping": "never",
    "max_time": 1.5,
    "stop_strings": ("\n\n", "User:"),
    "do_sample": True,
    "num_beams": 3,
    "use_cache": False,
    "cache_implementation": "quantized",
    "cache_config": {"nbits": 8},
    "max_cache_len": 64,
    "prefill_chunk_size": 16,
    "temperature": 0.75,
    "top_k": 7,
    "top_p": 0.5,
    "min_p": 0.125,
    "top_h": 0.25,
    "typical_p": 0.375,
    "epsilon_cutoff": 0.0625,
    "eta_cutoff": 0.03125,
    "repetition_penalty": 1.25,
    "encoder_repetition_penalty": 1.5,
    "length_penalty": -2.0,
    "no_repeat_ngram_size": 3,
    "encoder_no_repeat_ngram_size": 2,
    "bad_words_ids": ((5,), (6, 7)),
    "renormalize_logits": True,
    "forced_bos_token_id": 1,
    "forced_eos_token_id": (2, 3),
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (4, 1.125),
    "suppress_tokens": (8, 9),
    "begin_suppress_tokens": (10,),
    "sequence_bias": (((11,), -math.inf), ((12, 13), 2.5)),
    "token_healing": True,
    "guidance_scale": 1.75,
    "watermarking_config": WatermarkingConfig(bias=3.0, seeding_scheme="selfhash"),
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "pad_token_id": 14,
    "bos_token_id": 15,
    "eos_token_id": (16, 17),
    "num_assistant_tokens": 5,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.625,
    "prompt_lookup_num_tokens": 6,
    "max_matching_ngram_size": 3,
}


def test_every_setting_is_tried_limited_and_described():
    settings = [name for name in FIELDS if name not in ("extra", "given")]
    assert sorted(OTHER) == sorted(settings)
    assert sorted(config_checks.LIMITS) == sorted(set(settings) - {"watermarking_config"})
    assert not set(config_checks.ABSENT) & set(settings)
    described = set((GenerationConfig.__doc__ or "").replace(",", " ").replace(":", " ").split())
    assert set(FIELDS) <= described


def test_a_file_gives_back_what_was_saved(tmp_path):
    config = GenerationConfig(**OTHER, extra={"note": [1, {"a": None}], "low_memory": False})
    config.save_pretrained(tmp_path)
    again = GenerationConfig.from_pretrained(tmp_path)
    assert again == config and hash(again) == hash(config)
    assert {name: getattr(again, name) for name in OTHER} == OTHER
    for name, value in OTHER.items():
        assert getattr(GenerationConfig(), name) != value, name
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["sequence_bias"] == [[[11], -math.inf], [[12, 13], 2.5]]
    assert saved["watermarking_config"]["bias"] == 3.0 and saved["note"] == [1, {"a": None}]


def test_only_what_was_given_is_saved_and_shown():
    config = GenerationConfig(num_beams=4, top_k=50, extra={"note": 1})
    assert config.to_dict() == {"num_beams": 4, "top_k": 50, "note": 1}
    assert repr(config) == "GenerationConfig(num_beams=4, top_k=50, extra={'note': 1})"
    assert repr(GenerationConfig()) == "GenerationConfig()"
    assert config != GenerationConfig(num_beams=4, extra={"note": 1})


def test_null_in_a_file_says_nothing(tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text('{"top_k": null, "use_cache": null, "num_beams": 2, "penalty_alpha": null}')
    config = GenerationConfig.from_pretrained(tmp_path)
    assert config is not None and config.given == {"num_beams"}
    assert config.top_k == 50 and config.use_cache is True
    path.write_text('{"num_beams": 0}')
    with pytest.raises(ValueError, match=r"generation_config\.json: num_beams is 0"):
        GenerationConfig.from_pretrained(tmp_path)


def test_none_is_none():
    config = GenerationConfig(**dict.fromkeys(OTHER.keys() - set(NEVER_NONE)))
    for name in ("top_k", "top_p", "temperature", "repetition_penalty", "min_length"):
        assert getattr(config, name) is None
    assert config.num_beams == config.num_return_sequences == 1
    assert config.do_sample is config.output_scores is config.early_stopping is False
    config.check()
    for name in NEVER_NONE:
        with pytest.raises(ValueError, match=f"{name} is None"):
            GenerationConfig(**{name: None})


def test_values_are_kept_in_one_form():
    config = GenerationConfig(
        top_k=np.int64(3),
        temperature=1,
        eos_token_id=np.array([2, 5]),
        bad_words_ids=[np.array([1, 2]), [np.int32(3)]],
        sequence_bias={(np.int64(4), 5): 2, (6,): np.float32(0.5)},
        exponential_decay_length_penalty=[3, 2],
        stop_strings=["a", "b"],
        watermarking_config={"context_width": np.int64(2)},
        cache_config={"nbits": np.int8(8)},
        forced_eos_token_id=np.int64(7),
    )
    assert type(config.top_k) is int and type(config.temperature) is float
    assert config.eos_token_ids == (2, 5) and config.bad_words_ids == ((1, 2), (3,))
    assert config.sequence_bias == (((4, 5), 2.0), ((6,), 0.5))
    assert config.exponential_decay_length_penalty == (3, 2.0)
    assert config.watermarking_config == WatermarkingConfig(context_width=2)
    assert config.stop_strings == ("a", "b") and config.forced_eos_token_id == 7
    json.dumps(config.to_dict())
    hash(config)


def test_of_a_sequence_biased_twice_the_last_counts():
    config = GenerationConfig(sequence_bias=[[[1, 2], 1.0], [[3], 2.0], [[1, 2], 5.0]])
    assert config.sequence_bias == (((1, 2), 5.0), ((3,), 2.0))


def test_the_call_wins_over_what_it_is_laid_over():
    folder = GenerationConfig(num_beams=4, top_k=3, sequence_bias={(1,): 1.0}, penalty_alpha=0.5)
    call = GenerationConfig.from_call(
        {"num_beams": 2, "top_k": None, "sequence_bias": None, "penalty_alpha": None}
    )
    both = call.over(folder)
    assert (both.num_beams, both.top_k, both.sequence_bias) == (2, None, None)
    both.check()
    with pytest.raises(ValueError, match="penalty_alpha is 0.5"):
        GenerationConfig(num_beams=2).over(folder).check()


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"num_beam": 3}, "setting 'num_beam'; did you mean 'num_beams'"),
        ({"max_tokens": 3}, "did you mean 'max_new_tokens'"),
        ({"use_model_default": False}, "did you mean 'use_model_defaults'"),
        ({"stoping_criterion": None}, "did you mean 'stopping_criteria'"),
        ({"streamer": None}, "'streamer'; it is an argument of generate"),
        ({"assistant_model": None}, "generate's argument 'assistant'$"),
        ({"past_key_values": None}, "generate's argument 'cache'$"),
        ({"inputs": None}, "generate's argument 'input_ids'$"),
        ({"inputs_embeds": None}, "not taken, prompts are token ids"),
        ({"return_dict": True}, "always an object"),
        ({"top_n_sigma": 1.0}, "the reference has none either"),
        ({"zzz": 1}, "setting 'zzz'; GenerationConfig describes"),
        ({"given": ()}, "setting 'given'"),
        ({"extra": {}}, "setting 'extra'"),
    ],
)
def test_unknown_names(settings, words):
    with pytest.raises(ValueError, match=words) as error:
        GenerationConfig.from_call(settings)
    assert len(str(error.value)) < 150


def test_the_arguments_that_are_pointed_at_are_those_of_generate():
    arguments = inspect.signature(phi3.generate).parameters.values()
    named = [argument.name for argument in arguments if argument.kind != argument.VAR_KEYWORD]
    assert named[:2] == ["model", "params"]
    assert sorted(config_checks.ARGUMENTS) == sorted(named[2:])


def test_another_value_is_laid_over():
    config = GenerationConfig(top_k=3, num_beams=2)
    assert GenerationConfig(top_k=5).over(config) == GenerationConfig(top_k=5, num_beams=2)
    with pytest.raises(ValueError, match="'given'"):
        dataclasses.replace(config, top_k=5)


def test_kinds_of_caches():
    kinds = {kind: GenerationConfig(cache_implementation=kind).cache_kind for kind in
             (None, "dynamic", "static", "sliding_window", "hybrid", "quantized")}  # fmt: skip
    assert list(kinds.values()) == ["full"] * 3 + ["sliding_window"] * 2 + ["quantized"]


@pytest.mark.parametrize(
    "settings, prompt, expected",
    [
        ({}, 5, 20),
        ({}, 30, 10),
        ({}, 40, "the model 40 positions"),
        ({"max_new_tokens": 60}, 45, 60),
        ({"max_length": 9}, 5, 4),
        ({"max_length": 5}, 5, "max_length is 5"),
        ({"max_length": 9, "max_new_tokens": 7}, 5, 7),
        ({"min_new_tokens": 20}, 5, 20),
        ({"min_new_tokens": 21}, 5, "min_new_tokens is 21, and 20 tokens are added"),
        ({"min_new_tokens": 8, "max_new_tokens": 7}, 5, "a max_new_tokens of at least 8"),
        ({"min_length": 12, "max_new_tokens": 7}, 5, 7),
        ({"min_length": 13, "max_new_tokens": 7}, 5, "min_length is 13, and 7 tokens are added"),
        ({"min_length": 10, "max_length": 9}, 5, "min_length is 10"),
        ({"min_length": 99, "min_new_tokens": 2, "max_length": 9}, 5, 4),
        ({"min_length": None}, 5, 20),
    ],
)
def test_how_many_tokens(settings, prompt, expected):
    config = GenerationConfig(**settings)
    if isinstance(expected, int):
        assert config.new_tokens(prompt, 40) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            config.new_tokens(prompt, 40)


@pytest.mark.parametrize(
    "value, words",
    [
        ({"ngram_len": 5, "keys": [1, 2]}, "SynthID"),
        ({"green_list_ratio": 0.5}, "did you mean 'greenlist_ratio'"),
        ({"greenlist_ratio": 0.0}, "greenlist_ratio 0.0, must be in"),
        ({"greenlist_ratio": 1.0}, "greenlist_ratio 1.0"),
        ({"bias": math.inf}, "bias inf"),
        ({"hashing_key": 2**63}, "hashing_key"),
        ({"seeding_scheme": "hash"}, "'lefthash' or 'selfhash'"),
        ({"context_width": 0}, "context_width 0"),
        (3, "a dict of its fields"),
    ],
)
def test_watermarks_that_are_none(value, words):
    with pytest.raises(ValueError, match=words):
        GenerationConfig(watermarking_config=value)


def test_special_tokens_of_a_model():
    config = phi3.Phi3Config(eos_token_id=[7, 9], pad_token_id=None, bos_token_id=3)
    settings = GenerationConfig.from_model_config(config)
    assert settings.eos_token_ids == (7, 9) and settings.bos_token_id == 3
    assert settings.pad_token_id is None
