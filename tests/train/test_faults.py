"""Broken weights, disks, folders, checkpoints and data: what is said, and that nothing is lost."""

import contextlib
import json
import os
import resource
import shutil
import stat
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_runs import (
    assert_equal_bits,
    leaves_of,
    recorded,
    saved_steps,
    small_run,
    stop_after,
    use_devices,
    write_chat_model,
    write_documents,
    write_page,
)

import phi3_jax as phi3
import train.loop
from train import cli
from train.checkpoints import Checkpoints
from train.loop import train as run_train
from train.metrics import METRICS_FILE
from train.run_folder import CHECKPOINTS

SETTINGS = dict(steps=6, checkpoint=dict(every=2), evaluation=dict(every=4))


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    use_devices(monkeypatch, 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    parent = tmp_path_factory.mktemp("faults")
    write_chat_model(parent / "model")
    write_documents(parent / "data")
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, 1)
        whole = small_run(parent, "whole", **SETTINGS)
        state = run_train(whole).state
        # Saved at 2 and 4, with the metrics of step 4 and no more.
        stop_after(patch, 4)
        assert run_train(small_run(parent, "stopped", **SETTINGS)).preempted
    return parent, (recorded(whole.folder), leaves_of(state))


def a_copy(place, name):
    """A run that was stopped after 4 of 6 steps."""
    parent, _ = place
    shutil.copytree(parent / "stopped", parent / name)
    return small_run(parent, name, **SETTINGS)


def assert_ends_as_the_whole(place, config):
    result = run_train(config)
    metrics, leaves = place[1]
    assert recorded(config.folder) == metrics
    assert_equal_bits(leaves_of(result.state), leaves)
    assert saved_steps(config.folder) == [4, 6]


# ----- Weights ------------------------------------------------------------------------------------


def test_nan_weights_are_named(place):
    parent, _ = place
    model, params = phi3.from_pretrained(parent / "model", dtype="float32")
    spoilt = params["model"]["layers"]["mlp"]["down_proj"]["weight"].at[1, 3, 2].set(jnp.nan)
    params["model"]["layers"]["mlp"]["down_proj"]["weight"] = spoilt
    params["model"]["norm"]["weight"] = params["model"]["norm"]["weight"].at[0].set(jnp.inf)
    phi3.save_pretrained(parent / "spoilt", model, params)
    shutil.copy(parent / "model" / "tokenizer.model", parent / "spoilt")
    shutil.copy(parent / "model" / "tokenizer_config.json", parent / "spoilt")
    config = small_run(parent, "nan", model=dict(path=str(parent / "spoilt")))
    with pytest.raises(ValueError, match="NaN or infinite: ") as error:
        run_train(config)
    assert "model.layers.mlp.down_proj.weight, model.norm.weight;" in str(error.value)
    # Nothing that would be in the way of the same run with other weights.
    assert run_train(small_run(parent, "nan", steps=1)).step == 1


def test_nan_in_a_step_stops_and_the_last_good_checkpoint_goes_on(place, monkeypatch):
    config = small_run(place[0], "poisoned", **SETTINGS)
    real = train.loop.lower_step

    class Poisoned:
        """A step that spoils the weights when it is called the fifth time."""

        def __init__(self, *arguments):
            self.program, self.calls = real(*arguments).compile(), 0

        def compile(self):
            return self

        def memory_analysis(self):
            return None

        def __call__(self, state, *arguments):
            self.calls += 1
            if self.calls == 5:
                state = state.replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
            return self.program(state, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train.loop, "lower_step", Poisoned)
        with pytest.raises(FloatingPointError) as error:
            run_train(config)
    assert str(error.value).startswith("loss is nan, grad_norm is nan, param_norm is nan at step 5")
    last = Path(config.folder, CHECKPOINTS, "4")
    assert f"; the last good checkpoint is '{last}', steps 5 to 5" in str(error.value)
    assert_ends_as_the_whole(place, config)


@pytest.mark.parametrize("rate", [1e15, 3.4e38])  # too large for the next step; for the weights
def test_an_absurd_learning_rate_leaves_no_checkpoint_that_is_not_finite(place, rate):
    settings = dict(optimizer=dict(learning_rate=rate), checkpoint=dict(every=1, keep=9))
    config = small_run(place[0], f"absurd{rate}", **settings)
    with pytest.raises(FloatingPointError, match="at step [12]"):
        run_train(config)
    checkpoints = Checkpoints(Path(config.folder, CHECKPOINTS))
    for step in checkpoints.steps:
        leaves = leaves_of(checkpoints.load(step, abstract_state(config)))
        assert all(np.isfinite(leaf).all() for leaf in leaves.values()), step
    checkpoints.close()


def abstract_state(config):
    mesh = phi3.make_mesh(fsdp=1, tensor=1)
    return train.state.Setup(config, mesh, config.steps).abstract_state


# ----- Disk and folders ---------------------------------------------------------------------------


