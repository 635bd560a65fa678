"""Schedules, decay, and each update rule on stacked and fused leaves."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from reference import config_values

import phi3_jax as phi3
from phi3_jax.sharding import abstract_params
from train.config import LoraConfig, OptimizerConfig
from train.lora import abstract_adapters
from train.optimizer import frozen_leaves, keep_layers, make_optimizer, make_schedule

CONFIG = phi3.Phi3Config(**config_values("gqa"))
MODEL = phi3.Phi3ForCausalLM(CONFIG)
NAMES = ("adamw", "adafactor", "lion", "muon")


def filled(tree, seed=0):
    """Random leaves, of which each layer has another scale."""
    rng = np.random.Generator(np.random.PCG64(seed))

    def fill(leaf):
        values = rng.standard_normal(leaf.shape).astype(np.float32)
        scales = np.float32(10) ** np.arange(leaf.shape[0]) if leaf.ndim > 2 else np.float32(1)
        return jnp.asarray(values * np.reshape(scales, (-1, *(1,) * (leaf.ndim - 1))))

    return jax.tree.map(fill, tree)


PARAMS = filled(abstract_params(MODEL))
ADAPTERS = filled(abstract_adapters(MODEL, LoraConfig(rank=4)))


def first_update(config, gradients, params, kept=None):
    """At a learning rate of 1, so that it is what the rule makes."""
    optimizer = make_optimizer(config, optax.constant_schedule(1.0), kept)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    return flatten_dict(updates)


# ----- Schedules ----------------------------------------------------------------------------------


def cosine(step, peak, warmup, steps, final):
    """LinearLR from 0, then CosineAnnealingLR of torch with eta_min, each of its own length."""
    if step < warmup:
        return peak * step / warmup
    turn = math.pi * min(step - warmup, steps - warmup) / max(steps - warmup, 1)
    return peak * final + (peak - peak * final) * (1 + math.cos(turn)) / 2


@pytest.mark.parametrize(("warmup", "steps", "final"), [(0, 7, 0.0), (3, 20, 0.1), (5, 5, 0.5)])
def test_cosine(warmup, steps, final):
    config = OptimizerConfig(learning_rate=3e-4, warmup_steps=warmup, final_fraction=final)
    schedule = make_schedule(config, steps)
    found = [float(schedule(step)) for step in range(steps + 1)]
    wanted = [cosine(step, 3e-4, warmup, steps, final) for step in range(steps + 1)]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-11)
    assert found[warmup] == pytest.approx(3e-4)
    if steps > warmup:
        assert found[steps] == pytest.approx(3e-4 * final, abs=1e-11)


@pytest.mark.parametrize(
    ("warmup", "decay", "steps"), [(0, 4, 10), (2, 0, 6), (3, 5, 8), (2, 3, 9)]
)
def test_constant_and_warmup_stable_decay(warmup, decay, steps):
    values = dict(learning_rate=2.0, warmup_steps=warmup, decay_steps=decay, final_fraction=0.25)
    stable = make_schedule(OptimizerConfig(schedule="wsd", **values), steps)
    constant = make_schedule(OptimizerConfig(schedule="constant", **values), steps)
    for step in range(steps + 1):
        rise = min(1.0, step / warmup) if warmup else 1.0
        assert float(constant(step)) == pytest.approx(2 * rise)
        fallen = max(0, step - (steps - decay)) / decay if decay else 0.0
        assert float(stable(step)) == pytest.approx(2 * rise * (1 - 0.75 * fallen))


def test_schedules_that_do_not_fit_the_run():
    for values in (
        dict(warmup_steps=11),
        dict(warmup_steps=-1),
        dict(schedule="constant", warmup_steps=11),
        dict(schedule="wsd", warmup_steps=6, decay_steps=5),
        dict(schedule="wsd", decay_steps=-1),
    ):
        with pytest.raises(ValueError, match="do not fit a run of 10 steps"):
            make_schedule(OptimizerConfig(**values), 10)


# ----- Decay and clipping -------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tree", [PARAMS, ADAPTERS], ids=["weights", "adapters"])
def test_matrices_decay_and_norms_do_not(name, tree):
    config = OptimizerConfig(name=name, weight_decay=0.5, clip_norm=None)
    updates = first_update(config, jax.tree.map(jnp.zeros_like, tree), tree)
    for path, leaf in flatten_dict(tree).items():
        decay = 0.0 if "norm" in path[-2] else 0.5
        np.testing.assert_allclose(updates[path], -decay * leaf, rtol=1e-6, atol=0)
    assert tree is ADAPTERS or sum("norm" in path[-2] for path in updates) == 3


def test_clipping_is_of_the_global_norm():
    """Of lion, whose update is a sign, nothing is clipped afterwards; of sgd-like parts, all."""
    optimizer = make_optimizer(OptimizerConfig(clip_norm=0.5), optax.constant_schedule(1.0))
    _, state = optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)
    mean = optax.tree.get(state, "mu")
    # The first moment is (1 - b1) times the clipped gradient.
    assert float(optax.tree.norm(mean)) == pytest.approx(0.1 * 0.5, rel=1e-4)


def test_adamw_is_its_formula():
    config = OptimizerConfig(weight_decay=0.1, clip_norm=None, b1=0.8, b2=0.9, eps=1e-3)
    optimizer = make_optimizer(config, lambda step: 0.01 * (step + 1))
    weight, gradient = PARAMS["model"]["layers"]["mlp"]["down_proj"]["weight"], None
    tree = lambda leaf: {"down_proj": {"weight": leaf}}  # noqa: E731
    state, params = optimizer.init(tree(weight)), tree(weight)
    mean = square = np.zeros(weight.shape)
    expected = np.asarray(weight, np.float64)
    for step in range(3):
        gradient = np.random.Generator(np.random.PCG64(step)).standard_normal(weight.shape)
        updates, state = optimizer.update(tree(jnp.asarray(gradient, jnp.float32)), state, params)
        params = optax.apply_updates(params, updates)
        mean = 0.8 * mean + 0.2 * gradient
        square = 0.9 * square + 0.1 * gradient**2
        unbiased = np.sqrt(square / (1 - 0.9 ** (step + 1))) + 1e-3
        change = mean / (1 - 0.8 ** (step + 1)) / unbiased + 0.1 * expected
        expected = expected - 0.01 * (step + 1) * change
    np.testing.assert_allclose(params["down_proj"]["weight"], expected, rtol=1e-5, atol=1e-6)


# ----- Muon ---------------------------------------------------------------------------------------

D, F = CONFIG.hidden_size, CONFIG.intermediate_size


def matrices(path, leaf):
    """The matrices that a leaf holds, rows by columns, counted from the layout itself."""
    *_, module, name = path
    layers = leaf.shape[0]
    if name == "lora_a":
        return leaf.reshape(layers, leaf.shape[1], -1)
    if module == "gate_up_proj":
        return leaf.reshape(2 * layers, F, -1)
    if name == "lora_b":
        return leaf.reshape(layers, -1, leaf.shape[-1])
    return leaf.reshape(layers, -1, D) if module == "qkv_proj" else leaf.reshape(layers, D, -1)


@pytest.mark.parametrize("tree", [PARAMS, ADAPTERS], ids=["weights", "adapters"])
def test_muon_makes_each_matrix_of_each_layer_orthogonal(tree):
    """However different the layers' gradients are, with the root mean square that Adam's has."""
    config = OptimizerConfig(name="muon", clip_norm=None)
    updates = first_update(config, tree, tree)
    seen = 0
    for path, update in updates.items():
        if not path[-2].endswith("_proj"):
            # Adam's: a sign, and with Nesterov's momentum b1 (1 - b1) / (1 - b1^2) more.
            np.testing.assert_allclose(np.abs(update), 1 + 0.09 / 0.19, rtol=1e-4)
            continue
        seen += 1
        stack = matrices(path, np.asarray(update))
        singular = np.linalg.svd(stack, compute_uv=False)
        factor = 0.2 * math.sqrt(max(stack.shape[1:]))
        # Newton-Schulz with muon's coefficients ends between 0.68 and 1.13 or so, but for the
        # smallest of a square matrix.
        small, large = np.quantile(singular / factor, (0.1, 1.0), axis=1)
        assert small.min() > 0.6 and large.max() < 1.25, path
    assert seen == (4 if tree is PARAMS else 8)


# ----- All rules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tree", [PARAMS, ADAPTERS], ids=["weights", "adapters"])
def test_every_rule_reduces_a_loss(name, tree):
    start = jax.tree.map(lambda leaf: leaf / jnp.max(jnp.abs(leaf)), tree)
    optimizer = make_optimizer(OptimizerConfig(name=name), optax.constant_schedule(0.03))

    def loss_of(params):
        return sum(jnp.mean((leaf - 1) ** 2) for leaf in jax.tree.leaves(params))

    @jax.jit
    def step(carry, _):
        params, state = carry
        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), loss

    _, losses = jax.lax.scan(step, (start, optimizer.init(start)), length=60)
    assert losses[-1] < 0.8 * losses[0] and np.isfinite(losses).all()


def floats_per_weight(name, params):
    optimizer = make_optimizer(OptimizerConfig(name=name), optax.constant_schedule(1.0))
    state = jax.eval_shape(optimizer.init, params)
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    return count(state) / count(params)


def test_sizes_of_the_optimizer_state():
    """Floats a weight, of the real model's shapes."""
    params = abstract_params(phi3.Phi3ForCausalLM(phi3.Phi3Config()))
    assert floats_per_weight("adamw", params) == pytest.approx(2, abs=1e-3)
    assert floats_per_weight("lion", params) == pytest.approx(1, abs=1e-3)
    # Embedding and head have Adam's two.
    assert 1 < floats_per_weight("muon", params) < 1.06
    # q, k, v and o are not factored: an axis of theirs, the head's, is shorter than 128.
    assert floats_per_weight("adafactor", params) < 0.32


