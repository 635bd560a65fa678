"""What --stats prints of an answer."""

import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Timing:
    """Times one answer while its pieces pass through.

    Attributes:
      prompt_tokens: of the prompt.
      at_once: whether the pieces come all together, as with beams.
    """

    prompt_tokens: int
    at_once: bool = False
    tokens: int = 0
    first_s: float = 0.0
    rest_s: float = 0.0

    def watch(self, pieces: Iterator[str]) -> Iterator[str]:
        """The same pieces; the last one is what was left over and no token of its own."""
        start = last = time.perf_counter()
        count = 0
        for piece in pieces:
            now = time.perf_counter()
            if count == 0:
                self.first_s = now - start
            else:
                self.tokens, self.rest_s = count, last - start - self.first_s
            count, last = count + 1, now
            yield piece

    def report(self, load_s: float) -> str:
        """What --stats prints."""
        later = self.tokens - 1
        prompt_rate = f", {self.prompt_tokens / self.first_s:.1f} tokens/s (with compiling)"
        rate = f", {later / self.rest_s:.1f} tokens/s" if later > 0 else ", -"
        if self.at_once:
            prompt_rate, rate = "", f", {self.first_s:.2f} s together (with compiling)"
        return (
            f"load {load_s:.2f} s | prompt {self.prompt_tokens} tokens{prompt_rate} | "
            f"decode {self.tokens} tokens{rate} | peak memory {peak_memory_gb():.2f} GB"
        )


def peak_memory_gb() -> float:
    """Peak memory of the fullest device where it counts that, else of the process, in 1e9 bytes."""
    import jax

    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [entry["peak_bytes_in_use"] for entry in stats if "peak_bytes_in_use" in entry]
    if peaks:
        return max(peaks) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
