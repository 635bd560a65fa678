"""Adapters: how they begin, what they compute, their gradients, merging, dropout and meshes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from reference import config_values, hf_weights, on_mesh, params_of, tokens

import phi3_jax as phi3
from train.config import TARGETS, LoraConfig
from train.lora import abstract_adapters, attach, check_lora, init_adapters, merge, unmerge

LORA = LoraConfig(rank=3, alpha=7.0)
PADDED = "longrope_partial_tied"  # 3 key-value groups, mlp 80: padded on 4, 5 and 7 devices


@functools.cache
def model_and_params(case: str = PADDED, **changes):
    config = phi3.Phi3Config(**{**config_values(case), **changes})
    return phi3.Phi3ForCausalLM(config), params_of(config, hf_weights(config, case))


def random_adapters(model, lora=LORA, seed=0):
    """Adapters whose B is not zero, without padding."""
    rng = np.random.default_rng(seed)
    draw = lambda leaf: rng.uniform(-0.3, 0.3, leaf.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(lambda leaf: jnp.asarray(draw(leaf)), init_adapters(model, lora))


# Less optimised code for the CPU: half the time to compile, and nothing else changes.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def logits(model, params, ids, **settings):
    return jit(lambda params: model.apply({"params": params}, ids, **settings).logits)(params)


def placed(adapters, model, lora=LORA):
    """Adapters without padding, on the model's mesh."""

    def place(leaf, target):
        ends = [(0, b - a) for a, b in zip(leaf.shape, target.shape, strict=True)]
        return jax.device_put(jnp.pad(leaf, ends), target.sharding)

    return jax.tree.map(place, adapters, abstract_adapters(model, lora))


def cut(adapters, model, lora=LORA):
    """Adapters without the padding of the model's mesh, of which all must be zero."""

    def one(leaf, plain):
        whole = np.asarray(leaf)
        inner = whole[tuple(map(slice, plain.shape))]
        ends = [(0, b - a) for a, b in zip(plain.shape, whole.shape, strict=True)]
        np.testing.assert_array_equal(whole, np.pad(inner, ends))
        return inner

    return jax.tree.map(one, adapters, abstract_adapters(model.clone(mesh=None), lora))


def assert_close(found, wanted, atol):
    """The same arrays, to a part of an array's largest number."""
    found, wanted = flatten_dict({"": found}), flatten_dict({"": wanted})
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        scale = np.abs(leaf).max()
        np.testing.assert_allclose(found[path] / scale, leaf / scale, rtol=0, atol=atol)


# --- Beginning -------------------------------------------------------------------------------


def test_new_adapters():
    model, _ = model_and_params()
    leaves = flatten_dict(init_adapters(model, LORA, seed=1))
    shapes = {path[-2:]: leaf.shape for path, leaf in leaves.items()}
    assert shapes == {
        ("qkv_proj", "lora_a"): (3, 3, 48),
        ("qkv_proj", "lora_b"): (3, 3, 4, 8, 3),
        ("o_proj", "lora_a"): (3, 3, 3, 2, 8),
        ("o_proj", "lora_b"): (3, 48, 3),
        ("gate_up_proj", "lora_a"): (3, 3, 48),
        ("gate_up_proj", "lora_b"): (3, 2, 80, 3),
        ("down_proj", "lora_a"): (3, 3, 80),
        ("down_proj", "lora_b"): (3, 48, 3),
    }
    seen = []
    for path, leaf in leaves.items():
        assert leaf.dtype == "float32"
        if path[-1] == "lora_b":
            assert not leaf.any()
            continue
        bound = 1 / math.sqrt(80 if path[-2] == "down_proj" else 48)
        assert bound * 0.95 < np.abs(leaf).max() <= bound
        assert abs(np.std(leaf) / bound - 1 / math.sqrt(3)) < 0.06
        seen += [np.asarray(layer).ravel()[:9].tolist() for layer in leaf]
    assert len(set(map(tuple, seen))) == 4 * 3  # targets and layers draw for themselves
    others = flatten_dict(init_adapters(model, LORA, seed=2))
    assert all((others[path] != leaf).any() for path, leaf in leaves.items() if leaf.any())


