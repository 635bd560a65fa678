"""Configs that transformers saves load here, and the other way round."""

import json

import pytest
from reference import BASE, LONGROPE, PARTIAL_LONGROPE

import phi3_jax as phi3
from phi3_jax.rope import attention_factor

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

FORMS = {
    "default": {},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    "longrope": {"rope_parameters": LONGROPE},
    "partial": {"rope_parameters": PARTIAL_LONGROPE},
    "attention_factor": {"rope_parameters": {**LONGROPE, "attention_factor": 1.25}},
    "more": {"sliding_window": 7, "tie_word_embeddings": True},
    "two_labels": {"num_labels": 2},
    "one_label": {"num_labels": 1, "problem_type": "regression"},
    "labels": {"num_labels": 5, "problem_type": "multi_label_classification"},
    "named": {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}},
    "unlike": {"id2label": {1: "one", 3: "three", 7: "x"}, "label2id": {"three": 3}},
    "heads": {
        "classifier_dropout": 0.25,
        "hidden_dropout": 0.5,
        "token_classification_bias": False,
        "problem_type": "single_label_classification",
    },
}
LABELS = ("id2label", "label2id", "problem_type", "num_labels")
# Attributes that are there only where someone set them.
OPTIONAL = {"classifier_dropout": None, "hidden_dropout": None, "token_classification_bias": True}
FIELDS = [
    name
    for name in phi3.Phi3Config.__dataclass_fields__
    if name not in ("extra", "head_dim", "rope_parameters", "rope_scaling", "rope_theta")
    and name not in ("partial_rotary_factor", *LABELS, *OPTIONAL)
]


def agree(ours, theirs):
    saved = ours.to_dict()
    for name in FIELDS:
        assert saved[name] == getattr(theirs, name), name
    for name in LABELS:
        assert getattr(ours, name) == getattr(theirs, name), name
    for name, default in OPTIONAL.items():
        assert getattr(ours, name) == getattr(theirs, name, default), name
    rope = dict(theirs.rope_parameters)
    rope.pop("type", None)
    mine = saved["rope_parameters"]
    assert {key: mine[key] for key in rope} == rope


@pytest.mark.parametrize("form", FORMS)
def test_theirs_loads_here_and_ours_there(form, tmp_path):
    theirs = transformers.Phi3Config(**{**BASE, "eos_token_id": [2, 3]}, **FORMS[form])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = phi3.Phi3Config.from_pretrained(tmp_path / "theirs")
    agree(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    agree(ours, transformers.AutoConfig.from_pretrained(tmp_path / "ours"))


@pytest.mark.parametrize(
    "name", ["phi-3-mini-4k", "phi-3-medium-4k", "phi-3.5-mini", "phi-4", "phi-4-mini"]
)
def test_presets_load_in_the_reference(name, tmp_path):
    ours = phi3.Phi3Config.preset(name)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.Phi3Config)
    agree(ours, theirs)


@pytest.mark.parametrize("kind", ["su", "yarn"])
def test_old_names_load_in_the_reference_once_saved_here(kind, tmp_path):
    """transformers 5.23 cannot read "su" at all, and gives "yarn" another factor."""
    rope = {**LONGROPE, "type": kind}
    del rope["rope_type"]
    (tmp_path / "config.json").write_text(
        json.dumps({**BASE, "model_type": "phi3", "rope_scaling": rope})
    )
    ours = phi3.Phi3Config.from_pretrained(tmp_path)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    rotary = transformers.models.phi3.modeling_phi3.Phi3RotaryEmbedding(theirs)
    assert rotary.attention_scaling == pytest.approx(attention_factor(ours))


@pytest.mark.parametrize("form", FORMS)
def test_both_files_say_the_same_of_labels(form, tmp_path):
    """What is default is left out of both, and the rest stands in both in the same words."""
    theirs = transformers.Phi3Config(**BASE, **FORMS[form])
    theirs.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    phi3.Phi3Config(**BASE, **FORMS[form]).save_pretrained(tmp_path)
    ours = json.loads((tmp_path / "config.json").read_text())
    for name in (*LABELS, *OPTIONAL):
        assert ours.get(name, "left out") == written.get(name, "left out"), name


def test_labels_without_a_way_back_get_one(tmp_path):
    """transformers leaves label2id None; here it is the inverse, and saved as that."""
    theirs = transformers.Phi3Config(**BASE, id2label={0: "no", 1: "yes", 2: "or"})
    assert theirs.label2id is None
    theirs.save_pretrained(tmp_path)
    ours = phi3.Phi3Config.from_pretrained(tmp_path)
    assert ours.label2id == {"no": 0, "yes": 1, "or": 2}
    ours.save_pretrained(tmp_path)
    agree(ours, transformers.AutoConfig.from_pretrained(tmp_path))


def test_one_label_is_no_single_label_problem():
    values = {**BASE, "num_labels": 1, "problem_type": "single_label_classification"}
    for config_class in (phi3.Phi3Config, transformers.Phi3Config):
        with pytest.raises(ValueError, match="single_label_classification.*num_labels"):
            config_class(**values)


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_labels": 5},
        {"num_labels": 2, "attention_dropout": 0.5},
        {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}},
        {"problem_type": "regression", "sliding_window": 3, "tie_word_embeddings": True},
    ],
)
def test_overrides_mean_the_same(overrides, tmp_path):
    theirs = transformers.Phi3Config(**BASE, **FORMS["named"])
    theirs.save_pretrained(tmp_path)
    ours = phi3.Phi3Config.from_pretrained(tmp_path, **overrides)
    agree(ours, transformers.AutoConfig.from_pretrained(tmp_path, **overrides))


def test_defaults_are_the_references():
    ours, theirs = phi3.Phi3Config(), transformers.Phi3Config()
    agree(ours, theirs)
