"""Every family member on every mesh computes what one device does.

The members are shrunk; what decides how they are cut over a mesh is kept: key-value heads, query
heads for each, the kind of rope, tied or not, the window, and for width, mlp and vocabulary which
sizes from 1 to 8 divide them.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import cut_padding, hf_weights, on_mesh, params_of, tokens

import phi3_jax as phi3
from phi3_jax.sharding import abstract_params, init_params

MINI, LONG_MINI, MEDIUM = "phi-3-mini-4k", "phi-3.5-mini", "phi-3-medium-4k"
PHI4, PHI4_MINI = "phi-4", "phi-4-mini"
MEMBERS = (MINI, LONG_MINI, MEDIUM, PHI4, PHI4_MINI)
TENSOR = [(1, 1, size) for size in range(1, 9)]
MIXED = [(2, 2, 2), (1, 2, 4), (8, 1, 1), (1, 8, 1)]
# The fourth size is that of sequence.
SEQUENCE = [(1, 1, 1, 2), (1, 1, 1, 4), (1, 2, 1, 4), (2, 1, 2, 2), (1, 1, 2, 4), (1, 1, 1, 8)]
ROWS, WIDTH = 8, 20

# What is run without -m slow as well: all three layouts of heads, each at sizes that divide and do
# not divide, and every kind of mesh.
CORE = {
    (MINI, (1, 1, 8)),
    (LONG_MINI, (1, 1, 7)),
    (MEDIUM, (1, 1, 3)),
    (MEDIUM, (1, 1, 4)),
    (MEDIUM, (1, 1, 8)),
    (MEDIUM, (1, 2, 4)),
    (PHI4, (1, 1, 6)),
    (PHI4_MINI, (1, 1, 5)),
    (PHI4_MINI, (2, 2, 2)),
    (PHI4_MINI, (8, 1, 1)),
    (PHI4_MINI, (1, 8, 1)),
    (LONG_MINI, (1, 2, 1, 4)),
    (MEDIUM, (1, 1, 1, 4)),
    (PHI4, (1, 1, 1, 2)),
    (PHI4_MINI, (2, 1, 2, 2)),
}


def divided_alike(number: int) -> int:
    """The smallest number from 40 on that the same sizes up to 8 divide."""
    sizes = range(1, 9)
    alike = lambda n: all((n % size == 0) == (number % size == 0) for size in sizes)  # noqa: E731
    return next(n for n in range(40, 841) if alike(n))


def shrunk(member: str) -> phi3.Phi3Config:
    whole = phi3.Phi3Config.preset(member)
    rope = dict(whole.rope_parameters)
    for name in {"short_factor", "long_factor"} & rope.keys():
        rope[name] = rope[name][::8]
    vocab = divided_alike(whole.vocab_size)
    return phi3.Phi3Config(
        vocab_size=vocab,
        hidden_size=divided_alike(whole.hidden_size),
        intermediate_size=divided_alike(whole.intermediate_size),
        num_hidden_layers=2,
        num_attention_heads=whole.num_attention_heads,
        num_key_value_heads=whole.num_key_value_heads,
        head_dim=whole.head_dim // 8,
        tie_word_embeddings=whole.tie_word_embeddings,
        rope_parameters=rope,
        max_position_embeddings=whole.max_position_embeddings // 256,
        original_max_position_embeddings=whole.original_max_position_embeddings // 256,
        sliding_window=whole.sliding_window and whole.sliding_window // 256,
        bos_token_id=1,
        eos_token_id=vocab - 1,
        pad_token_id=vocab - 1,
    )


def on_devices(sizes: tuple[int, ...]) -> jax.sharding.Mesh:
    """A mesh of data, fsdp, tensor, and where there is a fourth size, sequence."""
    devices = jax.devices()[: math.prod(sizes)]
    return phi3.make_mesh(*sizes[:3], devices=devices, sequence=math.prod(sizes[3:]))


def batch(config: phi3.Phi3Config) -> dict:
    """Rows of unequal length, some beyond 16 tokens; the padding's id also stands among them."""
    ids = tokens(ROWS, WIDTH) % config.vocab_size
    mask = np.arange(WIDTH) >= np.arange(ROWS)[:, None]
    ids[5, 12] = config.pad_token_id
    return dict(input_ids=ids, attention_mask=mask, labels=np.where(mask, ids, -100))


