"""QLoRA (arXiv:2305.14314): the frozen matrices of the layers in 4 or 8 bits.

A quantised weight stands where the float one was, in the tree and on the mesh. The model turns it
back into floats a layer at a time, where it is used; embedding, head and norms stay as they are.
Merging an adapter is done on the original weights (`train.lora.merge` refuses these).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from phi3_jax.quantized import QuantizedWeight, layout_of_part, quantize_weight
from phi3_jax.sharding import abstract_params
from train.config import TARGETS
from train.lora import OUTPUTS


def quantize_params(
    params: Mapping[str, Any], kind: Literal["nf4", "int8"], model: nn.Module
) -> dict[str, Any]:
    """Parameters with the four projections' matrices quantised, laid out as the model's.

    nf4 has a scale for at most 64 inputs of an output, int8 one for each output, in the weight's
    dtype. Each leaf is moved and quantised a layer at a time. Beside the result a device holds at
    most one leaf's quantised values twice and one layer as float32; where the leaves come from the
    host (numpy, or loaded under `jax.default_device(jax.devices("cpu")[0])`) that is all, where
    they are on the device they stay there until the caller lets go of them.

    Args:
      params: the model's, padded as its mesh needs it.
      kind: "nf4" or "int8".
      model: with the mesh that the result goes to.

    Raises:
      ValueError: for another kind, and for leaves that are not the model's.
    """
    if kind not in ("nf4", "int8"):
        raise ValueError(f"lora.quantize is {kind!r}, must be 'nf4' or 'int8'")
    leaves, wanted = flatten_dict(params), flatten_dict(abstract_params(model))
    if {path: leaf.shape for path, leaf in leaves.items()} != {
        path: leaf.shape for path, leaf in wanted.items()
    }:
        raise ValueError(
            "these are not the model's parameters; load them with its config and its mesh"
        )
    for path, target in wanted.items():
        if path[-2] not in TARGETS:
            leaves[path] = jax.device_put(leaves[path], target.sharding)
            continue
        quantize = partial(quantize_weight, kind=kind, outputs=OUTPUTS[path[-2]])
        leaves[path] = _by_layer(quantize, leaves[path], target.sharding)
    return unflatten_dict(leaves)


def _by_layer(quantize: Any, leaf: Any, place: Any) -> QuantizedWeight:
    """A stacked leaf quantised, laid out as the leaf is to be."""
    layers = [quantize(jax.device_put(leaf[i], _without_layers(place))) for i in range(len(leaf))]
    stack = lambda layers: jax.tree.map(lambda *parts: jnp.stack(parts), *layers)  # noqa: E731
    shapes = jax.eval_shape(stack, layers)
    places = jax.tree.map(lambda part: layout_of_part(place, part.shape), shapes)
    return jax.jit(stack, out_shardings=places)(layers)


def _without_layers(place: Any) -> Any:
    """How one layer is laid out, of a leaf that is laid out so."""
    if not isinstance(place, NamedSharding):
        return place
    return NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
