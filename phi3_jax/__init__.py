"""Phi-3 in JAX and Flax linen: load, generate, fine-tune and convert, on one device or a mesh.

The names below are the public surface. They are imported on first use, so that a command which
only reads a header does not wait for the compiler to load.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "AsyncTextIteratorStreamer": "phi3_jax.text.streamers",
    "GenerationConfig": "phi3_jax.generation.config",
    "Grammar": "phi3_jax.text.guided",
    "KVCache": "phi3_jax.cache",
    "Phi3Config": "phi3_jax.config",
    "Phi3ForCausalLM": "phi3_jax.model",
    "Phi3ForSequenceClassification": "phi3_jax.classification",
    "Phi3ForTokenClassification": "phi3_jax.classification",
    "Phi3Model": "phi3_jax.model",
    "PromptCache": "phi3_jax.generation.prompt_cache",
    "TextGenerator": "phi3_jax.text.generator",
    "TextIteratorStreamer": "phi3_jax.text.streamers",
    "TextStreamer": "phi3_jax.text.streamers",
    "Tokenizer": "phi3_jax.text.tokenizer",
    "WatermarkDetector": "phi3_jax.generation.watermark",
    "WatermarkingConfig": "phi3_jax.generation.watermarking_config",
    "compute_transition_scores": "phi3_jax.generation.outputs",
    "from_pretrained": "phi3_jax.checkpoint",
    "generate": "phi3_jax.generation.request",
    "init_params": "phi3_jax.sharding",
    "make_mesh": "phi3_jax.sharding",
    "make_prompt_cache": "phi3_jax.generation.request",
    "resize_token_embeddings": "phi3_jax.resize",
    "save_checkpoint": "phi3_jax.checkpoint",
    "save_pretrained": "phi3_jax.checkpoint",
    "shard_params": "phi3_jax.sharding",
    "stream": "phi3_jax.generation.request",
}

__all__ = sorted([*_HOME, "__version__"])

if TYPE_CHECKING:
    from phi3_jax.cache import KVCache as KVCache
    from phi3_jax.checkpoint import from_pretrained as from_pretrained
    from phi3_jax.checkpoint import save_checkpoint as save_checkpoint
    from phi3_jax.checkpoint import save_pretrained as save_pretrained
    from phi3_jax.classification import (
        Phi3ForSequenceClassification as Phi3ForSequenceClassification,
    )
    from phi3_jax.classification import Phi3ForTokenClassification as Phi3ForTokenClassification
    from phi3_jax.config import Phi3Config as Phi3Config
    from phi3_jax.generation.config import GenerationConfig as GenerationConfig
    from phi3_jax.generation.outputs import compute_transition_scores as compute_transition_scores
    from phi3_jax.generation.prompt_cache import PromptCache as PromptCache
    from phi3_jax.generation.request import generate as generate
    from phi3_jax.generation.request import make_prompt_cache as make_prompt_cache
    from phi3_jax.generation.request import stream as stream
    from phi3_jax.generation.watermark import WatermarkDetector as WatermarkDetector
    from phi3_jax.generation.watermarking_config import WatermarkingConfig as WatermarkingConfig
    from phi3_jax.model import Phi3ForCausalLM as Phi3ForCausalLM
    from phi3_jax.model import Phi3Model as Phi3Model
    from phi3_jax.resize import resize_token_embeddings as resize_token_embeddings
    from phi3_jax.sharding import init_params as init_params
    from phi3_jax.sharding import make_mesh as make_mesh
    from phi3_jax.sharding import shard_params as shard_params
    from phi3_jax.text.generator import TextGenerator as TextGenerator
    from phi3_jax.text.guided import Grammar as Grammar
    from phi3_jax.text.streamers import AsyncTextIteratorStreamer as AsyncTextIteratorStreamer
    from phi3_jax.text.streamers import TextIteratorStreamer as TextIteratorStreamer
    from phi3_jax.text.streamers import TextStreamer as TextStreamer
    from phi3_jax.text.tokenizer import Tokenizer as Tokenizer


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(
            f"module 'phi3_jax' has no attribute {name!r}; phi3_jax.__all__ lists what it has"
        )
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return __all__
