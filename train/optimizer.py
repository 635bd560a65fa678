"""Which weights change, and how: the optax chain of a run.

Layers are stacked in one leaf and fused projections keep their parts on axes of their own, so what
optax guesses from shapes (which weights are matrices, what to decay) is said here by name.
"""

import fnmatch
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax.traverse_util import flatten_dict, unflatten_dict

import phi3_jax as phi3
from phi3_jax.hf_format import LeafPath, WeightTable
from train.config import OptimizerConfig

# In and out axes of the matrices of each projection, as a layer has them behind its first axis;
# the axes in neither count several matrices (gate and up).
_AXES = {
    "qkv_proj": ((4,), (1, 2, 3)),
    "o_proj": ((2, 3, 4), (1,)),
    "gate_up_proj": ((3,), (2,)),
    "down_proj": ((2,), (1,)),
}


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of each step, counted from 0.

    Raises:
      ValueError: where warm-up and decay are longer than the run.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    decay = {"cosine": steps - warmup, "wsd": config.decay_steps, "constant": 0}[config.schedule]
    if warmup < 0 or decay < 0 or warmup + decay > steps:
        raise ValueError(
            f"optimizer.warmup_steps {warmup} and optimizer.decay_steps {config.decay_steps} do "
            f"not fit a run of {steps} steps; together they must have no more than that"
        )
    rise = optax.linear_schedule(0.0, peak, warmup)
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(decay, 1), alpha=config.final_fraction)
    else:
        stable = steps - warmup - decay
        fall = optax.linear_schedule(peak, peak * config.final_fraction, decay)
        after = optax.join_schedules([optax.constant_schedule(peak), fall], [stable])
    return optax.join_schedules([rise, after], [warmup]) if warmup else after


def make_optimizer(
    config: OptimizerConfig,
    schedule: optax.Schedule,
    kept_layers: Mapping[LeafPath, np.ndarray] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The chain: clipping, the update rule, decoupled weight decay times the learning rate.

    Adafactor (arXiv:1804.04235) and muon are optax's; muon's update has the root mean square that
    Adam's has (0.2, arXiv:2502.16982), so that one learning rate suits both. Its
    Adam has Nesterov momentum, too.

    Adafactor's statistics are factored where two axes of a leaf have at least 128 (of Phi-3, all
    but qkv_proj and o_proj), and its means go over the layers that a leaf stacks.

    Args:
      config: the settings.
      schedule: from `make_schedule`.
      kept_layers: from `frozen_leaves`, for leaves of which some layers are not trained.

    Raises:
      ValueError: for an unknown name.
    """
    decay = optax.add_decayed_weights(config.weight_decay, mask=_decayed)
    rules = {
        "adamw": lambda: [optax.scale_by_adam(config.b1, config.b2, config.eps), decay],
        "lion": lambda: [optax.scale_by_lion(config.b1, config.b2), decay],
        "adafactor": lambda: [
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
            decay,
        ],
        "muon": lambda: [
            optax.contrib.muon(
                -1.0,  # the learning rate and its sign follow, and so does the decay
                beta=config.b1,
                adam_b1=config.b1,
                adam_b2=config.b2,
                eps=config.eps,
                muon_weight_dimension_numbers=matrix_axes,
                consistent_rms=0.2,
            ),
            decay,
        ],
    }
    if config.name not in rules:
        raise ValueError(
            f"optimizer.name is {config.name!r}, must be one of {', '.join(sorted(rules))}"
        )
    rule = [*rules[config.name](), optax.scale_by_learning_rate(schedule)]
    clip = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    # After the decay, which would move what is not trained.
    keep = [] if not kept_layers else [optax.stateless(lambda x, _: keep_layers(x, kept_layers))]
    return optax.chain(*clip, *rule, *keep)


def _decayed(params: Any) -> Any:
    """Matrices decay, norms and biases do not."""

    def of(path, _):
        *_, module, name = (key.key for key in path)
        return name != "bias" and "norm" not in module

    return jax.tree_util.tree_map_with_path(of, params)


def matrix_axes(params: Any) -> Any:
    """Which axes of each leaf are the rows and columns of the matrix that muon makes orthogonal.

    The fused q, k and v of a layer are one matrix, gate and up two. Embedding, head and norms have
    none and are left to Adam.
    """

    def of(path, leaf):
        *_, module, name = (key.key for key in path)
        if module not in _AXES:
            return None
        rows, columns = _AXES[module]
        if name == "lora_a":
            # The rank stands in the place of the out axes.
            rows, columns = tuple(range(2, leaf.ndim)), (1,)
        elif name == "lora_b":
            rows = (leaf.ndim - 1,)
        return optax.contrib.MuonDimensionNumbers(rows, columns)

    return jax.tree_util.tree_map_with_path(of, params)


def keep_layers(tree: Any, kept: Mapping[LeafPath, np.ndarray]) -> Any:
    """Gradients or updates, zero in the layers that are not trained."""
    flat = flatten_dict(tree)
    for path, layers in kept.items():
        shape = (-1, *(1,) * (flat[path].ndim - 1))
        flat[path] = jnp.where(layers.reshape(shape), flat[path], 0)
    return unflatten_dict(flat)


def frozen_leaves(
    config: phi3.Phi3Config, patterns: tuple[str, ...]
) -> tuple[set[LeafPath], dict[LeafPath, np.ndarray]]:
    """What patterns of Hugging Face's weight names keep from being trained.

    Args:
      config: of a causal model.
      patterns: with * and ?, such as "model.layers.3.mlp.*".

    Returns:
      Leaves that are frozen as a whole; and of those that are frozen in some of their layers,
      bool [L], True where a layer is trained.

    Raises:
      ValueError: for a pattern that names no weight, and where nothing is left to train.
    """
    table = WeightTable(config)
    names = {part: table.hf_name(*part) for part in table.parts}
    for pattern in patterns:
        if not fnmatch.filter(names.values(), pattern):
            some = ", ".join(list(names.values())[:3])
            raise ValueError(f"optimizer.freeze: {pattern!r} names no weight; there are {some} ...")
    whole, partly = set(), {}
    for path in table.weights:
        kept = np.array(
            [
                not any(fnmatch.fnmatchcase(names[path, layer], pattern) for pattern in patterns)
                for layer in table.layers(path)
            ]
        )
        if not kept.any():
            whole.add(path)
        elif not kept.all():
            partly[path] = kept
    if len(whole) == len(table.weights):
        raise ValueError(f"optimizer.freeze {patterns} leaves nothing to train; freeze less")
    return whole, partly