def test_a_target_begins_alike_whatever_the_others_are():
    model, _ = model_and_params()
    few = dataclasses.replace(LORA, targets=("down_proj", "qkv_proj"))
    some, whole = (flatten_dict(init_adapters(model, lora, 1)) for lora in (few, LORA))
    assert {path[-2] for path in some} == {"down_proj", "qkv_proj"}
    for path, leaf in some.items():
        np.testing.assert_array_equal(leaf, whole[path])


def test_new_adapters_change_nothing():
    model, params = model_and_params()
    ids = tokens(2, 9)
    attached = attach(params, init_adapters(model, LORA), LORA)
    np.testing.assert_array_equal(logits(model, attached, ids), logits(model, params, ids))


def test_init_makes_no_adapters():
    model, _ = model_and_params()
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens(1, 2))["params"]
    assert not [path for path in flatten_dict(shapes) if "lora" in path[-1]]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rank": 0}, "lora.rank is 0, must be at least 1"),
        ({"alpha": 0.0}, "lora.alpha is 0.0, must be a number above 0"),
        ({"alpha": math.inf}, "lora.alpha is inf"),
        ({"dropout": 1.0}, "lora.dropout is 1.0, must be at least 0 and below 1"),
        ({"dropout": -0.1}, "lora.dropout is -0.1"),
        ({"targets": ("q_proj", "o_proj")}, "is q_proj, o_proj; it names .* qkv_proj, o_proj, g"),
        ({"targets": ()}, "lora.targets is empty"),
        ({"targets": ("o_proj", "o_proj")}, "each once"),
    ],
)
def test_settings_that_do_not_work(changes, words):
    lora = dataclasses.replace(LORA, **changes)
    with pytest.raises(ValueError, match=words):
        check_lora(lora)
    with pytest.raises(ValueError, match=words):
        init_adapters(model_and_params()[0], lora)


# --- Computing and merging -------------------------------------------------------------------


@pytest.mark.parametrize(
    "case, changes",
    [
        ("gqa", {}),
        ("mqa_tied_window1", {"rslora": True, "targets": ("gate_up_proj", "o_proj")}),
        ("head_dim", {"targets": ("down_proj", "qkv_proj")}),
        (PADDED, {"rslora": True}),
    ],
)
def test_attached_equals_merged(case, changes):
    model, params = model_and_params(case)
    lora = dataclasses.replace(LORA, **changes)
    adapters, ids = random_adapters(model, lora), tokens(2, 9)
    merged = logits(model, merge(params, adapters, lora), ids)
    assert_close(logits(model, attach(params, adapters, lora), ids), merged, 1e-5)
    assert np.abs(merged - logits(model, params, ids)).max() > 0.01 * np.abs(merged).max()


def test_generation_takes_attached_adapters():
    """Through the cache as well."""
    model, params = model_and_params()
    adapters = random_adapters(model)
    settings = dict(max_new_tokens=12, eos_token_id=None)
    found, wanted, plain = (
        phi3.generate(model, those, tokens(2, 11), **settings).sequences
        for those in (attach(params, adapters, LORA), merge(params, adapters, LORA), params)
    )
    np.testing.assert_array_equal(found, wanted)
    assert (found != plain).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merge_and_unmerge(dtype):
    """Sums are float32, and what comes back differs by the rounding to the weights' dtype."""
    model, params = model_and_params()
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    before = jax.tree.map(np.asarray, params)
    adapters = random_adapters(model)
    merged = merge(params, adapters, LORA)
    weight, adapter = (
        tree["model"]["layers"]["self_attn"]["o_proj"] for tree in (before, adapters)
    )
    update = np.einsum("ldr,lrkgh->ldkgh", adapter["lora_b"], adapter["lora_a"]) * (7 / 3)
    wanted = (weight["weight"].astype(np.float32) + update).astype(weight["weight"].dtype)
    found = merged["model"]["layers"]["self_attn"]["o_proj"]["weight"]
    assert found.dtype == dtype
    epsilon = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.float32(found), np.float32(wanted), rtol=epsilon, atol=1e-6
    )  # a sum between two bfloat16 may fall to either
    back = unmerge(merged, adapters, LORA)
    for path, leaf in flatten_dict(before).items():
        np.testing.assert_array_equal(flatten_dict(params)[path], leaf)  # the caller's stay
        error = np.abs(np.float32(flatten_dict(back)[path]) - np.float32(leaf)).max()
        assert error < 4 * epsilon
        assert error == 0 or path[-2] in TARGETS


