"""Configs: pages, changes on the command line, and what is refused."""

import dataclasses
import json

import pytest

from train.config import (
    LoraConfig,
    TrainConfig,
    config_names,
    from_dict,
    load_config,
)

PAGE = """
from train.config import DataConfig, TrainConfig

def get_config():
    return TrainConfig(folder="runs/page", data=DataConfig(path="here"), steps=3)
"""


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.py"
    path.write_text(PAGE)
    return str(path)


def test_changes_have_the_types_of_the_fields(page):
    config = load_config(
        page,
        [
            "optimizer.learning_rate=1e-4",
            "optimizer.freeze=model.embed_tokens.*, model.norm.*",
            "optimizer.clip_norm=none",
            "data.packing=false",
            "evaluation.samples=Who are you?",
            "profile=3,5",
            "mesh.fsdp=-1",
            "model.path=some/where=there",
        ],
    )
    assert config.optimizer.learning_rate == 1e-4
    assert config.optimizer.freeze == ("model.embed_tokens.*", "model.norm.*")
    assert config.optimizer.clip_norm is None
    assert config.data.packing is False and config.data.path == "here"
    assert config.evaluation.samples == ("Who are you?",)
    assert config.profile == (3, 5)
    assert config.model.path == "some/where=there"


def test_a_section_that_the_page_leaves_out_is_made_and_taken_away(page):
    config = load_config(page, ["lora.rank=4", "lora.targets=qkv_proj,o_proj"])
    assert config.lora == LoraConfig(rank=4, targets=("qkv_proj", "o_proj"))
    assert load_config(page, ["lora.rank=4", "lora=none"]).lora is None


def test_steps_make_room_for_epochs(page):
    assert load_config(page, ["steps=none", "epochs=2"]).epochs == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("optimizer.learning_rat=1", "did you mean 'learning_rate'"),
        ("optimzer.name=lion", "did you mean 'optimizer'"),
        ("optimizer.name=adam", "did you mean 'adamw'"),
        ("optimizer.b1=high", "must be a number"),
        ("steps=2.5", "must be a whole number"),
        ("data.packing=maybe", "must be true or false"),
        ("profile=3", "must have 2 values"),
        ("steps", "write section.name=value"),
        ("optimizer=adamw", "optimizer.learning_rate"),
        ("steps.more=1", "has no parts"),
        ("epochs=2", "give one of the two"),
        ("folder=", "folder is empty"),
        ("accumulate=3", "not divisible by accumulate 3"),
        ("batch_size=0", "at least 1"),
        ("data.sequence_length=1", "at least 2"),
        ("checkpoint.every=0", "checkpoint.every is 0"),
        ("evaluation.sample_tokens=0", "evaluation.sample_tokens is 0"),
        ("model.dtype=float31", "did you mean 'float32'"),
        ("model.frozen_dtype=int8", "model.frozen_dtype is 'int8'; it is one of"),
        ("optimizer.learning_rate=nan", "learning_rate is nan, must be finite"),
        ("optimizer.learning_rate=inf", "learning_rate is inf, must be finite"),
        ("optimizer.learning_rate=-1", "learning_rate is -1.0, must be finite and at least 0"),
        ("optimizer.weight_decay=-0.1", "weight_decay is -0.1"),
        ("optimizer.b1=1", "optimizer.b1 is 1.0, must be at least 0 and less than 1"),
        ("optimizer.b2=-0.5", "optimizer.b2 is -0.5"),
        ("optimizer.eps=0", "optimizer.eps is 0.0, must be more than 0"),
        ("optimizer.clip_norm=0", "optimizer.clip_norm is 0.0"),
        ("optimizer.final_fraction=1.1", "optimizer.final_fraction is 1.1, must be from 0 to 1"),
        ("optimizer.ema_decay=1", "optimizer.ema_decay is 1.0"),
        ("seed=-1", "seed is -1"),
        ("seed=9223372036854775808", "seed is 9223372036854775808"),
        ("profile=0,3", "profile is"),
        ("profile=5,3", "profile is"),
        ("profile=[1, 2, 3]", "must have 2 values"),
        ("profile=[1, true]", "profile is True, must be a whole number"),
        ("evaluation.samples=[one, two]", "begins as a JSON list and is none"),
        pytest.param(f"evaluation.samples={'[' * 100_000}", "nested too deeply", id="deep"),
        ("evaluation.samples=[1]", "evaluation.samples is 1, must be a text"),
    ],
)
def test_what_cannot_be_is_named(page, change, words):
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        load_config(page, [change])


