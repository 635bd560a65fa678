"""The checks of real weights, on a small random model and with the figures of transformers."""

import dataclasses
import os
import shutil

import jax
import numpy as np
import pytest
from published import PUBLISHED, check_logits, find_models, greedy_text, load, read_figures
from small_models import GOLDEN, NAME, write_small_model

import phi3_jax as phi3
from convert.to_orbax import to_orbax

SMALL = read_figures(GOLDEN)[NAME]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "small"
    write_small_model(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return *load(folder), SMALL


def test_logits_agree_with_one_of_those_published(loaded):
    model, params, _, figures = loaded
    other = {"other": figures.logits["transformers"] + 1}
    several = dataclasses.replace(figures, logits={**other, **figures.logits})
    assert check_logits(model, params, several) == "transformers"
    with pytest.raises(AssertionError, match=r"differ from all .*\{'other': (1\.0|0\.99)"):
        check_logits(model, params, dataclasses.replace(figures, logits=other))


def test_one_logit_that_is_off_is_seen(loaded):
    model, params, _, figures = loaded
    wrong = figures.logits["transformers"].copy()
    wrong[1, 29] += 2e-3
    with pytest.raises(AssertionError, match="differ from all"):
        check_logits(model, params, dataclasses.replace(figures, logits={"wrong": wrong}))


@pytest.mark.parametrize("static", [False, True])
def test_text(loaded, static):
    figures = loaded[-1]
    wanted = figures.static_text if static else figures.text
    assert greedy_text(*loaded, static=static) == wanted
    assert figures.text.startswith(figures.static_text) and figures.text != figures.static_text


def test_a_converted_folder_is_loaded_in_float32(folder, tmp_path):
    to_orbax(folder, tmp_path / "orbax")
    model, params, _ = load(tmp_path / "orbax")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    assert check_logits(model, params, SMALL) == "transformers"


def test_folders_are_told_by_name_or_config(tmp_path):
    short, long = "Phi-3-mini-4k-instruct", "Phi-3-mini-128k-instruct"
    for name, positions in ((short, 4096), (long, 131072)):
        phi3.Phi3Config(max_position_embeddings=positions).save_pretrained(tmp_path / name)
        assert find_models(tmp_path / name) == {name: tmp_path / name}
    assert find_models(tmp_path) == {name: tmp_path / name for name in (short, long)}
    shutil.rmtree(tmp_path / long)
    assert find_models(tmp_path) == {short: tmp_path / short}
    phi3.Phi3Config(max_position_embeddings=512).save_pretrained(tmp_path / "other")
    for folder in (tmp_path / "other", tmp_path / "missing"):
        with pytest.raises(ValueError, match="neither is nor holds one of Phi-3-mini-4k"):
            find_models(folder)


def test_published_logits_are_finer_than_bfloat16():
    for figures in PUBLISHED.values():
        assert len(figures.logits) == 2
        for logits in figures.logits.values():
            assert logits.shape == (2, 30)
            coarse = logits.astype("bfloat16").astype(float)
            assert not np.allclose(coarse, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_texts_are_what_the_tokenizer_makes(name):
    if not (folder := os.environ.get("PHI3_TOKENIZER_DIR")):
        pytest.skip("PHI3_TOKENIZER_DIR names no folder with Phi-3's tokenizer files")
    tokenizer, figures = phi3.Tokenizer.from_pretrained(folder), PUBLISHED[name]
    prompt = tokenizer.apply_chat_template(figures.messages, add_generation_prompt=True)
    opening = tokenizer.decode(prompt)
    for text, tokens in (
        (figures.text, len(prompt) + figures.max_new_tokens),
        (figures.static_text, figures.static_tokens),
    ):
        assert text.startswith(f"{opening} Certainly!")
        ids = prompt + tokenizer.encode(text.removeprefix(f"{opening} "))
        assert len(ids) == tokens and tokenizer.decode(ids) == text
