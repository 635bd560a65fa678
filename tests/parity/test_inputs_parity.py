"""What goes into a call: positions, masks, caches, packed rows; against transformers, live."""

import jax.numpy as jnp
import numpy as np
import pytest
from reference import left_padded, tokens

import phi3_jax as phi3

torch = pytest.importorskip("torch")
hf = pytest.importorskip("torch_reference")
pytestmark = pytest.mark.parity

LOWEST = np.finfo(np.float32).min


@pytest.mark.parametrize("case", ["gqa", "mqa_tied_window1"])
def test_inputs_embeds(case):
    reference, model, params = hf.case(case)
    embeds = np.random.default_rng(0).normal(size=(2, 7, 48)).astype(np.float32)
    expected = hf.run(reference, inputs_embeds=embeds, labels=tokens(2, 7))
    out = hf.apply(model, params, inputs_embeds=embeds, labels=tokens(2, 7))
    hf.assert_same(out.logits, expected.logits)
    hf.assert_same(out.loss, expected.loss)


@pytest.mark.parametrize("case", ["gqa", "longrope", "longrope_partial_tied"])
def test_position_ids(case):
    """As they come, and for all rows where they have one."""
    reference, model, params = hf.case(case)
    ids = tokens(2, 6)
    for start in (3, 10, 11, 40):
        positions = np.arange(start, start + 6, dtype=np.int32)[None]
        expected = hf.run(reference, ids, position_ids=positions).logits
        hf.assert_same(hf.apply(model, params, ids, position_ids=positions).logits, expected)
        both_rows = np.repeat(positions, 2, axis=0)
        hf.assert_same(hf.apply(model, params, ids, position_ids=both_rows).logits, expected)


def test_a_long_row_leaves_the_others_short():
    """Each row as the reference has it alone, where it has the whole batch long (trap 15)."""
    reference, model, params = hf.case("longrope")
    ids = tokens(3, 6)
    positions = np.array([[0], [10], [11]], np.int32) + np.arange(6, dtype=np.int32)
    logits = hf.apply(model, params, ids, position_ids=positions).logits
    for row in range(3):
        one = slice(row, row + 1)
        hf.assert_same(logits[one], hf.run(reference, ids[one], position_ids=positions[one]).logits)
    together = hf.run(reference, ids, position_ids=positions).logits
    assert hf.relative(logits[0], together[0]) > 0.01


def masks(width: int) -> dict[str, np.ndarray]:
    """Two rows each, the last token real in all but "right"."""
    left, right, holes = np.ones((3, 2, width), np.int32)
    left[0, :3], left[1, :1] = 0, 0
    right[0, -2:], right[1, -4:] = 0, 0
    holes[0, 2:4], holes[0, 6], holes[1, 5:8] = 0, 0, 0
    return {"left": left, "right": right, "holes": holes, "both": left * holes * right}


@pytest.mark.parametrize("case", ["gqa", "mha_window", "mqa_tied_window1", "longrope_window"])
@pytest.mark.parametrize("width", [11, 20])
def test_padding_masks(case, width):
    """Real tokens only: what padding computes is not defined (traps 14, 19, 25)."""
    reference, model, params = hf.case(case)
    ids = tokens(2, width)
    for mask in masks(width).values():
        if width > 16 and case.startswith("longrope") and not mask[:, -1].all():
            continue  # there the reference counts padding behind the row into its length
        expected = hf.run(reference, ids, attention_mask=mask).logits
        real = mask.astype(bool)
        out = hf.apply(model, params, ids, attention_mask=mask)
        hf.assert_same(out.logits, expected, real)


@pytest.mark.parametrize("kind", [bool, np.float32, np.int64])
def test_padding_masks_of_any_kind(kind):
    """What is not zero is a token, a half too."""
    reference, model, params = hf.case("gqa")
    ids, mask = tokens(2, 11), masks(11)["both"]
    given = (mask * 0.5 if kind is np.float32 else mask).astype(kind)
    expected = hf.run(reference, ids, attention_mask=given).logits
    out = hf.apply(model, params, ids, attention_mask=given)
    hf.assert_same(out.logits, expected, mask.astype(bool))