# Less optimised code for the CPU: half the time to compile, and nothing else changes.
@functools.partial(
    jax.jit, static_argnames="model", compiler_options={"xla_backend_optimization_level": 0}
)
def loss_and_gradients(model, params, batch):
    def run(params):
        out = model.apply(
            {"params": params}, **batch, output_hidden_states=True, output_attentions=True
        )
        return out.loss, out

    return jax.value_and_grad(run, has_aux=True)(params)


@functools.cache
def on_one_device(member: str):
    config = shrunk(member)
    model, params = phi3.Phi3ForCausalLM(config), params_of(config, hf_weights(config, member))
    (_, out), gradients = jax.device_get(loss_and_gradients(model, params, batch(config)))
    return model, params, out, gradients


def assert_close(found, wanted):
    """The same arrays, but for the order of float32 sums: 5e-5 of an array's largest number."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    pairs = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True)
    for (path, a), b in pairs:
        name, scale = jax.tree_util.keystr(path), np.abs(b).max()
        np.testing.assert_allclose(a / scale, b / scale, atol=5e-5, rtol=0, err_msg=name)


def assert_zero_padding(tree, model):
    """That nothing but zeros was cut off."""

    def check(padded, cut):
        ends = [(0, b - a) for a, b in zip(cut.shape, padded.shape, strict=True)]
        np.testing.assert_array_equal(padded, np.pad(cut, ends))

    tree = jax.device_get(tree)
    jax.tree.map(check, tree, cut_padding(tree, model))


@pytest.mark.parametrize(
    "member, sizes",
    [
        pytest.param(
            member,
            sizes,
            id=f"{member}-{'x'.join(map(str, sizes))}",
            marks=() if (member, sizes) in CORE else pytest.mark.slow,
        )
        for member in MEMBERS
        for sizes in TENSOR + MIXED + SEQUENCE
    ],
)
def test_every_member_on_every_mesh(member, sizes):
    """Logits, loss, hidden states, attentions and the gradient of every leaf; key-value heads and
    vocabularies that the mesh does not divide are among them (traps 36 and 48).
    """
    alone, params, wanted, wanted_gradients = on_one_device(member)
    model, sharded = on_mesh(alone, params, on_devices(sizes))
    (_, out), gradients = jax.device_get(loss_and_gradients(model, sharded, batch(model.config)))
    assert_close(out, wanted)
    assert_zero_padding(gradients, model)
    assert_close(cut_padding(gradients, model), wanted_gradients)


def test_an_optimizer_leaves_the_padding_zero():
    """Key-value heads 8 on 5 devices, mlp 64, vocabulary 48: all three are padded."""
    alone, params, _, _ = on_one_device(PHI4_MINI)
    model, sharded = on_mesh(alone, params, on_devices((1, 1, 5)))
    sizes = jax.tree.map(lambda x: x.size, (sharded, params))
    assert sum(jax.tree.leaves(sizes[0])) > sum(jax.tree.leaves(sizes[1]))
    _, gradients = loss_and_gradients(model, sharded, batch(model.config))
    optimizer = optax.adamw(1e-2, weight_decay=0.1)

    @jax.jit
    def step(params, gradients):
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    stepped = step(sharded, gradients)
    assert_zero_padding(stepped, model)
    changed = lambda a, b: np.abs(np.asarray(a) - b).max() > 0  # noqa: E731
    assert all(jax.tree.leaves(jax.tree.map(changed, stepped, jax.device_get(sharded))))


@functools.cache
def born_on_one_device():
    return jax.device_get(init_params(phi3.Phi3ForCausalLM(shrunk(MEDIUM)), seed=3))


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(sizes, marks=() if (MEDIUM, sizes) in CORE else pytest.mark.slow)
        for sizes in TENSOR + MIXED + SEQUENCE
    ],
)
def test_new_parameters_do_not_depend_on_the_mesh(sizes, optimized):
    model = phi3.Phi3ForCausalLM(shrunk(MEDIUM), mesh=on_devices(sizes))
    params = init_params(model, seed=3)
    assert_zero_padding(params, model)
    for leaf, wanted in zip(
        jax.tree.leaves(params), jax.tree.leaves(abstract_params(model)), strict=True
    ):
        assert leaf.shape == wanted.shape and leaf.sharding == wanted.sharding
    found = cut_padding(jax.device_get(params), model)
    jax.tree.map(np.testing.assert_array_equal, found, born_on_one_device())


@pytest.mark.parametrize("sizes", [(1, 1, 7), (1, 1, 1, 4)])
@pytest.mark.parametrize(
    "call", ["mask of each head", "scores of each head", "dropout", "unknown ids"]
)
def test_calls_that_padding_could_disturb(call, sizes):
    """10 key-value heads are 14 or 12 on the mesh, 48 words 49: the first unknown id has a row
    there.
    """
    config = dataclasses.replace(shrunk(MEDIUM), attention_dropout=0.3, resid_pdrop=0.2)
    alone, params = phi3.Phi3ForCausalLM(config), on_one_device(MEDIUM)[1]
    model, sharded = on_mesh(alone, params, on_devices(sizes))
    ids, settings = batch(config)["input_ids"], {}
    heads = (ROWS, config.num_attention_heads, WIDTH, WIDTH)
    mask = np.tril(np.random.default_rng(0).random(heads) < 0.8)
    if call == "mask of each head":
        settings = dict(attention_mask=mask)
    elif call == "scores of each head":
        settings = dict(attention_mask=np.where(mask, 0.5, -np.inf).astype(np.float32))
    elif call == "dropout":
        settings = dict(deterministic=False, rngs={"dropout": jax.random.key(1)})
    else:
        ids[0, 3], ids[1, 2], ids[2, 5] = config.vocab_size, -1, 1000

    def logits(model, params):
        run = jax.jit(lambda params, ids: model.apply({"params": params}, ids, **settings).logits)
        return jax.device_get(run(params, ids))

    found, wanted = logits(model, sharded), logits(alone, params)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
    assert np.isnan(found).any() == (call == "unknown ids")
    assert_close(np.nan_to_num(found), np.nan_to_num(wanted))


@pytest.mark.parametrize(
    "model_class", [phi3.Phi3ForSequenceClassification, phi3.Phi3ForTokenClassification]
)
def test_classifiers_compute_what_one_device_does(model_class):
    alone = model_class(dataclasses.replace(shrunk(MEDIUM), token_classification_bias=False))
    score = np.random.default_rng(0).normal(size=(2, alone.config.hidden_size))
    params = {
        "model": on_one_device(MEDIUM)[1]["model"],
        "score": {"weight": jnp.asarray(score, jnp.float32)},
    }
    model, sharded = on_mesh(alone, params, on_devices((1, 2, 3)))
    inputs = batch(alone.config)
    per_token = model_class is phi3.Phi3ForTokenClassification
    inputs["labels"] = inputs["input_ids"] % 2 if per_token else inputs["input_ids"][:, 0] % 2
    found, wanted = (
        jax.device_get(jax.jit(one.apply)({"params": those}, **inputs))
        for one, those in ((model, sharded), (alone, params))
    )
    assert_close(found, wanted)


@pytest.mark.parametrize("sizes", [(1, 1, 4), (1, 1, 8), (1, 1, 1, 4)])
def test_generation_with_key_value_heads_that_do_not_divide(sizes):
    """Greedy on 10 key-value heads gives the tokens of one device (trap 48). Of a sequence axis
    the prompt is not a multiple, nor the one token of a step.
    """
    alone, params, _, _ = on_one_device(MEDIUM)
    model, sharded = on_mesh(alone, params, on_devices(sizes))
    ids = batch(model.config)["input_ids"][:3, :11]
    mask = np.arange(11) >= np.array([[0], [4], [2]])
    settings = dict(attention_mask=mask, max_new_tokens=9, eos_token_id=None)
    wanted = phi3.generate(alone, params, ids, **settings)
    found = phi3.generate(model, sharded, ids, **settings)
    np.testing.assert_array_equal(found.sequences, wanted.sequences)


def test_padded_vocabulary_is_never_sampled():
    """480 draws from 48 words padded to 49, nearly all alike likely (trap 36)."""
    alone, params, _, _ = on_one_device(MEDIUM)
    model, sharded = on_mesh(alone, params, on_devices((1, 1, 7)))
    assert len(sharded["lm_head"]["weight"]) == 49
    ids = batch(model.config)["input_ids"][:, :4]
    drawn = phi3.generate(
        model, sharded, ids, attention_mask=np.ones_like(ids), max_new_tokens=60, seed=1,
        do_sample=True, temperature=1000.0, top_k=0, top_p=1.0, eos_token_id=None,
    ).sequences[:, 4:]  # fmt: skip
    assert set(np.unique(drawn)) == set(range(48))
