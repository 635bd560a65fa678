"""Batches: every document once an epoch, the same whatever the processes, errors before all."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import phi3_jax as phi3
from train import batches as batches_module
from train.batches import Batches
from train.config import DataConfig
from train.records import open_records

DEMO = Path(phi3.__file__).parent / "tiny_demo"
NAMES = ("input_ids", "labels", "segment_ids")


@pytest.fixture(scope="module")
def demo():
    return phi3.Tokenizer.from_pretrained(DEMO)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return open_records(str(path))


def question(number, words=0):
    """A document of its own length and words."""
    return {"prompt": f"What is {number}?" + " a" * words, "completion": f"It is {number}."}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """43 documents of 17 to 40 tokens."""
    path = tmp_path_factory.mktemp("batches") / "train.jsonl"
    return write(path, [question(number, number * 7 % 23) for number in range(43)])


def make(records, tokenizer, batch_size=4, accumulate=1, seed=0, epochs=None, **others):
    """Batches; others that are fields of DataConfig go there."""
    data = {"path": "", "sequence_length": 96}
    data.update({name: others.pop(name) for name in vars(DataConfig("")) if name in others})
    return Batches(
        records, tokenizer, DataConfig(**data), batch_size, accumulate, seed, epochs, **others
    )


def stream(batches, steps, rows):
    """All rows of some steps as [rows, T], by name."""
    found = [batches.batch(step, rows) for step in range(steps)]
    return {name: np.concatenate([b[name].reshape(-1, 96) for b in found]) for name in NAMES}


def documents(rows):
    """The ids of each document in rows, in their order."""
    found = []
    for ids, segments in zip(rows["input_ids"], rows["segment_ids"], strict=True):
        numbers = range(1, segments.max() + 1)
        assert sorted(set(segments) - {0}) == list(numbers)
        for number in numbers:
            (columns,) = np.nonzero(segments == number)
            assert (np.diff(columns) == 1).all()
            found.append(tuple(ids[columns].tolist()))
    return found


def expected_documents(records, tokenizer):
    """The ids of all documents, without train/."""
    return [
        tuple(
            tokenizer.apply_chat_template(
                [
                    {"role": "user", "content": record["prompt"]},
                    {"role": "assistant", "content": record["completion"]},
                ]
            )
        )
        for record in map(records.__getitem__, range(len(records)))
    ]


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(-(2**63), 2**63),
    batch_size=st.integers(1, 7),
    epochs=st.integers(1, 4),
    packing=st.booleans(),
    shuffle=st.booleans(),
)
def test_an_epoch_has_each_document_once(demo, records, seed, batch_size, epochs, packing, shuffle):
    batches = make(
        records,
        demo,
        batch_size=batch_size,
        seed=seed,
        epochs=epochs,
        packing=packing,
        shuffle=shuffle,
    )
    rows = stream(batches, batches.steps, range(batch_size))
    found, expected = documents(rows), expected_documents(records, demo)
    assert Counter(found) == Counter({ids: epochs for ids in expected})
    count = len(expected)
    orders = [found[count * epoch : count * (epoch + 1)] for epoch in range(epochs)]
    assert all(Counter(order) == Counter(expected) for order in orders)
    if shuffle:
        assert all(a != b for a, b in zip(orders, [expected, *orders[:-1]], strict=True))
    elif not packing:
        assert all(order == expected for order in orders)
    # Epochs follow without a gap: rows are empty after the last one only, and less than a step.
    used = (rows["segment_ids"] > 0).any(axis=1)
    assert used[: used.sum()].all() and len(used) - used.sum() < batch_size
    if packing:
        assert batches.rows < 0.5 * count
    else:
        assert batches.rows == count and rows["segment_ids"].max() == 1


@settings(deadline=None, max_examples=15)
@given(step=st.integers(0, 40), owners=st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_processes_make_their_rows_of_the_same_batch(demo, records, step, owners):
    """Also in a run that begins at this step, and however many parts there are."""
    whole = make(records, demo, batch_size=12, accumulate=2, seed=5).batch(step, range(6))
    fresh = make(records, demo, batch_size=12, accumulate=2, seed=5)
    in_one_part = make(records, demo, batch_size=12, seed=5)
    for owner in range(3):
        rows = [row for row, of in enumerate(owners) if of == owner]
        mine = fresh.batch(step, rows)
        for name in NAMES:
            assert mine[name].shape == (2, len(rows), 96) and mine[name].dtype == np.int32
            assert np.array_equal(mine[name], whole[name][:, rows])
    for name, array in in_one_part.batch(step, range(12)).items():
        assert np.array_equal(array[0], whole[name].reshape(12, 96))
    assert fresh.fingerprint == in_one_part.fingerprint


def test_threads_make_the_same_batches(demo, records):
    batches = make(records, demo, accumulate=2)
    ahead = batches.iterate(3, 40, np.array([1]))
    found = [next(ahead) for _ in range(30)]
    ahead.close()
    assert len(list(batches.iterate(3, 7, [0]))) == 4
    assert list(batches.iterate(3, 3, [0])) == []
    for step, batch in enumerate(found, start=3):
        for name, array in batches.batch(step, [1]).items():
            assert np.array_equal(batch[name], array)


def test_labels_are_the_answers(demo, records):
    batch = make(records, demo, packing=False, shuffle=False).batch(0, range(4))
    for row in range(4):
        used = batch["segment_ids"][0, row] == 1
        ids, labels = (batch[name][0, row] for name in ("input_ids", "labels"))
        assert (labels[~used] == -100).all() and (ids[~used] == demo.pad_token_id).all()
        assert (labels[labels != -100] == ids[labels != -100]).all()
        assert demo.decode(labels[labels != -100]) == f"It is {row}.<|end|><|endoftext|>"
        assert not used.all()


def test_first_tokens_are_no_labels(demo, records):
    """What the summary counts are the labels."""
    batches = make(records, demo, epochs=1, mask_prompt=False)
    rows = stream(batches, batches.steps, range(4))
    first = np.diff(rows["segment_ids"], axis=1, prepend=0) > 0
    expected = np.where(rows["segment_ids"] > 0, rows["input_ids"], -100)
    assert np.array_equal(rows["labels"], np.where(first, -100, expected))
    assert batches.learnt_tokens == (rows["labels"] != -100).sum() == batches.tokens - 43
    assert batches.tokens == (rows["segment_ids"] > 0).sum()


def test_long_documents_are_dropped_or_split(tmp_path, demo):
    texts = [{"text": "a b c " * count} for count in (2, 60, 5, 33)]
    records = write(tmp_path / "train.jsonl", texts)
    dropping = make(records, demo, epochs=1)
    assert [records.where(index)[-2:] for index in dropping.dropped] == [":2", ":4"]
    whole = [tuple([*demo.encode(text["text"]), demo.eos_token_id]) for text in texts]
    assert (dropping.documents, dropping.longest) == (2, len(whole[1]))
    assert sorted(documents(stream(dropping, 1, range(4)))) == sorted([whole[0], whole[2]])

    splitting = make(records, demo, epochs=1, long_documents="split")
    pieces = [ids[at : at + 96] for ids in whole for at in range(0, len(ids), 96)]
    found = documents(stream(splitting, splitting.steps, range(4)))
    assert sorted(found) == sorted(pieces) and not splitting.dropped
    assert splitting.tokens == sum(map(len, whole))
    assert dropping.fingerprint != splitting.fingerprint

    with pytest.raises(
        ValueError, match=r"all 4 documents are longer than data.sequence_length 5, the lo"
    ):
        make(records, demo, sequence_length=5)


def test_pieces_without_answer_are_left_out(tmp_path, demo):
    records = write(tmp_path / "train.jsonl", [question(1, words=250)])
    batches = make(records, demo, epochs=1, long_documents="split")
    (ids,) = expected_documents(records, demo)
    assert documents(stream(batches, 1, range(4))) == [ids[192:]] and len(ids) < 288


def test_bad_records_are_named_all_at_once(tmp_path, demo, monkeypatch):
    path = tmp_path / "train.jsonl"
    good = json.dumps(question(1))
    path.write_text(f'{good}\n\n{{"text": 1\n{good}\n{{"question": "a"}}\n{{"text": ""}}\n')
    with pytest.raises(ValueError) as caught:
        make(open_records(str(path)), demo)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith("3 of 5 records cannot be learnt from")
    assert [line.split(": ")[0] for line in lines] == [f"{path}:{line}" for line in (3, 5, 6)]
    assert "is not JSON" in lines[0] and "the keys question" in lines[1]
    monkeypatch.setattr(batches_module, "_NAMED", 1)
    with pytest.raises(ValueError, match=r":3: is not JSON.*\nand 2 more$"):
        make(open_records(str(path)), demo)


@pytest.mark.parametrize("line", [question(1, words=3), question(2), {"text": ""}])
def test_data_that_changes_meanwhile_is_noticed(tmp_path, demo, line):
    path = tmp_path / "train.jsonl"
    records = write(path, [question(1, words=9)])
    batches = make(records, demo)
    raw = json.dumps(line)
    path.write_text(raw + " " * (path.stat().st_size - len(raw)))
    with pytest.raises(ValueError, match=r"train\.jsonl:1 has changed"):
        batches.batch(0, range(4))
    with pytest.raises(ValueError, match=r"train\.jsonl:1 has changed"):
        next(batches.iterate(0, 5, range(4)))


def test_the_fingerprint_tells_what_is_trained_on(tmp_path, demo, records):
    plain = make(records, demo).fingerprint
    assert plain == make(records, demo, accumulate=2, epochs=3).fingerprint
    values = [records[index] for index in range(len(records))]
    word = [*values[:-1], {**values[-1], "completion": "It is 43."}]
    others = [
        make(write(tmp_path / "order.jsonl", values[::-1]), demo),
        make(write(tmp_path / "word.jsonl", word), demo),
        make(records, demo, seed=1),
        make(records, demo, shuffle=False),
        make(records, demo, batch_size=8),
        make(records, demo, sequence_length=97),
        make(records, demo, packing=False),
        make(records, demo, mask_prompt=False),
    ]
    assert len({plain, *(other.fingerprint for other in others)}) == 9


def test_progress_is_told(demo, records, monkeypatch):
    monkeypatch.setattr(batches_module, "_AT_ONCE", 20)
    calls = []
    make(records, demo, progress=lambda *call: calls.append(call))
    assert calls == [(20, 43), (40, 43), (43, 43)]


def test_the_summary_marks_what_is_learnt(tmp_path, demo, records):
    text = "\n".join(make(records, demo).summary())
    assert "43, the longest" in text
    assert "What is 0?<|end|><|assistant|>[[It is 0.<|end|><|endoftext|>]]" in text
    text = "\n".join(
        make(
            write(tmp_path / "b.jsonl", [{"text": "1" * 500}]), demo, sequence_length=600
        ).summary()
    )
    assert text.endswith("1]] ...")


def test_an_iterator_left_open_ends_quietly(records):
    program = (
        "import sys; sys.path.insert(0, '.')\n"
        "import phi3_jax as phi3\n"
        "from train.batches import Batches\n"
        "from train.config import DataConfig\n"
        "from train.records import open_records\n"
        f"tokenizer = phi3.Tokenizer.from_pretrained({str(DEMO)!r})\n"
        f"records = open_records({records.where(0)[:-2]!r})\n"
        "batches = Batches(records, tokenizer, DataConfig(''), 8, 1, 0, None)\n"
        "ahead = batches.iterate(0, 10**9, range(8))\n"
        "print(next(ahead)['labels'].shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "(1, 8, 2048)\n", "")


# --- In the model ----------------------------------------------------------------------------


def test_packed_documents_are_computed_as_alone(demo, records):
    """Traps 29 and 42: the loss of a step is the mean over its tokens, as from each document by
    itself, though parts and rows have unequal numbers of labels."""
    model, params = phi3.from_pretrained(DEMO)
    call = jax.jit(lambda **inputs: model.apply({"params": params}, **inputs))
    batch = make(records, demo, accumulate=2).batch(0, range(2))
    count = (batch["labels"] != -100).sum()
    parts = [{name: array[part] for name, array in batch.items()} for part in range(2)]
    packed = sum(float(call(**part, num_items_in_batch=count).loss) for part in parts)

    total = 0.0
    for ids, labels, segments in zip(*(batch[name].reshape(4, 96) for name in NAMES), strict=True):
        for number in range(1, segments.max() + 1):
            (own,) = np.nonzero(segments == number)
            alone = np.zeros((1, 96), np.int32)
            alone[0, : len(own)] = ids[own]
            logits = np.asarray(call(input_ids=alone).logits[0], np.float64)
            logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
            learnt = np.flatnonzero(labels[own] != -100)
            total -= logits[learnt - 1, labels[own][learnt]].sum()
    assert len({(part["labels"] != -100).sum() for part in parts}) == 2
    assert packed == pytest.approx(total / count, rel=1e-5)
