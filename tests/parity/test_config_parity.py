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
}
FIELDS = [
    name
    for name in phi3.Phi3Config.__dataclass_fields__
    if name not in ("extra", "head_dim", "rope_parameters", "rope_scaling", "rope_theta")
    and name != "partial_rotary_factor"
]


def agree(ours, theirs):
    saved = ours.to_dict()
    for name in FIELDS:
        assert saved[name] == getattr(theirs, name), name
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


def test_defaults_are_the_references():
    ours, theirs = phi3.Phi3Config(), transformers.Phi3Config()
    agree(ours, theirs)
