"""The sequence axis: rows cut over devices, whole inside of attention.

That every member computes on it what one device does is in test_meshes.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from reference import config_values, cut_padding, hf_weights, on_mesh, params_of, tokens

import phi3_jax as phi3
from phi3_jax import head_loss
from phi3_jax.attention_kernels import splash_attention
from phi3_jax.cache import KVCache
from phi3_jax.sharding import abstract_params, named_sharding
from plan.hlo import count, read

ROWS, WIDTH = 4, 40
FAST = {"xla_backend_optimization_level": 0}  # of the CPU's code


def mesh_of(data: int, fsdp: int, sequence: int, tensor: int):
    devices = jax.devices()[: data * fsdp * sequence * tensor]
    return phi3.make_mesh(data, fsdp, tensor, devices, sequence=sequence)


def packed() -> dict:
    """Rows of documents that end anywhere, some longer than 16 tokens, and of padding."""
    ids = tokens(ROWS, WIDTH)
    ends = np.array([[17, 19, 33], [3, 24, 40], [9, 10, 11], [20, 30, 39]])
    segments = 1 + (np.arange(WIDTH) >= ends[:, :, None]).sum(axis=1)
    segments[:, 36:] = 0
    return dict(input_ids=ids, labels=ids, segment_ids=segments)


def loss_and_gradients(model, params):
    loss = lambda params: model.apply({"params": params}, **packed()).loss  # noqa: E731
    step = jax.jit(jax.value_and_grad(loss), compiler_options=FAST)
    return jax.device_get(step(params))


@functools.cache
def packed_on_one_device(case: str):
    config = phi3.Phi3Config(**config_values(case))
    model, params = phi3.Phi3ForCausalLM(config), params_of(config, hf_weights(config, case))
    return model, params, *loss_and_gradients(model, params)


@pytest.mark.parametrize(
    "case, sizes, remat",
    [
        ("longrope", (1, 1, 4, 1), "full"),
        ("longrope_window", (1, 2, 2, 2), "attention"),
        ("longrope_partial_tied", (2, 1, 4, 1), "none"),
    ],
)
@pytest.mark.parametrize("columns", [None, 3])
def test_packed_rows_train_as_on_one_device(case, sizes, remat, columns, monkeypatch):
    """With the loss of a device's columns in one piece, and in pieces that do not divide them."""
    alone, params, wanted_loss, wanted = packed_on_one_device(case)
    config = alone.config
    model, sharded = on_mesh(alone.clone(remat=remat), params, mesh_of(*sizes))
    if columns is not None:
        rows, words = ROWS // (sizes[0] * sizes[1]), -(-config.vocab_size // sizes[3])
        monkeypatch.setattr(head_loss, "_LOGITS_BYTES", columns * 4 * rows * words)
        assert head_loss._fitting(rows, words) == columns
    loss, gradients = loss_and_gradients(model, sharded)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-6)
    leaves = jax.tree_util.tree_leaves_with_path(cut_padding(gradients, model))
    for (path, found), gradient in zip(leaves, jax.tree.leaves(wanted), strict=True):
        error = np.abs(found - gradient).max() / np.abs(gradient).max()
        # Rounding: in float64 the two are equal to 2e-14, and in float32 each of them is off from
        # float64 by up to 7e-5 with AVX-512 (below 5e-5 with AVX2).
        assert error < 1e-4, (jax.tree_util.keystr(path), error)


def test_rows_that_do_not_divide_stay_whole():
    config = phi3.Phi3Config(**config_values("longrope"))
    alone, params = phi3.Phi3ForCausalLM(config), params_of(config, hf_weights(config, "longrope"))
    model, sharded = on_mesh(alone, params, mesh_of(1, 1, 4, 1))
    ids = tokens(3, 18)
    found, wanted = (
        jax.jit(one.apply)({"params": those}, ids, labels=ids)
        for one, those in ((model, sharded), (alone, params))
    )
    np.testing.assert_allclose(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-6)


def test_the_splash_kernel_has_whole_rows_of_its_heads():
    """Eight heads, two a device; interpreted, on rows that are padded to blocks."""
    mesh, rng = mesh_of(1, 1, 2, 2), np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, 130, 8, *groups, 16)), jnp.float32)
        for groups in ((2,), (), ())
    )
    segments = jnp.asarray(np.repeat([[1, 2, 0]], [60, 65, 5], axis=1).repeat(2, axis=0))
    run = lambda mesh: jax.jit(  # noqa: E731
        lambda q, k, v: splash_attention(q, k, v, segments, 50, mesh, interpret=True)
    )
    alone = run(None)(q, k, v)
    compiled = run(mesh).lower(q, k, v).compile()
    np.testing.assert_allclose(run(mesh)(q, k, v), alone, rtol=1e-5, atol=1e-5)
    spec = compiled.output_shardings.spec
    assert spec == PartitionSpec(None, None, ("tensor", "sequence")), spec


