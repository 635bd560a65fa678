"""Submodules, heads and greedy tokens against transformers, live, on random configs.

The configs are drawn in conftest.py; `--parity-seed 7` draws others.
"""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import BASE, LONGROPE, PARTIAL_LONGROPE, left_padded, tokens

import phi3_jax as phi3
from phi3_jax.attention import Visible, causal_mask
from phi3_jax.layers import MLP, Attention, DecoderLayer, LayerInputs, RMSNorm
from phi3_jax.rope import rope_cos_sin, rope_tables, rows_are_long

torch = pytest.importorskip("torch")
hf = pytest.importorskip("torch_reference")
pytestmark = pytest.mark.parity

ORIGINAL = BASE["original_max_position_embeddings"]
ROPES = {
    "default": {},
    "longrope": {"rope_parameters": LONGROPE},
    "longrope_partial": {"rope_parameters": PARTIAL_LONGROPE},
}


@pytest.fixture
def rng(drawn, request):
    """For what is random beside the config; the same for the same seed and config."""
    return np.random.default_rng(random.Random(request.node.name).getrandbits(32))


def lengths(rng) -> tuple[int, int]:
    """One at which longrope rows are short, and one at which they are long."""
    return int(rng.integers(2, ORIGINAL + 1)), int(rng.integers(ORIGINAL + 1, 2 * ORIGINAL))


def draw_ids(rng, config, rows: int, width: int) -> np.ndarray:
    """Any ids: padding's is nothing special to the decoder."""
    return rng.integers(0, config.vocab_size, (rows, width)).astype(np.int32)


def test_submodules(drawn, rng):
    """What each part makes of the reference's own intermediate values, float32, 1e-5."""
    reference, model, params = hf.both(drawn)
    config, length = model.config, int(rng.choice(lengths(rng)))
    index = int(rng.integers(config.num_hidden_layers))
    seen = {}
    for name, module in reference.model.layers[index].named_modules():
        module.register_forward_hook(
            lambda module, args, kwargs, out, name=name: seen.update(
                {name: (args[0] if args else kwargs["hidden_states"], out)}
            ),
            with_kwargs=True,
        )
    hf.run(reference, draw_ids(rng, config, 2, length))
    x = {name: jnp.asarray(x.numpy()) for name, (x, _) in seen.items()}
    expected = {name: out for name, (_, out) in seen.items()}
    expected["self_attn"], expected["probs"] = expected["self_attn"]

    columns_T = jnp.arange(length)
    position_BT = jnp.broadcast_to(columns_T, (2, length))
    mask = causal_mask(columns_T, columns_T, config.sliding_window)[None, None, None]
    inputs = LayerInputs(
        cos_sin=rope_cos_sin(
            rope_tables(config, length), position_BT, rows_are_long(config, position_BT)
        ),
        visible=Visible(None, (mask,), config.sliding_window, "xla"),
        keep_kv=False,
        keep_hidden=False,
        keep_probs=True,
        deterministic=True,
    )

    @jax.jit
    def ours(x, weights):
        out = {}
        for name, part, more in (
            ("input_layernorm", RMSNorm, ()),
            ("post_attention_layernorm", RMSNorm, ()),
            ("mlp", MLP, ()),
            ("self_attn", Attention, (None, inputs)),
        ):
            out[name] = part(config).apply({"params": weights[name]}, x[name], *more)
        out["self_attn"], _, probs = out["self_attn"]
        out["probs"] = probs.reshape(2, config.num_attention_heads, length, length)
        out[""], _ = DecoderLayer(config).apply({"params": weights}, x[""], None, inputs)
        return out

    weights = jax.tree.map(lambda leaf: leaf[index], params["model"]["layers"])
    for name, out in ours(x, weights).items():
        assert hf.relative(out, expected[name]) < 1e-5, name


def test_decoder(drawn, rng):
    reference, model, params = hf.both(drawn, "Phi3Model")
    for length in lengths(rng):
        ids = draw_ids(rng, model.config, 2, length)
        expected = hf.run(reference, ids).last_hidden_state
        out = hf.apply(model, params, ids)
        assert hf.relative(out.last_hidden_state, expected) < 1e-4, length


def test_causal_lm(drawn, rng):
    """Logits and loss, around the line too, with labels that do not count."""
    reference, model, params = hf.both(drawn)
    for length in (1, ORIGINAL, ORIGINAL + 1, int(rng.choice(lengths(rng)))):
        ids = draw_ids(rng, model.config, 2, length)
        labels = np.where(rng.random(ids.shape) < 0.3, -100, ids).astype(np.int32)
        labels[0, -1] = ids[0, -1]
        expected = hf.run(reference, ids, labels=labels)
        out = hf.apply(model, params, ids, labels=labels)
        assert hf.relative(out.logits, expected.logits) < 1e-4, length
        if length > 1:
            assert hf.relative(out.loss, expected.loss) < 1e-4, length
        else:
            assert out.loss == 0 and expected.loss.isnan()


