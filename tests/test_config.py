"""Phi3Config: both forms of config.json, every family member, and what is refused."""

import dataclasses
import json

import pytest
from reference import BASE, LONGROPE, PARTIAL_LONGROPE

import phi3_jax as phi3
from phi3_jax.config_checks import ACTIVATIONS
from phi3_jax.layers import ACTIVATION_FUNCTIONS
from phi3_jax.rope import attention_factor

FAMILY = {
    # name: layers, heads, kv heads, head dim, rotated dims, window, vocabulary, tied
    "phi-3-mini-4k-instruct": (32, 32, 32, 96, 96, 2047, 32064, False),
    "phi-3-medium-4k-instruct": (40, 40, 10, 128, 128, 2047, 32064, False),
    "phi-3.5-mini-instruct": (32, 32, 32, 96, 96, 262144, 32064, False),
    "phi-4": (40, 40, 10, 128, 128, None, 100352, False),
    "phi-4-mini-instruct": (32, 24, 8, 128, 96, 262144, 200064, True),
}
OLD_LONGROPE = {"type": "longrope", **{k: LONGROPE[k] for k in ("short_factor", "long_factor")}}


def small(**changes) -> phi3.Phi3Config:
    return phi3.Phi3Config(**{**BASE, **changes})


def test_a_config_is_what_its_own_dict_says():
    given = phi3.Phi3Config(num_labels=5, problem_type="regression", sliding_window=7)
    for config in (phi3.Phi3Config.preset("phi-3.5-mini"), phi3.Phi3Config(), given):
        assert phi3.Phi3Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("name", FAMILY)
def test_presets(name):
    config = phi3.Phi3Config.preset(name)
    assert FAMILY[name] == (
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.rotary_dim,
        config.sliding_window,
        config.vocab_size,
        config.tie_word_embeddings,
    )
    assert config == phi3.Phi3Config.preset(name.removesuffix("-instruct"))
    assert hash(config) == hash(phi3.Phi3Config.from_dict(config.to_dict()))


def test_unknown_preset_names_the_known():
    with pytest.raises(ValueError, match="'phi-5'; there are .*phi-3-mini-4k-instruct, .*phi-4"):
        phi3.Phi3Config.preset("phi-5")


def test_round_trip_keeps_unknown_keys(tmp_path):
    config = phi3.Phi3Config.preset("phi-4-mini-instruct")
    assert config.extra["interpolate_factor"] == 1 and config.extra["full_attn_mod"] == 1
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["interpolate_factor"] == 1 and saved["lm_head_bias"] is False
    assert saved["rope_parameters"]["rope_type"] == "longrope"
    assert isinstance(saved["rope_parameters"]["long_factor"], list)
    assert phi3.Phi3Config.from_pretrained(tmp_path) == config


def test_old_and_new_form_agree():
    old = small(rope_scaling=OLD_LONGROPE, rope_theta=5000.0, partial_rotary_factor=1.0)
    new = small(rope_parameters={**LONGROPE, "rope_theta": 5000.0})
    assert old == new and old.rope_theta == 5000.0


def test_default_rope_keeps_theta_and_partial_factor():
    config = small(rope_theta=250000, partial_rotary_factor=0.5, rope_scaling=None)
    assert config.rope_parameters["rope_theta"] == 250000
    assert (config.rotary_dim, config.is_longrope) == (4, False)


def test_su_is_longrope():
    su = small(rope_scaling={**OLD_LONGROPE, "type": "su"})
    assert su == small(rope_scaling=OLD_LONGROPE)
    assert attention_factor(su) == attention_factor(small(rope_parameters=LONGROPE))


def test_yarn_keeps_the_original_codes_factor():
    """0.1 ln s + 1 = 1.346574 at s = 32, where longrope has 1.190238 (trap 16)."""
    real = phi3.Phi3Config.preset("phi-3.5-mini")
    assert attention_factor(real) == pytest.approx(1.190238, abs=1e-6)
    yarn = {**real.to_dict(), "rope_parameters": {**real.rope_parameters, "rope_type": "yarn"}}
    config = phi3.Phi3Config.from_dict(yarn)
    assert attention_factor(config) == pytest.approx(1.346574, abs=1e-6)
    # what is saved says so itself, so that it means the same to whoever reads it next
    assert config.to_dict()["rope_parameters"]["rope_type"] == "longrope"
    assert attention_factor(phi3.Phi3Config.from_dict(config.to_dict())) == attention_factor(config)


def test_factor_and_attention_factor_are_honoured():
    assert attention_factor(small(rope_parameters={**LONGROPE, "attention_factor": 1.5})) == 1.5
    wide = small(rope_parameters={**LONGROPE, "factor": 2.0}, max_position_embeddings=9999)
    assert attention_factor(wide) == pytest.approx((1 + 0.6931472 / 2.7725887) ** 0.5)
    equal = small(rope_parameters=LONGROPE, max_position_embeddings=16)
    assert attention_factor(equal) == 1.0


