"""config.json, wrong in every way: `phi3-convert` names field and value, and writes nothing."""

import json
import re

import pytest
from model_folders import write_hf_folder

from convert import cli

VOCABULARY, HALF = 97, 4  # of the model that the faults are put into

LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * HALF,
    "long_factor": [2.0] * HALF,
}


def rope(**changes):
    return {"rope_parameters": {**LONG, **changes}}


# What is changed -> what is said of it.
FIELDS = [
    ({"vocab_size": "97"}, "vocab_size is '97', expected int"),
    ({"vocab_size": 97.0}, "vocab_size is 97.0"),
    ({"vocab_size": None}, "vocab_size is None"),
    ({"vocab_size": True}, "vocab_size is True"),
    ({"vocab_size": [97]}, r"vocab_size is \[97\]"),
    ({"vocab_size": 0}, "vocab_size is 0, must be at least 1"),
    ({"vocab_size": 10**18}, "vocab_size is 1000000000000000000, must be .* at most 2147483647"),
    ({"hidden_size": "64"}, "hidden_size is '64'"),
    ({"hidden_size": -64}, "hidden_size is -64"),
    ({"hidden_size": 1e400}, "hidden_size is inf"),
    ({"intermediate_size": 0}, "intermediate_size is 0"),
    ({"intermediate_size": {}}, "intermediate_size is {}"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, must be from 1 to 4000"),
    ({"num_hidden_layers": "two"}, "num_hidden_layers is 'two'"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"num_attention_heads": 2.5}, "num_attention_heads is 2.5"),
    ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    ({"num_key_value_heads": "2"}, "num_key_value_heads is '2'"),
    ({"num_key_value_heads": 5}, "does not divide into num_key_value_heads 5"),
    ({"num_key_value_heads": 1000}, "does not divide into num_key_value_heads 1000"),
    ({"head_dim": 0}, "head_dim is 0"),
    ({"head_dim": "eight"}, "head_dim is 'eight'"),
    ({"hidden_act": "gelux"}, "hidden_act is 'gelux', must be one of"),
    ({"hidden_act": None}, "hidden_act is None"),
    ({"hidden_act": ["silu"]}, "hidden_act is"),
    ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
    ({"max_position_embeddings": "4k"}, "max_position_embeddings is '4k'"),
    ({"original_max_position_embeddings": -4}, "original_max_position_embeddings is -4"),
    ({"original_max_position_embeddings": 4096.0}, "original_max_position_embeddings is 4096.0"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ({"initializer_range": -0.02}, "initializer_range is -0.02"),
    ({"initializer_range": float("inf")}, "initializer_range is inf"),
    ({"resid_pdrop": 1.0}, "resid_pdrop is 1.0"),
    ({"resid_pdrop": None}, "resid_pdrop is None"),
    ({"embd_pdrop": "0"}, "embd_pdrop is '0'"),
    ({"attention_dropout": -0.1}, "attention_dropout is -0.1"),
    ({"use_cache": "yes"}, "use_cache is 'yes'"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
    ({"bos_token_id": -1}, "bos_token_id is -1"),
    ({"bos_token_id": "<s>"}, "bos_token_id is '<s>'"),
    ({"eos_token_id": [1, "2"]}, "eos_token_id is"),
    ({"eos_token_id": {"id": 2}}, "eos_token_id is"),
    ({"eos_token_id": -2}, "eos_token_id is -2"),
    ({"pad_token_id": VOCABULARY}, "pad_token_id is 97, outside the vocabulary of 97"),
    ({"pad_token_id": 1.0}, "pad_token_id is 1.0"),
    ({"sliding_window": 0}, "sliding_window is 0"),
    ({"sliding_window": "all"}, "sliding_window is 'all'"),
    ({"model_type": "llama"}, "model_type is 'llama'"),
    ({"model_type": None}, "model_type is None"),
    ({"model_type": ["phi3"]}, "model_type is"),
    ({"rope_theta": 0}, "rope_theta is 0"),
    ({"rope_theta": "10k"}, "rope_theta is '10k'"),
    ({"rope_theta": float("inf")}, "rope_theta is inf"),
    ({"partial_rotary_factor": 0}, "partial_rotary_factor is 0"),
    ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
    ({"partial_rotary_factor": "half"}, "partial_rotary_factor is 'half'"),
    ({"rope_scaling": "longrope"}, "rope_scaling is 'longrope'|rope_parameters is 'longrope'"),
    ({"rope_parameters": [1.0]}, "rope_parameters is"),
    ({"rope_scaling": {"type": "longrope"}}, "short_factor"),
    ({"rope_scaling": {"type": "banana"}}, "banana"),
    ({"rope_scaling": {"type": 3}}, "3"),
    (rope(long_factor=None), "long_factor"),
    (rope(short_factor=[1.0] * (HALF - 1)), "short_factor"),
    (rope(long_factor=[2.0] * (HALF + 1)), "long_factor"),
    (rope(long_factor=["2"] * HALF), "long_factor"),
    (rope(long_factor=2.0), "long_factor"),
    (rope(short_factor=[0.0] * HALF), "short_factor"),
    (rope(short_factor=[-1.0] * HALF), "short_factor"),
    (rope(long_factor=[float("inf")] * HALF), "long_factor"),
    (rope(long_factor=[True] * HALF), "long_factor"),
    (rope(rope_type="linear"), "linear"),
    (rope(factor="2"), "factor"),
    (rope(factor=-1.0), "factor"),
    (rope(attention_factor="big"), "attention_factor"),
    ({"id2label": []}, r"id2label is \[\]"),
    ({"id2label": {"x": "y"}}, "id2label has 'x'"),
    ({"id2label": {}}, "id2label is {}"),
    ({"label2id": "a"}, "label2id is 'a'"),
    ({"num_labels": 0}, "num_labels is 0"),
    ({"num_labels": "two"}, "num_labels is 'two'"),
    ({"problem_type": "guess"}, "problem_type is 'guess'"),
    ({"classifier_dropout": 1}, "classifier_dropout is 1"),
    ({"token_classification_bias": 0}, "token_classification_bias is 0"),
]

# The config of another model than the weights beside it.
NEIGHBOURS = [
    ({"vocab_size": VOCABULARY + 1}, r"embed_tokens.weight: shape \(97, "),
    ({"hidden_size": 72, "head_dim": 8}, "the config makes it"),
    ({"intermediate_size": 77}, "gate_up_proj.weight: shape"),
    ({"num_hidden_layers": 9}, "layers.8.mlp.down_proj.weight: missing"),
    ({"num_hidden_layers": 1}, "layers.1.*: unexpected"),
    ({"tie_word_embeddings": True}, "lm_head.weight: differs from model.embed_tokens.weight"),
    ({"num_hidden_layers": 4000}, "and 23942 more$"),
    ({"vocab_size": 10**9}, "the config makes it"),
]

# The file itself.
FILES = {
    "empty": (b"", "is not JSON"),
    "null": (b"null", "holds a NoneType, expected a JSON object"),
    "list": (b"[1, 2]", "holds a list"),
    "number": (b"3", "holds a int"),
    "cut short": (b'{"model_type": "phi3", "vocab', "is not JSON"),
    "UTF-16": ('{"model_type": "phi3"}'.encode("utf-16"), "is not JSON"),
    "not text": (b"\xff\xfe\x00\x01", "is not JSON"),
    "deep": (b'{"a":' * 100_000, "is not JSON"),
    "many digits": (b'{"vocab_size": ' + b"9" * 10_000 + b"}", "is not JSON"),
    "python": (b"{'model_type': 'phi3'}", "is not JSON"),
}


@pytest.fixture
def folder(tmp_path):
    """A model to be spoilt."""
    write_hf_folder(tmp_path / "model")
    return tmp_path / "model"


def with_values(folder, **changes):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    if {"rope_theta", "partial_rotary_factor", "rope_scaling"} & changes.keys():
        del values["rope_parameters"]  # which would count alone
    path.write_text(json.dumps({**values, **changes}))


def said(refused, folder):
    return refused(cli.main, "to-orbax", folder, folder.parent / "target")


@pytest.mark.parametrize(("changes", "words"), FIELDS + NEIGHBOURS, ids=str)
def test_a_field(refused, folder, changes, words):
    with_values(folder, **changes)
    assert re.search(words, said(refused, folder))


@pytest.mark.parametrize("kind", FILES)
def test_a_file(refused, folder, kind):
    content, words = FILES[kind]
    (folder / "config.json").write_bytes(content)
    assert words in said(refused, folder)


def test_a_directory_in_its_place(refused, folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert "no config.json in" in said(refused, folder)


def test_none(refused, folder):
    (folder / "config.json").unlink()
    assert "no config.json in" in said(refused, folder)
