"""What the processes of a run do together, so that none waits for one that has failed.

An error becomes one in every process. A process that is killed is noticed by JAX, after the
timeouts of its own.
"""

import contextlib
from collections.abc import Generator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from phi3_jax.folder import staged_folder


def on_host(array: jax.Array) -> np.ndarray:
    """A whole array, wherever its parts are; every process has to ask."""
    if not array.is_fully_addressable and not array.is_fully_replicated:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


@contextlib.contextmanager
def by_all() -> Generator[None]:
    """Ends when all processes have ended it, and fails in all where one has failed.

    Raises:
      RuntimeError: where another process failed and this one did not.
    """
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.array(error is not None))
        if error is None and failed.any():
            which = ", ".join(str(process) for process in np.flatnonzero(failed))
            raise RuntimeError(f"process {which} failed; the reason must be in its own output")
    if error is not None:
        raise error


@contextlib.contextmanager
def staged_by_all(folder: str | Path, force: bool = False) -> Generator[Path]:
    """`staged_folder` of the first process for all of them, renamed when none has failed.

    Raises:
      FileExistsError, ValueError: as `staged_folder`, in the first process.
      RuntimeError: where another process failed and this one did not.
    """
    with contextlib.ExitStack() as stack:
        stage = Path()
        with by_all():
            if jax.process_index() == 0:
                stage = stack.enter_context(staged_folder(folder, force))
        if jax.process_count() > 1:
            name = np.frombuffer(stage.name.encode().ljust(256, b"\0"), np.uint8)
            name = multihost_utils.broadcast_one_to_all(name).tobytes().rstrip(b"\0").decode()
            stage = Path(folder).expanduser().resolve().with_name(name)
        with by_all():
            yield stage
        with by_all():
            stack.close()
