"""Ctrl-C at a command."""

import contextlib
import signal
import threading
from collections.abc import Generator
from types import FrameType

_IMPORTLIB = "<frozen importlib."


@contextlib.contextmanager
def ctrl_c_ends_imports() -> Generator[None]:
    """Ctrl-C raises KeyboardInterrupt as ever, except while modules are imported: then the process
    ends by the signal, without a word.

    Compiled modules that are interrupted while they are set up turn a KeyboardInterrupt into an
    ImportError, drop it, or crash. Nothing else is under way then that would need an end of its
    own: what writes leaves behind is cleared by the next run, as after a kill.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # only the main thread can take signals; who ignores them (nohup) goes on doing so
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith(_IMPORTLIB):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        frame = frame.f_back
    raise KeyboardInterrupt
