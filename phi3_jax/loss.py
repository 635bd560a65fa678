"""Losses, float32 scalars. Letters as in model.py.

Everywhere -100 is a label that does not count, and where none counts the loss is 0, not NaN as in
the reference, so that an empty batch leaves the parameters alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from phi3_jax.head_loss import IGNORED_LABEL, Head, head_loss
from phi3_jax.sharding import constrain


def cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The summed cross-entropy of labels that are not -100, and how many those are.

    Args:
      logits: [..., V].
      labels: int [...].

    Returns:
      float32 and int32 scalars; the sum is NaN where a label is not a class.
    """
    logits = logits.astype(jnp.float32)
    picked = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == labels[..., None], logits, 0.0), -1)
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    losses = jnp.where((labels >= 0) & (labels < logits.shape[-1]), losses, jnp.nan)
    counted = labels != IGNORED_LABEL
    return jnp.sum(jnp.where(counted, losses, 0.0)), counted.sum()


def mean_loss(total: jax.Array, count: jax.Array) -> jax.Array:
    """A summed loss over the labels that count; 0 for no label."""
    return total / jnp.maximum(count, 1)


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
    """Cross-entropy of each next token, a few columns of the batch at a time (`head_loss`).

    The definition is that of the reference (`ForCausalLMLoss`).

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
      chunk: columns that a device computes at a time; by default as many as make 128 MiB of logits.
    """
    targets_BT = jnp.pad(labels_BT[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED_LABEL)
    if document_BT is not None:
        next_BT = jnp.pad(document_BT[:, 1:], ((0, 0), (0, 1)), mode="edge")
        same_BT = (next_BT == document_BT) & (document_BT != 0)
        targets_BT = jnp.where(same_BT, targets_BT, IGNORED_LABEL)
    # Whole rows of these few numbers, so that nothing is shifted from device to device.
    targets_BT = constrain(targets_BT, "batch", None, mesh=mesh)
    if num_items_in_batch is None:
        num_items_in_batch = jnp.sum(targets_BT != IGNORED_LABEL)
    scale = 1 / jnp.maximum(num_items_in_batch, 1).astype(jnp.float32)
    return head_loss(hidden_BTD, weight_VD, targets_BT, scale, Head(vocab_size, mesh, chunk))
