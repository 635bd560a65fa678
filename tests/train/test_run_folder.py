"""The folder of a run is one for all of its processes."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from train.config import DataConfig, LoraConfig, OptimizerConfig, TrainConfig
from train.run_folder import check_same_run, own_folder

ROOT = Path(__file__).parent.parent.parent

WORKER = """
import sys
from pathlib import Path
import jax
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
from train.config import DataConfig, LoraConfig, OptimizerConfig, TrainConfig
from train.run_folder import check_same_run, own_folder
try:
    with own_folder(Path(sys.argv[3])):
        print("mine", flush=True)
except Exception as error:
    print(type(error).__name__, error, flush=True)
jax.distributed.shutdown()
"""


RUN = TrainConfig(folder="runs/one", data=DataConfig(path="data"), steps=3)
CONFIG = json.dumps(RUN.to_dict())


def two_processes(folders: list[Path]) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, address, str(process), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        )
        for process, folder in enumerate(folders)
    ]
    # The last line: Gloo prints one of its own.
    return [worker.communicate(timeout=200)[0].splitlines()[-1] for worker in workers]


def test_processes_that_share_a_folder_own_it_together(tmp_path):
    assert two_processes([tmp_path / "run"] * 2) == ["mine"] * 2


def test_a_folder_that_one_process_does_not_see_is_refused(tmp_path):
    first, second = two_processes([tmp_path / "here" / "run", tmp_path / "there" / "run"])
    assert first == "RuntimeError process 1 failed; the reason must be in its own output"
    assert second.startswith("ValueError process 1 does not see the folder")
    assert "file system that all hosts share" in second


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(ValueError, match=r"has no locks .*-o flock"):
        with own_folder(tmp_path / "run"):
            pass


@pytest.mark.parametrize("text", ['{"model_type": "phi3", "vocab_size": 100}', "not JSON"])
def test_the_config_of_something_else_is_not_overwritten(tmp_path, text):
    """As where the run's folder is, by a slip, that of the model that it starts from."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="is not the config of a run, and would be overwritten"):
        with own_folder(tmp_path):
            raise AssertionError("not entered")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == text


def test_the_metrics_of_something_else_are_not_overwritten(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "accuracy": 0.5}\n')
    with pytest.raises(ValueError, match="metrics.jsonl' has no config.json of a run beside it"):
        with own_folder(tmp_path):
            raise AssertionError("not entered")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "files",
    [
        {"metrics.jsonl": "", ".lock": "0a"},  # ended before its config was written
        {"metrics.jsonl": '{"kind": "train", "step": 1}\n', "config.json": CONFIG},
    ],
)
def test_a_run_without_a_checkpoint_begins_anew(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with own_folder(tmp_path):
        pass


def values_of(**changes) -> dict:
    """What a checkpoint keeps of RUN, with changes of its config."""
    config = json.loads(json.dumps(RUN.to_dict()))
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(config[key], dict) else value
    return {"config": config, "model": {"vocab_size": 9}, "data": "a", "frozen": None}


def without(section: str, key: str) -> dict:
    values = values_of()
    del values["config"][section][key]
    return values


def now(**changes) -> dict:
    return values_of() | {"config": dataclasses.replace(RUN, **changes).to_dict()}


def test_settings_that_the_version_before_did_not_have_were_as_by_default(tmp_path):
    for key in ("b1", "freeze"):
        check_same_run(without("optimizer", key), now(), tmp_path)
    with pytest.raises(ValueError, match="holds another run: optimizer.b1 was 0.9, is 0.5; set"):
        check_same_run(without("optimizer", "b1"), now(optimizer=OptimizerConfig(b1=0.5)), tmp_path)


def test_settings_that_this_version_does_not_have_are_named(tmp_path):
    saved = values_of(optimizer={"nesterov": True, "b1": 0.5}, seed=3)
    words = "holds a run of another version, with optimizer.nesterov in its config, which this"
    with pytest.raises(ValueError, match=f"{words} .*; go on with the version that began it"):
        check_same_run(saved, now(), tmp_path)
    check_same_run(values_of(evaluation={"judge": "x"}), now(), tmp_path)  # makes no difference


def test_checkpoints_of_another_program_are_told(tmp_path):
    saved = {"config": {"lr": 0.1}, "epoch": 3}
    with pytest.raises(ValueError, match="another program's: they do not say their model, data, f"):
        check_same_run(saved, now(), tmp_path)


def test_all_settings_that_differ_are_named(tmp_path):
    saved = values_of(optimizer={"b1": 0.5, "freeze": ["lm_head.*"]}, seed=3)
    words = (
        "optimizer.b1 was 0.5, is 0.9; optimizer.freeze was ['lm_head.*'], is []; "
        "lora was None, is {'rank': 2, "
    )
    with pytest.raises(ValueError, match=f"holds another run: {re.escape(words)}.*; seed was 3"):
        check_same_run(saved, now(lora=LoraConfig(rank=2)), tmp_path)
