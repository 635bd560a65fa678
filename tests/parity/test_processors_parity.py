"""Every processor against the reference's class on random logits with ties."""

import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.generation.config import GenerationConfig
from phi3_jax.generation.processors import Settings, repetition_penalty

torch = pytest.importorskip("torch")
process = pytest.importorskip("transformers.generation.logits_process")
pytestmark = pytest.mark.parity

V = 61


def logits_of(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (5, V)).astype(np.float32)
    logits[0] = np.round(logits[0])  # ties everywhere
    logits[1, rng.integers(0, V, 40)] = -np.inf
    return logits


@pytest.mark.parametrize("seed", range(20))
def test_warpers_in_their_order(seed):
    rng = np.random.default_rng(seed)
    temperature, k = float(rng.uniform(0.1, 3)), int(rng.integers(1, V + 9))
    p, low = float(rng.uniform(0.05, 0.99)), float(rng.uniform(0, 0.5))
    logits = logits_of(seed)
    expected = torch.from_numpy(logits)
    # Rows with ties are left to the golden tables for top_p: its order among equals is free.
    for warper in (
        process.TemperatureLogitsWarper(temperature),
        process.TopKLogitsWarper(k),
        process.TopPLogitsWarper(p),
        process.MinPLogitsWarper(low),
    ):
        expected = warper(torch.zeros(5, 1).long(), expected)
    config = GenerationConfig(do_sample=True, temperature=temperature, top_k=k, top_p=p, min_p=low)
    ours = np.asarray(Settings.of(config, V).process(jnp.asarray(logits)))
    np.testing.assert_allclose(ours[1:], expected[1:], rtol=1e-6)
    kept = np.isfinite(expected[0].numpy())
    assert np.isfinite(ours[0]).sum() == kept.sum()


@pytest.mark.parametrize("seed", range(20))
def test_repetition_penalty(seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, V, (5, 12))
    pads = rng.integers(0, 9, 5)
    seen = np.zeros((5, V), bool)
    for row in range(5):
        seen[row, ids[row, pads[row] :]] = True
    logits, penalty = logits_of(seed), float(rng.uniform(0.5, 2))
    reference = process.RepetitionPenaltyLogitsProcessor(
        penalty, prompt_ignore_length=torch.from_numpy(pads)
    )
    expected = reference(torch.from_numpy(ids), torch.from_numpy(logits.copy()))
    ours = repetition_penalty(jnp.asarray(logits), seen, penalty)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