def test_padding_behind_a_row_does_not_make_it_long():
    """The oracle is the row alone (trap 11)."""
    reference, model, params = hf.case("longrope")
    ids = tokens(2, 20)
    mask = np.ones((2, 20), np.int32)
    mask[0, 9:], mask[1, 17:] = 0, 0
    logits = hf.apply(model, params, ids, attention_mask=mask).logits
    for row, length in enumerate((9, 17)):
        expected = hf.run(reference, ids[row : row + 1, :length]).logits
        hf.assert_same(logits[row : row + 1, :length], expected)


def test_generations_positions_count_real_tokens():
    """With positions that skip the padding, a padded row is the row alone (traps 13, 14)."""
    reference, model, params = hf.case("longrope")
    rows = [tokens(1, width)[0] for width in (4, 16, 17)]
    ids, mask = left_padded(rows, 2)
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    logits = hf.apply(model, params, ids, attention_mask=mask, position_ids=positions).logits
    for row, alone in enumerate(rows):
        hf.assert_same(logits[row : row + 1, -len(alone) :], hf.run(reference, alone[None]).logits)


def random_keep(rng, rows: int, heads: int, width: int) -> np.ndarray:
    """Any keys, the future too, but each query sees itself."""
    return (rng.random((rows, heads, width, width)) < 0.5) | np.eye(width, dtype=bool)


@pytest.mark.parametrize("case", ["gqa", "mha_window", "longrope"])
@pytest.mark.parametrize("rows, heads", [(2, 1), (1, 6), (2, 6)])
def test_whole_masks(case, rows, heads):
    """4D float masks are added, bool ones are the same said otherwise (trap 50)."""
    reference, model, params = hf.case(case)
    width = 18
    rng, ids = np.random.default_rng(heads), tokens(2, width)
    keep = random_keep(rng, rows, heads, width)
    additive = np.where(keep, np.float32(0), LOWEST)
    expected = hf.run(reference, ids, attention_mask=additive).logits
    hf.assert_same(hf.apply(model, params, ids, attention_mask=additive).logits, expected)
    hf.assert_same(hf.apply(model, params, ids, attention_mask=keep).logits, expected)
    biased = additive + rng.normal(size=additive.shape).astype(np.float32)
    biased = np.where(keep, biased, np.float32(-np.inf))
    expected = hf.run(reference, ids, attention_mask=biased).logits
    hf.assert_same(hf.apply(model, params, ids, attention_mask=biased).logits, expected)


CUTS = [((0, 1), (1, 2), (2, 9)), ((0, 7), (7, 8), (8, 13)), ((0, 14), (14, 19), (19, 20))]


@pytest.mark.parametrize("case", ["gqa", "mha_window", "mqa_tied_window1", "longrope_window"])
@pytest.mark.parametrize("pads", [0, 3])
def test_chunks_appended_to_a_cache(case, pads):
    """Call by call as a DynamicCache has it: beyond the line old keys stay as they were turned."""
    reference, model, params = hf.case(case)
    for cuts in CUTS:
        width = cuts[-1][1]
        ids, mask = tokens(2, width), np.ones((2, width), np.int32)
        mask[0, :pads] = 0
        # For a window of 1 the reference's cache keeps all keys, not none, and its mask belongs to
        # others then; told nothing of a window it keeps all, and its mask knows.
        knows = None if model.config.sliding_window == 1 else reference.config
        theirs = hf.transformers.DynamicCache(config=knows)
        ours = phi3.KVCache.init(model.config, 2, 21, jnp.float32)
        for start, stop in cuts:
            expected = hf.run(
                reference,
                ids[:, start:stop],
                past_key_values=theirs,
                use_cache=True,
                attention_mask=mask[:, :stop],
            )
            slots = np.pad(mask[:, :stop], ((0, 0), (0, 21 - stop)))
            out = hf.apply(model, params, ids[:, start:stop], attention_mask=slots, cache=ours)
            theirs, ours = expected.past_key_values, out.cache
            real = mask[:, start:stop].astype(bool)
            if real.any():
                hf.assert_same(out.logits, expected.logits, real)
        assert int(ours.length) == theirs.get_seq_length() == width


