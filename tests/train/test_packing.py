"""Documents in rows: each once, none cut, and as best-fit says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train import packing as packing_module
from train.packing import best_fit, one_a_row

CAPACITY = 20
lengths = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=60)


@given(lengths=lengths, open_rows=st.integers(1, 5))
def test_rows_are_those_of_the_plain_way(lengths, open_rows):
    rows = []
    slots = [(0, None)] * open_rows  # room, and the documents that lie there
    for document, length in enumerate(lengths):
        fitting = [slot for slot in range(open_rows) if slots[slot][0] >= length]
        if not fitting:
            rows.append([])
            fullest = min(range(open_rows), key=lambda slot: slots[slot][0])
            slots[fullest] = (CAPACITY, rows[-1])
            fitting = [fullest]
        best = min(fitting, key=lambda slot: slots[slot][0])
        room, documents = slots[best]
        slots[best] = (room - length, documents)
        documents.append(document)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing_module, "OPEN_ROWS", open_rows)
        packing = best_fit(np.array(lengths), CAPACITY)
    assert [packing.documents(row).tolist() for row in range(packing.rows)] == rows


def test_rows_are_nearly_full():
    lengths = np.random.default_rng(0).integers(10, 1500, 5000)
    packing = best_fit(lengths, 2048)
    assert sorted(packing.order.tolist()) == list(range(5000))
    assert lengths.sum() / (packing.rows * 2048) > 0.97
    sums = [lengths[packing.documents(row)].sum() for row in range(packing.rows)]
    assert max(sums) <= 2048


def test_one_a_row():
    packing = one_a_row(3)
    assert [packing.documents(row).tolist() for row in range(packing.rows)] == [[0], [1], [2]]
