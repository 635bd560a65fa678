"""The checkpoints of a run: Orbax, asynchronous, whole or not at all.

A checkpoint holds the TrainState and, as JSON, what else the run needs to go on. Its leaves have
the shapes of the mesh that wrote them, with that mesh's padding: zeros at the end, which loading
cuts off or adds as the mesh in use wants it.
"""

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as orbax

from phi3_jax.processes import by_all
from train.config import CheckpointConfig
from train.state import TrainState


class Checkpoints:
    """The checkpoints in a folder, opened to go on with a run or to look at it.

    In a run of several processes all of them must make every call.

    Args:
      folder: of the checkpoints; made where it is not there.
      config: what is kept; None to read only.
    """

    def __init__(self, folder: Path, config: CheckpointConfig | None = None):
        self.folder = folder
        context = orbax.Context()
        context.array.loading.enable_padding_and_truncation = True
        policies = orbax.training.preservation_policies
        kept: Any = policies.PreserveAll()
        if config is not None:
            latest = policies.LatestN(config.keep)
            every = config.keep_every
            kept = policies.AnyPreservationPolicy(
                [latest, *([] if every is None else [policies.EveryNSteps(every)])]
            )
        self._checkpointer = orbax.training.Checkpointer(
            str(folder.absolute()),
            context=context,
            preservation_policy=kept,  # ty: ignore[invalid-argument-type]
            # What a killed run was writing.
            cleanup_tmp_directories=config is not None,
        )

    @property
    def steps(self) -> list[int]:
        """The steps that whole checkpoints were taken after, in order."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def latest(self) -> int | None:
        """The last step, or None; the same answer in every process.

        Raises:
          ValueError: in a process that does not see that checkpoint.
        """
        mine = self.steps
        first = np.array(mine[-1] if mine else -1)
        step = int(multihost_utils.broadcast_one_to_all(first))
        with by_all():
            if (step if step >= 0 else None) != (mine[-1] if mine else None):
                raise ValueError(
                    f"process {jax.process_index()} sees checkpoints of the steps {mine} in "
                    f"{str(self.folder)!r}, process 0 has one of step {step}; is the file system "
                    "late? Start again"
                )
        return None if step < 0 else step

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / str(step)

    def save(self, step: int, state: TrainState, run: dict[str, Any]) -> None:
        """Copies the state and begins to write it; waits for the one before to be written.

        Args:
          step: how many steps were taken.
          state: donated arrays may be overwritten as soon as this returns.
          run: JSON values.

        Raises:
          OSError: as `wait`, about the one before.
        """
        with self._writing():
            self._checkpointer.save_checkpointables_async(
                step, {"state": state}, force=True, custom_metadata=run
            )

    def wait(self) -> None:
        """Waits until all is written.

        Raises:
          OSError: what kept it from being written, and where a run goes on.
        """
        with self._writing():
            self._checkpointer.wait()

    def run_values(self, step: int) -> dict[str, Any]:
        """The JSON values of a checkpoint.

        Raises:
          ValueError: where they cannot be read.
        """
        try:
            values: Any = self._checkpointer.checkpointables_metadata(step).custom_metadata
        except Exception as error:  # whatever Orbax makes of a broken folder
            raise self._unreadable(step, error) from error
        if not values:
            raise self._unreadable(
                step, ValueError("its _CHECKPOINT_METADATA is missing or another program's")
            )
        return values

    def load(self, step: int, target: TrainState) -> TrainState:
        """The state of a checkpoint, on the mesh of `target`.

        Args:
          step: of the checkpoint.
          target: ShapeDtypeStruct with sharding; checkpoints of another mesh fit, too.

        Raises:
          ValueError: where it cannot be read, with the checkpoints that remain.
        """
        try:
            loaded = self._checkpointer.load_checkpointables(step, {"state": target})
        except Exception as error:  # a missing file comes as one of many kinds
            raise self._unreadable(step, error) from error
        return jax.block_until_ready(loaded["state"])

    def load_part(self, step: int, name: str, target: Any) -> Any:
        """One field of the state, such as "params"; as `load`."""
        partial = orbax.Context()
        partial.array.loading.enable_padding_and_truncation = True
        partial.pytree.loading.partial_load = True
        try:
            with partial:
                place = str(self.path(step).absolute())
                loaded = orbax.load_checkpointables(place, {"state": {name: target}})["state"]
        except Exception as error:
            raise self._unreadable(step, error) from error
        return jax.block_until_ready(loaded[name])

    def close(self) -> None:
        """Waits until all is written, and lets go of the folder."""
        self._checkpointer.close()

    @contextlib.contextmanager
    def _writing(self) -> Generator[None]:
        try:
            yield
        except Exception as error:  # a full disk comes as one of many kinds
            way_out = "the same command begins anew"
            if self.steps:
                way_out = f"the same command goes on from step {self.steps[-1]}"
            raise OSError(
                f"a checkpoint in {str(self.folder)!r} cannot be written: {_first_line(error)}; "
                f"make room, {way_out}"
            ) from error

    def _unreadable(self, step: int, error: Exception) -> ValueError:
        others = [other for other in self.steps if other != step]
        way_out = (
            f"remove that folder to go on from step {others[-1]}"
            if others
            else "there is no other one; remove that folder to start anew"
        )
        return ValueError(
            f"checkpoint {str(self.path(step))!r} cannot be read: {_first_line(error)}; {way_out}"
        )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]
