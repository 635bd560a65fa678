"""Vocabularies that grow and shrink."""

import jax
import numpy as np
import pytest
from reference import config_values, cut_padding, hf_weights, on_mesh, params_of, tokens

import phi3_jax as phi3
from phi3_jax.resize import resize_token_embeddings
from phi3_jax.sharding import abstract_params, make_mesh


@pytest.mark.parametrize("case", ["gqa", "mqa_tied_window1"])
@pytest.mark.parametrize("size", [103, 90])
@pytest.mark.parametrize("tensor", [1, 4])
def test_words_that_stay_keep_their_logits(case, size, tensor):
    config = phi3.Phi3Config(**config_values(case))
    model, params = phi3.Phi3ForCausalLM(config), params_of(config, hf_weights(config, case))
    ids = tokens(2, 5) % 90
    expected = model.apply({"params": params}, ids).logits
    table = np.asarray(params["model"]["embed_tokens"]["weight"])
    model, params = on_mesh(model, params, make_mesh(1, 1, tensor, devices=jax.devices()[:tensor]))
    model, params = resize_token_embeddings(model, params, size)
    assert model.config.vocab_size == size
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.sharding), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.sharding), abstract_params(model)
    )
    logits = model.apply({"params": params}, ids).logits
    kept = min(size, 97)
    assert logits.shape == (2, 5, size)
    np.testing.assert_allclose(logits[..., :kept], expected[..., :kept], rtol=1e-4, atol=1e-4)
    rows = np.asarray(cut_padding(params, model)["model"]["embed_tokens"]["weight"])
    np.testing.assert_allclose(
        rows[97:], np.tile(table.mean(axis=0), (max(0, size - 97), 1)), atol=1e-6
    )


def test_a_padding_id_cannot_be_cut_off():
    config = phi3.Phi3Config(**{**config_values("gqa"), "pad_token_id": 96})
    model = phi3.Phi3ForCausalLM(config)
    with pytest.raises(ValueError, match="pad_token_id is 96, outside the vocabulary of 90"):
        resize_token_embeddings(model, phi3.init_params(model), 90)
