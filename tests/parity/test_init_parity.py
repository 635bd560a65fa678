"""New parameters against the reference's own, by their statistics."""

import jax
import numpy as np
import pytest
from reference import BASE, params_of

import phi3_jax as phi3

torch = pytest.importorskip("torch")
hf = pytest.importorskip("torch_reference")
pytestmark = pytest.mark.parity


@pytest.mark.parametrize(
    "class_name, changes",
    [
        ("Phi3Model", {"initializer_range": 0.3}),
        ("Phi3ForCausalLM", {"tie_word_embeddings": True}),
        ("Phi3ForCausalLM", {}),
        ("Phi3ForTokenClassification", {"num_labels": 50}),
    ],
    ids=str,
)
def test_initial_parameters_are_drawn_alike(class_name, changes):
    """Normal, not truncated, initializer_range wide; norms one, biases and padding zero."""
    values = {**BASE, "vocab_size": 500, "hidden_size": 60, "num_attention_heads": 6, **changes}
    config = phi3.Phi3Config(**values)
    head = hf.head_of(class_name, config)
    torch.manual_seed(0)
    reference = getattr(hf.transformers, class_name)(hf.transformers.Phi3Config(**values))
    weights = {name: p.detach().numpy() for name, p in reference.named_parameters()}
    theirs = dict(jax.tree.leaves_with_path(params_of(config, weights, head)))
    ours = dict(jax.tree.leaves_with_path(phi3.init_params(getattr(phi3, class_name)(config))))
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        name, expected = jax.tree_util.keystr(path, simple=True, separator="."), theirs[path]
        assert leaf.shape == expected.shape, name
        if "norm" in name or "bias" in name:
            np.testing.assert_array_equal(leaf, expected)
            continue
        leaf, expected = np.asarray(leaf), np.asarray(expected)
        if "embed_tokens" in name:
            np.testing.assert_array_equal(leaf[config.pad_token_id], 0)
            np.testing.assert_array_equal(expected[config.pad_token_id], 0)
            leaf, expected = (np.delete(x, config.pad_token_id, axis=0) for x in (leaf, expected))
        width, few = config.initializer_range, leaf.size**-0.5
        for drawn in (leaf, expected):
            assert abs(drawn.mean()) < 4 * few * width, name
            assert abs(drawn.std() / width - 1) < 4 * few, name
            # One in 370 lies beyond three sigmas; a draw cut at two has none.
            beyond = (np.abs(drawn) > 3 * width).mean()
            assert abs(beyond * 370 - 1) < 4 * (370 / leaf.size) ** 0.5, name
        # Layers do not share their numbers.
        if name.startswith(("layers", "model.layers")):
            assert not np.array_equal(leaf[0], leaf[1]), name