@contextlib.contextmanager
def no_file_larger_than(size):
    """What a full disk does to whoever writes, for files that are large enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_while_saving(place, monkeypatch, capfd):
    config = a_copy(place, "full_disk")
    monkeypatch.setattr(sys, "argv", ["phi3-train", str(write_page(config))])
    with no_file_larger_than(50_000), pytest.raises(SystemExit) as status:
        cli.main()
    assert status.value.code == 1
    # Above it are the traces of Orbax's threads.
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: a checkpoint in") and "File too large" in error
    assert error.endswith("the same command goes on from step 4")
    assert saved_steps_of_whole(config) == [2, 4]
    assert_ends_as_the_whole(place, config)


def saved_steps_of_whole(config):
    checkpoints = Checkpoints(Path(config.folder, CHECKPOINTS))
    with contextlib.closing(checkpoints):
        return checkpoints.steps


def test_a_folder_that_cannot_be_written(place, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if os.access(folder, os.W_OK):  # root may write everywhere but where the kernel says no
        folder = Path("/sys")
    config = small_run(place[0], **SETTINGS, folder=str(folder / "run"))
    page = tmp_path / "page.py"
    page.write_text(write_page(small_run(place[0], "locked", **SETTINGS)).read_text())
    monkeypatch.setattr(sys, "argv", ["phi3-train", str(page), f"folder={config.folder}"])
    with pytest.raises(SystemExit) as status:
        cli.main()
    assert status.value.code == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and config.folder in error


def test_the_metrics_of_another_program_stay(place, tmp_path):
    file = tmp_path / METRICS_FILE
    file.write_text('{"epoch": 1, "step": 1}\n')
    with pytest.raises(ValueError, match="beside it, and would be overwritten; choose another"):
        run_train(small_run(place[0], **SETTINGS, folder=str(tmp_path)))
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == '{"epoch": 1, "step": 1}\n'


# ----- Checkpoints --------------------------------------------------------------------------------


def test_a_checkpoint_without_one_of_its_files(place):
    """Whichever file is gone: it is read as it was, or the error says what to remove."""
    parent, _ = place
    files = sorted(
        path.relative_to(parent / "stopped" / CHECKPOINTS / "4")
        for path in (parent / "stopped" / CHECKPOINTS / "4").rglob("*")
        if path.is_file()
    )
    refused = []
    for number, file in enumerate(files):
        config = a_copy(place, f"gap{number}")
        broken = Path(config.folder, CHECKPOINTS, "4")
        (broken / file).unlink()
        try:
            assert_ends_as_the_whole(place, config)
        except ValueError as error:
            refused.append(file)
            assert f"checkpoint '{broken}' cannot be read: " in str(error)
            assert "remove that folder to go on from step 2" in str(error)
            assert saved_steps(config.folder) == [2, 4]
            if len(refused) == 1:
                shutil.rmtree(broken)
                assert_ends_as_the_whole(place, config)
    print("refused without", *refused)
    assert {"_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt"} < {
        *map(str, refused)
    }
    assert any(path.parent.name == "d" for path in refused)


def test_the_only_checkpoint_broken(place):
    config = a_copy(place, "only")
    shutil.rmtree(Path(config.folder, CHECKPOINTS, "2"))
    broken = Path(config.folder, CHECKPOINTS, "4")
    shutil.rmtree(broken / "state" / "d")
    with pytest.raises(ValueError, match="there is no other one; remove that folder to start anew"):
        run_train(config)
    shutil.rmtree(broken)
    assert_ends_as_the_whole(place, config)


def test_a_line_of_metrics_that_was_not_finished(place):
    config = a_copy(place, "half_line")
    with open(Path(config.folder, METRICS_FILE), "a") as file:
        file.write(json.dumps({"kind": "train", "step": 5, "loss": 1.0}) + "\n" + '{"kind": "tr')
    assert_ends_as_the_whole(place, config)


# ----- Data ---------------------------------------------------------------------------------------

GOOD = {"prompt": "Count: 1 to 2.", "completion": "1, 2."}
WRONG_ROLE = {"messages": [{"role": "you", "content": "a"}, {"role": "assistant", "content": "b"}]}
BAD = {
    "bad_json": (['{"prompt": "a", "completion": }'], "is not JSON"),
    "wrong_role": ([json.dumps(WRONG_ROLE)], "role"),
    "two": (["[1]", json.dumps({"prompt": "a"})], "2 of 4 records"),
    "nothing_learnt": ([json.dumps({"text": ""})], "text"),
}


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("kind", BAD)
def test_bad_records_through_the_command(place, tmp_path, monkeypatch, capfd, kind, split):
    lines, reason = BAD[kind]
    write_documents(tmp_path)
    file = tmp_path / f"{split}.jsonl"
    file.write_text("\n".join([json.dumps(GOOD), "", *lines, json.dumps(GOOD)]) + "\n")
    config = small_run(place[0], "bad", data=dict(path=str(tmp_path)))
    error = refused_by_command(config, monkeypatch, capfd)
    for number in range(len(lines)):
        assert f"{file}:{3 + number}: " in error
    assert reason in error


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_files_through_the_command(place, tmp_path, monkeypatch, capfd, text):
    (tmp_path / "train.jsonl").write_text(text)
    config = small_run(place[0], "bad", data=dict(path=str(tmp_path)))
    error = refused_by_command(config, monkeypatch, capfd)
    assert f"there are no records in {tmp_path / 'train.jsonl'}" in error


def refused_by_command(config, monkeypatch, capfd):
    """What the command says on stderr: one message, status 1, and no folder of a run."""
    monkeypatch.setattr(sys, "argv", ["phi3-train", str(write_page(config))])
    with pytest.raises(SystemExit) as status:
        cli.main()
    assert status.value.code == 1
    assert not Path(config.folder).exists()
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("error: ") == 1
    assert "Traceback" not in error
    return error