def test_outer_original_max_wins():
    """(trap 17)"""
    rope = {**LONGROPE, "original_max_position_embeddings": 99}
    config = small(rope_parameters=rope, original_max_position_embeddings=16)
    assert config.rope_parameters["original_max_position_embeddings"] == 16


def test_config_is_frozen_and_replaceable():
    config = small(rope_parameters=LONGROPE)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1
    deeper = dataclasses.replace(config, num_hidden_layers=9)
    assert deeper.num_hidden_layers == 9 and deeper.rope_parameters == config.rope_parameters


def test_a_value_given_twice_is_refused_in_a_call_and_inner_in_a_file():
    config = small(rope_parameters={**LONGROPE, "rope_theta": 5000.0})
    with pytest.raises(ValueError, match="rope_theta is 7.0, and 5000.0"):
        dataclasses.replace(config, rope_theta=7.0)
    in_file = {**config.to_dict(), "rope_theta": 7.0}
    assert phi3.Phi3Config.from_dict(in_file).rope_theta == 5000.0


def test_labels_are_filled_in():
    assert small().id2label == {0: "LABEL_0", 1: "LABEL_1"} and small().num_labels == 2
    three = small(num_labels=3)
    assert three.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2} and three.num_labels == 3
    named = small(id2label={"0": "no", "1": "yes"}, num_labels=2)
    assert named.id2label == {0: "no", 1: "yes"} and named.label2id == {"no": 0, "yes": 1}
    assert small(label2id={"off": 0, "on": 1}).label2id == {"off": 0, "on": 1}
    assert dataclasses.replace(named, num_hidden_layers=9).id2label == named.id2label
    renamed = dataclasses.replace(named, num_labels=3, id2label=None, label2id=None)
    assert renamed.id2label == three.id2label and renamed.label2id == three.label2id


CLASSIFICATION = (
    "id2label label2id problem_type classifier_dropout hidden_dropout token_classification_bias"
).split()


def test_default_labels_are_not_written():
    assert not {"num_labels", *CLASSIFICATION} & small(num_labels=2).to_dict().keys()
    told = small(
        id2label={0: "a"},
        problem_type="regression",
        classifier_dropout=0.25,
        hidden_dropout=0,
        token_classification_bias=False,
    )
    assert set(CLASSIFICATION) <= told.to_dict().keys() and "num_labels" not in told.to_dict()
    assert "id2label" in small(label2id={"off": 0, "on": 1}).to_dict()


@pytest.mark.parametrize(
    "changes",
    [
        {"id2label": {10: "ten", 2: "two"}},
        {"num_labels": 4, "problem_type": "multi_label_classification"},
        {"num_labels": 1, "hidden_dropout": 0.5, "token_classification_bias": False},
        {"label2id": {"off": 0, "on": 1}, "classifier_dropout": 0},
    ],
)
def test_labels_come_back_from_a_file(tmp_path, changes):
    config = phi3.Phi3Config.from_dict({**small().to_dict(), **changes})
    config.save_pretrained(tmp_path)
    again = phi3.Phi3Config.from_pretrained(tmp_path)
    assert again == config and hash(again) == hash(config)
    assert all(isinstance(key, int) for key in again.id2label)


def test_overrides_are_laid_over_the_file(tmp_path):
    small(id2label={0: "no", 1: "yes"}, rope_parameters=LONGROPE).save_pretrained(tmp_path)
    load = lambda **overrides: phi3.Phi3Config.from_pretrained(tmp_path, **overrides)  # noqa: E731
    assert load(attention_dropout=0.5) == dataclasses.replace(load(), attention_dropout=0.5)
    assert load(num_labels=2) == load()
    assert load(num_labels=3).label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    assert load(id2label={0: "a", 1: "b"}).label2id == {"a": 0, "b": 1}
    # What is inside rope_parameters would win over the same beside it in a file.
    assert load(rope_theta=5.0).rope_parameters == {**load().rope_parameters, "rope_theta": 5.0}
    assert load(rope_scaling={"type": "default"}).rope_parameters["rope_type"] == "default"
    with pytest.raises(ValueError, match="'num_label'; did you mean 'num_labels'"):
        load(num_label=3)
    with pytest.raises(ValueError, match="unknown config field 'extra'"):
        load(extra={})
    with pytest.raises(ValueError, match=r"config\.json.*num_labels is 3, but id2label names 1"):
        load(num_labels=3, id2label={0: "a"})
    # Unlike those of dataclasses.replace, what follows from another size follows from the new one.
    (tmp_path / "config.json").write_text(json.dumps({"rope_theta": 9.0, **BASE}))
    assert load(hidden_size=96).head_dim == 16 and load(rope_parameters=None).rope_theta == 9.0


def test_lists_of_end_tokens():
    config = small(eos_token_id=[2, 5])
    assert config.eos_token_ids == (2, 5)
    assert config.to_dict()["eos_token_id"] == [2, 5]
    assert small(eos_token_id=None).eos_token_ids == ()


