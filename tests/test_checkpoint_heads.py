"""Which model class loads from, and saves to, a folder with which head."""

import json
import warnings

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from model_folders import assert_same, params_in, tensors_in, write_hf_folder

import phi3_jax as phi3
from convert.to_orbax import to_orbax
from phi3_jax.checkpoint import from_pretrained, save_checkpoint, save_pretrained
from phi3_jax.sharding import init_params, make_mesh

CLASSES = {
    "none": phi3.Phi3Model,
    "lm_head": phi3.Phi3ForCausalLM,
    "score": phi3.Phi3ForSequenceClassification,
    "score_bias": phi3.Phi3ForTokenClassification,
}
CASES = ("gqa", "mqa_tied_window1")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model with each head, tied and not, as name/case/hf and converted as name/case/orbax."""
    parent = tmp_path_factory.mktemp("heads")
    for head in CLASSES:
        for case in CASES:
            folder = parent / head / case
            write_hf_folder(folder / "hf", case, head=head, num_labels=3)
            to_orbax(folder / "hf", folder / "orbax")
    return parent


def inside(params: dict, head: str) -> dict:
    """path -> leaf of the decoder in a folder's parameters, as Phi3Model has them."""
    if head == "none":
        return params
    return {path[1:]: leaf for path, leaf in params.items() if path[0] == "model"}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["hf", "orbax"])
@pytest.mark.parametrize("head", CLASSES)
def test_every_class_loads_and_saves_its_own(folders, tmp_path, head, kind, case):
    with warnings.catch_warnings(action="error"):
        source = folders / head / case / kind
        model, params = from_pretrained(source, CLASSES[head], dtype=None)
    hf = folders / head / case / "hf"
    assert_same(params, params_in(hf))
    assert model.config.num_labels == 3

    save_pretrained(tmp_path / "hf", model, params)
    tensors = tensors_in(hf)
    saved = tensors_in(tmp_path / "hf")
    assert saved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(saved[name].view("u2"), tensor.view("u2"), name)
    save_checkpoint(tmp_path / "orbax", model, params)
    for name in ("hf", "orbax"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["architectures"] == [CLASSES[head].__name__]
        assert config["torch_dtype"] == "bfloat16"
        assert_same(from_pretrained(tmp_path / name, CLASSES[head], dtype=None)[1], params_in(hf))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("head", CLASSES)
def test_the_decoder_comes_from_any_folder(folders, head, case):
    for kind in ("hf", "orbax"):
        _, params = from_pretrained(folders / head / case / kind, phi3.Phi3Model, dtype=None)
        assert_same(params, inside(params_in(folders / head / case / "hf"), head))


@pytest.mark.parametrize("head", ["none", "score", "score_bias"])
def test_only_a_tied_causal_model_needs_no_head(folders, head):
    _, params = from_pretrained(folders / head / "mqa_tied_window1" / "hf", dtype=None)
    decoder = inside(params_in(folders / head / "mqa_tied_window1" / "hf"), head)
    assert_same(params, {("model", *path): leaf for path, leaf in decoder.items()})
    with pytest.raises(ValueError, match="with Phi3ForCausalLM (.|\\n)*lm_head.weight: m"):
        from_pretrained(folders / head / "gqa" / "hf")


NEW = {"score": "score.weight", "score_bias": "score.bias, score.weight"}


@pytest.mark.parametrize("kind", ["hf", "orbax"])
@pytest.mark.parametrize("stored", ["lm_head", "none"])
@pytest.mark.parametrize("head", NEW)
def test_a_classifier_without_a_head_gets_a_new_one_and_says_so(folders, stored, head, kind):
    source = folders / stored / "gqa" / kind
    with pytest.warns(UserWarning) as warned:
        model, params = from_pretrained(source, CLASSES[head], num_labels=5)
    (warning,) = warned
    assert warning.filename == __file__
    assert str(warning.message) == f"{str(source)!r} has no {NEW[head]}: new, and to be trained"
    decoder = inside(params_in(folders / stored / "gqa" / "hf", "float32"), stored)
    assert_same(params["model"], decoder)
    score = params["score"]
    assert_same(score, flatten_dict(init_params(model)["score"]))
    assert score["weight"].shape == (5, 48)
    assert 0.01 < np.std(np.asarray(score["weight"])) < 0.03 and not np.any(score.get("bias", 0))

    for sizes in ((1, 2, 4), (8, 1, 1)):
        with pytest.warns(UserWarning):
            mesh = make_mesh(*sizes)
            _, there = from_pretrained(source, CLASSES[head], mesh=mesh, num_labels=5)
        assert_same(there, flatten_dict(params))


def test_half_a_head_is_made_whole_and_none_is_halved(folders):
    with pytest.warns(UserWarning, match="has no score.bias: new"):
        _, params = from_pretrained(
            folders / "score" / "gqa" / "hf", phi3.Phi3ForTokenClassification, dtype=None
        )
    assert not np.any(params["score"].pop("bias"))
    assert_same(params, params_in(folders / "score" / "gqa" / "hf"))
    source = folders / "score_bias" / "gqa" / "orbax"
    with pytest.raises(ValueError, match="Phi3ForSequenceClassification(.|\\n)*score.bias: unexp"):
        from_pretrained(source, phi3.Phi3ForSequenceClassification)
    with pytest.raises(ValueError, match="score.bias: unexpected"):
        from_pretrained(source, phi3.Phi3ForTokenClassification, token_classification_bias=False)


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_overrides_are_laid_over_the_config(folders, kind):
    source = folders / "score" / "gqa" / kind
    load = lambda **changes: from_pretrained(source, CLASSES["score"], **changes)[0]  # noqa: E731
    model = load(problem_type="regression", attention_dropout=0.25, num_labels=3)
    assert (model.config.problem_type, model.config.attention_dropout) == ("regression", 0.25)
    with pytest.raises(ValueError, match=r"score\.weight: shape \(3, 48\), .* makes it \(5, 48\)"):
        load(num_labels=5)
    with pytest.raises(ValueError, match="'problem_typ'; did you mean 'problem_type'"):
        load(problem_typ="regression")
    with pytest.raises(ValueError, match="down_proj.*the config makes it"):
        load(intermediate_size=72)


def test_a_token_classifier_may_have_no_bias(folders, tmp_path):
    model, params = from_pretrained(
        folders / "score" / "gqa" / "hf",
        phi3.Phi3ForTokenClassification,
        token_classification_bias=False,
    )
    assert params["score"].keys() == {"weight"}
    save_pretrained(tmp_path / "m", model, params)
    again, loaded = from_pretrained(tmp_path / "m", phi3.Phi3ForTokenClassification)
    assert not again.config.token_classification_bias
    assert_same(loaded, flatten_dict(jax.tree.map(np.asarray, params)))
