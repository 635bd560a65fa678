"""Decoding on a CPU with each layer's parameters and slots by themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from no_cache import VOCAB, small_model

import phi3_jax as phi3
from phi3_jax.cache import KVCache
from phi3_jax.generation import decoding
from phi3_jax.generation.prepare import prepare
from phi3_jax.sharding import init_params
from phi3_jax.split_layers import decodes_split, split_layers

CONFIG = phi3.Phi3Config(
    vocab_size=320,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    pad_token_id=0,
)


def small(dtype=jnp.float32):
    model = phi3.Phi3ForCausalLM(CONFIG, dtype, dtype)
    return model, init_params(model)


def tokens(rows, width, seed=0):
    return np.random.default_rng(seed).integers(3, VOCAB, (rows, width))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_split_parameters_are_views(dtype):
    _, params = small(dtype)
    split = split_layers(params)
    assert sorted(split["model"]["layers"]) == ["0", "1", "2"]
    whole = params["model"]["layers"]["mlp"]["down_proj"]["weight"]
    for layer in range(3):
        own = split["model"]["layers"][str(layer)]["mlp"]["down_proj"]["weight"]
        np.testing.assert_array_equal(own, whole[layer])
        there = whole.unsafe_buffer_pointer() + layer * own.nbytes
        assert own.unsafe_buffer_pointer() == there
    table = params["model"]["embed_tokens"]
    assert ("bits" in split["model"]["embed_tokens"]) == (dtype == jnp.bfloat16)
    if dtype == jnp.bfloat16:
        bits = split["model"]["embed_tokens"]["bits"]
        assert bits.unsafe_buffer_pointer() == table["weight"].unsafe_buffer_pointer()
    assert split["lm_head"]["weight"] is params["lm_head"]["weight"]
    assert split_layers(split)["model"] is split["model"]
    boxed = small()[0].init(jax.random.key(0), tokens(1, 2))["params"]
    assert jax.tree.structure(split_layers(boxed)) == jax.tree.structure(split_layers(small()[1]))
    assert decodes_split(params) and decodes_split(split)
    assert not decodes_split(jax.eval_shape(lambda: params))


@pytest.mark.parametrize("case", ["gqa", "mha_window", "longrope_partial_tied"])
def test_they_compute_the_same(case):
    model, params = small_model(case)
    ids, split = tokens(2, 7), split_layers(params)
    ask = dict(output_hidden_states=True, output_attentions=True)
    run = jax.jit(lambda params: model.apply({"params": params}, ids, **ask))
    for ours, wanted in zip(jax.tree.leaves(run(split)), jax.tree.leaves(run(params)), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", [{}, {"ring": True}, {"quantized": True}])
@pytest.mark.parametrize("given", [False, True], ids=["stacked", "split"])
def test_caches_of_both_forms(kind, given):
    """A prompt, a padded chunk, then tokens one by one; a row is left out of one call."""
    model, params = small_model("mha_window")
    masks = [np.ones((2, 9)), np.array([[0, 1, 1, 1], [1, 1, 1, 1]]), np.ones((2, 1))]
    masks += [np.array([[1], [0]]), np.ones((2, 1))]
    results = []
    for some in (params, split_layers(params)):
        cache = KVCache.init(model.config, 2, 20, jnp.float32, split=given, **kind)
        run = jax.jit(
            lambda ids, mask, cache, some=some: model.apply(
                {"params": some}, ids, token_mask=mask, cache=cache
            )
        )
        logits = []
        for step, mask in enumerate(masks):
            out = run(tokens(*mask.shape, seed=step), mask, cache)
            cache = out.cache
            logits.append(np.where(mask[..., None] == 1, out.logits, 0))
        assert cache.is_split == (some is not params)
        results.append((logits, cache.split(False)))
    for ours, wanted in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=3e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_loop_copies_neither_weights_nor_cache(dtype, batch):
    model, params = small(dtype)
    request = prepare(
        model, params, tokens(batch, 5), max_new_tokens=2000, eos_token_id=None, do_sample=False
    )
    request.start()
    state = request.state
    assert state.cache.is_split and state.cache.k_LBKSH[0].dtype == jnp.float32
    loop = decoding.decode_loop.lower(
        request.model, request.params, state, request.plan, np.int32(2000)
    ).compile()
    memory = loop.memory_analysis()
    slots = state.cache.k_LBKSH[0].nbytes
    weight = params["model"]["layers"]["mlp"]["gate_up_proj"]["weight"][0].nbytes
    assert memory.temp_size_in_bytes < min(slots, weight), (slots, weight)
    cache = sum(x.nbytes for x in jax.tree.leaves(state.cache))
    assert memory.alias_size_in_bytes >= cache


def test_training_refuses_split_parameters():
    model, params = small()
    with pytest.raises(ValueError, match="each layer by itself are for inference"):
        model.apply({"params": split_layers(params)}, tokens(1, 3), deterministic=False)
