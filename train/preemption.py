"""Being told to stop: SIGTERM ends a run after a step, with a checkpoint.

So does Ctrl-C in a run of one process.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Generator

import jax
from jax.experimental import multihost_utils

# The exit status of a run that saved and stopped because it was told to: the same command goes on
# (EX_TEMPFAIL of sysexits.h).
PREEMPTED_STATUS = 75


@contextlib.contextmanager
def preemption() -> Generator[Callable[[int], bool]]:
    """Gives a function that says, after each step, whether the run is to stop there.

    It takes the number of steps taken. In a run of several processes JAX's coordination service
    takes the SIGTERM of any of them, and all are told to stop after the same step; every process
    has to ask after every step. A second signal is not waited for.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    told = threading.Event()

    def tell(number, frame):
        if told.is_set():
            raise KeyboardInterrupt
        told.set()

    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # only the main thread can take signals
        return
    before = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda step: told.is_set()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
