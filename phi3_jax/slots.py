"""Arrays of a cache's slots: how they are held, and written. Letters as in model.py."""

from collections.abc import Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint


class Quantized(NamedTuple):
    """Vectors in eight bits: values * scale is what they stand for.

    (H + 4) / 4H of the bytes of float32, (H + 4) / 2H of those of bfloat16. A cache of them is not
    exact: a value is off by up to 1/254 of the largest in its vector. The tokens of one call see
    each other unrounded, so that a prompt run in one call has exact logits. Those of later calls
    are off, as root mean square and share of their standard deviation, by 0.2 % in a random model
    of 4 layers with heads of 64 (float32), and by 2 to 4 % in those of the tests, whose weights are
    fifteen times as large.

    values: int8 [..., H], in [-127, 127].
    scale: float32 [...], the largest absolute value of the vector / 127.
    """

    values: jax.Array
    scale: jax.Array


Stored = jax.Array | Quantized


@flax.struct.dataclass
class LayerSlots:
    """A layer's slots in a call that writes them before it reads them.

    Attributes:
      k_NSH, v_NSH: as in a split KVCache.
      start: int32 scalar, the first slot to write.
      mask_BT: bool, where False a slot stays as it was; None for True.
    """

    k_NSH: jax.Array
    v_NSH: jax.Array
    start: jax.Array
    mask_BT: jax.Array | None

    def write(self, k_BTKH: jax.Array, v_BTKH: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values [N, S, H] with those of the call's tokens among them."""

        def written(old_NSH, new_BTKH):
            new_NTH = merged(new_BTKH.swapaxes(1, 2)).astype(old_NSH.dtype)
            return put(old_NSH, new_NTH, self.mask_BT, self.start, 1)

        return written(self.k_NSH, k_BTKH), written(self.v_NSH, v_BTKH)


def merged(x_BKSH: jax.Array) -> jax.Array:
    """Rows and heads as one axis N = B * K."""
    return x_BKSH.reshape(-1, *x_BKSH.shape[2:])


def apart(x_NSH: jax.Array, rows: int) -> jax.Array:
    """The inverse of `merged`."""
    return x_NSH.reshape(rows, -1, *x_NSH.shape[1:])


def unstacked(x_LBKSH: Stored) -> tuple[Stored, ...]:
    """Of all layers' slots, each layer's [N, S, H]."""
    layer = lambda i: jax.tree.map(lambda x: merged(x[i]), x_LBKSH)  # noqa: E731
    return tuple(layer(i) for i in range(len(jax.tree.leaves(x_LBKSH)[0])))


def stacked(layers: Sequence[Stored], rows: int) -> Stored:
    """The inverse of `unstacked`."""
    return jax.tree.map(lambda *xs: jnp.stack([apart(x, rows) for x in xs]), *layers)


def put(old: jax.Array, new: jax.Array, mask_BT: jax.Array | None, start, axis: int) -> jax.Array:
    """Slots side by side, the first one `start`, written where the mask of rows and slots says.

    axis: that of the slots: 3 in [L, B, K, S, ...], 1 in [B, S] and [N, S, ...].
    """
    if mask_BT is not None:
        before = lax.dynamic_slice_in_dim(old, start, new.shape[axis], axis)
        if axis == 1:
            mask = jnp.repeat(mask_BT, len(new) // len(mask_BT), axis=0)
            mask = jnp.expand_dims(mask, range(2, new.ndim))
        else:
            mask = jnp.expand_dims(mask_BT, (0, 2, *range(4, new.ndim)))
        new = jnp.where(mask, new, before)
    return lax.dynamic_update_slice_in_dim(old, new, start, axis)


def laid_out(x_LBKSH: jax.Array) -> jax.Array:
    """The cache as a TPU holds arguments and results of programs: of the slots and the width of a
    vector the one that fills 128 lanes better is the minor axis.

    Unasked, the compiler gives the cache of a loop the layout of what one step writes, and copies
    all of it there and back: 8 GiB more for phi-3-mini in libtpu 0.0.52.
    """
    if x_LBKSH.ndim < 5:
        return x_LBKSH  # scales, or a layer by itself
    slots, width = x_LBKSH.shape[3:]
    pads = lambda minor, major: (-minor % 128 / minor + 1) * (-major % 8 / major + 1)  # noqa: E731
    last = (4, 3) if pads(slots, width) < pads(width, slots) else (3, 4)
    layout = Layout((0, 1, 2, *last))
    return lax.platform_dependent(
        x_LBKSH, tpu=lambda x: with_layout_constraint(x, layout), default=lambda x: x
    )


def quantize(x: jax.Array) -> Quantized:
    """Vectors [..., H] in eight bits."""
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / 127
    # A vector of zeros has no scale to divide by.
    values = jnp.round(wide / jnp.where(scale == 0, 1, scale)[..., None])
    return Quantized(values.astype(jnp.int8), scale)
