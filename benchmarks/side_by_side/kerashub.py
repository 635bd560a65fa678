"""KerasHub on JAX; its loader wants the hub, so the weights are assigned here by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
from safetensors.numpy import load_file
from worker import Settings

PACKAGES = ("keras", "keras-hub", "jax")


def load_model(settings: Settings) -> Any:
    keras.config.set_dtype_policy(settings.dtype)
    folder = Path(settings.path)
    config = json.loads((folder / "config.json").read_text())
    width, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads, mlp = config["num_key_value_heads"], config["intermediate_size"]
    head = width // heads
    backbone = keras_hub.models.Phi3Backbone(
        vocabulary_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        hidden_dim=width,
        intermediate_dim=mlp,
        num_query_heads=heads,
        num_key_value_heads=kv_heads,
        layer_norm_epsilon=config["rms_norm_eps"],
        max_sequence_length=config["max_position_embeddings"],
        dtype=settings.dtype,
    )
    weights = load_file(folder / "model.safetensors")
    embedding = backbone.token_embedding
    embedding.embeddings.assign(weights["model.embed_tokens.weight"])
    embedding.reverse_embeddings.assign(weights["lm_head.weight"].T)
    backbone.layer_norm.scale.assign(weights["model.norm.weight"])
    for number, layer in enumerate(backbone.transformer_layers):
        prefix = f"model.layers.{number}."

        def stored(name: str, prefix: str = prefix) -> np.ndarray:
            return weights[f"{prefix}{name}.weight"].T

        layer.pre_attention_layernorm.scale.assign(stored("input_layernorm"))
        layer.post_attention_layernorm.scale.assign(stored("post_attention_layernorm"))
        cuts = [heads * head, (heads + kv_heads) * head]
        attention = layer.attention
        dense = (attention.query_dense, attention.key_dense, attention.value_dense)
        for target, part in zip(
            dense, np.split(stored("self_attn.qkv_proj"), cuts, 1), strict=True
        ):
            target.kernel.assign(part.reshape(width, -1, head))
        output = stored("self_attn.o_proj").reshape(heads, head, width)
        attention.output_dense.kernel.assign(output)
        gate, up = np.split(stored("mlp.gate_up_proj"), 2, 1)
        layer.feedforward_gate_dense.kernel.assign(gate)
        layer.feedforward_intermediate_dense.kernel.assign(up)
        layer.feedforward_output_dense.kernel.assign(stored("mlp.down_proj"))
    return keras_hub.models.Phi3CausalLM(backbone=backbone, preprocessor=None)


class KerasHub:
    """Its generate() fills the cache for the final length at once, so that a prompt which is one
    token shorter than that takes the prefill and one step.
    """

    def __init__(self, model: Any):
        self.model = model
        self.model.compile(sampler="greedy")

    def tokens(self, ids_BT: np.ndarray, length: int) -> np.ndarray:
        rows, prompt = ids_BT.shape
        ids = np.zeros((rows, length), np.int32)
        ids[:, :prompt] = ids_BT
        mask = np.zeros((rows, length), np.int32)
        mask[:, :prompt] = 1
        inputs = {"token_ids": ids, "padding_mask": mask}
        return np.asarray(self.model.generate(inputs, stop_token_ids=None)["token_ids"])

    def prefill(self, ids_BT: np.ndarray) -> np.ndarray:
        return self.tokens(ids_BT[:, :-1], ids_BT.shape[1])

    def first(self, ids_BT: np.ndarray, new: int) -> np.ndarray:
        rows, prompt = ids_BT.shape
        filled = np.concatenate([ids_BT, np.full((rows, new - 1), 5, np.int32)], 1)
        return self.tokens(filled, prompt + new)

    def generate(self, ids_BT: np.ndarray, new: int) -> np.ndarray:
        prompt = ids_BT.shape[1]
        return self.tokens(ids_BT, prompt + new)[:, prompt:]


def load(settings: Settings) -> KerasHub:
    return KerasHub(load_model(settings))


def start_training(settings: Settings, ids_BT: np.ndarray) -> Callable[[], float]:
    model = load_model(settings)
    model.compile(
        optimizer=keras.optimizers.AdamW(1e-5, weight_decay=0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[],
    )
    inputs = {"token_ids": ids_BT, "padding_mask": np.ones_like(ids_BT)}
    labels, counted = np.roll(ids_BT, -1, axis=1), np.ones(ids_BT.shape, np.float32)
    counted[:, -1] = 0

    def step() -> float:
        loss = model.train_on_batch(inputs, labels, sample_weight=counted)
        return float(np.ravel(np.asarray(loss))[0])

    return step
