"""Live comparisons share the machine with one another; random configs for them."""

import contextlib
import random

from phi3_jax.layers import ACTIVATION_FUNCTIONS

with contextlib.suppress(ImportError):
    import torch

    torch.set_num_threads(1)

ROPES = ("default", "partial", "longrope", "longrope_partial")
HEADS = ("mha", "gqa", "mqa")


def pytest_generate_tests(metafunc):
    if "drawn" in metafunc.fixturenames:
        seed = metafunc.config.getoption("--parity-seed")
        configs = {
            f"{rope}-{heads}": draw(rope, heads, random.Random(f"{seed}/{rope}/{heads}"))
            for rope in ROPES
            for heads in HEADS
        }
        metafunc.parametrize("drawn", configs.values(), ids=configs)


def draw(rope: str, heads: str, rng: random.Random) -> dict:
    """The values of a random config with this kind of rope and of attention heads."""
    kv_heads = 1 if heads == "mqa" else rng.choice((2, 3))
    groups = 1 if heads == "mha" else rng.choice((2, 3))
    head_dim = rng.choice((8, 12, 16))
    parts = [part for part in (0.25, 0.5, 0.75) if not int(head_dim * part) % 2]
    part = rng.choice(parts) if "partial" in rope else 1.0
    original = 16
    scaling = {"rope_theta": rng.choice((500.0, 10000.0, 250000.0)), "partial_rotary_factor": part}
    if "longrope" in rope:
        pairs = int(head_dim * part) // 2
        scaling |= {
            "rope_type": "longrope",
            "short_factor": [round(rng.uniform(1, 2), 3) for _ in range(pairs)],
            "long_factor": [round(rng.uniform(1, 30), 3) for _ in range(pairs)],
        }
        scaling |= rng.choice(({}, {"factor": 4.0}, {"attention_factor": 1.25}))
    vocab = rng.choice((61, 97, 113))
    labels = rng.randint(1, 5)
    several = [None, "regression", "single_label_classification", "multi_label_classification"]
    values = {
        "vocab_size": vocab,
        "hidden_size": kv_heads * groups * head_dim,
        "intermediate_size": rng.choice((36, 52, 80)),
        "num_hidden_layers": rng.randint(1, 3),
        "num_attention_heads": kv_heads * groups,
        "num_key_value_heads": kv_heads,
        "hidden_act": rng.choice(sorted(ACTIVATION_FUNCTIONS)),
        "rms_norm_eps": rng.choice((1e-6, 1e-5, 1e-3)),
        "max_position_embeddings": rng.choice((64, 512)),
        "original_max_position_embeddings": original,
        "rope_parameters": scaling,
        "sliding_window": rng.choice((None, 1, 5, 11)),
        "tie_word_embeddings": rng.random() < 0.5,
        "pad_token_id": rng.choice((None, 0, vocab - 1)),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_labels": labels,
        "problem_type": rng.choice(several if labels > 1 else several[:2]),
        "token_classification_bias": rng.random() < 0.75,
    }
    if rng.random() < 0.4:
        # The heads together are then wider or narrower than the model. The reference counts
        # longrope's factors by hidden_size // heads, so that has to be head_dim there.
        width = kv_heads * groups * head_dim + 1 if "longrope" in rope else rng.choice((28, 44, 60))
        values |= {"hidden_size": width, "head_dim": head_dim}
    return values
