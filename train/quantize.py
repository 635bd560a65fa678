"""QLoRA (arXiv:2305.14314): the frozen matrices of the layers in 4 or 8 bits, with qwix.

A quantised weight stands where the float one was, in the tree and on the mesh. The model turns it
back into floats a layer at a time, where it is used; embedding, head and norms stay as they are.
Merging an adapter is done on the original weights (`train.lora.merge` refuses these).
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from phi3_jax.sharding import abstract_params
from train.config import TARGETS
from train.lora import OUTPUTS

TILE = 64  # the most inputs that share a scale in nf4


@flax.struct.dataclass
class QuantizedWeight:
    """A matrix in few bits, in place of a projection's float `weight`.

    Attributes:
      quantized: qwix.QArray, values uint4 or int8 of the weight's shape, and their scales.
    """

    quantized: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight."""
        return self.quantized.shape

    def astype(self, dtype: Any) -> jax.Array:
        """The floats that it stands for, computed in float32."""
        return _qwix().dequantize(self.quantized.astype(jnp.float32)).astype(dtype)


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
      kind: of qwix.
      model: with the mesh that the result goes to.

    Raises:
      ImportError: without qwix.
      ValueError: for another kind, and for leaves that are not the model's.
    """
    qwix = _qwix()
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
        last = len(target.shape) - 2  # of a layer's dimensions
        if kind == "nf4":
            tiled, channels = {last: _tile(target.shape[-1])}, tuple(range(last))
        else:
            tiled, channels = {}, tuple(range(OUTPUTS[path[-2]]))
        quantize = partial(qwix.quantize, qtype=kind, channelwise_axes=channels, tiled_axes=tiled)
        leaves[path] = QuantizedWeight(_by_layer(quantize, leaves[path], target.sharding))
    return unflatten_dict(leaves)


def _by_layer(quantize: Any, leaf: Any, place: Any) -> Any:
    """The QArray of a stacked leaf, laid out as the leaf is to be."""
    scale_dtype = leaf.dtype
    run = jax.jit(lambda layer: quantize(layer.astype(jnp.float32), scale_dtype=scale_dtype))
    layers = [run(jax.device_put(leaf[i], _without_layers(place))) for i in range(len(leaf))]
    stack = lambda layers: jax.tree.map(lambda *parts: jnp.stack(parts), *layers)  # noqa: E731
    shapes = jax.eval_shape(stack, layers)
    return jax.jit(stack, out_shardings=jax.tree.map(partial(_placed, place), shapes))(layers)


def _without_layers(place: Any) -> Any:
    """How one layer is laid out, of a leaf that is laid out so."""
    if not isinstance(place, NamedSharding):
        return place
    return NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))


def _placed(place: Any, array: Any) -> Any:
    """The layout for values or scales; scales too few to be cut over an axis are whole there."""
    if not isinstance(place, NamedSharding):
        return place
    spec = []
    for size, axes in zip(array.shape, place.spec, strict=True):
        names = (axes,) if isinstance(axes, str) else axes or ()
        parts = math.prod(place.mesh.shape[name] for name in names)
        spec.append(axes if size % parts == 0 else None)
    return NamedSharding(place.mesh, PartitionSpec(*spec))


def _tile(size: int) -> int:
    """The largest divisor of a number of inputs that is at most TILE."""
    return next(tile for tile in range(TILE, 0, -1) if size % tile == 0)


def _qwix() -> Any:
    try:
        import qwix
    except ImportError:
        raise ImportError("quantised weights need qwix: pip install 'phi3-jax[quant]'") from None
    return qwix
