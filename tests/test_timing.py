"""Where the time of a command goes, by a clock that the tests turn."""

import jax
import jax.numpy as jnp
import pytest

from phi3_jax import timing
from phi3_jax.timing import Timing


class Clock:
    def __init__(self):
        self.now = 100.0

    def time(self):
        return self.now

    def compile(self, start, end, event="/jax/core/compile/backend_compile_duration"):
        """What jax tells when something ends; times are seconds before now."""
        jax.monitoring.record_event_time_span(event, self.now - start, self.now - end)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def test_compiling_is_divided_from_every_part(clock):
    timing = Timing()
    clock.now += 5
    timing.lap("start")
    clock.now += 10
    clock.compile(4, 3)
    clock.compile(6, 2)  # traced around the one before
    clock.compile(3, 1)  # in another thread
    clock.compile(9, 0, event="/jax/checkpoint/write")
    timing.lap("load")
    clock.now += 1
    timing.lap("rest")
    assert timing.seconds == {"start": 5, "load": 5, "rest": 1} and timing.compile_s == 5


def answer(clock):
    """Three tokens: one after a second, two more after two seconds each, one of them compiling."""
    clock.now += 1
    yield "a"
    clock.now += 2
    clock.compile(1.5, 0)
    yield "b"
    clock.now += 2
    yield "c"
    yield ""


def test_an_answer_has_prefill_and_decode(clock, monkeypatch):
    monkeypatch.setattr(timing, "peak_memory_gb", lambda: 1.5)
    measured = Timing()
    measured.lap("start")
    measured.lap("load")
    assert list(measured.watch(answer(clock))) == ["a", "b", "c", ""]
    assert measured.report(20) == (
        "start 0.00 s | load 0.00 s | compile 1.50 s | prefill 20 tokens 1.000 s, 20.0 tokens/s | "
        "decode 3 tokens 2.500 s, 0.8 tokens/s | peak memory 1.50 GB"
    )
    # The next answer of a chat has its own compiling, and no rate where there is one token.
    measured.lap("typing")
    list(measured.watch(iter(["a", ""])))
    report = measured.report(7)
    assert "compile 0.00 s" in report and "decode 1 tokens 0.000 s, - tokens/s" in report


def test_beams_have_one_time(clock):
    measured = Timing()
    measured.lap("start")
    measured.lap("load")
    list(measured.watch(answer(clock)))
    report = measured.report(20, at_once=True)
    assert "prefill 20 tokens and decode 3 tokens 3.500 s together" in report
    assert "tokens/s" not in report


def test_jax_tells_when_it_compiles():
    measured = Timing()
    jax.jit(lambda x: jnp.sin(x) * 12345.678)(jnp.ones(7)).block_until_ready()
    measured.lap("load")
    assert measured.compile_s > 0
