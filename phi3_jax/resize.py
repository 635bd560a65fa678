"""A vocabulary of another size."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from phi3_jax.quantized import require_floats
from phi3_jax.sharding import abstract_params, plain_tree

_TABLES = ("embed_tokens", "lm_head")


def resize_token_embeddings(
    model: nn.Module, params: Any, vocab_size: int
) -> tuple[nn.Module, dict[str, Any]]:
    """The model and its parameters with more or fewer words.

    New rows of the embedding, and of a head of its own, are the mean of the old rows (what
    `resize_token_embeddings` of transformers draws around, with 1e-9 of their covariance): a new
    word is as likely as the average one. Fewer words cut rows off at the end.

    Args:
      model: any model class, on any mesh.
      params: its parameters; they stay as they are.
      vocab_size: the new number of words.

    Raises:
      ValueError: where the config would not be one, as with a pad_token_id that is cut off, or
        where weights are quantised.
    """
    require_floats(plain_tree(params), "another vocabulary")
    old_size = model.config.vocab_size
    resized = model.clone(config=dataclasses.replace(model.config, vocab_size=vocab_size))
    wanted = abstract_params(resized)

    def fit(path, leaf, target):
        if path[-2].key not in _TABLES:
            return leaf
        words = leaf[:old_size]
        mean = jnp.mean(words.astype(jnp.float32), axis=0).astype(leaf.dtype)
        new = jnp.broadcast_to(mean, (max(0, vocab_size - old_size), *leaf.shape[1:]))
        table = jnp.concatenate([words[:vocab_size], new])
        return jnp.pad(table, ((0, target.shape[0] - vocab_size), (0, 0)))

    shardings = jax.tree.map(lambda leaf: leaf.sharding, wanted)
    run = jax.jit(
        lambda params: jax.tree_util.tree_map_with_path(fit, params, wanted),
        out_shardings=shardings,
    )
    return resized, run(plain_tree(params))
