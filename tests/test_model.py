"""The decoder: windows, the cache, masks, losses. Numbers of the reference: test_golden.py."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import config_values, hf_weights, params_of, tokens

import phi3_jax as phi3
from phi3_jax.attention import causal_mask


@functools.cache
def model_and_params(case: str, **changes):
    config = phi3.Phi3Config(**{**config_values(case), **changes})
    return phi3.Phi3ForCausalLM(config), params_of(config, hf_weights(config, case))


def forward(model, params, ids, **inputs):
    return model.apply({"params": params}, jnp.asarray(ids), **inputs)


# One program is compiled much faster than each operation alone; what looks at values stays as is.
compiled = jax.jit(forward, static_argnames="model")


def test_window_counts_the_query_itself():
    """W = 3 sees 1, 2, 3, 3, ... keys (trap 18)."""
    seen = causal_mask(jnp.arange(6), jnp.arange(6), 3)
    assert seen.sum(axis=1).tolist() == [1, 2, 3, 3, 3, 3]
    assert seen[5].tolist() == [False, False, False, True, True, True]


def test_holes_use_the_window_up():
    """The window counts columns, padding with them: behind a hole, row 8 sees itself only
    (trap 19)."""
    model, params = model_and_params("mha_window", sliding_window=3)
    ids, mask = tokens(1, 9), np.ones((1, 9), np.int32)
    mask[0, 5:8] = 0
    with_hole = compiled(model, params, ids, attention_mask=mask).logits[0, 8]
    # What column 8 computes is then a row of one token at position 8.
    alone = compiled(model, params, ids[:, 8:], position_ids=jnp.array([[8]])).logits[0, 0]
    np.testing.assert_allclose(with_hole, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["mha_window", "longrope_window"])
def test_single_steps_through_the_window_equal_one_forward(case):
    """More than three windows of single-token calls (trap 20)."""
    model, params = model_and_params(case, original_max_position_embeddings=64)
    width = 3 * model.config.sliding_window + 2
    ids = tokens(2, width)
    whole = compiled(model, params, ids).logits
    cache, steps = phi3.KVCache.init(model.config, 2, width, jnp.float32), []
    for column in range(width):
        out = compiled(model, params, ids[:, column : column + 1], cache=cache)
        cache = out.cache
        steps.append(out.logits)
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), whole, rtol=1e-4, atol=1e-4)


def test_chunks_appended_to_a_cache_equal_one_forward():
    model, params = model_and_params("gqa")
    ids = tokens(2, 11)
    whole = compiled(model, params, ids).logits
    cache, parts = phi3.KVCache.init(model.config, 2, 13, jnp.float32), []
    for start, stop in ((0, 4), (4, 5), (5, 11)):
        out = compiled(model, params, ids[:, start:stop], cache=cache)
        cache = out.cache
        parts.append(out.logits)
    assert int(cache.length) == 11 and cache.valid_BS.sum() == 22
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing_for_real_tokens():
    model, params = model_and_params("longrope")
    ids = tokens(1, 9)
    alone = compiled(model, params, ids).logits[0]
    padded = np.concatenate([np.zeros((1, 4), np.int32), ids], axis=1)
    mask = padded != 0
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    out = compiled(model, params, padded, attention_mask=mask, position_ids=positions).logits
    np.testing.assert_allclose(out[0, 4:], alone, rtol=1e-4, atol=1e-5)
    assert np.isfinite(out).all()
    # On the right, beyond the line of 16: finite, and without effect on the row's rope.
    right = np.concatenate([ids, np.zeros((1, 14), np.int32)], axis=1)
    out = compiled(model, params, right, attention_mask=right != 0).logits
    np.testing.assert_allclose(out[0, :9], alone, rtol=1e-4, atol=1e-5)
    assert np.isfinite(out).all()


def test_fully_masked_rows_stay_finite():
    model, params = model_and_params("gqa")
    out = forward(model, params, tokens(2, 5), attention_mask=np.zeros((2, 5), np.int32))
    assert np.isfinite(out.logits).all()


def test_cache_overflow_is_refused():
    """A write past the end would overwrite the last slot without a word (trap 21)."""
    model, params = model_and_params("gqa")
    cache = phi3.KVCache.init(model.config, 1, 6, jnp.float32)
    out = forward(model, params, tokens(1, 4), cache=cache)
    with pytest.raises(ValueError, match="6 slots, 4 of them used: 3 more"):
        forward(model, params, tokens(1, 3), cache=out.cache)
    with pytest.raises(ValueError, match="6 slots"):
        jax.jit(lambda ids: forward(model, params, ids, cache=cache).logits)(tokens(1, 7))


def test_a_compiled_write_past_the_end_is_nan():
    """Where the fill is not known nothing can be refused, but nothing is right either."""
    model, params = model_and_params("gqa")
    step = jax.jit(lambda ids, at, cache: forward(model, params, ids, position_ids=at, cache=cache))
    cache = phi3.KVCache.init(model.config, 1, 3, jnp.float32)
    for column, token in enumerate(tokens(1, 4)[0]):
        out = step(np.array([[token]]), np.array([[column]]), cache)
        cache = out.cache
        assert np.isnan(out.logits).all() == (column == 3)


def test_narrow_integers_mean_what_they_say():
    """156 is -100 in eight bits."""
    model, params = model_and_params("gqa", vocab_size=300)
    ids = np.array([[200, 156, 17, 156]])
    expected = forward(model, params, ids, labels=ids).loss
    narrow = ids.astype(np.uint8)
    np.testing.assert_array_equal(forward(model, params, narrow, labels=narrow).loss, expected)


def test_half_precision_masks_stay_finite():
    """A mask that is added in float16 would be -inf (trap 24)."""
    model, params = model_and_params("gqa")
    half = phi3.Phi3ForCausalLM(model.config, dtype=jnp.float16)
    small = jax.tree.map(lambda leaf: (leaf * 0.3).astype(jnp.float16), params)
    ids, mask = tokens(3, 7), np.ones((3, 7), np.int32)
    mask[0, :3] = mask[2] = 0
    value = lambda params: forward(half, params, ids, attention_mask=mask, labels=ids).loss  # noqa: E731
    loss, gradients = jax.jit(jax.value_and_grad(value))(small)
    assert np.isfinite(loss) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    lowest = np.where(mask[:, None, None, :] != 0, 0, np.finfo(np.float16).min).astype(np.float16)
    causal = np.triu(np.full((7, 7), np.finfo(np.float16).min), 1).astype(np.float16)
    added = compiled(half, small, ids, attention_mask=np.minimum(lowest, causal)).logits
    kept = compiled(half, small, ids, attention_mask=mask).logits
    real = mask != 0
    np.testing.assert_allclose(added[real], kept[real], atol=2e-2)


def test_masked_tokens_leave_their_slots_alone():
    model, params = model_and_params("gqa")
    cache = phi3.KVCache.init(model.config, 2, 8, jnp.float32)
    first = forward(model, params, tokens(2, 4), cache=cache).cache
    mask = np.array([[1, 1, 1, 1], [0, 0, 0, 0]])
    again = forward(
        model,
        params,
        tokens(2, 4, seed=1),
        cache=first.rewind(np.array([True, False])),
        attention_mask=mask,
    ).cache
    np.testing.assert_array_equal(again.k_LBKSH[:, 1], first.k_LBKSH[:, 1])
    assert (again.k_LBKSH[:, 0, :, :4] != first.k_LBKSH[:, 0, :, :4]).any()
    assert again.valid_BS[1].tolist() == first.valid_BS[1].tolist()


def test_truncated_slots_are_forgotten():
    model, params = model_and_params("gqa")
    ids = tokens(1, 6)
    cache = phi3.KVCache.init(model.config, 1, 8, jnp.float32)
    cache = forward(model, params, ids, cache=cache).cache.truncate(4)
    out = forward(model, params, ids[:, 4:], cache=cache)
    whole = compiled(model, params, ids).logits
    np.testing.assert_allclose(out.logits, whole[:, 4:], rtol=1e-4, atol=1e-5)


def test_logits_to_keep():
    model, params = model_and_params("gqa")
    ids = tokens(2, 7)
    whole = forward(model, params, ids).logits
    # Other numbers of rows are other products to a CPU, which end in other bits.
    some = forward(model, params, ids, logits_to_keep=2).logits
    np.testing.assert_allclose(some, whole[:, 5:], rtol=0, atol=1e-5)
    assert forward(model, params, ids, logits_to_keep=9).logits.shape == whole.shape
    columns = jnp.array([4, 1])
    np.testing.assert_allclose(
        forward(model, params, ids, logits_to_keep=columns).logits, whole[:, [4, 1]], atol=1e-6
    )
    for same in ([4, 1], np.array([4, 1])):
        out = forward(model, params, ids, logits_to_keep=same)
        np.testing.assert_allclose(out.logits, whole[:, [4, 1]], atol=1e-6)
    out = forward(model, params, ids, logits_to_keep=np.int64(2))
    np.testing.assert_allclose(out.logits, whole[:, 5:], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="logits_to_keep=0"):
        forward(model, params, ids, labels=ids, logits_to_keep=2)


def test_loss_counts_labels_not_rows():
    """The mean over all counted labels, -100 left out, the padding id counted (traps 29, 31)."""
    model, params = model_and_params("gqa")
    ids = tokens(2, 6)
    labels = ids.astype(np.int64)
    labels[0, 2:] = -100
    labels[1, 3] = 0
    out = forward(model, params, ids, labels=labels)
    log_probs = jax.nn.log_softmax(out.logits, axis=-1)
    picked = [
        log_probs[row, column - 1, labels[row, column]]
        for row in range(2)
        for column in range(1, 6)
        if labels[row, column] != -100
    ]
    np.testing.assert_allclose(out.loss, -np.mean(picked), rtol=1e-6)


def test_no_label_gives_no_loss():
    model, params = model_and_params("gqa")
    loss = forward(model, params, tokens(1, 4), labels=np.full((1, 4), -100)).loss
    assert loss == 0


def test_base_model_ends_before_the_head():
    model, params = model_and_params("mqa_tied_window1")
    ids = tokens(2, 5)
    base = phi3.Phi3Model(model.config).apply({"params": params["model"]}, ids)
    logits = base.last_hidden_state @ params["model"]["embed_tokens"]["weight"].T
    np.testing.assert_allclose(logits, forward(model, params, ids).logits, rtol=1e-4, atol=1e-5)
    assert "lm_head" not in params


def test_initial_parameters():
    config = phi3.Phi3Config(**config_values("gqa"), initializer_range=0.02)
    model = phi3.Phi3ForCausalLM(config, param_dtype=jnp.bfloat16)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 2), jnp.int32)))["params"]
    table = np.asarray(params["model"]["embed_tokens"]["weight"], np.float32)
    assert table.std() == pytest.approx(0.02, rel=0.05) and not table[config.pad_token_id].any()
    layers = params["model"]["layers"]
    assert layers["self_attn"]["qkv_proj"]["weight"].shape == (3, 2, 5, 8, 48)
    assert layers["self_attn"]["qkv_proj"]["weight"].dtype == jnp.bfloat16
    assert (layers["input_layernorm"]["weight"] == 1).all()
    first, second = layers["mlp"]["down_proj"]["weight"][:2]
    assert (first != second).any(), "layers must not share their random numbers"


def test_unknown_ids_are_nan_not_a_neighbours_row():
    """A gather would clamp or wrap (trap 22; generate() refuses such ids besides)."""
    model, params = model_and_params("gqa")
    for unknown in (97, -1):
        with pytest.raises(ValueError, match=f"input_ids holds {unknown}, outside the vocabulary"):
            model.apply({"params": params}, [[3, unknown]])
        assert np.isnan(forward(model, params, [[3, unknown]]).logits[0, 1]).all()
        ids = tokens(1, 3)
        assert np.isnan(forward(model, params, ids, labels=[[3, 4, unknown]]).loss)
    at_minus_1 = forward(model, params, [[3]], position_ids=[[-1]])
    assert np.isnan(at_minus_1.logits).all()


@pytest.mark.parametrize("kind", [np.float32, jnp.bfloat16, np.bool_])
def test_ids_that_are_no_whole_numbers_are_refused(kind):
    """Cast to some, 4.7 would be word 4, and a mask in the place of ids the words 0 and 1."""
    model, params = model_and_params("gqa")
    for array in (np.asarray, jnp.asarray):
        with pytest.raises(ValueError, match="input_ids are .*, must be whole numbers"):
            model.apply({"params": params}, array([[3, 4]]).astype(kind))


def test_a_cache_of_another_batch_or_model_is_refused():
    model, params = model_and_params("gqa")
    for config, rows in ((model.config, 2), (phi3.Phi3Config(**config_values("head_dim")), 1)):
        cache = phi3.KVCache.init(config, rows, 8, jnp.float32)
        with pytest.raises(ValueError, match="the cache has .layers, rows"):
            forward(model, params, tokens(1, 4), cache=cache)


@pytest.mark.parametrize(
    "inputs, words",
    [
        ({"ids": [3, 4]}, "input_ids has shape"),
        ({"attention_mask": np.ones((2, 3))}, "attention_mask has shape"),
        ({"position_ids": np.ones((1, 3), int)}, "position_ids has shape"),
    ],
)
def test_wrong_shapes_are_named(inputs, words):
    model, params = model_and_params("gqa")
    with pytest.raises(ValueError, match=words):
        forward(model, params, inputs.pop("ids", tokens(2, 4)), **inputs)
