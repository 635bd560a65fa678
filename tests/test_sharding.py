"""Meshes, the rule table, and what is asked of the compiler."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from reference import config_values, hf_weights, on_mesh, params_of, tokens

import phi3_jax as phi3
from phi3_jax.sharding import (
    abstract_params,
    axis_size,
    constrain,
    init_params,
    logical_spec,
    mesh_of,
    padded_shape,
)

TENSOR, FSDP = "tensor", "fsdp"


def test_make_mesh_takes_what_is_left():
    one = dict(data=1, fsdp=1, sequence=1, tensor=1)
    assert dict(phi3.make_mesh().shape) == one | {"tensor": 8}
    assert dict(phi3.make_mesh(2, -1, 2).shape) == one | {"data": 2, "fsdp": 2, "tensor": 2}
    mesh = phi3.make_mesh(1, 2, 1, sequence=-1)
    assert dict(mesh.shape) == one | {"fsdp": 2, "sequence": 4}
    assert mesh.axis_names == ("data", "fsdp", "sequence", "tensor")


def test_make_mesh_of_some_devices():
    devices = jax.devices()[2:8]
    mesh = phi3.make_mesh(1, -1, 3, devices=devices)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "sequence": 1, "tensor": 3}
    assert set(mesh.devices.flat) == set(devices)
    assert mesh.axis_types == (AxisType.Auto,) * 4


@dataclasses.dataclass(frozen=True)
class Device:
    """What make_mesh looks at of a device of several slices; tests/tpu has the compiler's."""

    id: int
    slice_index: int
    device_kind = platform = "a test's"


def devices_in(*slices: int) -> list:
    """Devices as jax lists them, slice by slice, with so many in each."""
    index = [number for number, size in enumerate(slices) for _ in range(size)]
    return [Device(*pair) for pair in enumerate(index)]


@pytest.mark.parametrize(
    "slices, sizes, across",
    [
        ((8, 8), dict(data=2, fsdp=8, tensor=1), "data"),
        ((8, 8), dict(data=1, fsdp=8, tensor=2), "fsdp"),
        ((8, 8), dict(data=2, fsdp=1, tensor=2, sequence=4), "data"),
        ((4, 4, 4), dict(data=2, fsdp=6, tensor=1), "fsdp"),
    ],
)
def test_slices_lie_along_one_axis(slices, sizes, across):
    """All other axes stay within a slice: they send much more."""
    mesh = phi3.make_mesh(**sizes, devices=devices_in(*slices))
    assert dict(mesh.shape) == dict(sequence=1) | sizes and mesh.axis_types == (AxisType.Auto,) * 4
    index = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    axis = mesh.axis_names.index(across)
    for other in set(range(4)) - {axis}:
        assert (index == np.take(index, [0], axis=other)).all()
    assert sorted(set(index.ravel())) == list(range(len(slices)))


def test_slices_may_lie_along_both_axes():
    mesh = phi3.make_mesh(2, 4, 1, devices=devices_in(2, 2, 2, 2))
    index = np.vectorize(lambda device: device.slice_index)(mesh.devices)[:, :, 0, 0]
    assert index.tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]]


@pytest.mark.parametrize(
    "slices, sizes",
    [
        ((8, 8), dict(tensor=16)),
        ((4, 4), dict(data=1, sequence=8, tensor=1)),
        ((4, 2), {"data": 6}),
    ],
)
def test_slices_that_a_mesh_cannot_hold(slices, sizes):
    words = rf"in 2 slices with \[{min(slices)}, {max(slices)}\] of them; .* a multiple of 2, not"
    with pytest.raises(ValueError, match=words):
        phi3.make_mesh(**sizes, devices=devices_in(*slices))


