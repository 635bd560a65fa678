"""Tables of a terminal."""

import io

import pytest
from rich.console import Console

from plan.advice import Tried
from plan.figures import Traffic
from plan.report import bar, compare, gib, mesh_text, quantity, seconds, show, show_advice


@pytest.fixture
def shown():
    """Calls a function with a console of 100 columns and returns its lines."""

    def call(function, *arguments) -> str:
        text = io.StringIO()
        function(Console(file=text, width=100, highlight=False), *arguments)
        lines = text.getvalue().splitlines()
        assert max(map(len, lines)) <= 100
        return "\n".join(" ".join(line.split()) for line in lines)

    return call


def test_all_figures_of_a_job(shown, figures):
    text = shown(show, figures(uncounted=("jit(step)/while", "jit(step)/while")))
    for line in (
        "train page on v5e:2x4 (8 x slow chip), fsdp=4 tensor=2",
        "32 rows of 4,096 tokens in 4 parts, remat=full, adamw; what follows is of each device",
        "peak, of 0.00: fits 0.00 " + "#" * 30 + "." * 10,
        "compute, which binds 15 s 15 TFLOP at 1 TFLOP/s",
        "memory 7.5 s 750 GB at 100 GB/s",
        "interconnect 5.21 s 52.1 GB at 10 GB/s",
        "compiler's estimate 25 s all but collectives",
        "The model itself asks for 10 TFLOP; attention kernels do 2.5 TFLOP, by formula.",
        "all-gather 1,032 772 59.6 GB 52.1 GB ici",
        "Counted once, or not at all: jit(step)/while.",
        "Estimated from the longest of these times, nothing was run: 25 s for 131,072 tokens,",
        "655 tokens/s a device, 5.24 ktokens/s in all, model FLOPs utilisation 40.0%.",
        "Compiled in 41 s by jax 0.10.2.",
    ):
        assert line in text


def test_a_job_that_does_not_fit(shown, figures):
    none = dict(estimate=None, seconds=None, mfu=None, flops=None, collectives=None)
    text = shown(show, figures(fits=False, peak_bytes=2**31, limit_bytes=2**30, **none))
    assert "peak, of 1.00: DOES NOT FIT 2.00 " + "#" * 40 in text
    assert "tokens/s" not in text and "binds" not in text
    assert "DOES NOT FIT ?" in shown(show, figures(fits=False, peak_bytes=None, **none))


def test_without_a_compilers_estimate_it_is_a_bound(shown, figures):
    found = figures()
    floors = type(found.estimate)(15.0, 7.5, 5.21, None, "compute")
    text = shown(show, figures(estimate=floors, collectives=()))
    assert "At best, by the floors alone" in text and "compiler's estimate" not in text
    assert "No collectives." in text


def test_side_by_side(shown, figures):
    other = {"data": 1, "fsdp": 8, "sequence": 1, "tensor": 1}
    sent = (Traffic("all-reduce", "ici", 1, 0, 10**9, 2 * 10**9),)
    too_large = dict(estimate=None, seconds=None, mfu=None, collectives=None, fits=False)
    text = shown(
        compare,
        [figures(), figures(mesh=other, collectives=sent), figures(peak_bytes=None, **too_large)],
    )
    assert "fsdp=4 tensor=2 0.00 750 GB 52.1 GB compute 25 s 655 40.0%" in text
    assert "fsdp=8 0.00 750 GB 2 GB compute 25 s 655 40.0%" in text
    assert "fsdp=4 tensor=2 ? - - does not fit - - -" in text
    assert "remat=full, adamw, fsdp=8" in shown(
        compare, [figures(mesh=other), figures(mesh=other, settings="fewer")]
    ).replace("\n", " ")


def test_advice(shown, figures):
    tried = [Tried("--ring-cache", figures(fits=False)), Tried("--quantized-cache", figures())]
    text = shown(show_advice, tried)
    assert "--ring-cache 0.00 25 s 655 does not fit" in text
    assert "It fits with --quantized-cache." in text
    assert "does not fit with any of these 1" in shown(show_advice, tried[:1])
    assert "nothing smaller to try" in shown(show_advice, [])


def test_numbers():
    assert [gib(3 * 2**29), gib(None)] == ["1.50", "?"]
    assert [seconds(x) for x in (None, 90, 1.234, 0.0217, 3e-6)] == [
        "-", "90 s", "1.23 s", "21.7 ms", "3 us",
    ]  # fmt: skip
    assert [quantity(x, "B") for x in (None, 0, 7, 1500, 999.7e6, 2.25e15)] == [
        "-", "0 B", "7 B", "1.5 kB", "1,000 MB", "2.25 PB",
    ]  # fmt: skip
    assert quantity(1500, "") == "1.5 k"
    assert mesh_text({"data": 1, "fsdp": 1}) == "one device"


def test_a_bar_is_full_only_where_the_memory_is():
    assert bar(1, 100, 10).plain == "#........."
    assert bar(91, 100, 20).plain == "#" * 19 + "."
    assert bar(99, 100, 10).plain == "#" * 10 and bar(99, 100, 10).style == "green"
    assert bar(101, 100, 10).style == bar(None, 100, 10).style == "red"
