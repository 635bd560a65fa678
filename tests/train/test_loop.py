"""The loop: what it compiles, keeps, writes and says; where it ends, goes on and refuses to."""

import contextlib
import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from train_runs import (
    assert_equal_bits,
    leaves_of,
    losses,
    recorded,
    saved_steps,
    small_run,
    stop_after,
    use_devices,
    write_chat_model,
    write_documents,
)

import phi3_jax as phi3
import train.loop
from train.batches import Batches
from train.checkpoints import Checkpoints
from train.config import CheckpointConfig
from train.metrics import METRICS_FILE, Reporter, read_metrics
from train.records import open_records
from train.run_folder import CHECKPOINTS, CONFIG_FILE
from train.state import Setup

# How often each program was compiled, by its name.
COMPILED: Counter[str] = Counter()
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **facts: (
        COMPILED.update([facts.get("fun_name", "?")]) if "backend_compile" in event else None
    )
)

EVALUATION = "jit(summed_loss)"


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    use_devices(monkeypatch, 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    parent = tmp_path_factory.mktemp("loop")
    write_chat_model(parent / "model")
    write_documents(parent / "data")
    return parent


@pytest.fixture(scope="module")
def six(place):
    """A run of six steps, as it is when nothing else is asked for."""
    config = small_run(place, "six")
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, 1)
        return config, train.loop.train(config)


def run(config):
    return train.loop.train(config)


def setup_of(config):
    return Setup(config, phi3.make_mesh(fsdp=1, tensor=1), config.steps)


# ----- Programs -----------------------------------------------------------------------------------


def test_nothing_compiles_after_the_first_step(place, monkeypatch):
    """But the evaluation's programs, once; also where a run goes on."""
    compiled = []
    said = Reporter.step

    def step(self, number, values):
        compiled.append((number, Counter(COMPILED)))
        said(self, number, values)

    monkeypatch.setattr(Reporter, "step", step)
    settings = dict(optimizer=dict(ema_decay=0.9), checkpoint=dict(every=2), steps=9, accumulate=2)
    config = small_run(place, "programs", evaluation=dict(every=3), **settings)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        run(config)
    run(config)
    assert [number for number, _ in compiled] == [*range(1, 6), *range(6, 10)]
    for first, last in ((0, 4), (5, 8)):
        more = compiled[last][1] - compiled[first][1]
        assert dict(more) in ({}, {EVALUATION: 1}), more
    assert compiled[-1][1][EVALUATION] > 0


# ----- What is kept and written -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "saved", "kept"),
    [
        (dict(keep=1), (2, 4, 5), [5]),
        (dict(keep=3), (2, 4, 6, 8), [4, 6, 8]),
        (dict(keep=2, keep_every=3), (1, 2, 3, 4, 5, 6, 7, 8), [3, 6, 7, 8]),
        (dict(keep=2, keep_every=4), (2, 4, 6, 8, 9, 10, 12), [4, 8, 10, 12]),
    ],
)
def test_the_policy_says_which_checkpoints_stay(tmp_path, policy, saved, kept):
    checkpoints = Checkpoints(tmp_path / CHECKPOINTS, CheckpointConfig(**policy))
    with contextlib.closing(checkpoints):
        for step in saved:
            checkpoints.save(step, {"params": jnp.full(3, step)}, {"step": step})
        checkpoints.wait()
        assert checkpoints.steps == kept
        assert [checkpoints.run_values(step) for step in kept] == [{"step": step} for step in kept]
    assert saved_steps(tmp_path) == kept


def test_a_run_saves_every_so_many_steps_and_its_last(place):
    config = small_run(place, "policy", checkpoint=dict(every=2, keep=2), steps=5)
    assert run(config).checkpoint == Path(config.folder, CHECKPOINTS, "5")
    assert saved_steps(config.folder) == [4, 5]


