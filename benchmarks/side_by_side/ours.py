"""This project's models, through its public names."""

from typing import Any

import jax
import numpy as np
from worker import Settings

from phi3_jax import from_pretrained, generate

PACKAGES = ("jax", "jaxlib", "flax")


class Ours:
    def __init__(self, model: Any, params: Any):
        self.model, self.params = model, params

    def tokens(self, ids_BT: np.ndarray, count: int, room: int) -> np.ndarray:
        result = generate(
            self.model,
            self.params,
            ids_BT,
            max_new_tokens=count,
            max_cache_len=ids_BT.shape[1] + room,
            do_sample=False,
            eos_token_id=None,
        )
        return np.asarray(result.sequences)[:, ids_BT.shape[1] :]

    def prefill(self, ids_BT: np.ndarray) -> np.ndarray:
        return self.tokens(ids_BT, 1, 1)

    def first(self, ids_BT: np.ndarray, new: int) -> np.ndarray:
        return self.tokens(ids_BT, 1, new)

    def generate(self, ids_BT: np.ndarray, new: int) -> np.ndarray:
        return self.tokens(ids_BT, new, new)


def load(settings: Settings) -> Ours:
    model, params = from_pretrained(settings.path, dtype=settings.dtype)
    return Ours(model, jax.block_until_ready(params))
