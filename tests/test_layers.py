"""Dropout, rematerialisation, the gradient of the padding's row, and layers one by one."""

import functools

import jax
import numpy as np
import pytest
from reference import config_values, cut_padding, hf_weights, on_mesh, params_of, tokens

import phi3_jax as phi3
from phi3_jax.attention import Visible
from phi3_jax.inputs import read_inputs
from phi3_jax.layers import REMAT_POLICIES, DecoderLayer, Embedding, LayerInputs, Projection
from phi3_jax.rope import rope_cos_sin, rope_tables, rows_are_long
from phi3_jax.sharding import make_mesh

RATE = 0.25


@functools.cache
def model_and_params(case: str = "gqa", **changes):
    config = phi3.Phi3Config(**{**config_values(case), **changes})
    return phi3.Phi3ForCausalLM(config), params_of(config, hf_weights(config, case))


def with_dropout(model, params, ids, seed=0, **inputs):
    rngs = {"dropout": jax.random.key(seed)}
    return model.apply({"params": params}, ids, deterministic=False, rngs=rngs, **inputs)


def without(params, *path):
    """The parameters with one leaf zero."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: leaf * 0 if tuple(k.key for k in keys[-len(path) :]) == path else leaf,
        params,
    )


# --- Dropout ---------------------------------------------------------------------------------


def test_dropout_is_off_unless_asked_for():
    model, params = model_and_params(attention_dropout=RATE, resid_pdrop=RATE)
    plain, _ = model_and_params()
    ids = tokens(2, 9)
    got = model.apply({"params": params}, ids).logits
    np.testing.assert_array_equal(got, plain.apply({"params": params}, ids).logits)
    assert (with_dropout(model, params, ids).logits != got).any()
    assert (
        with_dropout(model, params, ids, 1).logits != with_dropout(model, params, ids).logits
    ).any()


def test_the_embeddings_have_no_dropout():
    """embd_pdrop is declared by the reference and never applied (trap 41)."""
    model, params = model_and_params(embd_pdrop=0.5)
    ids = tokens(2, 5)
    got = with_dropout(model, params, ids).logits
    np.testing.assert_array_equal(got, model.apply({"params": params}, ids).logits)


def residual_masks(model, params, ids, silenced):
    """Which elements of the two first layers' residual branches were kept, one branch silenced."""
    params = without(params, *silenced)
    states = with_dropout(model, params, ids, output_hidden_states=True).hidden_states
    return [
        np.asarray(after != before) for before, after in zip(states[:2], states[1:3], strict=True)
    ]


@pytest.mark.parametrize("remat", ["none", "full"])
def test_residual_dropout_draws_anew_at_every_site(remat):
    """Both branches, and the layers of the scan, have keys of their own (traps 41, 47)."""
    model, params = model_and_params(resid_pdrop=RATE)
    model = model.clone(remat=remat)
    ids = tokens(4, 30)
    attention = residual_masks(model, params, ids, ("down_proj", "weight"))
    mlp = residual_masks(model, params, ids, ("o_proj", "weight"))
    masks = [*attention, *mlp]
    for mask in masks:
        assert abs(mask.mean() - (1 - RATE)) < 0.02
    for i in range(4):
        for other in masks[:i]:
            # Independent masks of rate 1/4 agree in 5/8 of their elements.
            assert abs((masks[i] == other).mean() - 0.625) < 0.02


def test_residual_dropout_keeps_the_mean():
    model, params = model_and_params(resid_pdrop=RATE)
    ids, silent = tokens(1, 6), without(params, "down_proj", "weight")
    run = jax.jit(
        lambda seed: with_dropout(
            model, silent, ids, seed, output_hidden_states=True
        ).hidden_states[1]
    )
    mean = np.mean([run(seed) for seed in range(400)], axis=0)
    plain = model.apply({"params": silent}, ids, output_hidden_states=True).hidden_states
    branch = np.asarray(plain[1] - plain[0])
    # 400 draws of variance p / (1 - p) an element: five standard errors.
    assert (
        np.abs(mean - plain[1]) < 5 * np.abs(branch) * np.sqrt(RATE / (1 - RATE) / 400) + 1e-5
    ).all()


