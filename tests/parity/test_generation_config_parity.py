"""GenerationConfigs: defaults, names, files and refusals beside those of transformers."""

import dataclasses
import json

import pytest

from phi3_jax.generation import config_checks
from phi3_jax.generation.config import GenerationConfig

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

FIELDS = {
    field.name: field.default
    for field in dataclasses.fields(GenerationConfig)
    if field.name not in ("extra", "given")
}
# What the reference keeps in a config beside its settings.
METADATA = {"transformers_version", "_from_model_config"}
# Their default of 20 counts new tokens as well, but only as long as it is the default.
LENGTH = "max_length"


def filled(**settings):
    """A config of the reference as generate() completes it."""
    config = transformers.GenerationConfig(**settings)
    config.update(**config._get_default_generation_params(), defaults_only=True)
    return config


def test_every_name_of_the_reference_is_known():
    theirs = set(vars(transformers.GenerationConfig()))
    assert theirs - METADATA - set(FIELDS) <= set(config_checks.ABSENT)
    assert set(FIELDS) <= theirs
    # The one name that is an argument of generate() there.
    assert set(config_checks.ABSENT) - theirs == {"synced_gpus"}


def test_defaults():
    theirs = filled()
    for name, ours in FIELDS.items():
        if name == LENGTH:
            assert theirs.max_length == 20 and ours is None
            assert GenerationConfig().new_tokens(3, 99) == 20
            continue
        # Switches that it leaves open are off.
        expected = getattr(theirs, name)
        assert ours == (False if expected is None and isinstance(ours, bool) else expected), name
    for name, (neutral, _) in config_checks.ABSENT.items():
        assert getattr(theirs, name, None) in (None, *neutral), name


SETTINGS = [
    {"num_beams": 4, "early_stopping": "never", "length_penalty": 0.5, "num_return_sequences": 2},
    {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.1, "top_h": 0.4},
    {"do_sample": True, "typical_p": 0.8, "epsilon_cutoff": 3e-4, "eta_cutoff": 2e-3},
    {"repetition_penalty": 1.25, "encoder_repetition_penalty": 0.5, "no_repeat_ngram_size": 3},
    {"bad_words_ids": [[5], [6, 7]], "suppress_tokens": [8], "begin_suppress_tokens": [9, 10]},
    {"sequence_bias": [[[11, 12], 2.5], [[13], -4.0]], "forced_eos_token_id": [2, 3]},
    {"exponential_decay_length_penalty": [4, 1.125], "remove_invalid_values": True},
    {"watermarking_config": {"bias": 3.0, "context_width": 2, "seeding_scheme": "selfhash"}},
    {"max_length": 50, "min_new_tokens": 3, "max_time": 2.5, "stop_strings": ["a", "b"]},
    {"cache_implementation": "quantized", "cache_config": {"nbits": 8}, "prefill_chunk_size": 16},
    {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 3, "num_assistant_tokens": 7},
    {"eos_token_id": [32000, 32007], "pad_token_id": 32000, "bos_token_id": 1},
    {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    {"guidance_scale": 1.5, "renormalize_logits": True, "token_healing": True, "top_k": 50},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: next(iter(settings)))
def test_ours_loads_there_and_theirs_here(settings, tmp_path):
    ours = GenerationConfig(**settings)
    ours.check()
    ours.save_pretrained(tmp_path)
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    plain = json.loads(theirs.to_json_string(use_diff=False))
    for name, value in ours.to_dict().items():
        assert plain[name] == value, name
        assert name == "watermarking_config" or getattr(theirs, name) == settings[name]
    assert theirs == transformers.GenerationConfig(**settings)

    theirs.save_pretrained(tmp_path)
    again = GenerationConfig.from_pretrained(tmp_path)
    for name in FIELDS:
        assert getattr(again, name) == getattr(ours, name), name
    assert again is not None and set(again.extra) <= METADATA


def test_whole_numbers_become_those_that_the_reference_takes():
    """Its processors refuse 1 where they want 1.0; what is saved here has the point."""
    saved = GenerationConfig(temperature=2, repetition_penalty=3, sequence_bias={(4,): 5}).to_dict()
    process = transformers.generation.logits_process
    process.TemperatureLogitsWarper(saved["temperature"])
    process.RepetitionPenaltyLogitsProcessor(saved["repetition_penalty"])
    process.SequenceBiasLogitsProcessor(saved["sequence_bias"])
    with pytest.raises(ValueError, match="strictly positive float"):
        process.TemperatureLogitsWarper(2)


@pytest.mark.parametrize(
    "settings",
    [
        {"early_stopping": "always"},
        {"max_new_tokens": 0},
        {"cache_implementation": "none_such"},
        {"watermarking_config": {"seeding_scheme": "hash"}},
        {"watermarking_config": {"greenlist_ratio": 1.5}},
        {"watermarking_config": {"context_width": 0}},
        {"num_return_sequences": 2},
        {"num_return_sequences": 3, "num_beams": 2},
        {"forced_bos_token_id": 5, "suppress_tokens": [5, 6]},
        {"forced_eos_token_id": [5, 6], "suppress_tokens": [5, 6, 7]},
        {"streamer": None},
        {"logits_processor": []},
    ],
    ids=str,
)
def test_refused_there_and_here(settings):
    with pytest.raises(ValueError):
        transformers.GenerationConfig(**settings)
    with pytest.raises(ValueError):
        GenerationConfig(**settings).check()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.1},
        {"top_h": 0.1},
        {"typical_p": 0.5},
        {"epsilon_cutoff": 0.1},
        {"eta_cutoff": 0.1},
        {"early_stopping": True},
        {"length_penalty": 2.0},
        {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0},
        {"early_stopping": False, "length_penalty": 1.0},
        {"temperature": 0.5, "do_sample": True},
        {"length_penalty": 0.5, "num_beams": 3},
    ],
    ids=str,
)
def test_in_vain_there_and_here(settings):
    """What the reference would not save, since it has no effect, is idle here."""
    idle = GenerationConfig(**settings).idle_settings(settings)
    theirs = transformers.GenerationConfig(**settings)
    if idle:
        with pytest.raises(ValueError, match=f"`{next(iter(idle))}`"):
            theirs.validate(strict=True)
    else:
        theirs.validate(strict=True)
