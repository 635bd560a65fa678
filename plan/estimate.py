"""How long a program must take at least, by what it costs and what the chip can do."""

from dataclasses import dataclass

from plan.hlo import Counts
from plan.machines import Chip


@dataclass(frozen=True)
class Estimate:
    """Seconds of one run of a program on one device. Nothing here was timed.

    Attributes:
      compute_s: floor of the matrix units: every operation at the data sheet's peak for bfloat16,
        whatever its precision.
      memory_s: floor of main memory: every byte once, at the data sheet's bandwidth.
      interconnect_s: floor of the networks: what a device sends, over all its links at once. A
        program whose collectives use one axis of a torus has a part of the links only.
      compiler_s: the TPU compiler's cycles, which leave out collectives and kernels, and the
        kernels at peak; None where the compiler gives no cycles.
      binds: the largest floor, "compute", "memory" or "interconnect". The program takes at least
        as long as that, and as long as all of them together where nothing overlaps.
    """

    compute_s: float
    memory_s: float
    interconnect_s: float
    compiler_s: float | None
    binds: str


def estimate(counts: Counts, chip: Chip, kernel_flops: float = 0) -> Estimate:
    """The floors of a program.

    Args:
      kernel_flops: operations of its kernels on one device, which the compiler does not tell.

    Raises:
      ValueError: for a program with transfers between slices, on a chip whose network is unknown.
    """
    seconds = 0.0
    for network, bandwidth in (("ici", chip.link_bandwidth), ("dcn", chip.network_bandwidth)):
        sent = sum(one.sent * one.times for one in counts.collectives if one.network == network)
        if sent and bandwidth is None:
            raise ValueError(
                f"{sent:,} bytes go between slices, of which {chip.name} has none; use one slice"
            )
        # Transfers within and between slices can be under way at the same time.
        seconds = max(seconds, sent / (bandwidth or 1))
    floors = {
        "compute": (counts.flops + kernel_flops) / chip.flops,
        "memory": counts.hbm_bytes / chip.hbm_bandwidth,
        "interconnect": seconds,
    }
    compiler = None
    if counts.cycles is not None and chip.clock_hz is not None:
        compiler = counts.cycles / chip.clock_hz + kernel_flops / chip.flops
    return Estimate(
        compute_s=floors["compute"],
        memory_s=floors["memory"],
        interconnect_s=floors["interconnect"],
        compiler_s=compiler,
        binds=max(floors, key=lambda name: floors[name]),
    )
