"""Which key a query sees, and the attention itself. Letters as in model.py."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def causal_mask(query_T: jax.Array, key_S: jax.Array, window: int | None) -> jax.Array:
    """Which columns a query may look at: those up to its own, the last `window` with its own.

    Columns, not positions: padding inside a window uses it up, as in the reference
    (`sliding_window_overlay` of transformers: q - window < kv <= q).

    Args:
      query_T, key_S: int32 column numbers.
      window: number of keys seen including the query's own, or None for all.

    Returns:
      bool [T, S].
    """
    distance = query_T[:, None] - key_S[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def attend(
    q_BTKGH: jax.Array,
    keys: Sequence[jax.Array],
    values: Sequence[jax.Array],
    masks: Sequence[jax.Array],
) -> jax.Array:
    """Softmax attention over one or more pieces of keys and values as if they were one.

    The pieces are the cached tokens and the new ones: so the cache is only read here, and what is
    new is written to it once for all layers.

    Args:
      q_BTKGH: queries, grouped by the key-value head that they share.
      keys, values: pieces [B, S, K, H], each with its own S.
      masks: bool [B, T, S] a piece, True where a query sees a key.

    Returns:
      [B, T, K, G, H] in the dtype of q. Scores and softmax are float32; probabilities are cast to
      the dtype of q before they meet the values, as in the reference (`eager_attention_forward`).
      A query that sees nothing gets the mean of all values: finite, and of no consequence.
    """
    scale = q_BTKGH.shape[-1] ** -0.5
    lowest = jnp.finfo(jnp.float32).min
    scores = []
    for k_BSKH, mask_BTS in zip(keys, masks, strict=True):
        score_BKGTS = jnp.einsum(
            "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
        )
        scores.append(jnp.where(mask_BTS[:, None, None], score_BKGTS * scale, lowest))
    probs = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(q_BTKGH.dtype)

    out, start = jnp.zeros((), q_BTKGH.dtype), 0
    for v_BSKH in values:
        stop = start + v_BSKH.shape[1]
        out = out + jnp.einsum("BKGTS,BSKH->BTKGH", probs[..., start:stop], v_BSKH)
        start = stop
    return out