def test_parameters_are_cut_along_their_width():
    """By fsdp and sequence together; 10 key-value heads are padded, to divide in attention."""
    config = phi3.Phi3Config.preset("phi-3-medium-4k")
    params = abstract_params(phi3.Phi3ForCausalLM(config, mesh=mesh_of(1, 2, 4, 1)))
    attention = params["model"]["layers"]["self_attn"]
    qkv, o = attention["qkv_proj"]["weight"], attention["o_proj"]["weight"]
    assert qkv.shape == (40, 12, 6, 128, 5120)
    assert qkv.sharding.shard_shape(qkv.shape) == (40, 12, 6, 128, 640)
    assert o.sharding.shard_shape(o.shape) == (40, 640, 12, 4, 128)


def test_a_cache_of_the_mesh_goes_through_calls():
    """A prompt that is cut over the devices, then tokens that cannot be."""
    config = phi3.Phi3Config(**config_values("gqa"))
    alone, params = phi3.Phi3ForCausalLM(config), params_of(config, hf_weights(config, "gqa"))
    model, sharded = on_mesh(alone, params, mesh_of(1, 2, 2, 2))
    ids = tokens(2, 13)
    wanted = jax.jit(alone.apply)({"params": params}, ids).logits
    cache, found = KVCache.init(config, 2, 16, jnp.float32, model.mesh), []
    for part in (ids[:, :8], ids[:, 8:12], ids[:, 12:]):
        out = jax.jit(model.apply)({"params": sharded}, part, cache=cache)
        cache, found = out.cache, [*found, out.logits]
    np.testing.assert_allclose(np.concatenate(found, axis=1), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [(1, 1, 4, 1), (1, 2, 4, 1), (1, 1, 4, 2)])
@pytest.mark.parametrize("pieces", [1, 2])
def test_a_training_step_gathers_no_activations(sizes, pieces, monkeypatch):
    """A layer sends one all-to-all into attention and one out of it, and the same two backward;
    all gathers are of parameters: four kernels a layer forward and backward, embedding and head.
    """
    config = phi3.Phi3Config(**config_values("head_dim") | {"num_key_value_heads": 2})
    model = phi3.Phi3ForCausalLM(config, mesh=mesh_of(*sizes))
    D, rows, tensor = config.hidden_size, ROWS // sizes[1], sizes[3]
    columns = WIDTH // sizes[2] // pieces
    a_column = 4 * rows * -(-config.vocab_size // tensor)
    monkeypatch.setattr(head_loss, "_LOGITS_BYTES", columns * a_column)
    place = named_sharding(("batch", None), (ROWS, WIDTH), model.mesh)
    ids = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.int32, sharding=place)

    def loss(params, ids, segments):
        return model.apply({"params": params}, ids, labels=ids, segment_ids=segments).loss

    params = abstract_params(model)
    step = jax.jit(jax.value_and_grad(loss)).lower(params, ids, ids)
    found = read(step.compile(FAST).as_text()).collectives
    assert set(count(found)) <= {"all-gather", "all-to-all", "all-reduce", "reduce-scatter"}
    assert count(found, depth=1)["all-to-all"] == count(found)["all-to-all"] == 4
    # qkv_proj's and attention's results, for the heads on a device: K (G + 2) H and K G H numbers.
    G, K, H = 2, 4 * tensor, config.head_dim
    share = 4 * rows * WIDTH // sizes[2] * K // tensor * H
    sent = sorted(one.nbytes for one in found if one.kind == "all-to-all")
    assert sent == sorted([share * (G + 2), share * G] * 2)

    layers = jax.tree.leaves(params["model"]["layers"])
    kernels = [leaf.size // 3 * 4 // tensor for leaf in layers if leaf.ndim > 2]
    tables = [4 * D * params["lm_head"]["weight"].shape[0] // tensor] * 2
    gathered = [one.nbytes for one in found if one.kind == "all-gather"]
    assert sorted(gathered) == sorted([*kernels * 2, *tables])