def test_an_unknown_rule():
    with pytest.raises(ValueError, match="is 'sgd', must be one of adafactor, adamw, lion, muon"):
        make_optimizer(OptimizerConfig(name="sgd"), optax.constant_schedule(1.0))


# ----- What is not trained ------------------------------------------------------------------------


def test_frozen_leaves_by_patterns():
    stack = ("model", "layers")
    whole, partly = frozen_leaves(
        CONFIG, ("model.embed_tokens.*", "*.layers.?.mlp.down_proj.weight")
    )
    assert whole == {("model", "embed_tokens", "weight"), (*stack, "mlp", "down_proj", "weight")}
    assert partly == {}
    whole, partly = frozen_leaves(
        CONFIG, ("model.layers.1.*", "*.0.self_attn.*", "model.norm.weight")
    )
    assert whole == {("model", "norm", "weight")}
    kept = {path[-2]: list(layers) for path, layers in partly.items()}
    assert kept == {
        "qkv_proj": [False, False, True],
        "o_proj": [False, False, True],
        "gate_up_proj": [True, False, True],
        "down_proj": [True, False, True],
        "input_layernorm": [True, False, True],
        "post_attention_layernorm": [True, False, True],
    }
    assert frozen_leaves(CONFIG, ()) == (set(), {})


def test_patterns_that_cannot_be():
    with pytest.raises(ValueError, match="'model.layers.3.*' names no weight; there are model"):
        frozen_leaves(CONFIG, ("model.norm.*", "model.layers.3.*"))
    with pytest.raises(ValueError, match="leaves nothing to train"):
        frozen_leaves(CONFIG, ("*",))


@pytest.mark.parametrize("name", NAMES)
def test_layers_that_are_kept_do_not_move_and_do_not_count(name):
    _, kept = frozen_leaves(CONFIG, ("model.layers.2.*",))
    config = OptimizerConfig(name=name, weight_decay=0.1, clip_norm=1.0)
    updates = first_update(config, keep_layers(PARAMS, kept), PARAMS, kept)
    # Whatever the gradient of the kept layer, the others' update is the same.
    flat = flatten_dict(PARAMS)
    other = unflatten_dict(
        {path: leaf.at[2].mul(7) if path in kept else leaf for path, leaf in flat.items()}
    )
    again = first_update(config, keep_layers(other, kept), PARAMS, kept)
    for path, update in updates.items():
        np.testing.assert_array_equal(update, again[path])
        if path in kept:
            assert not update[2].any() and update[0].all() and update[1].all()
