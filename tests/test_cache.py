"""The kinds of caches: a ring equals the full one, eight bits come near it, rows come and go.

Calls have 1, 9 or 32 columns and two rows: what costs is compiling for another number.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import config_values, hf_weights, left_padded, on_mesh, params_of, prompts, tokens

import phi3_jax as phi3
from phi3_jax.rope import rope_tables
from phi3_jax.slots import quantize

CAPACITY = 32


@functools.cache
def model_and_params(case: str = "mha_window", **changes):
    far = {"original_max_position_embeddings": 64}  # most tests are not about longrope
    config = phi3.Phi3Config(**{**config_values(case), **far, **changes})
    return phi3.Phi3ForCausalLM(config), params_of(config, hf_weights(config, case))


# Less optimised code: half the time to compile, and nothing else changes.
@functools.partial(
    jax.jit,
    static_argnames=("model", "attentions"),
    compiler_options={"xla_backend_optimization_level": 0},
)
def call(model, params, ids, mask, positions, cache, rope=None, attentions=False):
    return model.apply(
        {"params": params},
        ids,
        token_mask=mask,
        position_ids=positions,
        cache=cache,
        rope=rope,
        output_attentions=attentions,
    )


def batch(lengths=(32, 29)):
    """Rows padded on the left, their mask, and positions that count their own tokens."""
    ids, mask = left_padded(prompts(lengths))
    return ids, mask.astype(bool), np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)


def without_cache(model, params, *inputs):
    """The logits of one call, 32 columns wide by padding on the right."""
    width = inputs[0].shape[1]
    inputs = [np.pad(x, ((0, 0), (0, CAPACITY - width))) for x in inputs]
    return np.asarray(call(model, params, *inputs, None).logits)[:, :width]


def in_pieces(model, params, inputs, cache, sizes, rope=None):
    """The logits of the columns, computed in calls of so many, and the cache."""
    found, start = [], 0
    cache = cache.replace(filled=True)  # an empty one can be looked at as well
    for size in sizes:
        piece = [x[:, start : start + size] for x in inputs]
        out = call(model, params, *piece, cache, rope)
        cache, start = out.cache, start + size
        found.append(np.asarray(out.logits))
    return np.concatenate(found, axis=1), cache


@functools.partial(jax.jit, static_argnames=("model", "capacity", "ring", "quantized"))
def new_cache(model, rows=2, capacity=CAPACITY, ring=False, quantized=False):
    return phi3.KVCache.init(model.config, rows, capacity, jnp.float32, model.mesh, ring, quantized)


def assert_same(found, wanted, mask):
    np.testing.assert_allclose(found[mask], wanted[mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["mha_window", "mqa_tied_window1", "longrope_window"])
def test_a_ring_equals_one_forward(case):
    """Windows of 5, 1 and 7 columns, more than three of them one by one and a piece longer than
    the ring, with padding on the left and in between (traps 18 to 20).
    """
    model, params = model_and_params(case)
    inputs, cache = batch(), new_cache(model, ring=True)
    inputs[1][0, [8, 14, 26]] = False
    assert cache.slots == model.config.sliding_window and cache.capacity == CAPACITY
    found, cache = in_pieces(model, params, inputs, cache, [*[1] * 12, 9, *[1] * 11])
    assert_same(found, without_cache(model, params, *inputs), inputs[1])
    assert int(cache.length) == CAPACITY and cache.slots == model.config.sliding_window


@pytest.mark.parametrize("quantized", [False, True])
def test_padding_behind_a_prompt_pushes_nothing_out(quantized):
    """Pieces of 6 and 3 padded to 9, cut, and single tokens; in eight bits ring and full agree."""
    model, params = model_and_params()
    inputs = [x[:, :20] for x in batch()]
    found = {}
    for ring in (True, False):
        cache, parts = new_cache(model, ring=ring, quantized=quantized), []
        for start, stop in ((0, 6), (6, 9)):
            right = ((0, 0), (0, 9 - (stop - start)))
            out = call(model, params, *[np.pad(x[:, start:stop], right) for x in inputs], cache)
            cache = out.cache.truncate(stop)
            parts.append(out.logits[:, : stop - start])
        rest = [x[:, 9:] for x in inputs]
        last, _ = in_pieces(model, params, rest, cache, [1] * 11)
        found[ring] = np.concatenate([*parts, last], axis=1)
    assert_same(found[True], found[False], inputs[1])
    if not quantized:
        assert_same(found[True], without_cache(model, params, *inputs), inputs[1])


@pytest.mark.parametrize("kind", [{}, {"ring": True}, {"quantized": True}], ids=str)
def test_rows_computed_anew_beside_others(kind):
    """In pieces: the others keep what they have, and stale slots are not looked at."""
    model, params = model_and_params()
    ids, mask, positions = batch((19, 10))
    others = tokens(2, 19, seed=5)
    held = [x[:, :18] for x in (others, mask, positions)]
    _, before = in_pieces(model, params, held, new_cache(model, **kind), [9, 9])
    # Row 1 is made of other tokens now; its first piece is padding alone.
    rows = np.array([False, True])
    cache, start = before.rewind(rows), 0
    for size in (9, 5, 4):
        stop = start + size
        piece = [x[:, start:stop] for x in (ids, mask & rows[:, None], positions)]
        piece = [np.pad(x, ((0, 0), (0, 9 - size))) for x in piece]
        cache, start = call(model, params, *piece, cache).cache, stop
        if size < 9:
            cache = cache.truncate(stop, rows)
    stored = lambda cache: jax.tree.leaves((cache.k_LBKSH, cache.v_LBKSH))  # noqa: E731
    for old, new in zip(stored(before), stored(cache), strict=True):
        np.testing.assert_array_equal(new[:, 0], old[:, 0])
    np.testing.assert_array_equal(cache.valid_BS[0], before.valid_BS[0])

    both = np.stack([others[0], ids[1]])
    found = call(model, params, *[x[:, 18:] for x in (both, mask, positions)], cache).logits
    wanted = without_cache(model, params, both, mask, positions)[:, 18:]
    error = np.abs(found - wanted).max() / wanted.std()
    assert error < (0.2 if "quantized" in kind else 1e-4)


def test_a_ring_that_would_not_wrap_is_a_full_cache():
    for case, capacity in (("mha_window", 5), ("mha_window", 3), ("gqa", 8)):
        config = model_and_params(case)[0].config
        cache = phi3.KVCache.init(config, 1, capacity, jnp.float32, ring=True)
        assert cache.column_BS is None and cache.slots == cache.capacity == capacity
    assert new_cache(model_and_params()[0], capacity=6, ring=True).slots == 5


def test_a_step_writes_its_slot_alone():
    """No copy of the ring, and no gather, for one token."""
    cache = new_cache(model_and_params()[0], ring=True)
    new = cache.k_LBKSH[:, :, :, :1].swapaxes(2, 3)
    text = str(jax.make_jaxpr(lambda cache: cache.write(new, new, None))(cache))
    assert "gather" not in text and text.count("dynamic_update_slice") == 4


def test_a_ring_is_cut_where_it_can_be():
    model, params = model_and_params()
    inputs = batch((32, 32))
    wanted = without_cache(model, params, *inputs)
    for used, cut in ((9, 8), (5, 2)):
        _, cache = in_pieces(model, params, inputs, new_cache(model, ring=True), [1] * used)
        rest = [x[:, cut : cut + 2] for x in inputs]
        found, _ = in_pieces(model, params, rest, cache.truncate(cut), [1, 1])
        np.testing.assert_allclose(found, wanted[:, cut : cut + 2], rtol=1e-4, atol=1e-4)
    _, cache = in_pieces(model, params, inputs, new_cache(model, ring=True), [9])
    with pytest.raises(ValueError, match="5 slots that has run through 9 columns: cut to 7"):
        cache.truncate(7)
    with pytest.raises(ValueError, match="cut to 7"):
        cache.truncate(8).truncate(7)
    assert int(cache.rewind().truncate(7).length) == 0


def test_masks_of_all_columns_reach_the_slots_of_a_ring():
    """Of all so far, and in a compiled function of all there can be."""
    model, params = model_and_params()
    ids, mask, positions = [x[:, :10] for x in batch()]
    _, cache = in_pieces(model, params, (ids, mask, positions), new_cache(model, ring=True), [9])
    hidden = mask.copy()
    hidden[0, 6:8] = False
    wanted = None
    for run, width in ((model.apply, 10), (jax.jit(model.apply), CAPACITY)):
        whole = np.pad(hidden, ((0, 0), (0, CAPACITY)))[:, :width]
        found = run({"params": params}, ids[:, 9:], whole, positions[:, 9:], cache=cache).logits
        # The same with those slots made invalid by hand.
        valid_BS = cache.valid_BS.at[0, jnp.array([6 % 5, 7 % 5])].set(False)
        by_hand = cache.replace(valid_BS=valid_BS)
        wanted = call(model, params, *[x[:, 9:] for x in (ids, mask, positions)], by_hand).logits
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    plain = call(model, params, *[x[:, 9:] for x in (ids, mask, positions)], cache).logits
    assert np.abs(plain - wanted)[0].max() > 0.1


def test_attentions_of_a_ring_have_its_columns():
    model, params = model_and_params()
    inputs = [x[:, :10] for x in batch()]
    found = []
    for ring in (True, False):
        _, cache = in_pieces(model, params, inputs, new_cache(model, ring=ring), [9])
        rest = [x[:, 9:] for x in inputs]
        found.append(np.stack(call(model, params, *rest, cache, attentions=True).attentions))
    assert found[0].shape[-1] == CAPACITY
    np.testing.assert_allclose(*found, atol=1e-5)
    np.testing.assert_allclose(found[0].sum(axis=-1), 1, rtol=1e-5)


def test_what_a_ring_cannot_do_is_refused():
    model, params = model_and_params()
    _, cache = in_pieces(model, params, batch(), new_cache(model, ring=True), [9])
    with pytest.raises(ValueError, match="holds the last 5 only; use a full cache"):
        model.apply({"params": params}, tokens(2, 1), np.ones((2, 1, 1, 10), bool), cache=cache)
    other, _ = model_and_params(sliding_window=6)
    with pytest.raises(ValueError, match="a ring of 5 slots, the model's sliding_window is 6"):
        other.apply({"params": params}, tokens(2, 1), cache=cache)
    with pytest.raises(ValueError, match="32 slots, 9 of them used: 24 more"):
        model.apply({"params": params}, tokens(2, 24), cache=cache)


def test_a_compiled_write_past_the_end_of_a_ring_is_nan():
    model, params = model_and_params()
    inputs = [np.pad(x, ((0, 0), (0, 1)), mode="edge") for x in batch()]
    sizes = [9, *[1] * 24]
    found, _ = in_pieces(model, params, inputs, new_cache(model, ring=True), sizes)
    assert np.isfinite(found[:, :32]).all() and np.isnan(found[:, 32]).all()


def test_eight_bits_come_near():
    """The error that KVCache states, a prompt in one call without one, and the bytes."""
    model, params = model_and_params()
    inputs = batch((32, 32))
    wanted = without_cache(model, params, *inputs)
    cache = new_cache(model, quantized=True)
    found, cache = in_pieces(model, params, inputs, cache, [9] + [1] * 23)
    np.testing.assert_allclose(found[:, :9], wanted[:, :9], rtol=1e-4, atol=1e-4)
    error = np.sqrt(np.mean(np.square(found - wanted)[:, 9:])) / wanted.std()
    assert 0.001 < error < 0.04
    H = model.config.head_dim
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(cache.k_LBKSH))
    assert nbytes * 4 * H == (H + 4) * new_cache(model).k_LBKSH.nbytes


def test_rounding_to_eight_bits():
    x = np.random.default_rng(0).normal(size=(3, 5, 16)).astype(np.float32)
    x[1, 2], x[0, 0] = 0, x[0, 0] * 1e30
    values, scale = quantize(jnp.asarray(x))
    assert values.dtype == jnp.int8 and scale.dtype == jnp.float32
    largest = np.abs(x).max(axis=-1, keepdims=True)
    assert (np.abs(values * scale[..., None] - x) <= largest / 254 * 1.00001).all()
    assert np.abs(values).max() == 127 and not values[1, 2].any()
    assert np.isnan(quantize(jnp.full((1, 4), jnp.nan)).scale).all()


@pytest.mark.parametrize("kind", [{}, {"ring": True, "quantized": True}], ids=str)
def test_rows_are_repeated(kind):
    model, params = model_and_params()
    inputs = [x[:, :10] for x in batch()]
    _, cache = in_pieces(model, params, inputs, new_cache(model, **kind), [9])
    step = [x[:, 9:] for x in inputs]
    wanted = call(model, params, *step, cache).logits
    twice = [np.repeat(x, 2, axis=0) for x in step]
    found = call(model, params, *twice, cache.repeated(2)).logits
    np.testing.assert_allclose(found, np.repeat(wanted, 2, axis=0), rtol=1e-5, atol=1e-5)


def test_on_a_mesh():
    """Rows and heads of every array are shared out; 6 key-value heads padded to 8."""
    kind = {"ring": True, "quantized": True}
    model, params = model_and_params()
    inputs = [x[:, :11] for x in batch()]
    wanted, _ = in_pieces(model, params, inputs, new_cache(model, **kind), [9, 1, 1])
    model, params = on_mesh(model, params, phi3.make_mesh(2, 1, 4))
    cache = new_cache(model, **kind)
    for x in jax.tree.leaves((cache.k_LBKSH, cache.v_LBKSH)):
        assert x.addressable_shards[0].data.shape[:4] == (3, 1, 2, 5)
    assert cache.column_BS.addressable_shards[0].data.shape == (1, 5)
    found, _ = in_pieces(model, params, inputs, cache, [9, 1, 1])
    assert_same(found, wanted, inputs[1])


def test_long_rows_are_long_from_their_first_piece_on():
    """RopeTables.long_B: a prompt of 27 tokens over the line of 16, beside a short one."""
    model, params = model_and_params("longrope_window", original_max_position_embeddings=16)
    inputs = batch((27, 15))
    wanted = without_cache(model, params, *inputs)
    tables = rope_tables(model.config, CAPACITY)
    found = {}
    for long_rows in (True, False):
        rope = tables._replace(long_B=np.array([long_rows, False]))
        found[long_rows], _ = in_pieces(
            model, params, inputs, new_cache(model, ring=True), [9] * 3, rope
        )
    assert_same(found[True], wanted, inputs[1])
    assert np.abs(found[False] - wanted)[0].max() > 0.1, "the test has to see the difference"


def test_token_masks_go_alone():
    model, params = model_and_params()
    ids, ones = tokens(1, 3), np.ones((1, 3))
    with pytest.raises(ValueError, match="token_mask has shape"):
        model.apply({"params": params}, ids, token_mask=ones[:, :2])
    for name in ("attention_mask", "segment_ids"):
        with pytest.raises(ValueError, match=f"token_mask and {name} both say"):
            model.apply({"params": params}, ids, token_mask=ones, **{name: ones.astype(int)})
