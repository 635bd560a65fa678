"""What compiled programs send between devices, on the CPU's eight; the TPU compiler's in tests/tpu.

A layer under tensor parallelism has two all-reduces, after o_proj and after down_proj; the fused
kernels keep their parts apart so that nothing else is needed (layers.py).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import phi3_jax as phi3
from phi3_jax.generation.decoding import decode_loop, decode_step
from phi3_jax.generation.request import prepare
from phi3_jax.sharding import abstract_params, init_params
from plan.hlo import Collective, count, read

ROWS, WIDTH, HIDDEN = 3, 18, 64
RESIDUAL_BYTES = 4 * ROWS * WIDTH * HIDDEN
FAST = {"xla_backend_optimization_level": 0}  # of the CPU's code; collectives are above that

# Key-value heads, and query heads for each, of Phi-3-mini, Phi-3-medium and Phi-4, Phi-4-mini, and
# of eight heads without groups.
HEADS = [(32, 1), (10, 4), (8, 3), (8, 1)]


def config_of(heads: tuple[int, int]) -> phi3.Phi3Config:
    kv_heads, queries = heads
    return phi3.Phi3Config(
        vocab_size=97,
        hidden_size=HIDDEN,
        intermediate_size=84,
        num_hidden_layers=3,
        num_attention_heads=kv_heads * queries,
        num_key_value_heads=kv_heads,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def compiled(function, *arguments) -> list[Collective]:
    return read(jax.jit(function).lower(*arguments).compile(FAST).as_text()).collectives


def ids_on(mesh, rows: int):
    """Ids [rows, T], the rows over the mesh."""
    rows_over = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    return jax.ShapeDtypeStruct((rows, WIDTH), jnp.int32, sharding=rows_over)


def tensor_mesh(size: int):
    return phi3.make_mesh(1, 1, size, devices=jax.devices()[:size])


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_a_layers_forward_has_two_all_reduces(heads, tensor):
    """And one for the embedding, none larger than the residual stream (trap 48)."""
    model = phi3.Phi3Model(config_of(heads), mesh=tensor_mesh(tensor))
    run = lambda params, ids: model.apply({"params": params}, ids)  # noqa: E731
    found = compiled(run, abstract_params(model), ids_on(model.mesh, ROWS))
    assert count(found, depth=1) == {"all-reduce": 2}
    assert count(found) == {"all-reduce": 3}
    assert {one.nbytes for one in found} == {RESIDUAL_BYTES}


@pytest.mark.parametrize(
    "heads, tensor, remat, in_layer",
    [
        ((32, 1), 8, "none", 4),
        ((10, 4), 4, "full", 5),
        ((10, 4), 8, "attention", 5),
        ((8, 3), 8, "dots", 4),
    ],
)
def test_a_training_step_has_all_reduces_alone(heads, tensor, remat, in_layer):
    """Of activations: two a layer forward, two backward, one more where o_proj is computed again;
    the cross-entropy adds some of a number a token.
    """
    model = phi3.Phi3ForCausalLM(config_of(heads), mesh=tensor_mesh(tensor), remat=remat)
    loss = lambda params, ids: model.apply({"params": params}, ids, labels=ids).loss  # noqa: E731
    found = compiled(jax.value_and_grad(loss), abstract_params(model), ids_on(model.mesh, ROWS))
    assert set(count(found)) == {"all-reduce"}
    assert count(found, depth=1) == {"all-reduce": in_layer}
    assert max(one.nbytes for one in found) == RESIDUAL_BYTES


def test_a_decoding_step_has_two_all_reduces_a_layer():
    """Beside them, outside of the layers, the best of each device's share of the vocabulary."""
    model = phi3.Phi3ForCausalLM(config_of((10, 4)), mesh=tensor_mesh(8))
    ids = np.ones((ROWS, 5), np.int32)
    request = prepare(model, init_params(model), ids, max_new_tokens=9)
    request.start()
    arguments = (request.model, request.params, request.state, request.plan)
    step = read(decode_step.lower(*arguments).compile(FAST).as_text()).collectives
    loop = read(decode_loop.lower(*arguments, np.int32(9)).compile(FAST).as_text()).collectives
    assert count(step, depth=1) == count(loop, depth=2) == {"all-reduce": 2}
    around = {"all-reduce": 1, "all-gather": 2}
    assert count(step, depth=0) == count(loop, depth=1) == around
    assert count(loop, depth=0) == {}
    gathered = [one.nbytes for one in step if one.kind == "all-gather"]
    assert gathered == [4 * ROWS * 8] * 2  # a number and its place from each device
    assert max(one.nbytes for one in step) == 4 * ROWS * HIDDEN


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 2, 4), (2, 2, 2)])
def test_fsdp_gathers_weights_and_nothing_else(sizes):
    """Four kernels a layer and the embedding, each once, in its share of the tensor axis."""
    model = phi3.Phi3Model(config_of((10, 4)), mesh=phi3.make_mesh(*sizes))
    run = lambda params, ids: model.apply({"params": params}, ids)  # noqa: E731
    params = abstract_params(model)
    found = compiled(run, params, ids_on(model.mesh, 8))
    reduced = lambda number: {"all-reduce": number} if sizes[2] > 1 else {}  # noqa: E731
    assert count(found, depth=0) == {"all-gather": 1} | reduced(1)
    assert count(found, depth=1) == {"all-gather": 4} | reduced(2)
    kernels = [leaf for leaf in jax.tree.leaves(params["layers"]) if leaf.ndim > 2]
    gathered = [one.nbytes for one in found if one.depth == 1 and one.kind == "all-gather"]
    assert sorted(gathered) == sorted(leaf.size // 3 * 4 // sizes[2] for leaf in kernels)


def test_data_parallel_sends_nothing_forward():
    model = phi3.Phi3Model(config_of((10, 4)), mesh=phi3.make_mesh(8, 1, 1))
    run = lambda params, ids: model.apply({"params": params}, ids)  # noqa: E731
    assert compiled(run, abstract_params(model), ids_on(model.mesh, 8)) == []


def test_a_flat_fused_kernel_would_be_seen():
    """q, k and v side by side in one dimension, as in the file, are cut across the devices."""
    mesh = tensor_mesh(8)
    place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))  # noqa: E731
    x = jax.ShapeDtypeStruct((ROWS, WIDTH, HIDDEN), jnp.float32, sharding=place())
    flat = jax.ShapeDtypeStruct((HIDDEN, 3 * 64), jnp.float32, sharding=place(None, "tensor"))
    out = jax.ShapeDtypeStruct((64, HIDDEN), jnp.float32, sharding=place("tensor", None))

    def mixed(x, flat, out):
        q, k, v = jnp.split(x @ flat, 3, axis=-1)
        return jax.lax.with_sharding_constraint((q * k + v) @ out, place())

    kinds = count(compiled(mixed, x, flat, out))
    assert kinds.pop("all-reduce") == 1
    assert kinds
