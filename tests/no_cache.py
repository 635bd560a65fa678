"""Generation by the book, to compare with: rows run alone, whole, by a forward without a cache.

The models are small, since compiling is most of what these tests cost.
"""

import functools

import jax
import numpy as np
from reference import config_values, hf_weights, params_of, prompts

import phi3_jax as phi3

VOCAB = 29
# The most tokens of a row.
WIDTH = 32


@functools.cache
def small_model(case: str, weights: str = "", **changes) -> tuple:
    """A model and its parameters; other names of weights give other numbers."""
    sizes = {"vocab_size": VOCAB, "num_hidden_layers": 2}
    config = phi3.Phi3Config(**{**config_values(case), **sizes, **changes})
    return phi3.Phi3ForCausalLM(config), params_of(config, hf_weights(config, case + weights))


def small_prompts(lengths) -> list[np.ndarray]:
    """As reference.prompts, of ids that mean nothing special."""
    return [3 + row % (VOCAB - 3) for row in prompts(lengths)]


@functools.partial(jax.jit, static_argnames=("model", "outputs"))
def _forward(model, params, ids, mask, outputs):
    asked = dict(output_hidden_states=outputs, output_attentions=outputs)
    return model.apply({"params": params}, ids, attention_mask=mask, **asked)


def forward(model, params, rows, outputs: bool = False):
    """The model's output for each of these rows alone, from the first column on: numpy arrays."""
    ids, mask = np.zeros((2, -(-len(rows) // 8) * 8, WIDTH), np.int32)
    for index, row in enumerate(rows):
        ids[index, : len(row)], mask[index, : len(row)] = row, 1
    return jax.device_get(_forward(model, params, ids, mask, outputs))


def next_logits(model, params, rows) -> np.ndarray:
    """The logits behind each row: float32 [rows, V]."""
    logits = forward(model, params, rows).logits
    return np.stack([logits[index, len(row) - 1] for index, row in enumerate(rows)])


def beginnings(prompt, continuation) -> list[list[int]]:
    """What the row held when each token of the continuation was chosen."""
    return [[*prompt, *continuation[:step]] for step in range(len(continuation))]


def step_logits(model, params, rows, continuations) -> np.ndarray:
    """The logits that each token of each row is chosen by: float32 [rows, steps, V]."""
    every = [
        part for row, new in zip(rows, continuations, strict=True) for part in beginnings(row, new)
    ]
    return next_logits(model, params, every).reshape(len(rows), -1, model.config.vocab_size)
