"""The gradient of every leaf against torch's, live."""

import jax
import numpy as np
import pytest
from reference import BASE, config_values, params_of, tokens

torch = pytest.importorskip("torch")
hf = pytest.importorskip("torch_reference")
pytestmark = pytest.mark.parity

PAD = BASE["pad_token_id"]
CLASSES = {
    "causal": "Phi3ForCausalLM",
    "sequence": "Phi3ForSequenceClassification",
    "token": "Phi3ForTokenClassification",
}


def reference_gradients(reference, config, head, ids, labels, **inputs) -> dict:
    """torch's, in our layout."""
    reference.zero_grad()
    inputs = {"labels": labels, "use_cache": False, **inputs}
    reference(hf.as_torch(ids), **{k: hf.as_torch(v) for k, v in inputs.items()}).loss.backward()
    grads = {name: weight.grad.numpy() for name, weight in reference.named_parameters()}
    return params_of(config, grads, head)


def assert_equal_gradients(ours, theirs):
    """Every leaf to 1e-4 of its largest value."""
    theirs, ours = (dict(jax.tree.leaves_with_path(tree)) for tree in (theirs, ours))
    assert theirs.keys() == ours.keys()
    for path, leaf in theirs.items():
        assert np.abs(leaf).max() > 0, path
        assert hf.relative(ours[path], np.asarray(leaf)) < 1e-4, path


@pytest.mark.parametrize(
    "head, case, length, remat",
    [
        ("causal", "gqa", 9, "none"),
        ("causal", "mqa_tied_window1", 9, "none"),
        ("causal", "longrope_window", 18, "none"),
        ("causal", "longrope_partial_tied", 18, "none"),
        ("causal", "head_dim", 6, "none"),
        ("sequence", "longrope_window", 18, "none"),
        ("sequence", "longrope_partial_tied", 9, "none"),
        ("token", "partial_gelu", 9, "none"),
        ("token", "mqa_tied_window1", 9, "none"),
        ("causal", "gqa", 9, "full"),
        ("causal", "longrope_partial_tied", 18, "full"),
        ("sequence", "longrope_window", 18, "full"),
        ("token", "mqa_tied_window1", 9, "full"),
        ("causal", "gqa", 9, "dots"),
        ("causal", "gqa", 9, "attention"),
    ],
)
def test_gradients(head, case, length, remat):
    """With padding among the inputs, and labels that do not count."""
    values = {**config_values(case), "num_labels": 3}
    reference, model, params = hf.both(values, CLASSES[head], case)
    model = model.clone(remat=remat)
    ids = tokens(3, length)
    ids[0, length - 3 :] = PAD
    ids[1, 1] = PAD
    labels = ids % 3 if head == "token" else ids.copy()
    labels[0, length - 3 :], labels[2, :2] = -100, -100
    if head == "sequence":
        labels = np.array([2, 0, 1], np.int32)
    kind = hf.head_of(CLASSES[head], model.config)
    expected = reference_gradients(reference, model.config, kind, ids, labels)

    def loss(params):
        return model.apply({"params": params}, ids, labels=labels).loss

    grads = jax.jit(jax.grad(loss))(params)
    assert_equal_gradients(grads, expected)
    # The padding's row is trained by a tied head alone (trap 32).
    pad_row = np.asarray(grads["model"]["embed_tokens"]["weight"][PAD])
    tied_head = head == "causal" and model.config.tie_word_embeddings
    assert pad_row.any() == tied_head


def test_gradients_of_packed_and_of_masked_rows():
    """Through documents of their own, and through a mask with holes."""
    reference, model, params = hf.both(config_values("mha_window"), name="packed")
    ids = tokens(2, 12)
    positions = np.array([[*range(5), *range(7)], [*range(12)]], np.int32)
    mask = np.ones((2, 12), np.int32)
    mask[0, :2], mask[1, 5:7] = 0, 0
    for inputs in ({"position_ids": positions}, {"attention_mask": mask}):
        # What a padded token predicts is not defined, nor what it gives its neighbours.
        counted = np.roll(inputs.get("attention_mask", np.ones_like(ids)), 1, axis=1)
        labels = np.where(counted, ids, -100).astype(np.int32)
        expected = reference_gradients(reference, model.config, "lm_head", ids, labels, **inputs)

        def loss(params, labels=labels, inputs=inputs):
            return model.apply({"params": params}, ids, labels=labels, **inputs).loss

        assert_equal_gradients(jax.jit(jax.grad(loss))(params), expected)