def test_attention_dropout_falls_on_the_probabilities():
    """Each is zero or divided by 1 - p; layers and heads draw for themselves."""
    model, params = model_and_params(attention_dropout=RATE)
    ids = tokens(2, 25)
    plain = model.apply({"params": params}, ids, output_attentions=True).attentions[0]
    dropped = with_dropout(model, params, ids, output_attentions=True).attentions
    kept = [np.asarray(probs != 0)[..., np.tril(np.ones((25, 25), bool))] for probs in dropped]
    np.testing.assert_allclose(
        dropped[0], np.where(dropped[0] != 0, plain / (1 - RATE), 0), rtol=1e-6
    )
    for mask in kept:
        assert abs(mask.mean() - (1 - RATE)) < 0.03
    assert abs((kept[0] == kept[1]).mean() - 0.625) < 0.03
    assert abs((kept[0][:, 0] == kept[0][:, 1]).mean() - 0.625) < 0.05


@pytest.mark.parametrize("sizes", [(1, 1, 4), (2, 2, 2)])
def test_dropout_is_the_same_on_every_mesh(sizes):
    """Also where key-value groups are padded: 3 on 4 and on 2."""
    model, params = model_and_params(
        "longrope_partial_tied", attention_dropout=RATE, resid_pdrop=RATE
    )
    ids = tokens(4, 7)
    expected = with_dropout(model, params, ids).logits
    mesh = make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    got = jax.jit(functools.partial(with_dropout, on_mesh(model, params, mesh)[0]))(
        on_mesh(model, params, mesh)[1], ids
    ).logits
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_a_projection_with_an_adapter():
    """W x + B A dropout(x) in the model's dtype; the mean over draws is that without dropout."""
    config = phi3.Phi3Config(**config_values("gqa"))
    rng = np.random.default_rng(0)
    shapes = {"weight": (5, 4, 6), "lora_a": (2, 4, 6), "lora_b": (5, 2)}
    params = {name: rng.normal(size=shape).astype("f4") for name, shape in shapes.items()}
    x = rng.normal(size=(2, 3, 4, 6)).astype("f4")
    settings = dict(equation="BTEF,DEF->BTD", shape=(5, 4, 6), names=("embed", None, None))
    make = functools.partial(Projection, config, lora_dropout=RATE, **settings)
    own = np.einsum("BTEF,DEF->BTD", x, params["weight"])
    adapted = np.einsum("BTEF,rEF->BTr", x, params["lora_a"]) @ params["lora_b"].T
    close = functools.partial(np.testing.assert_allclose, rtol=0)
    got = make().apply({"params": params}, x, True)
    close(got, own + adapted, atol=1e-4)
    narrow = make(dtype="bfloat16").apply({"params": params}, x, True)
    assert narrow.dtype == "bfloat16"
    close(narrow.astype("f4"), own + adapted, atol=0.2)
    draw = jax.jit(
        jax.vmap(lambda key: make().apply({"params": params}, x, False, rngs={"dropout": key}))
    )
    draws = draw(jax.random.split(jax.random.key(0), 4000))
    errors = np.std(draws, axis=0) / np.sqrt(len(draws))
    assert (errors > 0).all() and (np.abs(draws.mean(axis=0) - own - adapted) < 5 * errors).all()


# --- Rematerialisation and the scan ----------------------------------------------------------


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_remat_changes_no_number(remat):
    model, params = model_and_params("mha_window", attention_dropout=RATE, resid_pdrop=RATE)
    ids = tokens(2, 7)
    value = lambda model, params: with_dropout(model, params, ids, labels=ids).loss  # noqa: E731
    step = jax.jit(jax.value_and_grad(value, 1), static_argnums=0)
    expected, gradients = step(model, params)
    got, others = step(model.clone(remat=remat), params)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), others, gradients
    )
    assert jax.tree.structure(model.clone(remat=remat).init(jax.random.key(0), ids)) == (
        jax.tree.structure(model.init(jax.random.key(0), ids))
    )


def saved_elements(remat: str) -> int:
    """Elements that the forward pass of a gradient hands to the backward pass."""
    model, params = model_and_params()
    ids = tokens(2, 16)
    value = lambda params: model.clone(remat=remat).apply({"params": params}, ids, labels=ids).loss  # noqa: E731
    _, backward = jax.vjp(value, params)
    return sum(leaf.size for leaf in jax.tree.leaves(backward))