def test_gradients_follow_from_those_of_the_weight():
    """dA = s B^T dW and dB = s dW A^T, where dW is that of the merged weight."""
    model, params = model_and_params()
    adapters, ids = random_adapters(model), tokens(2, 9)
    loss = lambda params: model.apply({"params": params}, ids, labels=ids).loss  # noqa: E731
    step = jit(jax.grad(lambda adapters: loss(attach(params, adapters, LORA))))
    dense = flatten_dict(jit(jax.grad(loss))(merge(params, adapters, LORA)))
    found, halves = flatten_dict(step(adapters)), flatten_dict(adapters)
    for path in {path[:-1] for path in found}:
        a, b = halves[*path, "lora_a"], halves[*path, "lora_b"]
        rank = a.shape[1]
        flat_a, flat_b = np.reshape(a, (3, rank, -1)), np.reshape(b, (3, -1, rank))
        dw = LORA.scale * np.reshape(dense[*path, "weight"], (3, flat_b.shape[1], -1))
        da = np.einsum("loi,lor->lri", dw, flat_b).reshape(a.shape)
        db = np.einsum("loi,lri->lor", dw, flat_a).reshape(b.shape)
        assert_close(found[*path, "lora_a"], da, 1e-4)
        assert_close(found[*path, "lora_b"], db, 1e-4)


# --- Dropout ---------------------------------------------------------------------------------


def test_dropout_is_of_calls_that_ask_for_it():
    model, params = model_and_params()
    attached, ids = attach(params, random_adapters(model), LORA), tokens(2, 9)
    plain = logits(model, attached, ids)
    dropping = model.clone(lora_dropout=0.25)
    run = lambda model, **more: logits(model, attached, ids, **more)  # noqa: E731
    seeded = lambda seed: dict(  # noqa: E731
        deterministic=False, rngs={"dropout": jax.random.key(seed)}
    )
    np.testing.assert_array_equal(run(dropping), plain)
    np.testing.assert_array_equal(run(model, **seeded(0)), plain)
    dropped = run(dropping, **seeded(0))
    assert (dropped != plain).any() and (run(dropping, **seeded(1)) != dropped).any()
    np.testing.assert_array_equal(run(dropping, **seeded(0)), dropped)
    # The weights themselves get all of the input.
    without = logits(dropping, params, ids, **seeded(0))
    np.testing.assert_array_equal(without, logits(model, params, ids))


def residual_branches(model, params, target, seed=0):
    """What one target's adapter adds to the stream in each layer: its input, dropped."""
    silent = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 0 if path[-2].key in ("o_proj", "down_proj") else leaf, params
    )
    width = 48
    lora = LoraConfig(rank=width, alpha=float(width), targets=(target,))
    eye = jnp.broadcast_to(jnp.eye(width), (3, width, width))
    adapters = jax.tree.map(lambda leaf: eye.reshape(leaf.shape), abstract_adapters(model, lora))
    states = model.apply(
        {"params": attach(silent, adapters, lora)},
        tokens(4, 30),
        deterministic=False,
        rngs={"dropout": jax.random.key(seed)},
        output_hidden_states=True,
    ).hidden_states
    # The last one comes after the norm.
    return [np.asarray(b - a) for a, b in zip(states[:2], states[1:3], strict=True)]


@pytest.mark.parametrize("remat", ["none", "full"])
def test_dropout_draws_anew_at_every_adapter(remat):
    """Targets and layers have keys of their own, the mean stays (traps 41, 47)."""
    model, params = model_and_params(intermediate_size=48)
    model, rate = model.clone(lora_dropout=0.25, remat=remat), 0.25
    branches = [
        branch
        for target in ("o_proj", "down_proj")
        for branch in residual_branches(model, params, target)
    ]
    masks = [branch != 0 for branch in branches]
    for index, mask in enumerate(masks):
        assert abs(mask.mean() - (1 - rate)) < 0.02
        for other in masks[:index]:
            # Independent masks of rate 1/4 agree in 5/8 of their elements.
            assert abs((mask == other).mean() - 0.625) < 0.02
    plain = residual_branches(model.clone(lora_dropout=0.0), params, "o_proj")[0]
    close = dict(rtol=1e-4, atol=1e-5)  # differences of the stream
    np.testing.assert_allclose(branches[0], np.where(masks[0], plain / (1 - rate), 0), **close)


