"""The model's use of the fused attention, as the TPU compiler sees it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import phi3_jax as phi3
from phi3_jax.sharding import abstract_params


@pytest.mark.parametrize("remat, kernels", [("none", 3), ("attention", 3), ("full", 4)])
def test_saved_attention_is_not_computed_again(tpu_mesh, remat, kernels):
    """One kernel forward and two backward; full rematerialisation runs the first one twice."""
    config = phi3.Phi3Config(
        vocab_size=256,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
    )
    mesh = tpu_mesh()
    model = phi3.Phi3ForCausalLM(config, dtype="bfloat16", mesh=mesh, remat=remat)
    everywhere = NamedSharding(mesh, PartitionSpec())
    ids = jax.ShapeDtypeStruct((1, 256), jnp.int32, sharding=everywhere)
    step = jax.jit(jax.grad(lambda p, ids: model.apply({"params": p}, ids, labels=ids).loss))
    text = step.lower(abstract_params(model), ids).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == kernels


def test_short_calls_and_exact_products_stay_with_xla(tpu_mesh):
    config = phi3.Phi3Config.preset("phi-3-mini-4k-instruct")
    model = phi3.Phi3Model(config, dtype="bfloat16", mesh=tpu_mesh())
    params = abstract_params(model)
    for tokens, kernel in ((64, False), (128, True)):
        ids = np.zeros((1, tokens), np.int32)
        lowered = jax.jit(lambda p: model.apply({"params": p}, ids)).trace(params)  # noqa: B023
        assert ("pallas_call" in str(lowered.jaxpr)) == kernel
