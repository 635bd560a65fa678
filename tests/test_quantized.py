"""Weights of 8 and 4 bits: the numbers, the products, loading on any mesh, and generating."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from model_folders import tensors_in, write_hf_folder
from reference import tokens

import phi3_jax as phi3
from convert.to_orbax import to_orbax
from phi3_jax.checkpoint import save_checkpoint, save_pretrained
from phi3_jax.generation import decoding
from phi3_jax.generation.prepare import prepare
from phi3_jax.hf_format import QUANTIZATIONS, tile_of
from phi3_jax.products import product
from phi3_jax.quantized import NF4, QuantizedWeight, is_quantized, quantize_weight
from phi3_jax.split_layers import split_layers

PADDED = "longrope_partial_tied"  # 3 key-value groups, mlp 80, padded on 4 and 7 devices
INPUTS = {"qkv_proj": 1, "o_proj": 3, "gate_up_proj": 1, "down_proj": 1, "lm_head": 1}


def matrix(*shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def floats(params):
    """Parameters with what quantised weights stand for."""
    return jax.tree.map(
        lambda leaf: leaf.astype("float32") if is_quantized(leaf) else leaf,
        params,
        is_leaf=is_quantized,
    )


def quantized_leaves(params) -> dict:
    return {path: leaf for path, leaf in flatten_dict(params).items() if is_quantized(leaf)}


def folders(path, case="gqa", kind="int8", dtype="F32", **changes):
    """A model in an HF folder, and the same one quantised."""
    write_hf_folder(path / "hf", case, dtype, **changes)
    to_orbax(path / "hf", path / kind, quantize=kind)
    return path / "hf", path / kind


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("last, tile", [(130, 26), (64, 64), (7, 7), (67, 1)])
def test_nf4_takes_the_nearest_number(last, tile, dtype):
    weight = matrix(3, 5, last, dtype=dtype).at[0, 0].set(0)
    found = quantize_weight(weight, "nf4", 2)
    assert tile_of(last) == tile and found.tile == tile and found.shape == weight.shape
    assert found.values.dtype == jnp.uint8 and found.values.shape == (3, 5, -(-last // 2))
    assert found.scales.dtype == dtype and found.scales.shape == (3, 5, last // tile)
    wide = np.asarray(weight, np.float32).reshape(3, 5, -1, tile)
    largest = np.abs(wide).max(-1, keepdims=True)
    nearest = np.abs(wide[..., None] / np.maximum(largest, 1e-9)[..., None] - np.array(NF4))
    wanted = np.array(NF4, np.float32)[nearest.argmin(-1)] * largest
    np.testing.assert_allclose(
        found.astype("float32"), wanted.reshape(weight.shape), rtol=1e-6, atol=1e-7
    )
    assert not np.asarray(found.astype("float32"))[0, 0].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("outputs", [1, 2])
def test_int8_has_a_scale_for_each_output(outputs, dtype):
    weight = matrix(4, 3, 10, dtype=dtype).at[0].set(0)
    found = quantize_weight(weight, "int8", outputs)
    inputs = tuple(range(outputs, 3))
    scales = np.abs(np.asarray(weight, np.float32)).max(inputs, keepdims=True) / 127
    assert found.scales.shape == scales.shape and found.scales.dtype == dtype
    np.testing.assert_allclose(found.scales.astype("float32"), scales, rtol=4e-3)
    off = np.abs(found.astype("float32") - weight.astype("float32"))
    # Half a step; a scale that bfloat16 rounds down cuts up to 127 times 2**-9 of one besides.
    assert (off <= scales * {"float32": 0.5001, "bfloat16": 0.76}[dtype] + 1e-9).all()
    assert np.abs(np.asarray(found.values)).max() == 127
    assert not np.asarray(found.astype("float32"))[0].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [(1, 1), (2, 3), (4, 3), (9, 8)])
@pytest.mark.parametrize("equation", ["BTD,KCD->BTKC", "BTKC,DKC->BTD", "BTD,VD->BTV"])
def test_products(rows, equation, dtype):
    """As an einsum with the floats that the weight stands for."""
    sizes = dict(B=rows[0], T=rows[1], D=24, K=2, C=6, V=7)
    left, right, out = equation.replace("->", ",").split(",")
    make = lambda axes, seed: matrix(*(sizes[axis] for axis in axes), dtype=dtype, seed=seed)  # noqa: E731
    x, weight = make(left, 0), make(right, 1)
    outputs = sum(axis in out for axis in right)
    run = jax.jit(lambda x, weight: product(equation, x, weight, None))
    wide = x.astype(jnp.float32)
    bound = dict(rtol=1e-5, atol=1e-5) if dtype == "float32" else dict(rtol=1e-2, atol=3e-2)
    np.testing.assert_allclose(
        run(x, weight).astype("float32"),
        jnp.einsum(equation, wide, weight.astype("float32")),
        **bound,
    )
    for kind in QUANTIZATIONS:
        small = quantize_weight(weight, kind, outputs)
        wanted = jnp.einsum(equation, wide, small.astype("float32"))
        np.testing.assert_allclose(run(x, small).astype("float32"), wanted, **bound)
    # A value a thousand times as large as the others takes no bits from them.
    x = x.at[:, :, 0].multiply(1000) if x.ndim == 3 else x.at[:, :, 0, 0].multiply(1000)
    small = quantize_weight(weight, "int8", outputs).replace(in_integers=True)
    wanted = jnp.einsum(equation, x.astype(jnp.float32), small.astype("float32"))
    largest = float(jnp.abs(x).max())
    found = run(x, small).astype("float32")
    atol = 2e-4 * largest if dtype == "float32" else 3e-2
    np.testing.assert_allclose(found, wanted, rtol=bound["rtol"], atol=atol)
    assert not run(jnp.zeros_like(x), small).any()


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("case, head", [("gqa", "lm_head"), (PADDED, "lm_head"), ("gqa", "none")])
def test_what_a_folder_holds(tmp_path, case, head, kind):
    """The matrices in few bits, made layer by layer; norms and embedding bit by bit."""
    source, folder = folders(tmp_path, case, kind, "BF16", head=head)
    which = phi3.Phi3Model if head == "none" else phi3.Phi3ForCausalLM
    plain = flatten_dict(phi3.from_pretrained(source, which, dtype=None)[1])
    _, params = phi3.from_pretrained(folder, which, dtype=None)
    params = flatten_dict(params)
    assert params.keys() == plain.keys()
    for path, weight in plain.items():
        leaf = params[path]
        if path[-2] not in INPUTS:
            assert leaf.dtype == weight.dtype
            np.testing.assert_array_equal(leaf, weight)
            continue
        assert isinstance(leaf, QuantizedWeight) and not leaf.in_integers
        assert leaf.scales.dtype == jnp.bfloat16
        stacked = path[-2] != "lm_head"
        outputs = weight.ndim - stacked - INPUTS[path[-2]]
        layers = [quantize_weight(layer, kind, outputs) for layer in weight] if stacked else None
        wanted = quantize_weight(weight, kind, outputs) if layers is None else layers[-1]
        own = leaf if layers is None else jax.tree.map(lambda part: part[-1], leaf)
        jax.tree.map(np.testing.assert_array_equal, own, wanted)
        assert leaf.shape == weight.shape
    wide = flatten_dict(phi3.from_pretrained(folder, which, dtype="float32")[1])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(wide)} == {
        "float32",
        {"int8": "int8", "nf4": "uint8"}[kind],
    }


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("case", ["gqa", PADDED])
@pytest.mark.parametrize("sizes", [(1, 2, 4), (1, 1, 7)])
def test_on_a_mesh(tmp_path, kind, case, sizes):
    """As on one device; padding stands for zero, values lie as their weights would."""
    _, folder = folders(tmp_path, case, kind)
    alone, params = phi3.from_pretrained(folder)
    mesh = phi3.make_mesh(*sizes, devices=jax.devices()[: sizes[0] * sizes[1] * sizes[2]])
    model, sharded = phi3.from_pretrained(folder, mesh=mesh)
    for path, leaf in quantized_leaves(sharded).items():
        whole = np.asarray(flatten_dict(params)[path].astype("float32"))
        found = np.array(leaf.astype("float32"))
        inner = tuple(map(slice, whole.shape))
        np.testing.assert_array_equal(found[inner], whole)
        found[inner] = 0
        assert not found.any()
    ids = tokens(4, 9)
    wanted = alone.apply({"params": params}, ids).logits
    ours = jax.jit(lambda params: model.apply({"params": params}, ids).logits)(sharded)
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_generation(tmp_path, kind):
    """On one CPU device int8 multiplies integers; the tokens are those without a cache."""
    _, folder = folders(tmp_path, "gqa", kind)
    model, params = phi3.from_pretrained(folder)
    ids = tokens(2, 5)
    settings = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, output_logits=True)
    found = phi3.generate(model, params, ids, **settings)
    split = split_layers(params)
    leaf = split["model"]["layers"]["1"]["mlp"]["down_proj"]["weight"]
    assert leaf.in_integers
    run = jax.jit(lambda ids: model.apply({"params": split}, ids).logits)
    for step in range(6):
        logits = run(found.sequences[:, : 5 + step])[:, -1]
        # 15 bits of each input: a little less than float32.
        atol = 1e-3 if kind == "int8" else 2e-4
        np.testing.assert_allclose(found.logits[step], logits, rtol=0, atol=atol)
        np.testing.assert_array_equal(found.sequences[:, 5 + step], logits.argmax(-1))
    wanted = model.apply({"params": floats(params)}, ids).logits
    np.testing.assert_allclose(run(ids), wanted, rtol=0, atol=2e-3 if kind == "int8" else 1e-4)
    on_mesh = phi3.from_pretrained(folder, mesh=phi3.make_mesh(1, 2, 4))
    there = phi3.generate(*on_mesh, ids, **settings).logits[0]
    np.testing.assert_allclose(there, wanted[:, -1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_loop_keeps_weights_of_8_bits_as_they_are(tmp_path, batch):
    _, folder = folders(tmp_path, hidden_size=256, intermediate_size=512, num_attention_heads=8)
    model, params = phi3.from_pretrained(folder)
    request = prepare(model, params, tokens(batch, 5), max_new_tokens=400, eos_token_id=None)
    request.start()
    loop = decoding.decode_loop.lower(
        request.model, request.params, request.state, request.plan, np.int32(400)
    ).compile()
    layers = params["model"]["layers"]
    weight = layers["mlp"]["gate_up_proj"]["weight"].values[0].nbytes
    slots = request.state.cache.k_LBKSH[0].nbytes
    assert loop.memory_analysis().temp_size_in_bytes < min(weight, slots), (weight, slots)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_prompt_has_few_weights_as_floats_at_a_time(tmp_path, kind, optimized):
    sizes = dict(hidden_size=256, intermediate_size=512, num_attention_heads=8)
    _, folder = folders(tmp_path, kind=kind, num_hidden_layers=8, **sizes)
    model, params = phi3.from_pretrained(folder)
    run = jax.jit(lambda params: model.apply({"params": params}, tokens(1, 70)).logits)
    memory = run.lower(split_layers(params)).compile().memory_analysis()
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(floats(params)["model"]["layers"]))
    assert memory.temp_size_in_bytes < whole / 4, (memory.temp_size_in_bytes, whole)


def test_other_heads(tmp_path):
    _, folder = folders(tmp_path, "gqa", "int8", head="score", num_labels=3)
    which = phi3.Phi3ForSequenceClassification
    model, params = phi3.from_pretrained(folder, which)
    found = model.apply({"params": params}, tokens(2, 7)).logits
    wanted = model.apply({"params": floats(params)}, tokens(2, 7)).logits
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="lm_head.weight: missing"):
        phi3.from_pretrained(folder)


def test_the_loss_is_that_of_the_floats(tmp_path):
    _, folder = folders(tmp_path)
    model, params = phi3.from_pretrained(folder)
    ids = tokens(2, 7)
    found, wanted = (
        model.apply({"params": some}, ids, labels=ids).loss for some in (params, floats(params))
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_what_is_refused(tmp_path):
    source, folder = folders(tmp_path)
    model, params = phi3.from_pretrained(folder)
    for save in (save_pretrained, save_checkpoint):
        with pytest.raises(ValueError, match=r"is quantised \(int8\), saving needs the original"):
            save(tmp_path / "new", model, params)
    with pytest.raises(ValueError, match="another vocabulary needs the original"):
        phi3.resize_token_embeddings(model, params, 120)
    with pytest.raises(ValueError, match="quantize is 'int3', must be one of int8, nf4"):
        to_orbax(source, tmp_path / "new", quantize="int3")
    with pytest.raises(ValueError, match="is converted already"):
        to_orbax(folder, tmp_path / "new", quantize="int8")
    assert not (tmp_path / "new").exists()
    assert tensors_in(source)
