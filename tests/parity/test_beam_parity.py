"""Beam search and beam sampling against transformers, live, token by token.

The vocabulary is small, so that beams end at many lengths. All below original_max_position_
embeddings: beyond it test_beam.py compares with the forward pass without a cache.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import config_values, hf_weights, left_padded, params_of

import phi3_jax as phi3

torch = pytest.importorskip("torch")
hf = pytest.importorskip("torch_reference")
pytestmark = pytest.mark.parity

SIZES = dict(vocab_size=23, num_hidden_layers=2, original_max_position_embeddings=512)
NEW = 11
# Not 0, since the reference fills up with an end token where the padding id is 0.
PAD = 1
ENDS = [5, 9, 14]
# Each compiles programs of its own; the rest varies with the seed and compiles nothing.
SEARCHES = [
    dict(num_beams=3, early_stopping=False, eos_token_id=ENDS),
    dict(num_beams=3, early_stopping=True, eos_token_id=ENDS),
    dict(num_beams=3, early_stopping="never", eos_token_id=ENDS),
    dict(num_beams=2, early_stopping=False, eos_token_id=5, repetition_penalty=1.7),
    dict(num_beams=4, early_stopping=True, eos_token_id=ENDS[:2], no_repeat_ngram_size=2),
    dict(num_beams=2, early_stopping="never", eos_token_id=None),
]
PENALTIES = (-1.0, 0.0, 0.5, 1.0, 2.0)


@functools.cache
def models(case: str, seed: int) -> tuple:
    """Theirs, ours and our parameters, with the weights of this seed."""
    values = {**config_values(case), **SIZES}
    config = phi3.Phi3Config(**values)
    weights = hf_weights(config, f"{case}/{seed}")
    model = phi3.Phi3ForCausalLM(config)
    return hf.hf_model(values, weights), model, params_of(config, weights)


def both(case: str, seed: int, lengths, outputs: bool = False, **settings) -> tuple:
    """What the reference generates, and what we do."""
    reference, model, params = models(case, seed)
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, SIZES["vocab_size"], n).astype(np.int32) for n in lengths]
    ids, mask = left_padded(rows)
    settings |= dict(max_new_tokens=NEW, pad_token_id=PAD, length_penalty=PENALTIES[seed % 5])
    asked = dict(output_scores=True, output_logits=True)
    with torch.no_grad():
        theirs = reference.generate(
            hf.as_torch(ids),
            attention_mask=hf.as_torch(mask),
            return_dict_in_generate=True,
            **settings,
            **asked,
        )
    return theirs, phi3.generate(model, params, ids, mask, **settings, **asked if outputs else {})


def assert_same(theirs, ours) -> None:
    # Without an end token the reference fills up with -1.
    expected = np.where(theirs.sequences < 0, PAD, theirs.sequences)
    np.testing.assert_array_equal(ours.sequences, expected)
    np.testing.assert_array_equal(ours.beam_indices, theirs.beam_indices)
    np.testing.assert_allclose(ours.sequences_scores, theirs.sequences_scores, rtol=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_search(seed):
    search = SEARCHES[seed % len(SEARCHES)]
    case = "mha_window" if seed % len(SEARCHES) == 2 else "gqa"
    returned = 1 + seed % search["num_beams"]
    assert_same(*both(case, seed, (8, 8, 8), num_return_sequences=returned, **search))


@pytest.mark.parametrize("seed", range(20, 26))
def test_padded_prompts(seed):
    assert_same(*both("gqa", seed, (3, 8, 6), num_return_sequences=3, **SEARCHES[seed % 2]))


@pytest.mark.parametrize("seed", range(30, 36))
def test_sampling_with_the_same_noise(seed, monkeypatch):
    """The reference draws what is largest with Gumbel noise, as we do, and from the same noise."""
    noise = np.random.default_rng(0).gumbel(size=10**4).astype(np.float32)
    monkeypatch.setattr(
        torch,
        "multinomial",
        lambda probs, num_samples: torch.topk(
            probs.log() + torch.from_numpy(noise[: probs.shape[1]]), num_samples
        )[1],
    )
    monkeypatch.setattr(jax.random, "gumbel", lambda key, shape: jnp.asarray(noise[: shape[0]]))
    cut = dict(temperature=0.7 + seed % 3, top_k=5 + seed % 2, top_p=(0.9, 0.95)[seed % 2])
    search = dict(num_beams=3, eos_token_id=ENDS[:2], early_stopping=False, do_sample=True, **cut)
    assert_same(*both("gqa", seed, (8, 8, 8), num_return_sequences=3, **search))


def test_outputs_of_every_step():
    theirs, ours = both("gqa", 40, (8, 8, 8), outputs=True, **SEARCHES[3])
    assert_same(theirs, ours)
    for name in ("scores", "logits"):
        expected = np.stack([step.numpy() for step in getattr(theirs, name)])
        got = np.stack(getattr(ours, name))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