def sequence_labels(rng, config, rows: int) -> np.ndarray:
    """Labels that fit the config's problem_type; None leaves two kinds to the labels."""
    n, kind = config.num_labels, config.problem_type
    if n == 1:
        return rng.normal(size=rows).astype(np.float32)
    if kind == "single_label_classification" or (kind is None and rng.random() < 0.5):
        return rng.integers(0, n, rows).astype(np.int32)
    if kind == "regression":
        return rng.normal(size=(rows, n)).astype(np.float32)
    return (rng.random((rows, n)) < 0.5).astype(np.float32)


def test_sequence_classification(drawn, rng):
    reference, model, params = hf.both(drawn, "Phi3ForSequenceClassification")
    pad = model.config.pad_token_id
    rows = 1 if pad is None else 3
    for length in lengths(rng):
        ids = draw_ids(rng, model.config, rows, length)
        if pad is not None:
            ids[1, length // 2 :] = pad
        labels = sequence_labels(rng, model.config, rows)
        reference.config.problem_type = model.config.problem_type  # it keeps what it inferred
        expected = hf.run(reference, ids, labels=labels)
        out = hf.apply(model, params, ids, labels=labels)
        assert hf.relative(out.logits, expected.logits) < 1e-4, length
        assert hf.relative(out.loss, expected.loss) < 1e-4, length


def test_token_classification(drawn, rng):
    reference, model, params = hf.both(drawn, "Phi3ForTokenClassification")
    for length in lengths(rng):
        ids = draw_ids(rng, model.config, 2, length)
        labels = rng.integers(0, model.config.num_labels, ids.shape).astype(np.int32)
        labels[1, length // 2 :] = -100
        expected = hf.run(reference, ids, labels=labels)
        out = hf.apply(model, params, ids, labels=labels)
        assert hf.relative(out.logits, expected.logits) < 1e-4, length
        # One class alone has no loss but what rounding leaves.
        assert abs(out.loss - expected.loss.item()) < 1e-4 * max(1, expected.loss.item())


def greedy_model(rope, kv_heads, tied, window, **more):
    """A random model in transformers and here, with a window and a line of its own."""
    values = {
        **BASE,
        **ROPES[rope],
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
        "sliding_window": window,
        **more,
    }
    return hf.both(values, name=f"{rope}{kv_heads}{tied}{window}")


@torch.no_grad()
def is_greedy(reference, row, prompt: int) -> bool:
    """Whether every token behind the prompt is what the forward without cache would choose.

    Up to the line a forward of the row that far says it, since a prefix computes the same there;
    beyond it one of the whole row does, all of it with the long factors.
    """
    line = reference.config.original_max_position_embeddings
    ids = torch.from_numpy(row).long()[None]
    short = reference(ids[:, :line], use_cache=False).logits[0].argmax(-1)
    long = reference(ids, use_cache=False).logits[0].argmax(-1)
    chosen = torch.cat([short, long[line:]])
    return bool((chosen[prompt - 1 : -1] == ids[0, prompt:]).all())


@pytest.mark.parametrize("chosen", [("default", 6, True, 5), ("longrope", 3, False, 5)], ids=str)
@pytest.mark.parametrize("pads", [0, 1, 6])
def test_greedy_below_the_line(chosen, pads):
    """200 tokens of unequal rows, padded as a batch, equal the reference's generate()."""
    reference, model, params = greedy_model(*chosen, original_max_position_embeddings=256)
    ids, mask = left_padded([tokens(1, width)[0] for width in (7, 12, 30, 3)], pads)
    expected = reference.generate(
        torch.from_numpy(ids).long(),
        attention_mask=torch.from_numpy(mask).long(),
        max_new_tokens=200,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    ).numpy()
    ours = phi3.generate(model, params, ids, mask, max_new_tokens=200, eos_token_id=None)
    np.testing.assert_array_equal(ours.sequences, expected)


@pytest.mark.parametrize(
    "chosen", [("longrope", 3, False, None), ("longrope_partial", 1, True, 5)], ids=str
)
def test_greedy_across_the_line(chosen):
    """200 tokens of rows that cross at their own steps equal the forward without cache."""
    reference, model, params = greedy_model(*chosen)
    rows = [tokens(1, width)[0] for width in (7, 12, 16, 17)]
    for pads in (0, 1, 6):
        ids, mask = left_padded(rows, pads)
        ours = phi3.generate(model, params, ids, mask, max_new_tokens=200, eos_token_id=None)
        for sequence, keep, row in zip(ours.sequences, mask, rows, strict=True):
            own = sequence[np.flatnonzero(keep)[0] :]
            assert len(own) == len(row) + 200 and is_greedy(reference, own, len(row))
