"""What a run hands over, and how it is looked at: export, eval, check on the command line."""

import json
import re
import shutil
import sys

import jax
import numpy as np
import pytest
from model_folders import tensors_in
from train_runs import small_run, use_devices, write_chat_model, write_documents, write_page

import phi3_jax as phi3
from train.cli import main
from train.export import export, load_for_use, merged_params, trained_params
from train.loop import train
from train.peft_format import load_adapter

LORA = dict(rank=3, alpha=5.0, targets=["qkv_proj", "down_proj"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A full run, one with a moving average and frozen weights, and a LoRA run."""
    parent = tmp_path_factory.mktemp("runs")
    write_chat_model(parent / "model", num_key_value_heads=3)
    # As Microsoft's folders say, with the files that it names or without.
    file = parent / "model" / "config.json"
    auto_map = {"AutoConfig": "configuration_phi3.Phi3Config"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": auto_map}))
    write_documents(parent / "data")
    (parent / "data" / "valid.jsonl").rename(parent / "data" / "test.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch)
        kept = dict(checkpoint=dict(every=2, keep=3), steps=4)
        train(small_run(parent, "full", **kept))
        average = dict(ema_decay=0.5, freeze=["model.embed_tokens.*", "model.layers.1.*"])
        train(small_run(parent, "average", optimizer=average, **kept))
        train(small_run(parent, "lora", lora=LORA, **kept))
    return parent


def logits(model, params):
    ids = np.arange(3, 40).reshape(1, -1)
    return np.asarray(model.apply({"params": params}, ids).logits)


@pytest.mark.parametrize("name", ["full", "average", "lora"])
def test_an_exported_folder_is_the_model_that_was_trained(runs, name, tmp_path):
    export(runs / name, tmp_path / "out", dtype="float32")
    setup, trained = trained_params(runs / name)
    model, params = phi3.from_pretrained(tmp_path / "out")
    np.testing.assert_array_equal(
        logits(model, params), logits(model, merged_params(setup, trained))
    )
    _, before = phi3.from_pretrained(runs / "model")
    assert np.abs(logits(model, params) - logits(model, before)).max() > 1e-3
    assert phi3.Tokenizer.from_pretrained(tmp_path / "out").vocab_size
    saved = phi3.Phi3Config.from_pretrained(tmp_path / "out")
    assert saved.num_key_value_heads == 3


def test_an_exported_config_names_no_code_that_is_not_there(runs, tmp_path):
    assert "auto_map" in phi3.Phi3Config.from_pretrained(runs / "model").extra
    export(runs / "full", tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in values and values["model_type"] == "phi3"


def test_what_is_frozen_is_exported_as_it_was(runs, tmp_path):
    export(runs / "average", tmp_path / "out")
    before, after = tensors_in(runs / "model"), tensors_in(tmp_path / "out")
    assert before.keys() == after.keys()
    same = {name for name in before if np.array_equal(before[name], after[name])}
    frozen = {n for n in before if n.startswith(("model.embed_tokens.", "model.layers.1."))}
    assert same == frozen


def test_the_dtype_is_that_of_the_model_or_as_asked(runs, tmp_path):
    export(runs / "full", tmp_path / "half", dtype="bfloat16")
    export(runs / "full", tmp_path / "same")
    assert {x.dtype.name for x in tensors_in(tmp_path / "half").values()} == {"bfloat16"}
    assert {x.dtype.name for x in tensors_in(tmp_path / "same").values()} == {"float32"}


def test_an_adapter_is_handed_over_as_peft_has_it(runs, tmp_path):
    export(runs / "lora", tmp_path / "adapter", adapter=True)
    setup, trained = trained_params(runs / "lora")
    lora, adapters = load_adapter(tmp_path / "adapter", setup.model)
    assert lora.rank == 3 and lora.scale == 5 / 3 and set(lora.targets) == set(LORA["targets"])
    jax.tree.map(np.testing.assert_array_equal, adapters, trained)
    base = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert base["base_model_name_or_path"] == str(runs / "model")
    with pytest.raises(ValueError, match="has no adapter"):
        export(runs / "full", tmp_path / "none", adapter=True)
    assert not (tmp_path / "none").exists()


def test_an_adapter_is_replaced_with_force(runs, tmp_path):
    target = tmp_path / "adapter"
    export(runs / "lora", target, adapter=True)
    weights = (target / "adapter_model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="replace it with force"):
        export(runs / "lora", target, adapter=True, step=2)
    export(runs / "lora", target, adapter=True, step=2, force=True)
    assert (target / "adapter_model.safetensors").read_bytes() != weights
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    (tmp_path / "home").mkdir()
    with pytest.raises(ValueError, match="not a model folder, so it is not replaced"):
        export(runs / "lora", tmp_path / "home", adapter=True, force=True)


@pytest.mark.parametrize("name", ["average", "lora"])
def test_other_weights_beside_those_trained_are_refused(runs, name, tmp_path):
    """As where an export has taken the place of the model: adapters would be merged twice."""
    shutil.copytree(runs / name, tmp_path / "run")
    shutil.copytree(runs / "model", tmp_path / "model")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["model"]["path"] = str(tmp_path / "model")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    for dtype in ("bfloat16", "float32"):
        export(tmp_path / "run", tmp_path / dtype, dtype=dtype)
    model, params = phi3.from_pretrained(tmp_path / "model")
    params["model"]["embed_tokens"]["weight"] *= 1.01
    phi3.save_pretrained(tmp_path / "model", model, params, force=True)
    shutil.copy(runs / "model" / "config.json", tmp_path / "model" / "config.json")
    with pytest.raises(ValueError, match="no longer those that the run began with"):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("adapter", [False, True])
def test_an_export_does_not_replace_the_model_that_it_needs(runs, adapter):
    with pytest.raises(ValueError, match="holds the source"):
        export(runs / "lora", runs / "model", adapter, force=True)
    assert phi3.Phi3Config.from_pretrained(runs / "model").num_key_value_heads == 3


def test_an_earlier_checkpoint_can_be_exported(runs, tmp_path):
    export(runs / "full", tmp_path / "two", step=2)
    export(runs / "full", tmp_path / "four")
    two, four = tensors_in(tmp_path / "two"), tensors_in(tmp_path / "four")
    assert any(not np.array_equal(two[name], four[name]) for name in two)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 3.*\[2, 4\]"):
        export(runs / "full", tmp_path / "three", step=3)


def test_a_folder_that_is_no_run_and_a_target_that_is_there(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match="not the folder of a run"):
        export(runs / "model", tmp_path / "out")
    (tmp_path / "out").mkdir()
    for adapter in (False, True):
        with pytest.raises(FileExistsError):
            export(runs / "lora", tmp_path / "out", adapter)


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def load(*arguments, **settings):
        raise AssertionError("weights are loaded before what was asked for is checked")

    monkeypatch.setattr(phi3, "from_pretrained", load)
    monkeypatch.setattr("train.checkpoints.Checkpoints.load_part", load)


@pytest.mark.parametrize("dtype", ["bf16", "float99", "int8", "float"])
def test_dtypes_are_checked_first(runs, dtype, tmp_path, monkeypatch, capsys, nothing_is_loaded):
    words = f"error: dtype is '{dtype}', must be one of bfloat16, float16, float32\n"
    export_it = ("export", runs / "full", tmp_path / "out")
    eval_it = [("eval", runs / name, runs / "no data") for name in ("full", "model")]
    for command in (export_it, *eval_it):
        assert run_command(monkeypatch, capsys, *command, "--dtype", dtype) == (1, "", words)
    assert not list(tmp_path.iterdir())


def test_a_target_that_is_there_is_told_first(runs, tmp_path, nothing_is_loaded):
    with pytest.raises(FileExistsError, match="--force"):
        export(runs / "full", tmp_path)
    with pytest.raises(ValueError, match="not a model folder"):
        export(runs / "full", tmp_path, force=True)


def run_command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["phi3-train", *map(str, arguments)])
    status = 0
    try:
        main()
    except SystemExit as error:
        status = error.code or 0
    return status, *capsys.readouterr()


def test_eval_takes_runs_and_model_folders(runs, tmp_path, monkeypatch, capsys):
    use_devices(monkeypatch)
    data = ("--sequence-length", "48", "--answers")
    status, trained, _ = run_command(
        monkeypatch, capsys, "eval", runs / "lora", runs / "data", *data
    )
    assert status == 0 and "perplexity" in trained and "of 7 exactly right" in trained
    export(runs / "lora", tmp_path / "out", dtype="float32")
    status, exported, _ = run_command(
        monkeypatch, capsys, "eval", tmp_path / "out", runs / "data", *data
    )
    assert status == 0 and exported == trained
    model, params, _ = load_for_use(runs / "lora", "bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    assert model.dtype == jax.numpy.bfloat16


def test_eval_reads_long_documents_in_parts(runs, monkeypatch, capsys):
    use_devices(monkeypatch)
    eval_it = ("eval", runs / "model", runs / "data" / "train.jsonl")
    _, whole, _ = run_command(monkeypatch, capsys, *eval_it, "--batch-size", 3)
    _, parts, _ = run_command(monkeypatch, capsys, *eval_it, "--sequence-length", 32)
    learnt = [int(re.search(r"([\d,]+) tokens learnt", text)[1]) for text in (whole, parts)]
    assert learnt[1] > learnt[0] - 40, "at most the first token of each part is not learnt"
    assert "split into rows" not in whole and "split into rows of 32\n" in parts


@pytest.mark.parametrize(
    "name, option, value, words",
    [
        ("full", "--sequence-length", 513, "is 513, must be from 2 to the 512 positions"),
        ("model", "--sequence-length", 1, "is 1, must be from 2 to the 512 positions"),
        ("model", "--batch-size", 0, "--batch-size is 0, must be at least 1"),
        ("model", "--step", 2, "is not the folder of a run, and has no checkpoint of step 2"),
    ],
)
def test_eval_refuses_first(
    runs, name, option, value, words, monkeypatch, capsys, nothing_is_loaded
):
    arguments = ("eval", runs / name, runs / "data", option, value)
    status, out, error = run_command(monkeypatch, capsys, *arguments)
    assert status == 1 and not out and error.startswith("error: ") and words in error


def test_eval_names_what_asks_nothing_first(runs, tmp_path, monkeypatch, capsys, nothing_is_loaded):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "Hello", "completion": "Hello!"}\n{"text": "Once upon a time"}\n')
    arguments = ("eval", runs / "model", data, "--answers")
    status, _, error = run_command(monkeypatch, capsys, *arguments)
    assert status == 1 and "record 1 (from 0) has no question" in error


def test_check_tells_what_a_run_will_see(runs, monkeypatch, capsys):
    page = write_page(small_run(runs, "checked"))
    status, out, _ = run_command(monkeypatch, capsys, "check", page, "data.mask_prompt=false")
    assert status == 0 and "documents    39" in out and "dropped      1" in out
    assert not (runs / "checked").exists()


def test_export_on_the_command_line(runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    status, text, _ = run_command(monkeypatch, capsys, "export", runs / "full", out)
    assert status == 0 and text == f"wrote {out}\n"
    status, _, error = run_command(monkeypatch, capsys, "export", runs / "full", out)
    assert status == 1 and error.startswith("error: ") and "--force" in error
    status, _, _ = run_command(monkeypatch, capsys, "export", runs / "full", out, "--force")
    assert status == 0


def test_a_run_begins_from_an_adapter(runs, tmp_path, monkeypatch):
    use_devices(monkeypatch)
    export(runs / "lora", tmp_path / "adapter", adapter=True)
    _, before = trained_params(runs / "lora")
    still = dict(learning_rate=0.0, weight_decay=0.0)
    lora = LORA | {"path": str(tmp_path / "adapter")}
    result = train(small_run(runs, "more", lora=lora, optimizer=still, steps=1))
    jax.tree.map(np.testing.assert_array_equal, result.state.params, before)
    with pytest.raises(ValueError, match="rank is 3 there and 4 in the config"):
        train(small_run(runs, "other", lora=lora | {"rank": 4}, steps=1))


def test_another_model_in_the_place_of_the_runs(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "full", run)
    shutil.copytree(runs / "model", tmp_path / "model")
    settings = json.loads((run / "config.json").read_text())
    settings["model"]["path"] = str(tmp_path / "model")
    (run / "config.json").write_text(json.dumps(settings))
    trained_params(run)
    model = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(model | {"rms_norm_eps": 1e-3}))
    with pytest.raises(ValueError, match="no longer the one"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
