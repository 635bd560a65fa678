"""LoRA: low-rank adapters beside the frozen matrices (arXiv:2106.09685), as PEFT parametrises them.

An adapter is two leaves in the tree of its projection: A [L, r, *in] and B [L, *out, r], where the
weight is [L, *out, *in]. All adapters are one tree, nested as the model's parameters; it alone is
trained and saved. On a mesh they are laid out and padded with zeros as their weights are.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from phi3_jax.hf_format import LAYER_WEIGHTS, LeafPath
from phi3_jax.sharding import abstract_params
from train.config import TARGETS, LoraConfig

# How many of a weight's dimensions, after the layers', are outputs; they stand first.
OUTPUTS = {row.path[-2]: len(row.hf_axes[0]) for row in LAYER_WEIGHTS if row.path[-2] in TARGETS}


def check_lora(lora: LoraConfig) -> None:
    """Checks the settings of the adapters.

    Raises:
      ValueError: with what works.
    """
    if lora.rank < 1:
        raise ValueError(f"lora.rank is {lora.rank}, must be at least 1")
    if not (math.isfinite(lora.alpha) and lora.alpha > 0):
        raise ValueError(f"lora.alpha is {lora.alpha}, must be a number above 0")
    if not 0 <= lora.dropout < 1:
        raise ValueError(f"lora.dropout is {lora.dropout}, must be at least 0 and below 1")
    unknown = [name for name in lora.targets if name not in TARGETS]
    if unknown or not lora.targets or len(set(lora.targets)) < len(lora.targets):
        raise ValueError(
            f"lora.targets is {', '.join(lora.targets) or 'empty'}; it names at least one of "
            f"{', '.join(TARGETS)}, each once"
        )


def abstract_adapters(model: nn.Module, lora: LoraConfig) -> dict[str, Any]:
    """Shapes and shardings of a model's adapters, float32, without making them.

    Returns a nested dict of jax.ShapeDtypeStruct: of each target `lora_a` [L, r, *in] and `lora_b`
    [L, *out, r], with the padding of the model's mesh.

    Raises:
      ValueError: for settings that `check_lora` refuses, and as `abstract_params`.
    """
    check_lora(lora)
    adapters: dict[LeafPath, jax.ShapeDtypeStruct] = {}
    for path, leaf in flatten_dict(abstract_params(model)).items():
        *above, target, _ = path
        if target not in lora.targets:
            continue
        shape, place, cut = leaf.shape, leaf.sharding, 1 + OUTPUTS[target]
        shapes = {
            "lora_a": (shape[0], lora.rank, *shape[cut:]),
            "lora_b": (*shape[:cut], lora.rank),
        }
        for name, whole in shapes.items():
            if isinstance(place, NamedSharding):
                axes = place.spec
                spec = (None, None, *axes[cut:]) if name == "lora_a" else (*axes[:cut], None)
                where: Any = NamedSharding(place.mesh, PartitionSpec(*spec))
            else:
                where = place
            adapters[*above, target, name] = jax.ShapeDtypeStruct(
                whole, jnp.float32, sharding=where
            )
    return unflatten_dict(adapters)


def init_adapters(model: nn.Module, lora: LoraConfig, seed: int = 0) -> dict[str, Any]:
    """New adapters, float32, which change nothing yet: B is zero.

    A is uniform between -1/sqrt(in) and 1/sqrt(in), as PEFT begins. The values depend on the seed,
    the config and the target alone, not on the mesh or on what other targets there are.

    Raises:
      ValueError: as `abstract_adapters`.
    """
    wanted = flatten_dict(abstract_adapters(model, lora))
    plain = flatten_dict(abstract_adapters(model.clone(mesh=None), lora))

    def init(key: jax.Array) -> dict[LeafPath, jax.Array]:
        leaves = {}
        for path, leaf in wanted.items():
            shape = plain[path].shape
            new = jnp.zeros(shape, leaf.dtype)
            if path[-1] == "lora_a":
                bound = 1 / math.sqrt(math.prod(shape[2:]))
                own = jax.random.fold_in(key, TARGETS.index(path[-2]))
                new = jax.random.uniform(own, shape, leaf.dtype, -bound, bound)
            ends = [(0, b - a) for a, b in zip(shape, leaf.shape, strict=True)]
            leaves[path] = jnp.pad(new, ends)
        return leaves

    places = {path: leaf.sharding for path, leaf in wanted.items()}
    return unflatten_dict(jax.jit(init, out_shardings=places)(jax.random.key(seed)))


def attach(
    params: Mapping[str, Any], adapters: Mapping[str, Any], lora: LoraConfig
) -> dict[str, Any]:
    """Parameters with the adapters in place, which any call of the model then uses.

    B is multiplied by lora.scale here; through it, gradients reach the adapters as they are. To
    train with lora.dropout, give it to the model: `model.clone(lora_dropout=lora.dropout)`.

    Args:
      params: of the model, also quantised.
      adapters: float32, from `init_adapters`.
    """
    scaled = {
        path: leaf * lora.scale if path[-1] == "lora_b" else leaf
        for path, leaf in flatten_dict(adapters).items()
    }
    return unflatten_dict(flatten_dict(params) | scaled)


def merge(
    params: Mapping[str, Any], adapters: Mapping[str, Any], lora: LoraConfig
) -> dict[str, Any]:
    """Parameters with the adapters added into their weights: W + scale B A.

    Computed in float32, a layer at a time, and cast to the weight's dtype. The weights given stay
    as they are; a layer's sum is the only float32 copy.

    Raises:
      ValueError: for quantised weights; an adapter is merged into the original ones.
    """
    return _added(params, adapters, lora.scale)


def unmerge(
    params: Mapping[str, Any], adapters: Mapping[str, Any], lora: LoraConfig
) -> dict[str, Any]:
    """The inverse of `merge`, but for the rounding of both to the weight's dtype: W - scale B A.

    Raises:
      ValueError: as `merge`.
    """
    return _added(params, adapters, -lora.scale)


def _added(params: Mapping[str, Any], adapters: Mapping[str, Any], scale: float) -> dict[str, Any]:
    leaves, halves = flatten_dict(params), flatten_dict(adapters)
    for path in [path for path in halves if path[-1] == "lora_a"]:
        where = (*path[:-1], "weight")
        weight = leaves[where]
        if not jax.tree_util.all_leaves([weight]):
            raise ValueError(
                f"{'.'.join(where)} is quantised; load the original weights and merge the adapter "
                "into those"
            )
        add = jax.jit(_add, out_shardings=weight.sharding)
        leaves[where] = add(weight, halves[path], halves[*path[:-1], "lora_b"], scale)
    return unflatten_dict(leaves)


def _add(weight: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    def layer(parts):
        weight, a, b = parts
        # On a GPU or TPU the default is fewer bits than float32 has.
        update = jnp.tensordot(b, a, axes=1, precision="highest") * scale
        return (weight.astype(jnp.float32) + update).astype(weight.dtype)

    return jax.lax.map(layer, (weight, a, b))