def test_activations_have_functions():
    assert set(ACTIVATIONS) == set(ACTIVATION_FUNCTIONS)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"hidden_size": "64"}, ["hidden_size", "'64'", "int"]),
        ({"hidden_size": 0}, ["hidden_size is 0", "at least 1"]),
        ({"head_dim": 10**400}, ["head_dim is 1000", "at most 2147483647"]),
        ({"hidden_size": 2**31 - 1, "num_attention_heads": 2**30}, ["hidden_size", "1 heads"]),
        ({"eos_token_id": 2**31}, ["eos_token_id is 2147483648"]),
        ({"rms_norm_eps": 10**400}, ["rms_norm_eps is 1000", "finite"]),
        ({"rope_theta": 10**400}, ["rope_theta is 1000", "above 0"]),
        ({"num_labels": 10**12}, ["num_labels is 1000", "at most 1000000"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers", "True", "int"]),
        ({"attention_dropout": 1.0}, ["attention_dropout", "[0, 1)"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps", "above 0"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings", "bool"]),
        ({"hidden_act": "swiglu"}, ["hidden_act", "'swiglu'", "silu"]),
        ({"sliding_window": 0}, ["sliding_window is 0", "at least 1"]),
        ({"eos_token_id": [2, "x"]}, ["eos_token_id"]),
        ({"num_attention_heads": 5}, ["48", "5", "4 or 6 heads", "head_dim"]),
        ({"num_key_value_heads": 4}, ["6", "4", "3 or 6 key-value heads"]),
        ({"pad_token_id": 97}, ["pad_token_id is 97", "97", "None"]),
        ({"rope_parameters": {**LONGROPE, "rope_type": "llama3"}}, ["'llama3'", "longrope"]),
        ({"rope_parameters": OLD_LONGROPE | {"type": None}}, ["short_factor", "no rope_type"]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ["needs short_factor", "4 numbers"]),
        ({"rope_parameters": {**LONGROPE, "long_factor": [1.0]}}, ["long_factor has 1", "4"]),
        ({"rope_parameters": {**LONGROPE, "long_factor": [1, 1, 0, 1]}}, ["long_factor[2]", "0"]),
        ({"rope_parameters": {**LONGROPE, "short_factor": 3}}, ["short_factor is 3", "list"]),
        ({"rope_parameters": {**LONGROPE, "factor": -1}}, ["factor is -1"]),
        ({"partial_rotary_factor": 1.5}, ["partial_rotary_factor", "(0, 1]"]),
        ({"partial_rotary_factor": 0.4}, ["rotates 3", "even"]),
        ({"rope_theta": "x"}, ["rope_theta", "'x'"]),
        ({"num_labels": 0}, ["num_labels is 0", "at least 1"]),
        ({"num_labels": True}, ["num_labels is True", "int"]),
        ({"num_labels": 3, "id2label": {0: "a"}}, ["num_labels is 3", "names 1", "only one"]),
        ({"id2label": ["a", "b"]}, ["id2label is ['a', 'b']", "expected Mapping | None"]),
        ({"id2label": {}}, ["id2label is {}", "at least 1"]),
        ({"id2label": {"0": "a", 0: "b"}}, ["id2label", "once"]),
        ({"id2label": {"x": "a"}}, ["id2label has 'x': 'a'", "a number and a name"]),
        ({"id2label": {0: 7}}, ["id2label has 0: 7", "a number and a name"]),
        ({"problem_type": "ranking"}, ["problem_type is 'ranking'", "regression, single_label"]),
        (
            {"problem_type": "single_label_classification", "num_labels": 1},
            ["needs at least 2", "num_labels is 1", "'regression'"],
        ),
        ({"classifier_dropout": 1.0}, ["classifier_dropout", "[0, 1)"]),
        ({"hidden_dropout": "0.1"}, ["hidden_dropout", "'0.1'", "float"]),
        ({"token_classification_bias": 0}, ["token_classification_bias", "bool"]),
        (
            {"rope_parameters": LONGROPE, "original_max_position_embeddings": 1},
            ["original_max_position_embeddings is 1", "at least 2"],
        ),
    ],
)
def test_refused(changes, words):
    with pytest.raises(ValueError) as error:
        small(**changes)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_factor_lengths_count_rotated_dimensions():
    """Half of head_dim times the partial factor, not of head_dim (trap 44)."""
    assert small(rope_parameters=PARTIAL_LONGROPE, num_key_value_heads=3).rotary_dim == 6
    with pytest.raises(ValueError, match="short_factor has 4 numbers, expected 3"):
        small(rope_parameters={**LONGROPE, "partial_rotary_factor": 0.75})


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="model_type is 'phi3small'"):
        phi3.Phi3Config.from_dict({"model_type": "phi3small"})


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "is not JSON"),
        pytest.param("[" * 10**5, "is not JSON", id="deep"),
        ("[]", "list"),
        ('{"hidden_size": -1}', "config.json"),
    ],
)
def test_broken_files_are_named(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        phi3.Phi3Config.from_pretrained(tmp_path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        phi3.Phi3Config.from_pretrained(tmp_path)