def test_a_json_list_may_have_commas_in_its_values(page):
    config = load_config(page, ['evaluation.samples=["Red, or blue?", "Who?"]', "profile=[2,2]"])
    assert config.evaluation.samples == ("Red, or blue?", "Who?")
    assert config.profile == (2, 2)
    assert load_config(page, ["evaluation.samples=[]"]).evaluation.samples == ()


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("", {"steps": "3"}, "steps is '3', must be a whole number"),
        ("", {"steps": 3.0}, "steps is 3.0, must be a whole number"),
        ("", {"steps": True}, "steps is True, must be a whole number"),
        ("", {"batch_size": None}, "batch_size is None, must be a whole number"),
        ("", {"tensorboard": 1}, "tensorboard is 1, must be true or false"),
        ("", {"profile": 3}, "profile is 3, must be a tuple"),
        ("", {"mesh": 3}, r"mesh is 3, must be a section \(MeshConfig\)"),
        ("", {"lora": {"alpha": "2"}}, "lora.alpha is '2', must be a number"),
        ("data", {"long_documents": "dorp"}, "long_documents is 'dorp' .did you mean 'drop'"),
        ("model", {"path": 3}, "model.path is 3, must be a text"),
        ("optimizer", {"freeze": "model.norm.*"}, "freeze is 'model.norm.*', must be a tuple"),
        ("optimizer", {"freeze": ["model.norm.*", 3]}, "freeze is 3, must be a text"),
    ],
)
def test_values_of_another_type_are_named(page, tmp_path, section, values, words):
    """Whether they come from JSON or from a page."""
    config = load_config(page).to_dict()
    (config[section] if section else config).update(values)
    with pytest.raises(ValueError, match=words):
        from_dict(json.loads(json.dumps(config)))
    if not section and "lora" not in values:
        (tmp_path / "wrong.py").write_text(
            PAGE.replace("steps=3", f"**{ ({'steps': 3} | values)!r}")
        )
        with pytest.raises(ValueError, match=words):
            load_config(str(tmp_path / "wrong.py"))


def test_whole_numbers_are_numbers(page):
    values = load_config(page).to_dict()
    values["optimizer"] |= {"learning_rate": 1, "clip_norm": None, "freeze": ["model.norm.*"]}
    config = from_dict(values)
    assert config.optimizer.learning_rate == 1 and config.optimizer.clip_norm is None
    assert config.optimizer.freeze == ("model.norm.*",)


def test_lora_and_frozen_weights_exclude_each_other(page):
    with pytest.raises(ValueError, match="lora.targets"):
        load_config(page, ["lora.rank=4", "optimizer.freeze=model.norm.*"])


def test_unknown_pages_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"'smoke_cup' is no config \(did you mean 'smoke_cpu'\?"):
        load_config("smoke_cup")
    with pytest.raises(ValueError, match="there is no file"):
        load_config(str(tmp_path / "none.py"))
    empty = tmp_path / "empty.py"
    empty.write_text("")
    with pytest.raises(ValueError, match="get_config"):
        load_config(str(empty))


def test_json_brings_a_config_back(page):
    config = load_config(page, ["lora.rank=4", "profile=1,2", "optimizer.freeze="])
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", config_names())
def test_pages_say_what_they_are(name):
    config = load_config(name)
    assert isinstance(config, TrainConfig)
    import importlib

    text = importlib.import_module(f"configs.{name}").__doc__ or ""
    for heading in ("Hardware:", "Memory:", "Time:", "Command:"):
        assert heading in text, f"{name}: no {heading}"
    assert f"phi3-train {name}" in text


def test_every_field_is_described():
    from train import config

    kinds = [kind for kind in vars(config).values() if dataclasses.is_dataclass(kind)]
    assert len(kinds) == 8
    for kind in kinds:
        for entry in dataclasses.fields(kind):
            assert entry.name in (kind.__doc__ or ""), entry.name
