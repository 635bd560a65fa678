"""One optimizer step, compiled: gradients over the parts of a batch, then the update."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from phi3_jax.loss import IGNORED_LABEL
from phi3_jax.rope import RopeTables, rope_tables
from phi3_jax.sharding import axis_size, named_sharding, replicate
from train.optimizer import keep_layers
from train.state import Setup, TrainState, Tree

Batch = dict[str, jax.Array]

BATCH_NAMES = ("input_ids", "labels", "segment_ids")


def batch_sharding(setup: Setup) -> NamedSharding:
    """Rows over the mesh; the rows of the parts stand side by side on each device.

    Raises:
      ValueError: where they do not divide.
    """
    config, mesh = setup.config, setup.mesh
    rows = config.batch_size // config.accumulate
    over = axis_size(mesh, "data") * axis_size(mesh, "fsdp")
    if rows % over:
        raise ValueError(
            f"batch_size {config.batch_size} in {config.accumulate} parts is {rows} rows, which do "
            f"not divide over {over} devices (mesh.data x mesh.fsdp); take a multiple of "
            f"{over * config.accumulate}"
        )
    sequence = axis_size(mesh, "sequence")
    if setup.tokens_per_row % sequence:
        raise ValueError(
            f"data.sequence_length {setup.tokens_per_row} does not divide over mesh.sequence "
            f"{sequence}; take a multiple of it"
        )
    shape = (config.accumulate, rows, setup.tokens_per_row)
    return named_sharding((None, "batch", None), shape, mesh)


def abstract_batch(setup: Setup) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of what a step takes: int32 [A, B, T] each."""
    config = setup.config
    shape = (config.accumulate, config.batch_size // config.accumulate, setup.tokens_per_row)
    sharding = batch_sharding(setup)
    leaf = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    return dict.fromkeys(BATCH_NAMES, leaf)


def rows_held(setup: Setup) -> np.ndarray:
    """The rows of each part that this process's devices hold."""
    shape = abstract_batch(setup)["labels"].shape
    indices: Any = batch_sharding(setup).addressable_devices_indices_map(shape).values()
    return np.unique(np.concatenate([np.arange(shape[1])[index[1]] for index in indices]))


def place_batch(setup: Setup, arrays: Mapping[str, np.ndarray], rows: np.ndarray) -> Batch:
    """The global batch, of which this process has these rows."""

    def place(array: np.ndarray, target: jax.ShapeDtypeStruct) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            wanted = np.arange(target.shape[1])[index[1]]
            return array[:, np.searchsorted(rows, wanted)]

        sharding: Any = target.sharding
        return jax.make_array_from_callback(target.shape, sharding, part)

    return {name: place(arrays[name], leaf) for name, leaf in abstract_batch(setup).items()}


def model_tables(setup: Setup) -> RopeTables:
    """The rope tables of a row, on every device: an argument of the step, too large for a constant
    where rows are long.
    """
    return replicate(rope_tables(setup.model.config, setup.tokens_per_row), setup.mesh)


def step_function(setup: Setup) -> Any:
    """The jitted step (state, frozen, batch, rope) -> (state, metrics); the state is donated.

    Metrics are scalars: loss, a mean over the labels of all parts; labels and tokens that count;
    grad_norm before clipping, update_norm, param_norm, learning_rate.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract_state)
    return jax.jit(
        lambda *arguments: _step(setup, *arguments),
        out_shardings=(shardings, setup.everywhere),
        donate_argnums=0,
    )


def lower_step(setup: Setup, frozen: Tree) -> Any:
    """The step, lowered for its mesh and ready to be compiled.

    Args:
      setup: of the run.
      frozen: the leaves that are not trained, or their shapes with shardings.
    """
    rope = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=setup.everywhere),
        rope_tables(setup.model.config, setup.tokens_per_row),
    )
    step = step_function(setup)
    return step.lower(setup.abstract_state, frozen, abstract_batch(setup), rope)


def _step(
    setup: Setup, state: TrainState, frozen: Tree, batch: Batch, rope: RopeTables
) -> tuple[TrainState, dict[str, jax.Array]]:
    parts = setup.config.accumulate
    # Over all parts: the mean of the parts' means would weigh their labels unequally.
    labels = jnp.sum(batch["labels"] != IGNORED_LABEL)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

    def loss_of(params: Tree, part: Batch, number: jax.Array) -> jax.Array:
        out: Any = setup.model.apply(
            {"params": setup.combine(params, frozen)},
            part["input_ids"],
            labels=part["labels"],
            segment_ids=part["segment_ids"],
            num_items_in_batch=labels,
            deterministic=False,
            rngs={"dropout": jax.random.fold_in(key, number)},
            rope=rope,
        )
        return out.loss

    def add(sums: tuple[jax.Array, Tree], numbered: tuple[Batch, jax.Array]):
        return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss_of)(state.params, *numbered))

    numbered = (batch, jnp.arange(parts))
    if parts == 1:
        first = jax.tree.map(lambda leaf: leaf[0], numbered)
        loss, gradients = jax.value_and_grad(loss_of)(state.params, *first)
    else:
        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
        (loss, gradients), _ = jax.lax.scan(lambda sums, xs: (add(sums, xs), None), zeros, numbered)
    # Layers that are not trained have no part in the norm, nor in what is clipped by it.
    gradients = keep_layers(gradients, setup.kept_layers)
    updates, opt_state = setup.optimizer.update(gradients, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    ema, decay = state.ema, setup.config.optimizer.ema_decay
    if decay is not None:
        ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)
    metrics = {
        "loss": loss,
        "labels": labels,
        "tokens": jnp.sum(batch["segment_ids"] != 0),
        "grad_norm": optax.tree.norm(gradients),
        "update_norm": optax.tree.norm(updates),
        "param_norm": optax.tree.norm(params),
        "learning_rate": jnp.asarray(setup.schedule(state.step), jnp.float32),
    }
    return TrainState(state.step + 1, params, opt_state, ema, state.rng), metrics