def test_metrics_of_every_step(six):
    config, result = six
    lines = read_metrics(Path(config.folder, METRICS_FILE))
    assert [(line["kind"], line["step"]) for line in lines] == [
        *(("train", step) for step in range(1, 7)),
        ("valid", 6),
    ]
    numbers = {"loss", "grad_norm", "update_norm", "param_norm", "learning_rate"}
    counts = {"labels", "tokens", "tokens_per_second", "memory_gib"}
    for line in lines[:-1]:
        assert line.keys() == {"kind", "step"} | numbers | counts
        assert all(np.isfinite(line[name]) and line[name] > 0 for name in numbers | counts)
        assert line["labels"] < line["tokens"] <= 8 * 48
    assert lines[-1].keys() == {"kind", "step", "loss", "perplexity", "labels"}
    assert lines[-1]["perplexity"] == pytest.approx(np.exp(lines[-1]["loss"]))
    assert json.loads(Path(config.folder, CONFIG_FILE).read_text()) == json.loads(
        json.dumps(config.to_dict())
    )
    assert result.step == int(result.state.step) == 6 and not result.preempted
    # The last checkpoint is what the run ended with.
    checkpoints = Checkpoints(result.checkpoint.parent)
    loaded = checkpoints.load(6, setup_of(config).abstract_state)
    checkpoints.close()
    assert_equal_bits(leaves_of(loaded), leaves_of(result.state))


def test_tensorboard_events(place):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    config = small_run(place, "events", tensorboard=True, steps=3, evaluation=dict(samples=("Hi",)))
    run(config)
    found = {}
    for file in Path(config.folder, "tensorboard").iterdir():
        raw, start = file.read_bytes(), 0
        while start < len(raw):  # length, its checksum, the event, its checksum
            size = int.from_bytes(raw[start : start + 8], "little")
            event = Event.FromString(raw[start + 12 : start + 12 + size])
            start += size + 16
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    assert found["train/loss"] == pytest.approx(dict(enumerate(losses(config.folder), start=1)))
    assert found["valid/perplexity"].keys() == {3}
    assert {"train/grad_norm", "train/learning_rate"} < found.keys()
    assert any("Hi" in tag for tag in found)