@pytest.mark.parametrize(
    "sizes, count, words",
    [
        ((1, 1, 3), 8, r"does not make 8 devices; each size must be one of \[1, 2, 4, 8\]"),
        ((1, 1, 4), 6, r"does not make 6 devices; each size must be one of \[1, 2, 3, 6\]"),
        ((3, 1, -1), 8, "does not make 8 devices"),
        ((-1, -1, 2), 8, "only one size can be left open"),
        ((0, 1, 8), 8, "'data' has size 0"),
        ((1, -2, 8), 8, "'fsdp' has size -2"),
    ],
)
def test_meshes_that_cannot_be(sizes, count, words):
    with pytest.raises(ValueError, match=words):
        phi3.make_mesh(*sizes, devices=jax.devices()[:count])


def test_what_does_not_divide_is_replicated():
    mesh = phi3.make_mesh(1, 2, 4)
    names = ("embed", "kv_heads", None, None)
    assert logical_spec(names, (48, 8, 5, 8), mesh) == PartitionSpec("fsdp", "tensor", None, None)
    assert logical_spec(names, (48, 10, 6, 8), mesh) == PartitionSpec("fsdp", None, None, None)
    long = phi3.make_mesh(1, 2, 2, sequence=2)
    both = ("fsdp", "sequence")
    assert logical_spec(names, (48, 8, 5, 8), long) == PartitionSpec(both, "tensor", None, None)
    assert logical_spec(("batch", "tokens"), (2, 18), long) == PartitionSpec("fsdp", "sequence")
    assert logical_spec(("batch", "tokens"), (2, 1), long) == PartitionSpec("fsdp", None)
    both = phi3.make_mesh(2, 2, 2)
    assert logical_spec(("batch",), (8,), both) == PartitionSpec(("data", "fsdp"))
    assert logical_spec(("batch",), (2,), both) == PartitionSpec("data")
    assert logical_spec(("batch",), (1,), both) == PartitionSpec(None)


def test_what_the_tensor_axis_shards_is_padded():
    mesh = phi3.make_mesh(1, 2, 4)
    assert padded_shape(("embed", "kv_heads", None), (7, 10, 6), mesh) == (7, 12, 6)
    assert padded_shape((None, "vocab"), (7, 97), mesh) == (7, 100)
    assert padded_shape(("mlp",), (97,), None) == (97,)
    # Inside of attention key-value heads are over sequence too.
    mesh = phi3.make_mesh(1, 1, 2, sequence=4)
    assert padded_shape(("kv_heads", "mlp", "vocab"), (10, 97, 97), mesh) == (16, 98, 98)


# Leaf, its shape on the mesh (layers, of 10 key-value heads 12), and its partition.
PHI3_MEDIUM = {
    "model.embed_tokens.weight": ((32064, 5120), (TENSOR, FSDP)),
    "model.layers.self_attn.qkv_proj.weight": (
        (40, 12, 6, 128, 5120),
        (None, TENSOR, None, None, FSDP),
    ),
    "model.layers.self_attn.o_proj.weight": (
        (40, 5120, 12, 4, 128),
        (None, FSDP, TENSOR, None, None),
    ),
    "model.layers.mlp.gate_up_proj.weight": ((40, 2, 17920, 5120), (None, None, TENSOR, FSDP)),
    "model.layers.mlp.down_proj.weight": ((40, 5120, 17920), (None, FSDP, TENSOR)),
    "model.layers.input_layernorm.weight": ((40, 5120), (None, None)),
    "model.layers.post_attention_layernorm.weight": ((40, 5120), (None, None)),
    "model.norm.weight": ((5120,), (None,)),
    "lm_head.weight": ((32064, 5120), (TENSOR, FSDP)),
}


def test_abstract_params_name_every_leafs_place():
    config = phi3.Phi3Config.preset("phi-3-medium-4k")
    mesh = phi3.make_mesh(1, 2, 4)
    leaves = {
        ".".join(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            abstract_params(phi3.Phi3ForCausalLM(config, mesh=mesh, param_dtype=jnp.bfloat16))
        )
    }
    assert {name: (leaf.shape, tuple(leaf.sharding.spec)) for name, leaf in leaves.items()} == (
        PHI3_MEDIUM
    )
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.sharding.mesh for leaf in leaves.values()} == {mesh}


