"""This project's training step, through the functions that a run is made of."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from worker import Settings

import phi3_jax as phi3
from phi3_jax.loss import IGNORED_LABEL
from train.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from train.state import Setup
from train.step import BATCH_NAMES, model_tables, place_batch, rows_held, step_function

PACKAGES = ("jax", "jaxlib", "flax", "optax")


def start_training(settings: Settings, ids_BT: np.ndarray) -> Callable[[], float]:
    """A step with the optimizer of the peers, which keeps all activations as they do."""
    config = TrainConfig(
        folder="",
        data=DataConfig(path="", sequence_length=settings.train_tokens),
        model=ModelConfig(path=settings.path, dtype="float32", remat="none"),
        optimizer=OptimizerConfig(
            learning_rate=1e-5, schedule="constant", weight_decay=0.01, b2=0.999, clip_norm=None
        ),
        steps=1000,
        batch_size=settings.train_rows,
    )
    setup = Setup(config, phi3.make_mesh(), 1000)
    state, frozen, _ = setup.load(Path(settings.path), trained=True)
    labels_BT = ids_BT.copy()
    labels_BT[:, 0] = IGNORED_LABEL  # nothing comes before it to learn it from
    arrays = [array[None] for array in (ids_BT, labels_BT, np.ones_like(ids_BT))]
    batch = place_batch(setup, dict(zip(BATCH_NAMES, arrays, strict=True)), rows_held(setup))
    program, rope = step_function(setup), model_tables(setup)

    def step() -> float:
        nonlocal state
        state, metrics = program(state, frozen, batch, rope)
        return float(metrics["loss"])

    return step