# --- Meshes ----------------------------------------------------------------------------------


def on_devices(sizes):
    return phi3.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])


def trained(model, params, adapters, ids, steps=3):
    """Adapters after some steps of AdamW, and the losses."""
    optimizer = optax.adamw(1e-2, weight_decay=0.1)

    def loss(adapters, key):
        out = model.apply(
            {"params": attach(params, adapters, LORA)},
            ids,
            labels=ids,
            deterministic=False,
            rngs={"dropout": key},
        )
        return out.loss

    @jit
    def step(adapters, state, key):
        value, gradients = jax.value_and_grad(loss)(adapters, key)
        updates, state = optimizer.update(gradients, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    state, losses = optimizer.init(adapters), []
    for index in range(steps):
        adapters, state, value = step(adapters, state, jax.random.key(index))
        losses.append(float(value))
    return adapters, losses


@functools.cache
def trained_on_one_device():
    model, params = model_and_params()
    model = model.clone(lora_dropout=0.25, remat="full")
    adapters, losses = trained(model, params, random_adapters(model), tokens(8, 18))
    return jax.device_get(adapters), losses


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 2, 4),
        pytest.param((1, 1, 7), marks=pytest.mark.slow),
        pytest.param((2, 2, 2), marks=pytest.mark.slow),
        pytest.param((8, 1, 1), marks=pytest.mark.slow),
    ],
)
def test_training_on_a_mesh_is_that_on_one_device(sizes):
    """With dropout, whose draws know no padding; the padding is zero in the end."""
    alone, params = model_and_params()
    model, sharded = on_mesh(
        alone.clone(lora_dropout=0.25, remat="full"), params, on_devices(sizes)
    )
    adapters = placed(random_adapters(alone), model)
    found, losses = trained(model, sharded, adapters, tokens(8, 18))
    wanted, wanted_losses = trained_on_one_device()
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-5)
    # Rounding, which the optimizer makes steps of where a gradient is near zero: in float64 the two
    # are equal to 2e-12; in float32, without dropout, one device is off from float64 by 2.8e-4
    # itself. With AVX-512 one number of 432 differs by 3.9e-4 here, with AVX2 none by 2e-4.
    assert_close(cut(jax.device_get(found), model), wanted, 5e-4)


@pytest.mark.parametrize(
    "sizes", [(1, 2, 4), (1, 1, 7), pytest.param((2, 2, 2), marks=pytest.mark.slow)]
)
def test_new_and_merged_on_a_mesh(sizes, optimized):
    alone, params = model_and_params()
    model, sharded = on_mesh(alone, params, on_devices(sizes))
    new = init_adapters(model, LORA, seed=5)
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(abstract_adapters(model, LORA)), strict=True)
    for leaf, wanted in pairs:
        assert leaf.shape == wanted.shape and leaf.sharding == wanted.sharding
    jax.tree.map(np.testing.assert_array_equal, cut(new, model), init_adapters(alone, LORA, seed=5))
    adapters = random_adapters(alone)
    merged = merge(sharded, placed(adapters, model), LORA)
    for leaf, weight in zip(jax.tree.leaves(merged), jax.tree.leaves(sharded), strict=True):
        assert leaf.shape == weight.shape and leaf.sharding == weight.sharding
    wanted = merge(params, adapters, LORA)

    def check(leaf, whole):
        ends = [(0, b - a) for a, b in zip(whole.shape, leaf.shape, strict=True)]
        np.testing.assert_allclose(leaf, np.pad(whole, ends), rtol=0, atol=1e-6)
        assert not np.asarray(leaf)[np.pad(np.ones(whole.shape), ends) == 0].any()

    jax.tree.map(check, jax.device_get(merged), jax.device_get(wanted))
    ids = tokens(8, 9)
    assert_close(logits(model, merged, ids), logits(alone, wanted, ids), 5e-5)


def test_adapters_of_another_mesh_are_named():
    model, params = model_and_params()
    sharded_model, sharded = on_mesh(model, params, on_devices((1, 1, 4)))
    attached = attach(sharded, init_adapters(model, LORA), LORA)
    words = r"qkv_proj.lora_b has shape \(3, 4, 8, 3\), this model on mesh .* has \(4, 4, 8, 3\)"
    with pytest.raises(ValueError, match=words):
        logits(sharded_model, attached, tokens(1, 3))