def test_whole_mask_over_a_filled_cache():
    """A 4D mask over all tokens so far, in the second of two calls."""
    reference, model, params = hf.case("gqa")
    ids = tokens(2, 9)
    keep = random_keep(np.random.default_rng(3), 2, 6, 9) & np.tri(9, dtype=bool)
    additive = np.where(keep, np.float32(0), LOWEST)
    expected = hf.run(reference, ids, attention_mask=additive).logits[:, 5:]
    for mask in (keep, additive):
        cache = phi3.KVCache.init(model.config, 2, 12, jnp.float32)
        variables = {"params": params}
        cache = model.apply(variables, ids[:, :5], mask[..., :5, :5], cache=cache).cache
        out = model.apply(variables, ids[:, 5:], mask[..., 5:, :], cache=cache)
        hf.assert_same(out.logits, expected)


PACKED = np.array([[*range(6), *range(3), *range(9)], [*range(1), *range(14), *range(3)]], np.int32)


@pytest.mark.parametrize("case", ["gqa", "mha_window", "mqa_tied_window1", "longrope_window"])
def test_packed_rows(case):
    """Positions that begin anew are documents of their own, window and all (trap 42)."""
    reference, model, params = hf.case(case)
    ids = tokens(2, PACKED.shape[1])
    expected = hf.run(reference, ids, position_ids=PACKED, labels=ids)
    out = hf.apply(model, params, ids, position_ids=PACKED, labels=ids)
    hf.assert_same(out.logits, expected.logits)
    hf.assert_same(out.loss, expected.loss)
    one_row = hf.apply(model, params, ids[:1], position_ids=PACKED[:1])
    hf.assert_same(one_row.logits, expected.logits[:1])


@pytest.mark.parametrize("case", ["longrope", "longrope_window", "longrope_partial_tied"])
def test_packed_documents_have_their_own_longrope(case):
    """Short beside long as the reference has each alone; in one call it has all of them long."""
    reference, model, params = hf.case(case)
    lengths = (5, 17, 16)
    ids = tokens(1, sum(lengths))
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])[None]
    segments = np.repeat([3, 1, 2], lengths)[None].astype(np.int32)
    expected = torch.cat(
        [hf.run(reference, part).logits for part in np.split(ids, np.cumsum(lengths)[:-1], axis=1)],
        dim=1,
    )
    hf.assert_same(hf.apply(model, params, ids, position_ids=positions).logits, expected)
    hf.assert_same(hf.apply(model, params, ids, segment_ids=segments).logits, expected)


def test_a_later_mask_may_hide_earlier_tokens():
    """One over all tokens so far counts for those in the cache too."""
    reference, model, params = hf.case("gqa")
    ids, later = tokens(2, 9), np.ones((2, 9), np.int32)
    later[0, 1], later[1, 2:4] = 0, 0
    theirs = hf.run(reference, ids[:, :5], use_cache=True).past_key_values
    cache = phi3.KVCache.init(model.config, 2, 21, jnp.float32)
    cache = hf.apply(model, params, ids[:, :5], cache=cache).cache
    out = model.apply({"params": params}, ids[:, 5:], later, cache=cache)
    expected = hf.run(
        reference, ids[:, 5:], attention_mask=later, past_key_values=theirs, use_cache=True
    )
    hf.assert_same(out.logits, expected.logits)
