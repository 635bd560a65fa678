"""Programs for the compilers of devices that are not here: small steps, full-size decoding."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import phi3_jax as phi3
from phi3_jax.cache import KVCache
from phi3_jax.generation.config import GenerationConfig
from phi3_jax.generation.decoding import (
    Plan,
    Wanted,
    decode_loop,
    decode_step,
    first_state,
    prefill,
)
from phi3_jax.generation.settings import Past, Settings
from phi3_jax.rope import rope_tables
from phi3_jax.sharding import abstract_params, named_sharding
from plan.hlo import Counts, read

GIB = 2**30
# 32 key-value heads of 96: 4 a device of 8; and 10 of 128, which such a mesh pads to 16.
MINI, MEDIUM = "phi-3-mini-4k", "phi-3-medium-4k"


def small_config(**changes) -> phi3.Phi3Config:
    """Heads of 96 and a window, for jobs of phi3-plan."""
    values = dict(
        vocab_size=512,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=4096,
        sliding_window=200,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return phi3.Phi3Config(**{**values, **changes})


def training_step(layers: int, mesh) -> Counts:
    """Counts of a gradient of bfloat16 weights, all computed again in the backward pass."""
    config = phi3.Phi3Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    model = phi3.Phi3ForCausalLM(config, jnp.bfloat16, jnp.bfloat16, mesh, remat="full")
    place = named_sharding(("batch", None), (8, 256), mesh)
    ids = jax.ShapeDtypeStruct((8, 256), jnp.int32, sharding=place)
    step = jax.jit(jax.grad(lambda p, ids: model.apply({"params": p}, ids, labels=ids).loss))
    return read(step.lower(abstract_params(model), ids).compile().as_text())


class Job:
    """A model, and shapes of what its programs take, laid out on a mesh."""

    def __init__(self, mesh, member, layers=None, rows=32, slots=4096):
        values = phi3.Phi3Config.preset(member).to_dict()
        values["num_hidden_layers"] = layers or values["num_hidden_layers"]
        config = phi3.Phi3Config.from_dict(values)
        self.mesh, self.rows = mesh, rows
        self.model = phi3.Phi3ForCausalLM(config, jnp.bfloat16, jnp.bfloat16, mesh)
        self.params = abstract_params(self.model)
        settings = Settings.of(GenerationConfig.from_model_config(config), config.vocab_size)
        plan = Plan(settings, rope_tables(config, slots))

        def start():
            cache = KVCache.init(config, rows, slots, jnp.bfloat16, mesh)
            row_B, past = jnp.zeros(rows, jnp.int32), Past(jnp.zeros((), jnp.int32))
            return first_state(
                jnp.zeros((rows, config.vocab_size)), cache, row_B > 0, row_B, past, None, plan,
                jax.random.key(0), None, slots, mesh, Wanted(),
            )[0]  # fmt: skip

        state = jax.eval_shape(start)
        self.plan, self.state = self.everywhere(plan), self.everywhere(state)
        self.cache = state.cache.mapped(
            lambda x, names: self.shape(x, named_sharding(names, x.shape, mesh))
        ).replace(length=self.state.cache.length, filled=True)
        self.state = self.state.replace(cache=self.cache)

    @staticmethod
    def shape(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def everywhere(self, tree):
        whole = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(lambda x: self.shape(x, whole), tree)

    def step(self):
        return decode_step.lower(self.model, self.params, self.state, self.plan).compile()

    def loop(self):
        limit = self.everywhere(np.int32(9))
        return decode_loop.lower(self.model, self.params, self.state, self.plan, limit).compile()

    def prefill(self, tokens, fresh):
        of_tokens = [np.zeros((self.rows, tokens), dtype) for dtype in (np.int32, bool, np.int32)]
        inputs = self.everywhere((*of_tokens, np.zeros(self.rows, bool), np.int32(0)))
        rope = self.plan.rope
        return prefill.lower(self.model, self.params, *inputs, self.cache, rope, fresh).compile()

    @property
    def nbytes(self) -> int:
        """Of the weights and the cache on a device: what a token step has to read."""
        leaves = jax.tree.leaves((self.params, self.cache))
        return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in leaves)

    def above(self, compiled) -> float:
        """GiB of the peak above weights and cache."""
        return (compiled.memory_analysis().peak_memory_in_bytes - self.nbytes) / GIB
