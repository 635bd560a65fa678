"""What the TPU compiler's programs send between the eight chips of a v5e-8, at full width.

Two layers stand for all: they are one loop.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import phi3_jax as phi3
from phi3_jax.cache import KVCache
from phi3_jax.generation.config import GenerationConfig
from phi3_jax.generation.decoding import Plan, Wanted, decode_step, first_state
from phi3_jax.generation.settings import Past, Settings
from phi3_jax.rope import rope_tables
from phi3_jax.sharding import abstract_params
from plan.hlo import count, read

# 32 key-value heads of 96; and 10 of 128, which the mesh pads to 16.
MEMBERS = ["phi-3-mini-4k", "phi-3-medium-4k"]


def two_layers(member: str) -> phi3.Phi3Config:
    values = phi3.Phi3Config.preset(member).to_dict()
    return phi3.Phi3Config.from_dict({**values, "num_hidden_layers": 2})


def everywhere(tree, mesh):
    """Shapes, the arrays whole on every device."""
    whole = NamedSharding(mesh, PartitionSpec())
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)  # noqa: E731
    return jax.tree.map(place, tree)


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("attn_implementation", ["xla", "auto"])
def test_a_layers_forward_has_two_all_reduces(tpu_mesh, member, attn_implementation):
    """And one for the embedding; no collective-permute, all-gather or all-to-all (trap 48)."""
    config, mesh = two_layers(member), tpu_mesh("v5e:2x4", (1, 1, 8))
    model = phi3.Phi3Model(
        config, jnp.bfloat16, jnp.bfloat16, mesh, attn_implementation=attn_implementation
    )
    ids = everywhere(np.zeros((1, 2048), np.int32), mesh)
    run = jax.jit(lambda params, ids: model.apply({"params": params}, ids))
    text = run.lower(abstract_params(model), ids).compile().as_text()
    assert ("tpu_custom_call" in text) == (attn_implementation == "auto")
    found = read(text).collectives
    assert count(found, depth=1) == {"all-reduce": 2}
    assert count(found) == {"all-reduce": 3}
    assert {one.nbytes for one in found} == {2 * 2048 * config.hidden_size}


@pytest.mark.parametrize("member", MEMBERS)
def test_a_decoding_step_has_two_all_reduces_a_layer(tpu_mesh, member):
    """Of 32 rows over a cache of 4096 slots. Beside them, outside of the layers, the best of each
    device's share of the vocabulary: a number and its place.
    """
    rows, slots = 32, 4096
    config, mesh = two_layers(member), tpu_mesh("v5e:2x4", (1, 1, 8))
    model = phi3.Phi3ForCausalLM(config, jnp.bfloat16, jnp.bfloat16, mesh)
    settings = Settings.of(GenerationConfig.from_model_config(config), config.vocab_size)

    def start():
        cache = KVCache.init(config, rows, slots, jnp.bfloat16, mesh)
        logits_BV = jnp.zeros((rows, config.vocab_size), jnp.float32)
        row_B, key = jnp.zeros(rows, jnp.int32), jax.random.key(0)
        plan = Plan(settings, rope_tables(config, slots))
        past = Past(jnp.zeros((), jnp.int32))
        return first_state(
            logits_BV, cache, row_B > 0, row_B, past, None, plan, key, None, slots, mesh, Wanted()
        )[0]

    state = everywhere(jax.eval_shape(start), mesh)
    over_heads = NamedSharding(mesh, PartitionSpec(None, None, "tensor", None, None))
    cut = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=over_heads)  # noqa: E731
    k_LBKSH, v_LBKSH = cut(state.cache.k_LBKSH), cut(state.cache.v_LBKSH)
    state = state.replace(cache=state.cache.replace(k_LBKSH=k_LBKSH, v_LBKSH=v_LBKSH, filled=True))
    plan = everywhere(Plan(settings, rope_tables(config, slots)), mesh)
    compiled = decode_step.lower(model, abstract_params(model), state, plan).compile()
    found = read(compiled.as_text()).collectives
    assert count(found, depth=1) == {"all-reduce": 2}
    assert count(found, depth=0) == {"all-reduce": 1, "all-gather": 2}
    reduced = {one.nbytes for one in found if one.kind == "all-reduce"}
    assert reduced == {2 * rows * config.hidden_size}
    assert max(one.nbytes for one in found if one.kind == "all-gather") == 4 * rows * 8
    # The cache is written in place: the temporary memory is far below its gigabyte.
    assert compiled.memory_analysis().temp_size_in_bytes < 2**28
