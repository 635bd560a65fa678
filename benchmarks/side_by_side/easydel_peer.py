"""EasyDeL on JAX."""

from typing import Any

import easydel
import jax.numpy as jnp
import numpy as np
from transformers import GenerationConfig
from worker import Settings

PACKAGES = ("easydel", "jax")


class EasyDeL:
    def __init__(self, model: Any):
        self.model = model
        self.model.mesh.__enter__()  # for good: the process ends with it

    def prefill(self, ids_BT: np.ndarray) -> np.ndarray:
        return self.generate(ids_BT, 1)

    def first(self, ids_BT: np.ndarray, new: int) -> np.ndarray:
        return self.generate(ids_BT, 1)

    def generate(self, ids_BT: np.ndarray, new: int) -> np.ndarray:
        settings = GenerationConfig(
            max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, bos_token_id=1
        )
        ids = jnp.asarray(ids_BT)
        mask = jnp.ones_like(ids)
        out = self.model.generate(ids, attention_mask=mask, generation_config=settings)
        return np.asarray(getattr(out, "sequences", out))[:, ids_BT.shape[1] :]


def load(settings: Settings) -> EasyDeL:
    dtype = jnp.dtype(settings.dtype)
    model = easydel.AutoEasyDeLModelForCausalLM.from_pretrained(
        settings.path,
        from_torch=True,
        dtype=dtype,
        param_dtype=dtype,
        local_files_only=True,
        verbose=False,
    )
    return EasyDeL(model)
