"""The loss of a head over a large vocabulary, and its gradient in the same pass.

A head's logits are the largest array of a training step. Here they exist a few columns at a time,
and once: where a gradient is asked for it is made beside the loss, not in a second pass, so that
neither logits nor what they are made of waits for the backward pass. Letters as in model.py.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from phi3_jax.sharding import constrain, logical_spec

IGNORED_LABEL = -100

# Float32 logits that exist at once on a device, in bytes.
_LOGITS_BYTES = 128 * 2**20


class Head(NamedTuple):
    """What is static of a loss.

    Attributes:
      classes: how many of the table's rows are classes; the others are padding.
      mesh: of the model.
      chunk: columns that a device computes at a time; None for as many as make 128 MiB of logits.
    """

    classes: int
    mesh: Mesh | None = None
    chunk: int | None = None


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def head_loss(
    hidden_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    scale: jax.Array,
    head: Head,
) -> jax.Array:
    """The summed cross-entropy times a scale.

    Args:
      hidden_BTD: what the head gets; logits are rounded to its dtype.
      table_VD: the head's, of any float dtype, which its gradient has too.
      targets_BT: int32, the class of each token, or -100 for those that do not count.
      scale: float32 scalar; has no gradient. It multiplies the gradients before they are rounded.
      head: the rest.

    Returns:
      float32 scalar; NaN where a target is not a class.
    """
    return _run(hidden_BTD, table_VD, targets_BT, scale, head, gradients=False)[0]


def _forward(hidden_BTD, table_VD, targets_BT, scale, head: Head):
    loss, *gradients = _run(hidden_BTD, table_VD, targets_BT, scale, head, gradients=True)
    # Both at once: the table's, summed over the devices, does not wait for the end of the backward
    # pass as a sum that is not yet made, of which each device holds all.
    return loss, lax.optimization_barrier(gradients)


def _backward(head: Head, gradients, scale):
    return *((scale * x).astype(x.dtype) for x in gradients), None, None


head_loss.defvjp(_forward, _backward)


def _run(hidden_BTD, table_VD, targets_BT, scale, head: Head, gradients: bool) -> Any:
    """Loss, and if asked for the gradients of the hidden states and the table."""
    mesh, dtype = head.mesh, table_VD.dtype
    cast_VD = table_VD.astype(hidden_BTD.dtype)
    if mesh is None:
        share = _Share(head, dtype, gradients)
        return share.run(hidden_BTD, cast_VD, targets_BT, scale)
    table = logical_spec(("vocab", "embed"), table_VD.shape, mesh)
    hidden = logical_spec(("batch", "tokens", None), hidden_BTD.shape, mesh)
    tokens = PartitionSpec(*hidden[:2])
    rows, (vocab, width) = _axes(*tokens), map(_axes, table)
    share = _Share(head, dtype, gradients, rows, vocab, width)
    of_table = PartitionSpec(vocab, tuple(axis for axis in width if axis in rows))
    whole = PartitionSpec()
    run = jax.shard_map(
        share.run,
        mesh=mesh,
        in_specs=(hidden, table, tokens, whole),
        out_specs=(whole, hidden, of_table) if gradients else (whole,),
        check_vma=False,  # the sums are said in full below
    )
    # Cut before it is gathered, so that what is sent has been cast.
    return run(hidden_BTD, constrain(cast_VD, "vocab", "embed", mesh=mesh), targets_BT, scale)


def _axes(*entries: Any) -> tuple[str, ...]:
    """The mesh axes of some entries of a PartitionSpec, in their order."""
    found: tuple[str, ...] = ()
    for entry in entries:
        found += (entry,) if isinstance(entry, str) else tuple(entry or ())
    return found


class _Share(NamedTuple):
    """What one device computes: the loss of its tokens, with its part of the vocabulary.

    Attributes:
      head: as `head_loss` has it.
      dtype: of the table's gradient.
      gradients: whether to make them.
      rows, vocab, width: the mesh axes that cut tokens, table rows and table columns.
    """

    head: Head
    dtype: Any
    gradients: bool
    rows: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    width: tuple[str, ...] = ()

    def run(self, hidden_BTD, table_VD, targets_BT, scale):
        """Arguments and results are this device's."""
        if self.width:
            table_VD = lax.all_gather(table_VD, self.width, axis=1, tiled=True)
        B, T, D = hidden_BTD.shape
        chunk = min(T, self.head.chunk or _fitting(B, len(table_VD)))
        count = -(-T // chunk)

        def chunks(x, fill):
            tail = [(0, 0), (0, count * chunk - T), *[(0, 0)] * (x.ndim - 2)]
            x = jnp.pad(x, tail, constant_values=fill)
            return jnp.moveaxis(x.reshape(B, count, chunk, *x.shape[2:]), 1, 0)

        def add(sums, xs):
            loss, d_table, d_hidden = self._part(*xs, table_VD, scale)
            return jax.tree.map(jnp.add, sums, (loss, d_table)), d_hidden

        d_table: Any = jnp.zeros(table_VD.shape, self.dtype) if self.gradients else None
        xs = chunks(hidden_BTD, 0), chunks(targets_BT, IGNORED_LABEL)
        sums, d_hidden = lax.scan(add, (jnp.zeros(()), d_table), xs)
        loss = _sum(sums[0], self.rows)
        if not self.gradients:
            return (loss,)
        d_table = sums[1]
        d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(B, count * chunk, D)[:, :T]
        for axis in self.rows:
            if axis not in self.width:
                d_table = lax.psum(d_table, axis)
        cut = tuple(axis for axis in self.width if axis in self.rows)
        return loss, d_hidden, scattered(d_table, cut)

    def _part(self, hidden_BTD, targets_BT, table_VD, scale):
        """Loss of some columns, and the gradients of the table and of those columns, or None."""
        logits = jnp.einsum("BTD,VD->BTV", hidden_BTD, table_VD).astype(jnp.float32)
        classes_V = jnp.arange(len(table_VD))
        if self.vocab:
            classes_V += lax.axis_index(self.vocab) * len(table_VD)
        logits = jnp.where(classes_V < self.head.classes, logits, jnp.finfo(jnp.float32).min)
        top_BT1 = jnp.max(logits, axis=-1, keepdims=True)
        top_BT1 = lax.pmax(top_BT1, self.vocab) if self.vocab else top_BT1
        exp = jnp.exp(logits - top_BT1)
        total_BT1 = _sum(jnp.sum(exp, axis=-1, keepdims=True), self.vocab)
        is_target = classes_V == targets_BT[..., None]
        picked_BT = _sum(jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1), self.vocab)
        losses_BT = (jnp.log(total_BT1) + top_BT1)[..., 0] - picked_BT
        known_BT = (targets_BT >= 0) & (targets_BT < self.head.classes)
        losses_BT = jnp.where(known_BT, losses_BT, jnp.nan)
        loss = scale * jnp.sum(jnp.where(targets_BT != IGNORED_LABEL, losses_BT, 0.0))
        if not self.gradients:
            return loss, None, None
        scale_BT1 = jnp.where(known_BT, scale, 0.0)[..., None]
        d_logits = (scale_BT1 * (exp / total_BT1 - is_target)).astype(hidden_BTD.dtype)
        d_hidden = _sum(jnp.einsum("BTV,VD->BTD", d_logits, table_VD), self.vocab)
        # Not rounded to the dtype of the activations before they are added up.
        d_table = jnp.einsum(
            "BTV,BTD->VD", d_logits, hidden_BTD, preferred_element_type=jnp.float32
        )
        return loss, d_table.astype(self.dtype), d_hidden


def scattered(table_VD: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The sum of the devices' tables, of which each keeps its columns; inside of a shard_map."""
    if not axes:
        return table_VD
    # The parts in front: cut along its minor axis, compilers may sum all of it everywhere.
    parts = table_VD.reshape(len(table_VD), lax.axis_size(axes), -1).swapaxes(0, 1)
    return lax.psum_scatter(parts, axes, scatter_dimension=0)


def _fitting(rows: int, classes: int) -> int:
    """Columns whose float32 logits fit the limit."""
    columns = max(1, _LOGITS_BYTES // (4 * rows * classes))
    return columns - columns % 128 if columns > 128 else columns


def _sum(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return lax.psum(x, axes) if axes else x
