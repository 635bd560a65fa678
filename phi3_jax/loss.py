"""Losses, float32 scalars. Letters as in model.py.

Everywhere -100 is a label that does not count, and where none counts the loss is 0, not NaN as in
the reference, so that an empty batch leaves the parameters alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from phi3_jax.sharding import constrain, named_sharding

IGNORED_LABEL = -100

# Float32 logits that exist at once on a device, in bytes.
_LOGITS_BYTES = 128 * 2**20


def cross_entropy(
    logits: jax.Array, labels: jax.Array, classes: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """The summed cross-entropy of labels that are not -100, and how many those are.

    Args:
      logits: [..., V].
      labels: int [...].
      classes: how many of the V count; the others are padding.

    Returns:
      float32 and int32 scalars; the sum is NaN where a label is not a class.
    """
    columns_V = jnp.arange(logits.shape[-1])
    classes = logits.shape[-1] if classes is None else classes
    logits = logits.astype(jnp.float32)
    if classes < logits.shape[-1]:
        logits = jnp.where(columns_V < classes, logits, jnp.finfo(jnp.float32).min)
    # A comparison and not a lookup: the vocabulary may be spread over devices.
    picked = jnp.sum(jnp.where(columns_V == labels[..., None], logits, 0.0), axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    losses = jnp.where((labels >= 0) & (labels < classes), losses, jnp.nan)
    counted = labels != IGNORED_LABEL
    return jnp.sum(jnp.where(counted, losses, 0.0)), counted.sum()


def mean_loss(total: jax.Array, count: jax.Array, num_items_in_batch: Any = None) -> jax.Array:
    """A summed loss over the labels that count, or over num_items_in_batch; 0 for no label."""
    return total / jnp.maximum(count if num_items_in_batch is None else num_items_in_batch, 1)


def causal_lm_loss(
    hidden_BTD: jax.Array,
    weight_VD: jax.Array,
    labels_BT: jax.Array,
    vocab_size: int,
    *,
    document_BT: jax.Array | None = None,
    num_items_in_batch: Any = None,
    mesh: Mesh | None = None,
    chunk: int | None = None,
) -> jax.Array:
    """Cross-entropy of each next token, a few columns of the batch at a time.

    The float32 logits of all tokens never exist together, neither forward nor backward. The
    definition is that of the reference (`ForCausalLMLoss`).

    Args:
      hidden_BTD: what the head gets.
      weight_VD: its table, of any float dtype; V may be padded. Logits have the dtype of hidden.
      labels_BT: the ids themselves (shifted here), -100 for those that do not count.
      vocab_size: the classes among V.
      document_BT: int, the document of each token, 0 for padding; neither the first token of a
        document nor padding is a label.
      num_items_in_batch: what to divide the sum by (labels over all accumulated batches and
        processes); by default the labels that count here.
      mesh: of the model.
      chunk: columns at a time; by default as many as make 128 MiB of logits on a device.
    """
    targets_BT = jnp.pad(labels_BT[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED_LABEL)
    if document_BT is not None:
        next_BT = jnp.pad(document_BT[:, 1:], ((0, 0), (0, 1)), mode="edge")
        same_BT = (next_BT == document_BT) & (document_BT != 0)
        targets_BT = jnp.where(same_BT, targets_BT, IGNORED_LABEL)
    # Whole rows of these few numbers, so that nothing is shifted from device to device.
    targets_BT = constrain(targets_BT, "batch", None, mesh=mesh)
    B, T, D = hidden_BTD.shape
    shares = _shares(T, "tokens", mesh)
    chunk = _chunk(B, T, len(weight_VD), mesh) if chunk is None else min(chunk, T)
    chunk = -(-chunk // shares)  # of each share of the row
    count = -(-T // (shares * chunk))
    # Gathered once over fsdp and sequence, not in every turn of the loop.
    weight_VD = constrain(weight_VD, "vocab", None, mesh=mesh)

    @jax.checkpoint
    def part(weight_VD, hidden_BTD, targets_BT):
        # Cast in here, so that the chunks' gradients are summed in the parameter's dtype.
        logits = jnp.einsum("BTD,VD->BTV", hidden_BTD, weight_VD.astype(hidden_BTD.dtype))
        logits = constrain(logits, "batch", "tokens", "vocab", mesh=mesh)
        return cross_entropy(logits, targets_BT, vocab_size)

    if count == 1:
        return mean_loss(*part(weight_VD, hidden_BTD, targets_BT), num_items_in_batch)

    def chunks(x: jax.Array, fill: int) -> jax.Array:
        """[count, B, shares * chunk, ...]: each chunk has as many columns of every share of the
        row, so that no device sends any.
        """
        x = x.reshape(B, shares, T // shares, *x.shape[2:])
        tail = [(0, 0), (0, 0), (0, count * chunk - T // shares), *[(0, 0)] * (x.ndim - 3)]
        x = jnp.pad(x, tail, constant_values=fill)
        x = jnp.moveaxis(x.reshape(B, shares, count, chunk, *x.shape[3:]), 2, 0)
        x = x.reshape(count, B, shares * chunk, *x.shape[4:])
        return constrain(x, None, "batch", "tokens", *[None] * (x.ndim - 3), mesh=mesh)

    xs = chunks(hidden_BTD, 0), chunks(targets_BT, IGNORED_LABEL)
    add = lambda sums, xs: (jax.tree.map(jnp.add, sums, part(weight_VD, *xs)), None)  # noqa: E731
    zero = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))
    return mean_loss(*jax.lax.scan(add, zero, xs)[0], num_items_in_batch)


def _chunk(B: int, T: int, V: int, mesh: Mesh | None) -> int:
    """Columns whose float32 logits fit the limit on each device."""
    column = 4 * (B // _shares(B, "batch", mesh)) * (V // _shares(V, "vocab", mesh))
    fitting = max(1, _LOGITS_BYTES // column)
    if fitting > 128:
        fitting -= fitting % 128
    return min(T, fitting * _shares(T, "tokens", mesh))


def _shares(size: int, name: str, mesh: Mesh | None) -> int:
    """How many parts a dimension of this logical name is cut into."""
    if mesh is None:
        return 1
    return size // named_sharding((name,), (size,), mesh).shard_shape((size,))[0]
