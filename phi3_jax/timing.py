"""What --stats prints: where the time of a command went."""

import resource
import sys
import time
from collections.abc import Iterator


class Timing:
    """Divides time into named parts, and what jax spends on compiling from all of them.

    jax tells of compiling itself (jax.monitoring): tracing, lowering, and the compiler's run or the
    loading of what was compiled before, from the making of this object on.

    Attributes:
      seconds: of each part, without compiling.
      compile_s: spent on compiling since the last report.
      tokens: of the last answer.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.compile_s = 0.0
        self.tokens = 0
        self._spans: list[tuple[float, float]] = []
        self._last = time.time()  # the clock that jax.monitoring has
        import jax.monitoring

        jax.monitoring.register_event_time_span_listener(self._heard)

    def _heard(self, event: str, start_time: float, end_time: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            self._spans.append((start_time, end_time))

    def lap(self, part: str) -> None:
        """Ends a part, which began where the one before ended."""
        spans, self._spans = sorted(self._spans), []
        compile_s, reached = 0.0, self._last
        for start, end in spans:  # programs are traced inside of others
            compile_s += max(0.0, end - max(start, reached))
            reached = max(end, reached)
        now = time.time()
        self.seconds[part] = now - self._last - compile_s
        self.compile_s += compile_s
        self._last = now

    def watch(self, pieces: Iterator[str]) -> Iterator[str]:
        """The same pieces of an answer: "prefill" ends with the first one, "decode" with the last,
        which is what was left over and no token of its own.
        """
        count = 0
        for piece in pieces:
            if count == 0:
                self.lap("prefill")
            count += 1
            yield piece
        self.lap("decode")
        self.tokens = count - 1

    def report(self, prompt_tokens: int, at_once: bool = False) -> str:
        """What --stats prints of an answer.

        Args:
          prompt_tokens: of the prompt.
          at_once: whether the pieces came all together, as with beams.
        """
        seconds = self.seconds
        if at_once:
            both_s = seconds["prefill"] + seconds["decode"]
            answer = (
                f"prefill {prompt_tokens} tokens and decode {self.tokens} tokens {both_s:.3f} s "
                "together"
            )
        else:
            # The prefill has chosen the first token.
            answer = (
                f"prefill {prompt_tokens} tokens {_rate(prompt_tokens, seconds['prefill'])} | "
                f"decode {self.tokens} tokens {_rate(self.tokens - 1, seconds['decode'])}"
            )
        compile_s, self.compile_s = self.compile_s, 0.0
        return (
            f"start {seconds['start']:.2f} s | load {seconds['load']:.2f} s | "
            f"compile {compile_s:.2f} s | {answer} | peak memory {peak_memory_gb():.2f} GB"
        )


def _rate(tokens: int, seconds: float) -> str:
    rate = f"{tokens / seconds:.1f}" if tokens > 0 and seconds > 0 else "-"
    return f"{seconds:.3f} s, {rate} tokens/s"


def peak_memory_gb() -> float:
    """Peak memory of the fullest device where it counts that, else of the process, in 1e9 bytes."""
    import jax

    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [entry["peak_bytes_in_use"] for entry in stats if "peak_bytes_in_use" in entry]
    if peaks:
        return max(peaks) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
