"""Random models that transformers and this library both build from the same numbers.

Sizes are small and unequal, so that swapped axes show. Lengths around 5 (the window) and 16
(original_max_position_embeddings) are the ones that matter.
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.config import Phi3Config
from phi3_jax.hf_format import Head, WeightTable
from phi3_jax.sharding import abstract_params, shard_params

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.2, 2.0, 5.0, 9.0],
}
PARTIAL_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.2, 1.5],
    "long_factor": [2.0, 6.0, 7.0],
    "partial_rotary_factor": 0.75,
}
BASE = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=512,
    original_max_position_embeddings=16,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
CASES = {
    "gqa": {},
    "mha_window": {"num_key_value_heads": 6, "sliding_window": 5},
    "mqa_tied_window1": {
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "sliding_window": 1,
    },
    "partial_gelu": {"partial_rotary_factor": 0.5, "hidden_act": "gelu_new"},
    "longrope": {"rope_parameters": LONGROPE},
    "longrope_window": {"rope_parameters": LONGROPE, "sliding_window": 7},
    "longrope_partial_tied": {
        "rope_parameters": PARTIAL_LONGROPE,
        "tie_word_embeddings": True,
        "num_key_value_heads": 3,
    },
    "head_dim": {"head_dim": 12, "num_attention_heads": 4, "rms_norm_eps": 1e-6},
}
LENGTHS = (1, 5, 16, 17, 30)
# Rows that start below, at and beyond the line, two of them crossing it at different steps.
PROMPT_LENGTHS = (7, 12, 16, 17, 13)

# What stands on the decoder, by the name of the class, here and in transformers.
HEADS: dict[str, Head] = {
    "Phi3Model": "none",
    "Phi3ForCausalLM": "lm_head",
    "Phi3ForSequenceClassification": "score",
    "Phi3ForTokenClassification": "score_bias",
}


def config_values(case: str) -> dict:
    return {**BASE, **CASES[case]}


def hf_weights(config: Phi3Config, name: str, head: Head = "lm_head") -> dict[str, np.ndarray]:
    """Random float32 weights in HF's names and layouts, the same for the same name."""
    table = WeightTable(config, head)
    weights = {}
    for path, layer in table.parts:
        hf_name = table.hf_name(path, layer)
        rng = np.random.Generator(np.random.PCG64(zlib.crc32(f"{name}/{hf_name}".encode())))
        values = rng.random(table.hf_shape(path), dtype=np.float32) - np.float32(0.5)
        weights[hf_name] = values + np.float32(1) if "norm" in hf_name else values
    return weights


def params_of(config: Phi3Config, weights: dict[str, np.ndarray], head: Head = "lm_head") -> dict:
    """The weights as this library's parameter tree."""
    table = WeightTable(config, head)
    params: dict = {}
    for path in table.weights:
        layers = [
            table.from_hf(path, weights[table.hf_name(path, layer)]) for layer in table.layers(path)
        ]
        stacked = np.stack(layers) if table.layers(path) != [None] else layers[0]
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = jnp.asarray(stacked)
    return params


def on_mesh(model, params: dict, mesh) -> tuple:
    """The model laid out on a mesh, and its parameters there."""
    model = model.clone(mesh=mesh)
    return model, shard_params(model, params)


def cut_padding(params: dict, model) -> dict:
    """A tree shaped like the model's parameters without the padding of its mesh."""
    plain = abstract_params(model.clone(mesh=None))
    cut = lambda x, leaf: x[tuple(slice(size) for size in leaf.shape)]  # noqa: E731
    return jax.tree.map(cut, params, plain)


def tokens(rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Random ids that are neither padding, beginning nor end."""
    rng = np.random.Generator(np.random.PCG64(1000 * width + seed))
    return rng.integers(3, BASE["vocab_size"], (rows, width)).astype(np.int32)


def prompts(lengths=PROMPT_LENGTHS) -> list[np.ndarray]:
    return [tokens(1, length, seed=index)[0] for index, length in enumerate(lengths)]


def left_padded(rows, more: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows as one batch, padded on the left to the longest and `more` columns besides."""
    width = max(map(len, rows)) + more
    ids, mask = np.zeros((2, len(rows), width), np.int32)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = row
        mask[index, width - len(row) :] = 1
    return ids, mask
