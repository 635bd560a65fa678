"""What the models return. Letters as in model.py."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from phi3_jax.cache import KVCache
from phi3_jax.config import Phi3Config


class Output:
    """What all outputs have; fields that were not asked for are None."""

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in their order, as `return_dict=False` gives them."""
        fields = (getattr(self, name) for name in self.__dataclass_fields__)  # ty: ignore
        return tuple(field for field in fields if field is not None)


@flax.struct.dataclass
class BaseModelOutput(Output):
    """What Phi3Model returns.

    Attributes:
      last_hidden_state: [B, T, D], after the final norm.
      cache: the grown one, where one was passed.
      hidden_states: L + 1 of [B, T, D]: the embeddings, and the output of each layer, the last
        one after the final norm.
      attentions: L of [B, N, T, keys], probabilities; where a cache was passed the keys are the
        columns that it has room for, with zeros where no token is yet.
    """

    last_hidden_state: jax.Array
    cache: KVCache | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@flax.struct.dataclass
class CausalLMOutput(Output):
    """What Phi3ForCausalLM returns.

    Attributes:
      loss: float32 scalar, where labels were given.
      logits: [B, T kept, V] in the model's dtype.
      cache, hidden_states, attentions: as in BaseModelOutput.
    """

    loss: jax.Array | None
    logits: jax.Array
    cache: KVCache | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


def attentions_of(
    probs_LBKGTS: jax.Array, config: Phi3Config, cache: KVCache | None
) -> tuple[jax.Array, ...]:
    """Probabilities a layer by query head, without padded heads, with a key for each column.

    cache: as the call got it.
    """
    L, B, _, _, T, keys = probs_LBKGTS.shape
    probs = probs_LBKGTS[:, :, : config.num_key_value_heads]
    probs = probs.reshape(L, B, config.num_attention_heads, T, keys)
    if cache is not None:
        slots, new = probs[..., : keys - T], probs[..., keys - T :]
        if not cache.filled or cache.column_BS is not None:
            columns = jnp.zeros((*probs.shape[:-1], cache.capacity), probs.dtype)
            if cache.filled:
                index = jnp.broadcast_to(cache.columns[:, None, None], slots.shape)
                columns = jnp.put_along_axis(columns, index, slots, axis=-1, inplace=False)
            slots = columns
        probs = lax.dynamic_update_slice_in_dim(slots, new, cache.length, axis=-1)
    return tuple(probs)
