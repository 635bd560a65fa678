"""Small runs for the tests of train/: a model folder, rows of documents, and the bare steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from reference import BASE, hf_weights, params_of

import phi3_jax as phi3
from phi3_jax.loss import IGNORED_LABEL
from train.config import DataConfig, ModelConfig, TrainConfig
from train.state import Setup
from train.step import lower_step, model_tables, place_batch, rows_held

Document = tuple[np.ndarray, np.ndarray]

WIDTH = 40


def write_model(folder: Path, values: dict, name: str = "training") -> dict[str, np.ndarray]:
    """Writes a random model; returns its weights in HF's names."""
    config = phi3.Phi3Config(**values)
    weights = hf_weights(config, name)
    phi3.save_pretrained(folder, phi3.Phi3ForCausalLM(config), params_of(config, weights))
    return weights


def tiny_run(tmp_path: Path, **changes: Any) -> TrainConfig:
    """A run of the model that `write_model` put into tmp_path / "model", in float32."""
    given = dict(
        folder=str(tmp_path / "run"),
        data=DataConfig(path="unused", sequence_length=WIDTH),
        model=ModelConfig(
            path=str(tmp_path / "model"), dtype="float32", frozen_dtype="float32", remat="none"
        ),
        steps=50,
        batch_size=4,
    )
    return TrainConfig(**(given | changes))


def documents_in_rows(seed: int, rows: int, width: int) -> list[list[Document]]:
    """Rows of documents of uneven lengths; ids and labels, some of which are ignored."""
    rng = np.random.Generator(np.random.PCG64(seed))
    filled = []
    for _ in range(rows):
        row, left = [], width
        while left >= 2 and len(row) < 3:
            length = int(rng.integers(2, max(3, left)))
            # A few words only, so that there is something to learn.
            ids = rng.integers(3, 3 + BASE["vocab_size"] // 8, length).astype(np.int32)
            labels = np.where(rng.random(length) < 0.3, IGNORED_LABEL, ids).astype(np.int32)
            labels[0] = IGNORED_LABEL
            row.append((ids, labels))
            left -= length
        filled.append(row)
    return filled


def batch_of_rows(run: TrainConfig, rows: Sequence[list[Document]]) -> dict[str, np.ndarray]:
    """The rows, packed, as a step takes them: int32 [A, B, T]."""
    width = run.data.sequence_length
    batch = {name: np.zeros((len(rows), width), np.int32) for name in ("input_ids", "segment_ids")}
    batch["labels"] = np.full((len(rows), width), IGNORED_LABEL, np.int32)
    for index, row in enumerate(rows):
        start = 0
        for number, (ids, labels) in enumerate(row, start=1):
            place = (index, slice(start, start + len(ids)))
            batch["input_ids"][place] = ids
            batch["labels"][place] = labels
            batch["segment_ids"][place] = number
            start += len(ids)
    shape = (run.accumulate, run.batch_size // run.accumulate, width)
    return {name: array.reshape(shape) for name, array in batch.items()}


def mesh_of_sizes(sizes: Sequence[int]) -> jax.sharding.Mesh:
    """data, fsdp, tensor and, where it is given, sequence."""
    devices = jax.devices()[: int(np.prod(sizes))]
    sequence = sizes[3] if len(sizes) > 3 else 1
    return phi3.make_mesh(*sizes[:3], devices=devices, sequence=sequence)


def step_by_step(
    run: TrainConfig,
    mesh_sizes: Sequence[int],
    batches: Sequence[dict[str, np.ndarray]],
    adapter: Path | None = None,
    **wanted: Any,
) -> Any:
    """The loss of each step; with state=True the last state, too."""
    setup = Setup(run, mesh_of_sizes(mesh_sizes), run.steps or len(batches))
    state, frozen, _ = setup.load(setup.source, trained=True)
    assert state is not None
    if adapter is not None:
        from train.peft_format import load_adapter

        _, adapters = load_adapter(adapter, setup.model)
        state = state.replace(params=adapters)
    program = lower_step(setup, frozen).compile()
    rope, rows = model_tables(setup), rows_held(setup)
    losses = []
    for arrays in batches:
        here = {name: array[:, rows] for name, array in arrays.items()}
        state, metrics = program(state, frozen, place_batch(setup, here, rows), rope)
        losses.append(float(metrics["loss"]))
    return (losses, setup, state) if wanted.get("state") else losses
