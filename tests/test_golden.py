"""The model against numbers that transformers made (golden/make_golden.py records how)."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from reference import (
    CASES,
    HEADS,
    LENGTHS,
    config_values,
    hf_weights,
    left_padded,
    params_of,
    prompts,
)
from reference import tokens as some_tokens

import phi3_jax as phi3
from phi3_jax.generation.config import GenerationConfig
from phi3_jax.generation.processors import repetition_penalty
from phi3_jax.generation.settings import Past, Settings
from phi3_jax.hf_format import WeightTable
from phi3_jax.model import RMSNorm
from phi3_jax.rope import apply_rope, inverse_frequencies, rope_tables

GOLDEN = Path(__file__).parent / "golden"
MODEL = np.load(GOLDEN / "model.npz")
PARTS = np.load(GOLDEN / "parts.npz")
CALLS = np.load(GOLDEN / "calls.npz")


def test_products_are_exact_while_comparing():
    """TPUs and newer GPUs would round their factors by default (trap 27)."""
    assert jax.config.jax_default_matmul_precision == "highest"


@pytest.fixture(scope="module", params=sorted(CASES))
def case(request):
    config = phi3.Phi3Config(**config_values(request.param))
    params = params_of(config, hf_weights(config, request.param))
    return request.param, phi3.Phi3ForCausalLM(config), params


def relative(ours, reference):
    return np.abs(np.asarray(ours) - reference).max() / np.abs(reference).max()


def test_versions_are_recorded():
    for golden in (MODEL, PARTS, CALLS):
        assert json.loads(str(golden["versions"]))["transformers"] == "5.23.0"


def test_logits_and_loss(case):
    name, model, params = case
    apply = jax.jit(lambda ids: model.apply({"params": params}, ids, labels=ids))
    for length in LENGTHS:
        out = apply(some_tokens(2, length))
        assert relative(out.logits, MODEL[f"{name}/logits/{length}"]) < 1e-4, length
        if length > 1:
            assert abs(out.loss - MODEL[f"{name}/loss/{length}"]) < 1e-5, length


@pytest.mark.parametrize("pads", [0, 1, 6])
def test_greedy_equals_the_forward_without_cache(case, pads):
    """Rows of unequal length, across the longrope line, whatever their padding (traps 11-13)."""
    name, model, params = case
    ids, mask = left_padded(prompts(), pads)
    golden = MODEL[f"{name}/greedy"]
    result = phi3.generate(
        model, params, ids, mask, max_new_tokens=golden.shape[1], eos_token_id=None
    )
    np.testing.assert_array_equal(result.sequences[:, : ids.shape[1]], ids)
    np.testing.assert_array_equal(result.sequences[:, ids.shape[1] :], golden)


def recorded(name: str, side: str) -> dict[str, np.ndarray]:
    """What came in, or out, in one of the recorded calls."""
    start = f"{name}/{side}/"
    return {key.removeprefix(start): CALLS[key] for key in CALLS.files if key.startswith(start)}


def replayed(name: str, case: str, class_name: str = "Phi3ForCausalLM", changes=(), **more):
    """Our output where the reference's is recorded, its logits and loss compared."""
    config = phi3.Phi3Config(**config_values(case), **dict(changes))
    head = HEADS[class_name]
    params = params_of(config, hf_weights(config, case, head), head)
    model = getattr(phi3, class_name)(config)
    call = lambda params, inputs: model.apply({"params": params}, **inputs, **more)  # noqa: E731
    out, expected = jax.jit(call)(params, recorded(name, "in")), recorded(name, "out")
    assert relative(out.logits, expected["logits"]) < 1e-4
    if "loss" in expected:
        assert float(out.loss) == pytest.approx(float(expected["loss"]), rel=1e-5)
    return out


@pytest.mark.parametrize(
    "name, case", [("packed", "mha_window"), ("documents", "longrope"), ("mask", "gqa")]
)
def test_calls_with_other_inputs(name, case):
    """Positions that begin anew; a short and a long document as each is alone; a whole mask."""
    replayed(name, case)


def test_hidden_states_and_attentions():
    out = replayed("outputs", "longrope", output_hidden_states=True, output_attentions=True)
    for name, golden in recorded("outputs", "out").items():
        ours = getattr(out, name)
        assert len(ours) == len(golden)
        assert relative(np.stack(ours), golden) < 1e-4, name


@pytest.mark.parametrize(
    "problem", ["regression", "single_label_classification", "multi_label_classification"]
)
def test_sequence_classification(problem):
    name = "Phi3ForSequenceClassification"
    changes = {"num_labels": 3, "problem_type": problem}
    replayed(f"{name}/{problem}", "longrope_window", name, changes)


