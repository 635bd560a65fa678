"""Prompts and settings that cannot be served: `phi3-generate` and `generate` say why."""

import io
import re
import shutil
import sys

import numpy as np
import pytest

import phi3_jax as phi3
from phi3_jax import chat_cli, cli

# Arguments of the command -> what is said.
COMMANDS = {
    "empty": ([""], "the prompt is empty"),
    "blanks": ([" \n\t"], "the prompt is empty"),
    "empty input": (["-"], "the prompt is empty"),
    "a megabyte": (["capital " * 131_072], "tokens.*cache"),
    "no such folder": (["Hi", "--model", "no/such/folder"], "there is no folder 'no/such/folder'"),
    "a file": (["Hi", "--model", __file__], "is a file, expected a model folder"),
    "a folder of something else": (["Hi", "--model", "/usr"], "/usr"),
    "no new tokens": (["Hi", "--max-new-tokens", "0"], "max_new_tokens is 0, must be"),
    "countless new tokens": (["Hi", "--max-new-tokens", "4294967296"], "max_new_tokens is"),
    "more than the cache": (["Hi", "--max-new-tokens", "600"], "600"),
    "no cache": (["Hi", "--cache-length", "0"], "cache_length is 0"),
    "a cache below the prompt": (["Hi there, you", "--cache-length", "3"], "3"),
    "temperature below 0": (["Hi", "--temperature", "-1"], "temperature is -1.0, must be above 0"),
    "temperature nan": (["Hi", "--temperature", "nan"], "temperature is nan"),
    "top_p of 1.5": (["Hi", "--temperature", "1", "--top-p", "1.5"], "top_p is 1.5, must be in"),
    "top_p below 0": (["Hi", "--temperature", "1", "--top-p", "-0.5"], "top_p is -0.5"),
    "top_k below 0": (["Hi", "--temperature", "1", "--top-k", "-3"], "top_k is -3"),
    "min_p of 2": (["Hi", "--temperature", "1", "--min-p", "2"], "min_p is 2.0"),
    "repetition penalty of 0": (["Hi", "--repetition-penalty", "0"], "repetition_penalty is 0.0"),
    "no beams": (["Hi", "--num-beams", "0"], "num_beams is 0"),
    "stop at nothing": (["Hi", "--stop", ""], "stop_strings is"),
    "no time": (["Hi", "--max-time", "0"], "max_time is 0.0"),
    "4 bits": (["Hi", "--kv-bits", "4"], "--kv-bits is 4"),
    "guesses of nobody": (["Hi", "--num-draft-tokens", "3"], "give --draft-model too"),
    "guesses by two": (
        ["Hi", "--draft-model", "x", "--prompt-lookup-num-tokens", "3"],
        "do not go together",
    ),
    "guesses and beams": (
        ["Hi", "--prompt-lookup-num-tokens", "3", "--num-beams", "2"],
        "do not go together",
    ),
    "no guesses": (["Hi", "--prompt-lookup-num-tokens", "0"], "prompt_lookup_num_tokens is 0"),
    "no such draft": (["Hi", "--draft-model", "nowhere"], "there is no folder 'nowhere'"),
    "no such schema": (["Hi", "--json-schema", "none.json"], "none.json"),
    "a schema that is none": (["Hi", "--json-schema", __file__], "is not JSON"),
    "unknown dtype": (["Hi", "--dtype", "float7"], "float7"),
    "dtype of integers": (["Hi", "--dtype", "int8"], "int8"),
    "prompt cache in no folder": (
        ["Hi", "--prompt-cache-file", "no/where.safetensors"],
        "no/where",
    ),
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_command(refused, kind):
    arguments, words = COMMANDS[kind]
    error = refused(cli.generate_command, *arguments)
    assert re.search(words, error, re.DOTALL), error


# Of these the command line says what it may be, and ends with its own status.
USAGE = {
    "no prompt": [],
    "a number that is none": ["Hi", "--top-k", "many"],
    "a whole number that is none": ["Hi", "--max-new-tokens", "2.5"],
    "an unknown option": ["Hi", "--temprature", "1"],
    "two prompts": ["Hi", "there"],
    "an option without a value": ["Hi", "--model"],
}


@pytest.mark.parametrize("kind", USAGE)
def test_usage(refused, kind):
    error = refused(cli.generate_command, *USAGE[kind], status=2)
    assert "Usage: " in error or "requires an argument" in error


SETTINGS_FILES = {
    "not JSON": ("{", "generation_config.json is not JSON"),
    "a list": ("[]", "generation_config.json holds a list"),
    "too deep": ('{"a":' * 100_000, "nested too deeply"),
    "temperature of text": ('{"temperature": "hot"}', "temperature is 'hot'"),
    "eos below 0": ('{"eos_token_id": -1}', "eos_token_id is -1"),
    "top_p above 1": ('{"do_sample": true, "top_p": 3.0}', "top_p is 3.0, must be in"),
    "sequences without beams": ('{"num_return_sequences": 3}', "num_return_sequences is 3"),
    "a cache elsewhere": ('{"cache_implementation": "offloaded"}', "is not supported"),
    "what code on the hub has": ('{"penalty_alpha": 0.6}', "penalty_alpha is 0.6"),
    "a bias of text": ('{"sequence_bias": [[[5], "much"]]}', "sequence_bias is"),
    "words of nothing": ('{"bad_words_ids": [[]]}', "bad_words_ids is"),
    "ids outside": ('{"forced_eos_token_id": 5000}', "5000, outside the vocabulary of 1024"),
}


@pytest.mark.parametrize("kind", SETTINGS_FILES)
def test_settings_of_a_folder(refused, tmp_path, kind):
    content, words = SETTINGS_FILES[kind]
    shutil.copytree(cli.EMBEDDED_MODEL, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(content)
    error = refused(cli.generate_command, "Hi", "--model", tmp_path / "model")
    assert words in error


@pytest.fixture(scope="module")
def loaded():
    return phi3.from_pretrained(cli.EMBEDDED_MODEL, dtype="float32")


IDS = {
    "no rows": ([], "input_ids"),
    "an empty row": ([[]], "input_ids"),
    "ragged": ([[5, 6], [7]], "input_ids"),
    "one row without its list": ([5, 6], "input_ids"),
    "three dimensions": ([[[5]]], "input_ids"),
    "below 0": ([[5, -1]], "-1"),
    "beyond the vocabulary": ([[5, 1024]], "1024"),
    "floats": ([[5.0, 6.5]], "input_ids"),
    "texts": ([["5"]], "input_ids"),
    "a text": ("Hello", "input_ids"),
    "NaN": (np.full((1, 2), np.nan), "input_ids"),
    "truth": (np.ones((1, 2), bool), "input_ids"),
}


@pytest.mark.parametrize("kind", IDS)
def test_ids(loaded, kind):
    ids, words = IDS[kind]
    with pytest.raises(ValueError, match=words):
        phi3.generate(*loaded, ids, max_new_tokens=2)


MASKS = {
    "too short": ([[1, 1]], r"shape \(1, 2\)"),
    "too long": ([[1, 1, 1, 1]], r"shape \(1, 4\)"),
    "of two rows": ([[1, 1, 1]] * 2, r"shape \(2, 3\)"),
    "ragged": ([[1, 1, 1], [1]], r"shape \(0,\)"),
    "one dimension": ([1, 1, 1], r"shape \(3,\)"),
    "of nothing": ([[0, 0, 0]], "row 0 of the prompt has no token at all"),
    "padded on the right": ([[1, 1, 0]], "row 0 of the prompt has padding on the right"),
    "of text": ([["a", "b", "c"]], "dtype <U1"),
    "of None": ([[1, None, 1]], "dtype object"),
    "NaN": (np.full((1, 3), np.nan), "0 for padding, 1 for tokens"),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks(loaded, kind):
    mask, words = MASKS[kind]
    with pytest.raises(ValueError, match=words):
        phi3.generate(*loaded, [[5, 6, 7]], mask, max_new_tokens=2)


def test_a_conversation_that_a_chat_cannot_hold(monkeypatch, capsys):
    """In a chat an error costs the turn and no more."""
    lines = ["capital " * 2000, "!set temperature=hot", "!set top_p=7", "!save", "!sing", "!exit"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    monkeypatch.setattr(sys, "argv", ["phi3-chat"])
    with pytest.raises(SystemExit) as stop:
        chat_cli.chat_command()
    assert stop.value.code == 0
    out, err = capsys.readouterr()
    assert err.count("error: ") == 5 and "Traceback" not in err and out == ""
