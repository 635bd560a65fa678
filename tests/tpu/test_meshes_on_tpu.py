"""Long rows over the sequence axis, and meshes of several slices, as the TPU compiler sees them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import phi3_jax as phi3
from phi3_jax.sharding import abstract_params, named_sharding
from plan.hlo import count, read

GIB = 2**30


def training_step(config, mesh, rows, tokens):
    """The compiled loss and gradients of bfloat16 parameters on packed rows."""
    model = phi3.Phi3ForCausalLM(config, jnp.bfloat16, jnp.bfloat16, mesh, remat="attention")
    place = named_sharding(("batch", None), (rows, tokens), mesh)
    ids = jax.ShapeDtypeStruct((rows, tokens), jnp.int32, sharding=place)

    def loss(params, ids, segments):
        return model.apply({"params": params}, ids, labels=ids, segment_ids=segments).loss

    return jax.jit(jax.value_and_grad(loss)).lower(abstract_params(model), ids, ids).compile()


def test_rows_of_131072_tokens_train(tpu_mesh):
    """phi-3.5-mini at full width, two layers, one row over eight chips: nothing is sent of the
    activations but the results of qkv_proj and of the attention, forward and backward. The latter
    is saved as the kernel gives it, and sent once more for the gradient of o_proj.
    """
    values = phi3.Phi3Config.preset("phi-3.5-mini").to_dict()
    config = phi3.Phi3Config.from_dict({**values, "num_hidden_layers": 2})
    tokens, devices = 131_072, 8
    mesh = tpu_mesh("v5e:2x4", (1, 1, 1, devices))
    compiled = training_step(config, mesh, 1, tokens)
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3  # forward, dq, dk with dv
    found = read(text).collectives
    assert count(found, depth=1)["all-to-all"] == count(found)["all-to-all"] == 5
    a_result = 2 * tokens // devices * config.hidden_size
    sent = sorted(one.nbytes for one in found if one.kind == "all-to-all")
    assert sent == [a_result, a_result, a_result, 3 * a_result, 3 * a_result]
    # What else is sent are parameters, whole or piece by piece, and their gradients.
    of_tokens = re.compile(rf"[\[,]({tokens}|{tokens // devices})[\],]")
    others = [one.line.split("(%")[0] for one in found if one.kind != "all-to-all"]
    assert not [line for line in others if of_tokens.search(line)]
    # 3.9; whole rows of one layer's gate and up alone would be 4.
    assert compiled.memory_analysis().peak_memory_in_bytes < 4.2 * GIB


def slice_of(mesh) -> np.ndarray:
    return np.vectorize(lambda device: device.slice_index)(mesh.devices)


@pytest.mark.parametrize(
    "topology, sizes, across",
    [
        ("v5e:2x4", dict(data=2, fsdp=4, tensor=2), "data"),
        ("v5e:2x4", dict(data=1, fsdp=16, tensor=1), "fsdp"),
        ("v5e:4x4", dict(data=1, fsdp=2, sequence=16, tensor=1), "fsdp"),
        ("v5p:2x2x2", dict(data=2, fsdp=2, sequence=2, tensor=2), "data"),
        ("v5p:4x4x4", dict(data=4, fsdp=8, tensor=4), "data"),
    ],
)
def test_slices_lie_along_data_or_fsdp(tpu_devices, topology, sizes, across):
    mesh = phi3.make_mesh(**sizes, devices=tpu_devices(topology, slices=2))
    assert dict(mesh.shape) == dict(sequence=1) | sizes
    index = np.moveaxis(slice_of(mesh), mesh.axis_names.index(across), 0)
    half = len(index) // 2
    assert (index[:half] == index[0, 0, 0, 0]).all() and (index[half:] == index[-1, 0, 0, 0]).all()
    assert set(index.ravel()) == {0, 1}


def test_slices_that_a_mesh_cannot_hold(tpu_devices):
    with pytest.raises(ValueError, match=r"in 2 slices with \[8, 8\] of them; .* not 1 x 1: seq"):
        phi3.make_mesh(devices=tpu_devices("v5e:2x4", slices=2))


def test_between_slices_gradients_alone_are_sent(tpu_devices):
    """Of two slices with a copy of the parameters each."""
    config = phi3.Phi3Config(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
    )
    mesh = phi3.make_mesh(2, 2, 2, tpu_devices("v5e:2x4", slices=2), sequence=2)
    text = training_step(config, mesh, 4, 256).as_text()
    sent = re.findall(r'_xla_host_transfer_rendezvous="([a-z\-]+)', text)
    # Older libtpus call it by jax's own name.
    assert sent and set(sent) <= {"all-reduce", "psum"}