def test_remat_policies_save_less_and_less():
    saved = [saved_elements(remat) for remat in ("none", "dots", "attention", "full")]
    assert saved == sorted(saved, reverse=True) and len(set(saved)) == 4, saved


def test_an_unknown_policy_is_named():
    model, params = model_and_params()
    with pytest.raises(ValueError, match="remat 'most' is not known; it is one of 'none', 'full'"):
        model.clone(remat="most").apply({"params": params}, tokens(1, 3))


def test_layers_one_by_one_equal_the_scan():
    model, params = model_and_params("longrope_window")
    config, ids = model.config, tokens(2, 20)
    inputs = read_inputs(config, 2, 20, None, None, None, None)
    long = rows_are_long(config, inputs.position_BT)
    layer_inputs = LayerInputs(
        cos_sin=rope_cos_sin(rope_tables(config, 20), inputs.position_BT, long),
        visible=Visible(None, inputs.masks(config), config.sliding_window, "xla"),
        keep_kv=False,
        keep_hidden=False,
        keep_probs=False,
        deterministic=True,
    )
    out = model.apply({"params": params}, ids, output_hidden_states=True)
    x = out.hidden_states[0]
    for index in range(config.num_hidden_layers - 1):
        layer = jax.tree.map(lambda leaf: leaf[index], params["model"]["layers"])  # noqa: B023
        x, _ = DecoderLayer(config).apply({"params": layer}, x, None, layer_inputs)
        expected = out.hidden_states[index + 1]
        np.testing.assert_allclose(x, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# --- Gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("case, tied", [("gqa", False), ("mqa_tied_window1", True)])
def test_the_padding_row_learns_only_through_a_tied_head(case, tied):
    """Trap 32: also where the padding's id is a real input; a loaded row is used as it is."""
    model, params = model_and_params(case)
    ids = tokens(2, 6)
    ids[:, 2] = model.config.pad_token_id
    value = lambda params: model.apply({"params": params}, ids, labels=ids).loss  # noqa: E731
    rows = np.abs(jax.grad(value)(params)["model"]["embed_tokens"]["weight"]).max(axis=1)
    assert (rows[model.config.pad_token_id] > 0) == tied
    assert rows[ids[0, 0]] > 0


def test_padding_of_a_mesh_has_no_gradient():
    model, params = model_and_params("longrope_partial_tied")  # 3 groups, 97 words, 80 wide
    model, params = on_mesh(model, params, make_mesh(1, 1, 7, devices=jax.devices()[:7]))
    ids = tokens(2, 6)
    gradients = jax.grad(lambda p: model.apply({"params": p}, ids, labels=ids).loss)(params)
    cut = cut_padding(gradients, model)
    sizes = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    total = lambda tree: sum(np.abs(leaf).sum() for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert sizes(gradients) > sizes(cut)
    np.testing.assert_allclose(total(gradients), total(cut), rtol=1e-6)


def test_gradients_of_a_frequent_word_are_summed_in_the_parameters_dtype():
    """A sum of 4096 ones ends at 256 in bfloat16."""
    embedding = Embedding(phi3.Phi3Config(**config_values("gqa")), dtype="bfloat16")
    table, ids = np.ones((97, 48), np.float32), np.full((4, 1024), 5)

    def value(table):
        rows = embedding.apply({"params": {"weight": table}}, ids)
        assert rows.dtype == "bfloat16"
        return rows.astype("float32").sum()

    assert (jax.grad(value)(table)[5] == 4096).all()


def test_parameters_of_another_mesh_are_named():
    model, params = model_and_params("longrope_partial_tied")
    mesh = make_mesh(1, 1, 2, devices=jax.devices()[:2])
    words = r"model.embed_tokens.weight has shape \(97, 48\), .*'tensor': 2} has \(98, 48\)"
    with pytest.raises(ValueError, match=words):
        model.clone(mesh=mesh).apply({"params": params}, tokens(1, 3))
    with pytest.raises(ValueError, match="this model without a mesh has"):
        model.apply({"params": on_mesh(model, params, mesh)[1]}, tokens(1, 3))
