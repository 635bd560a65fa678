"""transformers on torch: eager, and compiled over a static cache."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from transformers import Phi3ForCausalLM, StaticCache
from worker import Settings

PACKAGES = ("torch", "transformers")

transformers.logging.set_verbosity_error()


def load_model(settings: Settings) -> Any:
    return Phi3ForCausalLM.from_pretrained(settings.path, dtype=getattr(torch, settings.dtype))


class Eager:
    """The model as its own generate() calls it."""

    def __init__(self, model: Any):
        self.model = model.eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0

    @torch.inference_mode()
    def prefill(self, ids_BT: np.ndarray) -> Any:
        out = self.model(torch.from_numpy(ids_BT).long(), use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1)

    def first(self, ids_BT: np.ndarray, new: int) -> Any:
        return self.generate(ids_BT, 1)

    @torch.inference_mode()
    def generate(self, ids_BT: np.ndarray, new: int) -> np.ndarray:
        ids = torch.from_numpy(ids_BT).long()
        all_ids = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
        )
        return all_ids[:, ids_BT.shape[1] :].numpy()


class Compiled:
    """Every call through torch.compile, one program for each shape."""

    def __init__(self, model: Any):
        self.model = model.eval()
        self.forward = torch.compile(self.model.forward, dynamic=False)
        self.caches: dict[tuple[int, int], Any] = {}

    def cache(self, rows: int, room: int) -> Any:
        """An empty cache; the same arrays again, since new ones may compile anew."""
        if (rows, room) not in self.caches:
            config = self.model.config
            width = config.hidden_size // config.num_attention_heads
            made = StaticCache(config=config, max_cache_len=room)
            made.early_initialization(
                rows, config.num_key_value_heads, width, self.model.dtype, torch.device("cpu")
            )
            self.caches[rows, room] = made
        self.caches[rows, room].reset()
        return self.caches[rows, room]

    def prefill(self, ids_BT: np.ndarray) -> Any:
        return self.tokens(ids_BT, 1, 0)

    def first(self, ids_BT: np.ndarray, new: int) -> Any:
        return self.tokens(ids_BT, 1, new)

    def generate(self, ids_BT: np.ndarray, new: int) -> np.ndarray:
        return self.tokens(ids_BT, new, new)

    @torch.inference_mode()
    def tokens(self, ids_BT: np.ndarray, count: int, room: int) -> np.ndarray:
        rows, prompt = ids_BT.shape
        cache, chosen = self.cache(rows, prompt + room), []
        ids, begin = torch.from_numpy(ids_BT).long(), 0
        for _ in range(count):
            position_ids = torch.arange(begin, begin + ids.shape[1]).expand(rows, -1)
            out = self.forward(
                input_ids=ids,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            begin += ids.shape[1]
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            chosen.append(ids)
        return torch.cat(chosen, 1).numpy()


def load(settings: Settings) -> Any:
    return (Compiled if settings.compiled else Eager)(load_model(settings))


def start_training(settings: Settings, ids_BT: np.ndarray) -> Callable[[], float]:
    model = load_model(settings).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01)
    forward = torch.compile(model) if settings.compiled else model
    ids = torch.from_numpy(ids_BT).long()

    def step() -> float:
        loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step
