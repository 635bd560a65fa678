"""What the steps of a run change: parts, averages, dtypes, frozen leaves and adapters."""

import dataclasses

import numpy as np
import pytest
from train_runs import (
    assert_equal_bits,
    leaves_of,
    losses,
    record_batches,
    recorded,
    small_run,
    stop_after,
    use_devices,
    write_chat_model,
    write_documents,
)

import phi3_jax as phi3
import train.loop
from train.batches import Batches


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    use_devices(monkeypatch, 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    parent = tmp_path_factory.mktemp("updates")
    write_chat_model(parent / "model")
    write_documents(parent / "data")
    return parent


def run(config):
    return train.loop.train(config)


def test_parts_do_not_change_the_result(place, monkeypatch):
    """Rows with unequal numbers of labels; also where a run goes on with another number of them."""
    whole = record_batches(monkeypatch)
    run(small_run(place, "parts1"))
    batches = record_batches(monkeypatch)  # around the first one
    run(small_run(place, "parts4", accumulate=4))
    config = small_run(place, "parts1then2")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        run(config)
    run(dataclasses.replace(config, accumulate=2))
    # Six steps and an evaluation each.
    assert batches[:7] == batches[7:] == whole[:7]
    expected = losses(place / "parts1")
    assert len(expected) == 6
    np.testing.assert_allclose(losses(place / "parts4"), expected, rtol=1e-6)
    np.testing.assert_allclose(losses(config.folder), expected, rtol=1e-6)


def test_the_moving_average_follows_its_formula(place, monkeypatch):
    states = []
    real = train.loop.Checkpoints.save

    def save(self, step, state, run):
        states.append(leaves_of({"params": state.params, "ema": state.ema}))
        real(self, step, state, run)

    monkeypatch.setattr(train.loop.Checkpoints, "save", save)
    config = small_run(
        place, "ema", optimizer=dict(ema_decay=0.75), checkpoint=dict(every=1), steps=4
    )
    run(config)
    _, first = phi3.from_pretrained(place / "model", dtype="float32")
    average = leaves_of({"params": first})
    for state in states:
        for name in average:
            before = average[name]
            average[name] = 0.75 * before + 0.25 * state[name]
            # To the rounding of the two terms, which may cancel.
            terms = 0.75 * np.abs(before) + 0.25 * np.abs(state[name])
            error = np.abs(state[name.replace("params", "ema")] - average[name])
            assert (error <= 1e-6 * terms).all()


def test_bfloat16_compute_has_float32_masters(place):
    model = dict(dtype="bfloat16", frozen_dtype="bfloat16")
    config = small_run(place, "bf16", model=model, steps=2, optimizer=dict(ema_decay=0.5))
    state = run(config).state
    for name, leaf in leaves_of(state).items():
        assert leaf.dtype in (np.float32, np.int32, np.uint32), name
    reference = small_run(place, "bf16_reference", steps=2)
    run(reference)
    error = np.abs(np.subtract(losses(config.folder), losses(reference.folder)))
    assert (error > 0).all() and (error < 0.05).all()


def test_a_batch_without_a_label_changes_no_weight(place, monkeypatch):
    real = Batches.batch

    def batch(self, step, rows):
        arrays = real(self, step, rows)
        if self._shuffle and step == 1:
            arrays["labels"][:] = -100
        return arrays

    monkeypatch.setattr(Batches, "batch", batch)
    config = small_run(place, "unlabelled", steps=3, optimizer=dict(weight_decay=0.0))
    state = run(config).state
    line = recorded(config.folder)[1]
    assert (line["loss"], line["labels"], line["grad_norm"]) == (0, 0, 0)
    assert all(np.isfinite(leaf).all() for leaf in leaves_of(state).values())
    assert recorded(config.folder)[2]["loss"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_other_optimizers_go_on_as_if_never_stopped(place, monkeypatch, name):
    """With statistics that are factored, and split between devices."""
    use_devices(monkeypatch, 4)
    model = place / "wide"
    if not model.exists():
        write_chat_model(model, hidden_size=144, intermediate_size=160)
    settings = dict(
        model=dict(path=str(model)),
        optimizer=dict(name=name),
        mesh=dict(fsdp=2, tensor=2),
        steps=4,
    )
    whole = small_run(place, f"{name}-whole", **settings)
    expected = run(whole)
    config = small_run(place, f"{name}-stopped", **settings)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        run(config)
    assert_equal_bits(leaves_of(run(config).state), leaves_of(expected.state))
    assert recorded(config.folder) == recorded(whole.folder)


# ----- What is trained ----------------------------------------------------------------------------


def test_frozen_leaves_and_layers_stay(place):
    """To the bit, decay included; whole leaves are in no checkpoint, either."""
    freeze = ("model.embed_tokens.*", "*.mlp.down_proj.*", "model.layers.0.*")
    config = small_run(place, "freeze", optimizer=dict(freeze=freeze, weight_decay=0.5), steps=3)
    result = run(config)
    _, before = phi3.from_pretrained(place / "model", dtype="float32")
    before, after = leaves_of(before), leaves_of(result.state.params)
    gone = before.keys() - after.keys()
    assert gone == {name for name in before if "embed_tokens" in name or "down_proj" in name}
    for name, leaf in after.items():
        if "layers" in name:
            assert np.array_equal(leaf[0], before[name][0]), name
            assert not np.array_equal(leaf[1], before[name][1]), name
        else:
            assert not np.array_equal(leaf, before[name]), name
    for text in map(str, leaves_of(result.state)):
        assert "embed_tokens" not in text and "down_proj" not in text


def test_a_checkpoint_of_lora_holds_the_adapters_alone(place):
    config = small_run(place, "lora", lora=dict(rank=2), steps=2)
    result = run(config)
    names = set(leaves_of(result.state.params))
    assert names and all("lora_" in name for name in names)
    size = sum(path.stat().st_size for path in result.checkpoint.rglob("*") if path.is_file())
    of_full = run(small_run(place, "not_lora", steps=2)).checkpoint
    full = sum(path.stat().st_size for path in of_full.rglob("*") if path.is_file())
    held = sum(leaf.nbytes for leaf in leaves_of(result.state).values())
    assert held < size < full / 5
