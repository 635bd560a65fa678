"""Meshes, the rule table, and the same numbers on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from reference import config_values, hf_weights, params_of, tokens

import phi3_jax as phi3
from phi3_jax.sharding import abstract_params, active_mesh, constrain, logical_spec, mesh_of


def test_make_mesh_takes_what_is_left():
    assert dict(phi3.make_mesh().shape) == {"data": 1, "fsdp": 1, "tensor": 8}
    assert dict(phi3.make_mesh(2, -1, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    "sizes, words",
    [
        ((1, 1, 3), "does not make 8 devices; each size must be one of \\[1, 2, 4, 8\\]"),
        ((3, 1, -1), "does not make 8 devices"),
        ((-1, -1, 2), "only one size can be left open"),
        ((0, 1, 8), "'data' has size 0"),
    ],
)
def test_meshes_that_cannot_be(sizes, words):
    with pytest.raises(ValueError, match=words):
        phi3.make_mesh(*sizes)


def test_what_does_not_divide_is_replicated():
    mesh = phi3.make_mesh(1, 2, 4)
    names = ("embed", "kv_heads", None, None)
    assert logical_spec(names, (48, 8, 5, 8), mesh) == PartitionSpec("fsdp", "tensor", None, None)
    assert logical_spec(names, (48, 10, 6, 8), mesh) == PartitionSpec("fsdp", None, None, None)
    both = phi3.make_mesh(2, 2, 2)
    assert logical_spec(("batch",), (8,), both) == PartitionSpec(("data", "fsdp"))
    assert logical_spec(("batch",), (2,), both) == PartitionSpec("data")


def test_a_constraint_takes_effect():
    mesh = phi3.make_mesh(2, 2, 2)
    place = jax.jit(lambda x: constrain(x * 2, "batch", None))
    with active_mesh(mesh):
        out = place(jnp.ones((8, 3)))
    assert out.sharding.is_equivalent_to(
        NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None)), 2
    )


def test_abstract_params_name_every_leafs_place():
    config = phi3.Phi3Config.preset("phi-3-mini-4k")
    leaves = abstract_params(phi3.Phi3ForCausalLM(config), phi3.make_mesh(1, 2, 4))
    assert sum(leaf.size for leaf in jax.tree.leaves(leaves)) == 3_821_079_552
    qkv = leaves["model"]["layers"]["self_attn"]["qkv_proj"]["weight"]
    assert qkv.shape == (32, 3072, 32, 3, 96)
    assert qkv.sharding.spec == PartitionSpec(None, "fsdp", "tensor", None, None)
    down = leaves["model"]["layers"]["mlp"]["down_proj"]["weight"]
    assert down.sharding.spec == PartitionSpec(None, "tensor", "fsdp")
    assert leaves["lm_head"]["weight"].sharding.spec == PartitionSpec("tensor", "fsdp")


@pytest.mark.parametrize("sizes", [(1, 1, 8), (2, 2, 2), (1, 4, 2)])
@pytest.mark.parametrize("case", ["longrope", "mha_window"])
def test_meshes_compute_what_one_device_does(case, sizes):
    """The vocabulary of 97 divides by no mesh; nothing is padded for that, so no padded id can be
    drawn or enter the loss (trap 36).
    """
    config = phi3.Phi3Config(**config_values(case))
    model, params = phi3.Phi3ForCausalLM(config), params_of(config, hf_weights(config, case))
    ids = tokens(4, 18)
    alone = jax.jit(model.apply)({"params": params}, ids, labels=ids)
    mesh = phi3.make_mesh(*sizes)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(model, mesh))
    sharded = jax.tree.map(jax.device_put, params, places)
    assert mesh_of(sharded) == mesh and mesh_of(params) is None
    with active_mesh(mesh):
        out = jax.jit(model.apply)({"params": sharded}, ids, labels=ids)
    np.testing.assert_allclose(out.logits, alone.logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(out.loss, alone.loss, rtol=1e-5)
    result = phi3.generate(model, params, ids[:2, :15], max_new_tokens=5, eos_token_id=None)
    meshed = phi3.generate(model, sharded, ids[:2, :15], max_new_tokens=5, eos_token_id=None)
    np.testing.assert_array_equal(meshed.sequences, result.sequences)
