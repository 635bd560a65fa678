"""Weights that are NaN, or too large for their dtype: no token is chosen by what they give."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from reference import config_values, hf_weights, params_of, tokens

import phi3_jax as phi3

CASE, LAYER = "longrope", ("model", "layers", "mlp", "down_proj", "weight")
WAYS = {
    "greedy": {},
    "drawn": dict(do_sample=True, seed=1),
    "drawn of few": dict(do_sample=True, seed=1, top_k=4, top_p=0.5, typical_p=0.5, min_p=0.1),
    "beams": dict(num_beams=3),
    "beams with outputs": dict(num_beams=3, output_scores=True),
    "drawn beams": dict(num_beams=3, do_sample=True, seed=1),
    "looked up": dict(prompt_lookup_num_tokens=3),
    "guidance": dict(guidance_scale=2.0),
    "step by step": dict(output_logits=True),
}


@functools.cache
def model_and_params():
    config = phi3.Phi3Config(**config_values(CASE))
    return phi3.Phi3ForCausalLM(config), params_of(config, hf_weights(config, CASE))


def changed(params: dict, path: tuple[str, ...], change) -> dict:
    """The parameters with another leaf."""
    name, *rest = path
    inner = changed(params[name], tuple(rest), change) if rest else change(params[name])
    return {**params, name: inner}


def generate(params: dict, dtype=jnp.float32, **settings):
    model, _ = model_and_params()
    return phi3.generate(
        model.clone(dtype=dtype), params, tokens(2, 7), max_new_tokens=5, **settings
    )


@pytest.mark.parametrize("way", WAYS)
def test_one_nan_is_refused(way):
    params = changed(model_and_params()[1], LAYER, lambda x: x.at[0, 1, 2].set(jnp.nan))
    with pytest.raises(ValueError, match=r"new token 0 of row 0 are NaN: the weights hold NaN"):
        generate(params, **WAYS[way])


@pytest.mark.parametrize("way", ["greedy", "drawn beams"])
def test_numbers_too_large_for_float16(way):
    """Which float32 holds."""
    params = changed(model_and_params()[1], LAYER, lambda x: x * 1e6)
    generate(params, **WAYS[way])
    with pytest.raises(ValueError, match="too large for float16; use .* float32"):
        generate(params, jnp.float16, **WAYS[way])


def test_a_nan_on_the_way_ends_it_there():
    """In the embedding of the second token; what came before has been handed out."""
    model, params = model_and_params()
    second = int(generate(params).sequences[1, 8])
    path = ("model", "embed_tokens", "weight")
    params = changed(params, path, lambda x: x.at[second].set(jnp.nan))
    with pytest.raises(ValueError, match="new token 2 of row 1"):
        generate(params)
    handed_out = []
    with pytest.raises(ValueError, match="new token 2 of row 1"):
        for token_B in phi3.stream(model, params, tokens(2, 7), max_new_tokens=5):
            handed_out.append(token_B)
    assert len(handed_out) == 2 and (np.stack(handed_out) >= 0).all()


def test_remove_invalid_values_takes_them_for_0():
    params = changed(model_and_params()[1], LAYER, lambda x: x.at[0, 1, 2].set(jnp.nan))
    assert (generate(params, remove_invalid_values=True).sequences[:, 7:] == 0).all()