def test_a_profile_of_the_steps_named(place, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    real = jax.profiler.StepTraceAnnotation
    monkeypatch.setattr(
        jax.profiler,
        "StepTraceAnnotation",
        lambda name, step_num: calls.append(step_num) or real(name, step_num=step_num),
    )
    config = small_run(place, "profile", profile=(2, 3), steps=5)
    run(config)
    assert calls == [1, str(Path(config.folder, "profile", "0")), 2, 3, "stop", 4, 5]


@pytest.mark.slow
def test_a_profile_is_written(place):
    config = small_run(place, "real_profile", profile=(2, 9), steps=3)
    run(config)
    assert list(Path(config.folder, "profile").rglob("*.xplane.pb"))


def test_samples_are_said(place, capsys):
    settings = dict(every=2, samples=("Who are you?", "Count: 1 to 3."), sample_tokens=5)
    config = small_run(place, "samples", steps=3, evaluation=settings)
    run(config)
    out = capsys.readouterr().out
    for question in settings["samples"]:
        assert out.count(f"{question!r} -> ") == 2


# ----- How long -----------------------------------------------------------------------------------


def test_epochs_see_every_document_once_each(place, monkeypatch):
    seen = []
    real = Batches.batch

    def batch(self, step, rows):
        arrays = real(self, step, rows)
        if self._shuffle:
            seen.append((step, arrays))
        return arrays

    monkeypatch.setattr(Batches, "batch", batch)
    config = small_run(place, "epochs", steps=None, epochs=2, batch_size=12)
    result = run(config)
    tokenizer = phi3.Tokenizer.from_pretrained(place / "model")
    records = open_records(str(place / "data"), "train")
    data = Batches(records, tokenizer, config.data, 12, 1, 0, 2)
    # Two epochs do not fill their last step.
    assert data.steps == result.step == len(losses(config.folder)) > 2
    documents = Counter()
    for _, arrays in seen:
        for ids, segments in zip(arrays["input_ids"][0], arrays["segment_ids"][0], strict=True):
            for number in range(1, segments.max() + 1):
                documents[ids[segments == number].tobytes()] += 1
    assert sum(documents.values()) == 2 * data.documents
    assert set(documents.values()) == {2}
    tokens = sum(line["tokens"] for line in recorded(config.folder) if line["kind"] == "train")
    assert tokens == 2 * data.tokens


def test_steps_beyond_the_data_begin_it_anew(place):
    config = small_run(place, "around", batch_size=16, steps=6)
    run(config)
    tokenizer = phi3.Tokenizer.from_pretrained(place / "model")
    records = open_records(str(place / "data"), "train")
    assert Batches(records, tokenizer, config.data, 16, 1, 0, 1).steps < 6
    assert all(line["tokens"] > 16 * 24 for line in recorded(config.folder)[:-1])


def test_a_finished_run_says_so_and_changes_nothing(six, capsys):
    config, result = six

    def files():
        found = (path for path in Path(config.folder).rglob("*") if path.is_file())
        return {path: path.read_bytes() for path in found if path.name != ".lock"}

    before = files()
    again = run(config)
    assert "taken its 6 steps; there is nothing left to do" in capsys.readouterr().out
    assert again.step == 6 and not again.preempted
    assert_equal_bits(leaves_of(again.state), leaves_of(result.state))
    assert files() == before


def test_more_steps_go_on(place):
    constant = dict(schedule="constant")
    config = small_run(place, "more", steps=4, optimizer=constant)
    run(config)
    longer = dataclasses.replace(config, steps=7)
    result = run(longer)
    whole = small_run(place, "whole7", steps=7, optimizer=constant)
    expected = run(whole)
    assert_equal_bits(leaves_of(result.state), leaves_of(expected.state))
    assert losses(config.folder) == losses(whole.folder)
    assert json.loads(Path(config.folder, CONFIG_FILE).read_text())["steps"] == 7


def test_an_evaluation_that_a_stop_left_out_is_made_up(place, monkeypatch):
    whole = small_run(place, "every_evaluation", evaluation=dict(every=2), steps=5)
    run(whole)
    config = dataclasses.replace(whole, folder=str(place / "evaluation_left_out"))
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        run(config)
    assert recorded(config.folder)[-1]["kind"] == "train"
    run(config)
    assert recorded(config.folder) == recorded(whole.folder)


# ----- What is refused ----------------------------------------------------------------------------


def test_another_run_in_the_folder_is_refused(six, place, tmp_path):
    config, _ = six
    config = dataclasses.replace(config, steps=9)
    before = {path for path in Path(config.folder).rglob("*")}
    write_documents(tmp_path / "others", train=39)
    data = dataclasses.replace(config.data, path=str(tmp_path / "others"))
    optimizer = dataclasses.replace(config.optimizer, b1=0.5)
    for change, reason in [
        (dict(optimizer=optimizer), "optimizer.b1 was 0.9, is 0.5"),
        (dict(seed=3), "seed was 0, is 3"),
        (dict(batch_size=16), "batch_size was 8, is 16"),
        (dict(data=data), "the data .* is another one"),
    ]:
        with pytest.raises(ValueError, match=f"holds another run: .*{reason}"):
            run(dataclasses.replace(config, **change))
    assert {path for path in Path(config.folder).rglob("*")} == before
    # The same data at another place is the same.
    write_documents(tmp_path / "copy")
    data = dataclasses.replace(config.data, path=str(tmp_path / "copy"))
    assert run(dataclasses.replace(config, data=data, steps=6)).step == 6


def test_other_frozen_weights_are_refused(place, monkeypatch):
    config = small_run(place, "frozen_base", lora=dict(rank=2), steps=3)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        run(config)
    model, params = phi3.from_pretrained(place / "model", dtype="float32")
    params["model"]["norm"]["weight"] += 1e-3
    write_chat_model(place / "other_model")
    phi3.save_pretrained(place / "changed", model, params)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (place / "changed" / name).write_bytes((place / "other_model" / name).read_bytes())
    changed = dataclasses.replace(config.model, path=str(place / "changed"))
    with pytest.raises(ValueError, match="the weights .* that are not trained are others"):
        run(dataclasses.replace(config, model=changed))
    assert run(config).step == 3


def test_a_second_run_at_the_same_time_is_refused(six):
    config, _ = six
    holder = (
        "import sys, time; from train.run_folder import own_folder; from pathlib import Path\n"
        "with own_folder(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", holder, config.folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent.parent,
    )
    with process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another run is writing into"):
            run(config)
        process.kill()
    assert run(config).step == 6  # the lock goes with the process


def test_a_run_that_goes_on_does_not_read_all_data_again(place, monkeypatch):
    constant = dict(schedule="constant")
    config = small_run(place, "read_once", steps=1, optimizer=constant)
    run(config)

    def again(*_):
        raise AssertionError("all data is read again")

    monkeypatch.setattr("train.batches.Batches._read", again)
    assert run(dataclasses.replace(config, steps=2)).step == 2
