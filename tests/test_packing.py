"""Packed rows, padding, whole masks and chunks: what has to come out the same, on drawn examples.

Widths are few, so that the examples share compiled programs; longrope's line is at 16 tokens.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import config_values, hf_weights, params_of

import phi3_jax as phi3

WIDTH = 24
# Of documents: a lone token, two around the window of 7, and one beyond the line.
LENGTHS = (1, 3, 9, 17)
CAPACITY = 14

few = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**32 - 1)
cases = st.sampled_from(["longrope", "longrope_window"])


@functools.cache
def model_and_params(case: str):
    config = phi3.Phi3Config(**config_values(case))
    return phi3.Phi3ForCausalLM(config), params_of(config, hf_weights(config, case))


@functools.cache
def compiled(case: str):
    """A call of the model; one program for each set of shapes."""
    model, params = model_and_params(case)
    call = jax.jit(lambda params, ids, inputs: model.apply({"params": params}, ids, **inputs))
    return lambda ids, **inputs: call(params, ids, inputs)


def alone(case: str, ids, labels=None):
    """One document by itself, always with labels, so that there is one program for a length."""
    return compiled(case)(ids, labels=ids if labels is None else labels)


def draw_ids(rng, *shape: int) -> np.ndarray:
    return rng.integers(0, 97, shape).astype(np.int32)


def assert_close(ours, expected):
    expected = np.asarray(expected)
    assert np.abs(np.asarray(ours) - expected).max() < 1e-4 * max(np.abs(expected).max(), 1.0)


@st.composite
def documents(draw, gaps: bool = True) -> list[tuple[int, int]]:
    """(first column, length) of documents that lie in a row one behind the other."""
    first, found = 0, []
    for length in draw(st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=6)):
        first += draw(st.integers(0, 2)) if gaps else 0
        if first + length <= WIDTH:
            found.append((first, length))
            first += length
    return found


@few
@given(case=cases, rows=st.tuples(documents(), documents()), seed=seeds)
def test_segments_are_computed_as_alone(case, rows, seed):
    """Logits, and the loss as the mean over all tokens: window, longrope and positions are those of
    the document (trap 42)."""
    rng = np.random.default_rng(seed)
    ids, segments = draw_ids(rng, 2, WIDTH), np.zeros((2, WIDTH), np.int32)
    labels = np.full((2, WIDTH), -100, np.int32)
    for row, cuts in enumerate(rows):
        numbers = rng.permutation(np.arange(1, 2 + len(cuts)))
        for number, (first, length) in zip(numbers, cuts, strict=False):
            own = slice(first, first + length)
            segments[row, own] = number
            labels[row, own] = np.where(rng.random(length) < 0.8, ids[row, own], -100)
    out = compiled(case)(ids, segment_ids=segments, labels=labels)
    assert np.isfinite(out.logits).all()
    total, count = 0.0, 0
    for row, cuts in enumerate(rows):
        for first, length in cuts:
            own = (slice(row, row + 1), slice(first, first + length))
            expected = alone(case, ids[own], labels[own])
            assert_close(out.logits[own], expected.logits)
            counted = int((labels[own][:, 1:] != -100).sum())
            total, count = total + float(expected.loss) * counted, count + counted
    assert float(out.loss) == pytest.approx(total / max(count, 1), rel=1e-5, abs=1e-6)


@few
@given(case=cases, rows=st.tuples(documents(gaps=False), documents(gaps=False)), seed=seeds)
def test_positions_that_begin_anew_cut_documents(case, rows, seed):
    ids, positions = draw_ids(np.random.default_rng(seed), 2, WIDTH), np.empty((2, WIDTH), np.int32)
    for row, cuts in enumerate(rows):
        for first, _ in [*cuts, (sum(cuts[-1]), 0)]:
            # What is left of the row is one more document.
            positions[row, first:] = np.arange(WIDTH - first)
    logits = compiled(case)(ids, position_ids=positions).logits
    for row, cuts in enumerate(rows):
        for first, length in cuts:
            own = (slice(row, row + 1), slice(first, first + length))
            assert_close(logits[own], alone(case, ids[own]).logits)


@few
@given(case=cases, length=st.sampled_from(LENGTHS), data=st.data(), seed=seeds)
def test_padding_changes_no_real_token(case, length, data, seed):
    """On the left, on the right and in holes, whatever stands there; a hole uses a window up, so
    that there the tokens stay together (trap 19)."""
    rng = np.random.default_rng(seed)
    first = data.draw(st.integers(0, WIDTH - length))
    columns = np.arange(first, first + length)
    if case == "longrope":
        columns = np.sort(rng.choice(WIDTH, length, replace=False))
    mask = np.zeros((1, WIDTH), np.int32)
    mask[:, columns] = 1
    ids = draw_ids(rng, 1, WIDTH)
    positions = rng.integers(0, 100, (1, WIDTH)).astype(np.int32)
    positions[:, columns] = np.arange(length)
    logits = compiled(case)(ids, attention_mask=mask, position_ids=positions).logits
    assert np.isfinite(logits).all()
    assert_close(logits[:, columns], alone(case, ids[:, columns]).logits)


@few
@given(
    shape=st.sampled_from([(1, 1), (2, 6)]),
    hidden=st.sampled_from([-np.inf, np.finfo(np.float32).min]),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=seeds,
)
def test_whole_masks_mean_the_same_as_bool_and_as_float(shape, hidden, share, seed):
    """Queries that see nothing among them (trap 50); a whole mask says what the window would."""
    rng, case = np.random.default_rng(seed), "longrope_window"
    ids, keep = draw_ids(rng, 2, 9), rng.random((*shape, 9, 9)) < share
    logits = compiled(case)(ids, attention_mask=keep).logits
    additive = np.where(keep, np.float32(0), np.float32(hidden))
    assert_close(compiled(case)(ids, attention_mask=additive).logits, logits)
    window = np.tri(9, dtype=bool) & ~np.tri(9, k=-7, dtype=bool)
    seen = np.broadcast_to(window, (*shape, 9, 9))
    assert_close(compiled(case)(ids, attention_mask=seen).logits, compiled(case)(ids).logits)


@few
@given(
    sizes=st.lists(st.sampled_from([1, 2, 5]), min_size=1, max_size=6),
    pads=st.tuples(st.integers(0, 11), st.integers(0, 11)),
    covers=st.sampled_from(["so far", "slots"]),
    seed=seeds,
)
def test_chunks_equal_one_forward(sizes, pads, covers, seed):
    """Any cuts, with a mask of all tokens so far, or of all slots."""
    case = "longrope_window"
    model, params = model_and_params(case)
    rng, width = np.random.default_rng(seed), 12
    ids, mask = draw_ids(rng, 2, width), np.ones((2, width), np.int32)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    whole = np.asarray(compiled(case)(ids, attention_mask=mask).logits)
    cache, start = phi3.KVCache.init(model.config, 2, CAPACITY, jnp.float32), 0
    for size in sizes:
        stop = start + size
        if stop > width:
            break
        given_mask = mask[:, :stop]
        if covers == "slots":  # what it says of slots to come is of no consequence
            later = rng.integers(0, 2, (2, CAPACITY - stop)).astype(np.int32)
            given_mask = np.concatenate([given_mask, later], axis=1)
        call = compiled(case)
        if covers == "so far":  # for which the fill of the cache has to be known
            call = functools.partial(model.apply, {"params": params})
        out = call(ids[:, start:stop], attention_mask=given_mask, cache=cache)
        real = mask[:, start:stop].astype(bool)
        assert np.isfinite(out.logits).all()
        if real.any():
            assert_close(np.asarray(out.logits)[real], whole[:, start:stop][real])
        cache, start = out.cache, stop
    assert int(cache.length) == start
    np.testing.assert_array_equal(cache.valid_BS[:, :start], mask[:, :start])


@few
@given(
    used=st.sampled_from([0, 4]),
    size=st.integers(1, 5),
    width=st.integers(1, CAPACITY + 3),
    whole=st.booleans(),
)
def test_masks_that_do_not_cover_the_keys_raise(used, size, width, whole):
    """The reference takes a short one for masked, without a word (trap 49)."""
    fits = {used + size, CAPACITY}
    if width in fits:
        return
    model, params = model_and_params("longrope_window")
    cache = phi3.KVCache.init(model.config, 1, CAPACITY, jnp.float32)
    if used:
        cache = compiled("longrope_window")(np.ones((1, used), np.int32), cache=cache).cache
    mask = np.ones((1, 1, size, width) if whole else (1, width), bool)
    with pytest.raises(ValueError, match=f"attention_mask .*covers {width} keys"):
        model.apply({"params": params}, np.ones((1, size), np.int32), mask, cache=cache)
    if not used:
        with pytest.raises(ValueError, match=f"attention_mask .*covers {width} keys"):
            model.apply({"params": params}, np.ones((1, size), np.int32), mask[..., :width])


@functools.cache
def loss_and_gradients():
    model, params = model_and_params("longrope_window")

    def loss(params, ids, inputs):
        return model.apply({"params": params}, ids, labels=ids, **inputs).loss

    call = jax.jit(jax.value_and_grad(loss))
    return lambda ids, **inputs: call(params, ids, inputs)


@few
@given(
    kind=st.sampled_from(["rows", "whole", "added", "segments"]),
    share=st.sampled_from([0.0, 0.1, 0.5]),
    seed=seeds,
)
def test_rows_that_see_nothing_stay_finite(kind, share, seed):
    """Forward and backward (trap 23)."""
    rng = np.random.default_rng(seed)
    kept = rng.random((2, 9)) < share
    whole = rng.random((2, 1, 9, 9)) < share
    inputs = {
        "rows": {"attention_mask": kept},
        "whole": {"attention_mask": whole},
        "added": {"attention_mask": np.where(whole, np.float32(0), np.float32(-np.inf))},
        "segments": {"segment_ids": np.where(kept, rng.integers(1, 3, (2, 9)), 0)},
    }[kind]
    loss, grads = loss_and_gradients()(draw_ids(rng, 2, 9), **inputs)
    assert np.isfinite(loss)
    for path, leaf in jax.tree.leaves_with_path(grads):
        assert np.isfinite(leaf).all(), path


def test_positions_may_be_constants_of_a_program():
    """Then the tables are as long as those positions, compiled or not."""
    model, params = model_and_params("longrope")
    ids, positions = draw_ids(np.random.default_rng(0), 1, 9), np.arange(600, 609)[None]
    call = jax.jit(lambda ids: model.apply({"params": params}, ids, position_ids=positions).logits)
    expected = model.apply({"params": params}, ids, position_ids=positions).logits
    assert np.isfinite(expected).all()
    assert_close(call(ids), expected)
