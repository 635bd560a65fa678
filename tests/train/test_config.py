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
        ("profile=3", "takes 2 values"),
        ("steps", "write section.name=value"),
        ("optimizer=adamw", "optimizer.learning_rate"),
        ("steps.more=1", "has no parts"),
        ("epochs=2", "give one of the two"),
        ("accumulate=3", "not divisible by accumulate 3"),
        ("batch_size=0", "at least 1"),
        ("data.sequence_length=1", "at least 2"),
        ("checkpoint.every=0", "checkpoint.every is 0"),
    ],
)
def test_what_cannot_be_is_named(page, change, words):
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        load_config(page, [change])


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
