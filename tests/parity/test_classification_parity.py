"""What classifies a row or a token, and with which loss, against transformers, live."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from reference import BASE, tokens

from phi3_jax.classification import sequence_classification_loss

torch = pytest.importorskip("torch")
hf = pytest.importorskip("torch_reference")
pytestmark = pytest.mark.parity

PAD = BASE["pad_token_id"]
SEQUENCE, TOKEN = "Phi3ForSequenceClassification", "Phi3ForTokenClassification"


def pooling_rows() -> tuple[np.ndarray, list[int]]:
    """Rows of 5 with padding about, and the columns that classify them (trap 39)."""
    ids = tokens(6, 5)
    ids[0, :2] = PAD  # on the left, and the last two
    ids[0, 3:] = PAD
    ids[1, :2] = PAD
    ids[2, 3:], ids[2, 0] = PAD, PAD
    ids[3, :] = PAD  # nothing else
    ids[4, 1:3] = PAD  # in the middle
    ids[5, 2:] = PAD  # the first of them an end of text that is padding too
    return ids, [2, 4, 2, 0, 4, 1]


def test_pooling_is_by_the_padding_id():
    """The right-most other id, whatever the mask says, the first column where there is none."""
    reference, model, params = hf.case("gqa", SEQUENCE, num_labels=3, eos_token_id=PAD)
    ids, columns = pooling_rows()
    mask = np.ones_like(ids)
    mask[4, 3:] = 0
    for given in (None, mask):
        out = hf.apply(model, params, ids, attention_mask=given, output_hidden_states=True)
        expected = hf.run(reference, ids, attention_mask=given).logits
        # Row 4 is then classified by a masked token, whose value is not defined.
        rows = np.arange(6) if given is None else np.array([0, 1, 2, 3, 5])
        assert hf.relative(out.logits[rows], expected[rows]) < 1e-4
        pooled = out.hidden_states[-1][jnp.arange(6), jnp.array(columns)]
        assert hf.relative(out.logits, pooled @ params["score"]["weight"].T) < 1e-5


def test_inputs_embeds_are_classified_by_their_last_token():
    reference, model, params = hf.case("gqa", SEQUENCE, num_labels=3)
    embeds = np.random.default_rng(0).normal(size=(2, 6, 48)).astype(np.float32)
    expected = hf.run(reference, inputs_embeds=embeds).logits
    with pytest.warns(UserWarning, match="padding cannot be seen in inputs_embeds"):
        out = hf.apply(model, params, inputs_embeds=embeds)
    assert hf.relative(out.logits, expected) < 1e-4


def test_without_a_padding_id():
    """One row is classified by its last token, several are refused, in both."""
    reference, model, params = hf.case("gqa", SEQUENCE, num_labels=3, pad_token_id=None)
    ids = tokens(2, 6)
    expected = hf.run(reference, ids[:1]).logits
    assert hf.relative(hf.apply(model, params, ids[:1]).logits, expected) < 1e-4
    embeds = np.random.default_rng(0).normal(size=(1, 6, 48)).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = hf.apply(model, params, inputs_embeds=embeds)
    assert hf.relative(out.logits, hf.run(reference, inputs_embeds=embeds).logits) < 1e-4
    with pytest.raises(ValueError, match="no padding token"):
        hf.run(reference, ids)
    with pytest.raises(ValueError, match="2 rows.*pad_token_id"):
        hf.apply(model, params, ids)


def test_a_tied_decoder_classifies_all_the_same():
    reference, model, params = hf.case("mqa_tied_window1", SEQUENCE, num_labels=4)
    ids = tokens(2, 7)
    assert hf.relative(hf.apply(model, params, ids).logits, hf.run(reference, ids).logits) < 1e-4


def label_kinds(num_labels: int) -> dict[str, np.ndarray]:
    """Labels for 5 rows, by what they are."""
    rng = np.random.default_rng(num_labels)
    targets = rng.normal(size=(5, num_labels)).astype(np.float32)
    return {
        "int": np.array([0, 1, -100, num_labels - 1, 1], np.int64),
        "nothing": np.full(5, -100, np.int64),
        "float": targets[:, 0] if num_labels == 1 else targets,
        "column": targets[:, :1],
        "chances": rng.random((5, num_labels)).astype(np.float32),
    }


@pytest.mark.parametrize(
    "problem_type, num_labels, kind",
    [
        (None, 1, "float"),
        (None, 1, "column"),
        (None, 3, "int"),
        (None, 3, "chances"),
        ("regression", 1, "float"),
        ("regression", 1, "column"),
        ("regression", 3, "float"),
        ("single_label_classification", 2, "int"),
        ("single_label_classification", 4, "int"),
        ("multi_label_classification", 1, "chances"),
        ("multi_label_classification", 3, "chances"),
        ("single_label_classification", 3, "nothing"),
    ],
)
def test_sequence_losses(problem_type, num_labels, kind):
    """Chosen by the config, else by the labels, and from there on as in the reference."""
    labels = label_kinds(num_labels)[kind]
    logits = np.random.default_rng(1).normal(size=(5, num_labels)).astype(np.float32) * 3
    config = hf.transformers.Phi3Config(**BASE, num_labels=num_labels, problem_type=problem_type)
    from transformers.loss.loss_utils import ForSequenceClassificationLoss

    expected = ForSequenceClassificationLoss(
        torch.from_numpy(labels), torch.from_numpy(logits), config
    ).item()
    ours = sequence_classification_loss(jnp.asarray(logits), jnp.asarray(labels), problem_type)
    assert ours.dtype == jnp.float32
    if kind == "nothing":
        assert np.isnan(expected) and ours == 0
    else:
        assert ours == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"token_classification_bias": False}], ids=str)
def test_token_losses(changes):
    """No shift; padding counts where it has a label (trap 40)."""
    reference, model, params = hf.case("gqa", TOKEN, num_labels=5, **changes)
    assert ("bias" in params["score"]) == (not changes)
    ids = tokens(2, 7)
    ids[0, 4:] = PAD
    labels = ids % 5
    labels[1, :3] = -100
    for mask in (None, (ids != PAD).astype(np.int32)):
        expected = hf.run(reference, ids, labels=labels, attention_mask=mask)
        out = hf.apply(model, params, ids, labels=labels, attention_mask=mask)
        real = ids != PAD
        assert hf.relative(out.logits[real], expected.logits[torch.from_numpy(real)]) < 1e-4
        if mask is None:
            assert hf.relative(out.loss, expected.loss) < 1e-5
    nothing = np.full_like(ids, -100)
    assert hf.run(reference, ids, labels=nothing).loss.isnan()
    assert hf.apply(model, params, ids, labels=nothing).loss == 0


@pytest.mark.parametrize("class_name", [SEQUENCE, TOKEN])
def test_one_input_of_the_two_is_needed(class_name):
    reference, model, params = hf.case("gqa", class_name, num_labels=3)
    both = {"input_ids": tokens(1, 3), "inputs_embeds": np.zeros((1, 3, 48), np.float32)}
    for inputs in ({}, both):
        with pytest.raises(ValueError, match="exactly one"):
            hf.run(reference, inputs.get("input_ids"), inputs_embeds=inputs.get("inputs_embeds"))
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model.apply({"params": params}, **inputs)