def test_abstract_params_without_a_mesh_are_on_one_device():
    config = phi3.Phi3Config.preset("phi-3-mini-4k")
    leaves = jax.tree.leaves(abstract_params(phi3.Phi3ForCausalLM(config)))
    assert sum(leaf.size for leaf in leaves) == 3_821_079_552
    assert {device for leaf in leaves for device in leaf.sharding.device_set} == {jax.devices()[0]}


@pytest.mark.parametrize("make", [abstract_params, init_params])
@pytest.mark.parametrize("fsdp, sequence", [(5, 1), (1, 7)])
def test_a_width_that_does_not_divide_is_refused(make, fsdp, sequence):
    """With the parameter, the axes, the sizes, and those that would work."""
    config = phi3.Phi3Config(**config_values("gqa"))
    devices = jax.devices()[: fsdp * sequence]
    mesh = phi3.make_mesh(1, fsdp, 1, devices, sequence=sequence)
    model = phi3.Phi3ForCausalLM(config, mesh=mesh)
    words = (
        r"lm_head\.weight of shape \(97, 48\): its dimension 'embed' of 48 does not divide over "
        rf"fsdp={fsdp} x sequence={sequence} of the mesh; products that would work are "
        r"\[1, 2, 3, 4, 6, 8, 12, 16, 24, 48\]"
    )
    with pytest.raises(ValueError, match=words):
        make(model)


def test_a_mesh_with_other_axes_is_refused():
    """It would shard nothing, in silence."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "model"))
    model = phi3.Phi3ForCausalLM(phi3.Phi3Config(**config_values("gqa")), mesh=mesh)
    with pytest.raises(ValueError, match=r"axes \['model'\], known are \['data', 'fsdp', 'sequ"):
        abstract_params(model)


def test_a_mesh_whose_axes_are_explicit_is_refused():
    """As jax.make_mesh makes them unless told otherwise."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 3)
    model = phi3.Phi3ForCausalLM(phi3.Phi3Config(**config_values("gqa")), mesh=mesh)
    with pytest.raises(ValueError, match="places activations on Auto axes only: use phi3_jax.make"):
        phi3.init_params(model)


def test_gradients_are_sharded_as_the_parameters():
    """Also along fsdp, and where nothing but the program itself says so."""
    config = phi3.Phi3Config(**config_values("longrope_partial_tied"))
    model, params = phi3.Phi3ForCausalLM(config), params_of(config, hf_weights(config, "x"))
    model, params = on_mesh(model, params, phi3.make_mesh(1, 4, 2))
    ids = tokens(4, 9)
    step = jax.jit(jax.grad(lambda params: model.apply({"params": params}, ids, labels=ids).loss))
    compiled = step.lower(params).compile()
    placed = jax.tree.map(
        lambda place, leaf: place.is_equivalent_to(leaf.sharding, leaf.ndim),
        compiled.output_shardings,
        params,
    )
    assert all(jax.tree.leaves(placed)), placed
    # Nor are they whole on the way: of 3 layers, 48 wide, 40 of 80 mlp columns.
    assert "f32[3,2,40,12]" in compiled.as_text() and "f32[3,2,40,48]" not in compiled.as_text()


def test_parameters_can_be_laid_out_later():
    config = phi3.Phi3Config(**config_values("gqa"))
    model = phi3.Phi3ForCausalLM(config)
    boxed = model.init(jax.random.key(3), tokens(1, 2))["params"]
    meshed = model.clone(mesh=phi3.make_mesh(2, 1, 4))
    params = phi3.shard_params(meshed, boxed)
    wanted = abstract_params(meshed)
    assert jax.tree.map(lambda x: (x.shape, x.sharding), params) == jax.tree.map(
        lambda x: (x.shape, x.sharding), wanted
    )
    ids = tokens(2, 5)
    logits = meshed.apply({"params": params}, ids).logits
    np.testing.assert_allclose(logits, model.apply({"params": boxed}, ids).logits, atol=1e-5)
    with pytest.raises(ValueError, match="not the model's parameters without padding"):
        phi3.shard_params(meshed, params)