def test_token_classification():
    name = "Phi3ForTokenClassification"
    replayed(name, "longrope_window", name, {"num_labels": 3})


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("case", ["gqa", "mqa_tied_window1"])
def test_gradients(case, remat):
    """Some rows of every kind of leaf, of an untied and of a tied model (trap 32)."""
    config = phi3.Phi3Config(**config_values(case))
    params = params_of(config, hf_weights(config, case))
    model = phi3.Phi3ForCausalLM(config, remat=remat)
    inputs = recorded(f"gradients/{case}", "in")
    loss = lambda params: model.apply({"params": params}, **inputs).loss  # noqa: E731
    grads = jax.jit(jax.grad(loss))(params)
    golden, table = recorded(f"gradients/{case}", "out"), WeightTable(config)
    names = {table.hf_name(path, layer): (path, layer) for path, layer in table.parts}
    for name, rows in golden.items():
        path, layer = names[name]
        leaf = functools.reduce(dict.__getitem__, path, grads)
        ours = table.to_hf(path, np.asarray(leaf if layer is None else leaf[layer]))
        assert np.abs(ours[::7] - rows).max() < 1e-4 * np.abs(ours).max(), name
    pad_row = np.asarray(grads["model"]["embed_tokens"]["weight"][config.pad_token_id])
    assert pad_row.any() == config.tie_word_embeddings


def bfloat16(bits):
    return bits.view(ml_dtypes.bfloat16)


@pytest.mark.parametrize("compiled", [False, True])
def test_rms_norm_is_bit_equal_in_bfloat16(compiled):
    """The weight multiplies after the cast (trap 5); 10,000 values."""
    config = phi3.Phi3Config(rms_norm_eps=1e-5)
    norm = RMSNorm(config, param_dtype=jnp.bfloat16)
    variables = {"params": {"weight": jnp.asarray(bfloat16(PARTS["norm/weight"]))}}
    apply = jax.jit(norm.apply) if compiled else norm.apply
    out = np.asarray(apply(variables, jnp.asarray(bfloat16(PARTS["norm/x"]))))
    np.testing.assert_array_equal(out.view(np.uint16), PARTS["norm/out"])


def test_rms_norm_epsilon():
    """1e-5, which inputs of 1e-3 feel (trap 6)."""
    norm = RMSNorm(phi3.Phi3Config(), param_dtype=jnp.float32)
    out = norm.apply({"params": {"weight": jnp.ones(100)}}, jnp.asarray(PARTS["norm/small"]))
    np.testing.assert_allclose(out, PARTS["norm/small_out"], rtol=1e-5)


def test_tables_are_the_references():
    config = phi3.Phi3Config(**config_values("longrope"))
    tables = rope_tables(config, 500)
    names = ("short/cos", "short/sin", "long/cos", "long/sin")
    for ours, name in zip(tables[:4], names, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, PARTS[f"rope/{name}"], rtol=0, atol=3e-7, err_msg=name)


def test_cos_is_cast_after_its_scaling():
    """bfloat16 cos and sin equal torch's bit for bit (trap 8)."""
    config = phi3.Phi3Config(**config_values("longrope"))
    tables = rope_tables(config, 500)
    for ours, name in ((tables.long_cos_PR, "cos"), (tables.long_sin_PR, "sin")):
        bits = ours.astype(ml_dtypes.bfloat16).view(np.uint16)
        np.testing.assert_array_equal(bits, PARTS[f"rope/bf16/{name}"])
    # and that is the cast that apply_rope makes
    pairs = len(inverse_frequencies(config))
    x = jnp.ones((1, 500, 1, 1, 2 * pairs), jnp.bfloat16)
    zeros = jnp.zeros((1, 500, pairs))
    rotated = apply_rope(x, jnp.asarray(tables.long_cos_PR)[None], zeros)
    bits = np.asarray(rotated)[0, :, 0, 0, :pairs].view(np.uint16)
    np.testing.assert_array_equal(bits, PARTS["rope/bf16/cos"])


@pytest.mark.parametrize("name", [k for k in PARTS.files if k.startswith("warp/") and "=" in k])
def test_processors_follow_the_reference(name):
    """Ties, order and extremes as in the reference's classes (trap 37)."""
    settings = {"top_k": None}
    for part in name.removeprefix("warp/").split(","):
        key, _, value = part.partition("=")
        settings[key] = int(value) if key == "top_k" else float(value)
    config = GenerationConfig(do_sample=True, **settings)
    logits = jnp.asarray(PARTS["warp/logits"])
    ours = np.array(Settings.of(config, vocab_size=50).process(Past(jnp.int32(0)), logits))
    expected = PARTS[name]
    if "top_p" in settings:
        # Which of several equal logits top-p keeps is left open by torch's sort, and differs from
        # run to run there; how many it keeps is not.
        ours[:2], expected[:2] = np.sort(ours[:2]), np.sort(expected[:2])
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_repetition_penalty_follows_the_reference():
    """Once an id, no left padding, negative scores multiplied (trap 38)."""
    ids, mask = PARTS["penalty/ids"], PARTS["penalty/mask"]
    seen = np.zeros((6, 50), bool)
    rows, columns = np.nonzero(mask)
    seen[rows, ids[rows, columns]] = True
    ours = repetition_penalty(jnp.asarray(PARTS["warp/logits"]), seen, 1.3)
    np.testing.assert_allclose(ours, PARTS["penalty/1.3"], rtol=1e-6)
