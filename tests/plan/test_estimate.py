"""Floors and what binds, by hand."""

import pytest

from plan.estimate import estimate
from plan.hlo import Collective, Counts
from plan.machines import Chip

CHIP = Chip("a chip", 10, 200.0, 50.0, 20.0, 4.0, 2.0)


def collective(sent: int, times: int, network: str = "ici") -> Collective:
    return Collective("all-gather", 9, sent, times, 0, 2, network, True, "", "")


def test_floors():
    counts = Counts(1000, 100, 6, [collective(30, 2), collective(8, 1)])
    found = estimate(counts, CHIP, kernel_flops=400)
    assert found.compute_s == 7
    assert found.memory_s == 2
    assert found.interconnect_s == 3.4
    assert found.compiler_s == 3 + 2  # cycles, and the kernels at peak
    assert found.binds == "compute"


@pytest.mark.parametrize(
    "counts, binds",
    [
        (Counts(10, 1000), "memory"),
        (Counts(10, 10, None, [collective(30, 2)]), "interconnect"),
        (Counts(10, 10, None, [collective(30, 0)]), "memory"),
    ],
)
def test_what_binds(counts, binds):
    found = estimate(counts, CHIP)
    assert found.binds == binds
    assert found.compiler_s is None


def test_between_slices_the_slower_network_counts():
    counts = Counts(collectives=[collective(30, 2), collective(40, 1, "dcn")])
    assert estimate(counts, CHIP).interconnect_s == 10
    gpu = Chip("a card", 10, 200.0, 50.0, 20.0, None, None)
    with pytest.raises(ValueError, match="40 bytes go between slices, of which a card has none"):
        estimate(counts, gpu)
