"""Parameters with each layer by itself, for decoding on a CPU."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding

from phi3_jax.quantized import is_quantized
from phi3_jax.sharding import plain_tree

_LAYERS = ("model", "layers")
_TABLE = ("model", "embed_tokens")
# The embedding as integers: XLA's CPU compiler widens a table of 16-bit floats to take rows of it.
BITS = "bits"


def decodes_split(params: Mapping[str, Any]) -> bool:
    """Whether parameters are where split ones are faster: on one CPU device."""
    leaf = jax.tree.leaves(params)[0]
    if not isinstance(leaf, jax.Array) or isinstance(leaf.sharding, NamedSharding):
        return False
    return {device.platform for device in leaf.devices()} == {"cpu"}


def split_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Stacked parameters as each layer's own, which the model runs without a loop.

    On a CPU they are views, of the same memory where that is aligned to 64 bytes. There a loop over
    stacked weights copies each layer's before it multiplies with them.

    Args:
      params: of a Phi3ForCausalLM, on one CPU device; split ones stay as they are.

    Returns:
      The tree with model.layers.0, model.layers.1, ... in place of model.layers, and with a 16-bit
      embedding's bits beside it. Weights of 8 bits are multiplied as integers.
    """
    if "0" in params["model"]["layers"]:
        return dict(params)
    leaves = flatten_dict(plain_tree(params))
    split: dict[tuple[str, ...], Any] = {}
    for path, leaf in leaves.items():
        if path[:2] != _LAYERS:
            split[path] = leaf
            continue
        # Puts an aligned NumPy array where it is, without a copy.
        views = [np.asarray(x) for x in jax.tree.leaves(leaf)]
        for layer in range(len(views[0])):
            own = jax.device_put([view[layer] for view in views], jax.tree.leaves(leaf)[0].sharding)
            place = (*_LAYERS, str(layer), *path[2:])
            split[place] = jax.tree.unflatten(jax.tree.structure(leaf), own)
    for path, leaf in split.items():
        if is_quantized(leaf):
            split[path] = dataclasses.replace(leaf, in_integers=True)
    table = leaves[*_TABLE, "weight"]
    if table.dtype.itemsize == 2:
        split[*_TABLE, BITS] = jax.device_put(np.asarray(table).view(np.uint16), table.sharding)
    return unflatten_dict(split)