def test_a_mesh_may_lack_axes():
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
    assert axis_size(mesh, "tensor") == 2 and axis_size(mesh, "fsdp") == 1
    assert logical_spec(("batch", "embed", "vocab"), (2, 2, 2), mesh) == PartitionSpec(
        None, None, "tensor"
    )


def rows_over(mesh, *more):
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp"), *more))


def test_a_constraint_takes_effect():
    """A no-op would leave one device."""
    mesh = phi3.make_mesh(2, 2, 2)
    out = jax.jit(lambda x: constrain(x * 2, "batch", None, mesh=mesh))(jnp.ones((8, 3)))
    assert out.sharding.is_equivalent_to(rows_over(mesh, None), 2)


def test_a_constraint_without_a_mesh_asks_nothing():
    x = jnp.ones((8, 3))
    assert constrain(x, "batch", None) is x


def test_the_residual_stream_is_laid_out():
    """Nothing but the constraints says so: parameters and ids come whole to every device, and the
    compiler would compute all of it everywhere.
    """
    mesh = phi3.make_mesh(2, 2, 2)
    config = phi3.Phi3Config(**config_values("longrope"))
    model = phi3.Phi3Model(config, mesh=mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)  # noqa: E731
    params = jax.tree.map(place, abstract_params(model))
    ids = jax.ShapeDtypeStruct((8, 18), jnp.int32, sharding=everywhere)

    def run(params, ids):
        return model.apply({"params": params}, ids, output_hidden_states=True)

    out = jax.jit(run).lower(params, ids).compile().output_shardings
    for place in (out.last_hidden_state, *out.hidden_states):
        assert place.is_equivalent_to(rows_over(mesh, None, None), 3)


def test_activations_of_each_device_are_its_share():
    """Heads, mlp and vocabulary are cut without a constraint on each: the compiler follows the
    parameters. Logits of 97 words are 104 in memory, 13 on each of eight devices.
    """
    config = phi3.Phi3Config(**config_values("mha_window"))
    model = phi3.Phi3ForCausalLM(config, mesh=phi3.make_mesh(1, 1, 8))
    ids = jax.ShapeDtypeStruct((3, 18), jnp.int32)
    run = lambda params, ids: model.apply({"params": params}, ids, labels=ids).loss  # noqa: E731
    text = jax.jit(run).lower(abstract_params(model), ids).compile().as_text()
    assert "f32[3,18,13]" in text and "f32[3,18,104]" not in text and "f32[3,18,97]" not in text
    assert "f32[3,18,1,3,8]" in text and "f32[3,18,8,3,8]" not in text  # q, k, v of 6 heads, 8
    assert "f32[3,18,2,10]" in text and "f32[3,18,2,80]" not in text  # gate and up


def test_a_batch_smaller_than_the_mesh_is_replicated():
    config = phi3.Phi3Config(**config_values("longrope"))
    model, params = phi3.Phi3ForCausalLM(config), params_of(config, hf_weights(config, "longrope"))
    ids = tokens(1, 18)
    alone = jax.jit(model.apply)({"params": params}, ids, labels=ids)
    laid_out, sharded = on_mesh(model, params, phi3.make_mesh(2, 2, 2))
    assert mesh_of(sharded) == laid_out.mesh and mesh_of(params) is None
    out = jax.jit(laid_out.apply)({"params": sharded}, ids, labels=ids)
    np.testing.assert_allclose(out.logits, alone.logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(out.loss, alone.loss, rtol=1e-5)
