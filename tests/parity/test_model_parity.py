"""Logits and greedy tokens against transformers, live, on random configs."""

import itertools
import random

import numpy as np
import pytest
from reference import BASE, LONGROPE, PARTIAL_LONGROPE, hf_weights, left_padded, params_of, tokens

import phi3_jax as phi3

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

ROPES = {
    "default": {},
    "partial": {"partial_rotary_factor": 0.5},
    "longrope": {"rope_parameters": LONGROPE},
    "longrope_partial": {"rope_parameters": PARTIAL_LONGROPE},
}
GRID = list(itertools.product(ROPES, (6, 3, 1), (True, False), (None, 5)))
# Three of each rope kind, windows and tied heads among them.
DRAWN = [
    drawn
    for rope in ROPES
    for drawn in random.Random(rope).sample([g for g in GRID if g[0] == rope], 3)
]


def both(rope, kv_heads, tied, window, **more):
    """The same random model in transformers and here."""
    values = {
        **BASE,
        **ROPES[rope],
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
        "sliding_window": window,
        **more,
    }
    config = phi3.Phi3Config(**values)
    weights = hf_weights(config, f"{rope}{kv_heads}{tied}{window}")
    hf_config = transformers.Phi3Config(**values, attn_implementation="eager")
    reference = transformers.Phi3ForCausalLM(hf_config).eval()
    state = {name: torch.from_numpy(array.copy()) for name, array in weights.items()}
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if tied else [])
    return reference, phi3.Phi3ForCausalLM(config), params_of(config, weights)


@torch.no_grad()
def is_greedy(reference, row, prompt: int) -> bool:
    """Whether every token behind the prompt is what the forward without cache would choose.

    Up to the line a forward of the row that far says it, since a prefix computes the same there;
    beyond it one of the whole row does, all of it with the long factors.
    """
    line = reference.config.original_max_position_embeddings
    ids = torch.from_numpy(row).long()[None]
    short = reference(ids[:, :line], use_cache=False).logits[0].argmax(-1)
    long = reference(ids, use_cache=False).logits[0].argmax(-1)
    chosen = torch.cat([short, long[line:]])
    return bool((chosen[prompt - 1 : -1] == ids[0, prompt:]).all())


@pytest.mark.parametrize("drawn", DRAWN, ids=lambda drawn: "-".join(map(str, drawn)))
def test_logits(drawn):
    """float32, 1e-4 relative, around the window and around original_max (16)."""
    reference, model, params = both(*drawn)
    for length in (1, 5, 6, 16, 17, 25):
        ids = tokens(2, length)
        with torch.no_grad():
            expected = reference(torch.from_numpy(ids).long()).logits.numpy()
        logits = model.apply({"params": params}, ids).logits
        assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max(), length


@pytest.mark.parametrize("drawn", [DRAWN[0], ("longrope", 3, False, 5)], ids=str)
@pytest.mark.parametrize("pads", [0, 1, 6])
def test_greedy_below_the_line(drawn, pads):
    """200 tokens of unequal rows, padded as a batch, equal the reference's generate()."""
    reference, model, params = both(*drawn, original_max_position_embeddings=256)
    ids, mask = left_padded([tokens(1, width)[0] for width in (7, 12, 30, 3)], pads)
    expected = reference.generate(
        torch.from_numpy(ids).long(),
        attention_mask=torch.from_numpy(mask).long(),
        max_new_tokens=200,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    ).numpy()
    ours = phi3.generate(model, params, ids, mask, max_new_tokens=200, eos_token_id=None)
    np.testing.assert_array_equal(ours.sequences, expected)


@pytest.mark.parametrize(
    "drawn", [("longrope", 3, False, None), ("longrope_partial", 1, True, 5)], ids=str
)
def test_greedy_across_the_line(drawn):
    """200 tokens of rows that cross at their own steps equal the forward without cache."""
    reference, model, params = both(*drawn)
    rows = [tokens(1, width)[0] for width in (7, 12, 16, 17)]
    for pads in (0, 1, 6):
        ids, mask = left_padded(rows, pads)
        ours = phi3.generate(model, params, ids, mask, max_new_tokens=200, eos_token_id=None)
        for sequence, keep, row in zip(ours.sequences, mask, rows, strict=True):
            own = sequence[np.flatnonzero(keep)[0] :]
            assert len(own) == len(row) + 200 and is_greedy(reference, own, len(row))


def test_forward_counts_padding_in_positions_as_the_reference_does():
    """forward(): columns; generate(): the row's own tokens (trap 14)."""
    reference, model, params = both("default", 3, False, None)
    ids, mask = left_padded([tokens(1, 4)[0], tokens(1, 9)[0]])
    with torch.no_grad():
        expected = reference(
            torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long()
        ).logits.numpy()
    logits = np.asarray(model.apply({"params": params}, ids, attention_mask=mask).logits)
    real = mask.astype(bool)
    np.testing.assert_allclose(logits[real], expected[real], rtol=1e-4, atol=1e-4)
