"""The model's use of cuDNN, as the GPU compiler sees it."""

import jax
import jax.numpy as jnp
import pytest

import phi3_jax as phi3
from phi3_jax.sharding import abstract_params, named_sharding


@pytest.mark.parametrize("remat, kernels", [("none", 2), ("attention", 2), ("full", 3)])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 2), (1, 1, 1, 2)])
def test_saved_attention_is_not_computed_again(gpu_mesh, remat, kernels, sizes):
    """One kernel forward and one backward; full rematerialisation runs the first one twice."""
    config = phi3.Phi3Config(
        vocab_size=256,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        pad_token_id=0,
    )
    mesh = gpu_mesh(sizes)
    model = phi3.Phi3ForCausalLM(config, dtype="bfloat16", mesh=mesh, remat=remat)
    place = named_sharding(("batch", None), (2, 256), mesh)
    ids = jax.ShapeDtypeStruct((2, 256), jnp.int32, sharding=place)
    step = jax.jit(jax.grad(lambda p, ids: model.apply({"params": p}, ids, labels=ids).loss))
    text = step.lower(abstract_params(model), ids).compile().as_text()
    assert text.count('custom_call_target="__cudnn$fmha') == kernels
