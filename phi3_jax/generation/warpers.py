"""How the distribution is cut before drawing from it.

Pure functions of float32 logits_BV, each after one class of transformers' logits_process.py, which
its docstring names. What is cut becomes -inf; at least `keep` tokens stay. Where several tokens
are equally likely and only some of them may stay, the reference leaves open which.
"""

import jax
import jax.numpy as jnp
from jax import lax

ArrayLike = jax.typing.ArrayLike

# Top-H looks at no more tokens than these.
TOP_H_CANDIDATES = 100


def top_h(logits_BV: jax.Array, share: ArrayLike) -> jax.Array:
    """Keeps the most likely tokens while their entropy is at most that share of the whole, of the
    100 most likely (TopHLogitsWarper, arXiv:2509.02510).
    """
    top_BC, ids_BC = lax.top_k(logits_BV, min(TOP_H_CANDIDATES, logits_BV.shape[-1]))
    probs_BC = jax.nn.softmax(top_BC, axis=-1)
    limit_B1 = share * _entropy(top_BC)
    # An impossible token has the term NaN, which is not at most anything.
    entropy_BC = jnp.cumsum(-probs_BC * jnp.log(probs_BC), axis=-1)
    kept_BC = (entropy_BC <= limit_B1).at[:, 0].set(True)
    kept_BV = jnp.zeros(logits_BV.shape, bool)
    kept_BV = jnp.put_along_axis(kept_BV, ids_BC, kept_BC, axis=-1, inplace=False)
    return _cut(logits_BV, ~kept_BV)


def top_k(logits_BV: jax.Array, k: ArrayLike) -> jax.Array:
    """Removes what is below the k-th largest; ties with it stay (TopKLogitsWarper)."""
    k = jnp.minimum(k, logits_BV.shape[-1])
    kth = jnp.take(jnp.sort(logits_BV, axis=-1), logits_BV.shape[-1] - k, axis=-1)
    return _cut(logits_BV, logits_BV < kth[:, None])


def top_p(logits_BV: jax.Array, tail: ArrayLike, keep: int = 1) -> jax.Array:
    """Keeps the smallest set of most likely tokens whose mass is at least p (TopPLogitsWarper).

    tail is 1 - p, subtracted in float64 as in the reference: for p = 0.8 and a token of just that
    mass, float32 would keep one token more.
    """
    ascending_BV = jnp.sort(logits_BV, axis=-1)
    mass_BV = jnp.cumsum(jax.nn.softmax(ascending_BV, axis=-1), axis=-1)
    size = logits_BV.shape[-1]
    removed_B1 = jnp.minimum((mass_BV <= tail).sum(axis=-1, keepdims=True), size - keep)
    least_B1 = jnp.take_along_axis(ascending_BV, removed_B1, axis=-1)
    # By value, and not back through the order of the sort: a GPU scatters one number at a time.
    equal_BV = logits_BV == least_B1
    kept_B1 = ((ascending_BV == least_B1) & (jnp.arange(size) >= removed_B1)).sum(-1, keepdims=True)
    kept_BV = (logits_BV > least_B1) | (equal_BV & (jnp.cumsum(equal_BV, axis=-1) <= kept_B1))
    return _cut(logits_BV, ~kept_BV)


def min_p(logits_BV: jax.Array, p: ArrayLike, keep: int = 1) -> jax.Array:
    """Removes what is less likely than p times the most likely (MinPLogitsWarper)."""
    probs_BV = jax.nn.softmax(logits_BV, axis=-1)
    removed_BV = probs_BV < p * probs_BV.max(axis=-1, keepdims=True)
    if keep > 1:
        _, ids = lax.top_k(probs_BV, min(keep, logits_BV.shape[-1]))
        removed_BV = jnp.put_along_axis(removed_BV, ids, False, axis=-1, inplace=False)
    return _cut(logits_BV, removed_BV)


def typical(logits_BV: jax.Array, mass: ArrayLike, keep: int = 1) -> jax.Array:
    """Keeps the tokens whose surprise is nearest to the expected one, up to that mass
    (TypicalLogitsWarper, arXiv:2202.00666).
    """
    log_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    entropy_B1 = -jnp.nansum(log_BV * jnp.exp(log_BV), axis=-1, keepdims=True)
    distance_BV = jnp.abs(-log_BV - entropy_B1)
    order_BV = jnp.argsort(distance_BV, axis=-1)
    ascending_BV = jnp.take_along_axis(distance_BV, order_BV, axis=-1)
    nearest_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    below_BV = jnp.cumsum(jax.nn.softmax(nearest_BV, axis=-1), axis=-1) < mass
    last_B1 = jnp.minimum(below_BV.sum(axis=-1, keepdims=True), logits_BV.shape[-1] - 1)
    removed_BV = ascending_BV > jnp.take_along_axis(ascending_BV, last_B1, axis=-1)
    return _cut(logits_BV, _unsorted(removed_BV.at[:, :keep].set(False), order_BV))


def epsilon(logits_BV: jax.Array, cutoff: ArrayLike, keep: int = 1) -> jax.Array:
    """Removes what is less likely than the cutoff (EpsilonLogitsWarper, arXiv:2210.15191)."""
    unlikely_BV = jax.nn.softmax(logits_BV, axis=-1) < cutoff
    return _cut(logits_BV, unlikely_BV & (logits_BV < _nth_largest(logits_BV, keep)))


def eta(logits_BV: jax.Array, cutoff: ArrayLike, keep: int = 1) -> jax.Array:
    """Removes what is less likely than the cutoff, or than its root times exp(-entropy) where that
    is less (EtaLogitsWarper, arXiv:2210.15191).
    """
    limit_B1 = jnp.minimum(cutoff, jnp.sqrt(cutoff) * jnp.exp(-_entropy(logits_BV)))
    return epsilon(logits_BV, limit_B1, keep)


def _cut(logits_BV, removed_BV):
    return jnp.where(removed_BV, -jnp.inf, logits_BV)


def _unsorted(sorted_BV, order_BV):
    """What was found in sorted order, in the order of the tokens."""
    return jnp.put_along_axis(sorted_BV, order_BV, sorted_BV, axis=-1, inplace=False)


def _nth_largest(logits_BV, n: int):
    return lax.top_k(logits_BV, min(n, logits_BV.shape[-1]))[0][:, -1:]


def _entropy(logits_BV):
    """[B, 1]; impossible tokens count for nothing."""
    log_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    log_BV = jnp.maximum(log_BV, jnp.finfo(jnp.float32).min)
    return -(jnp.exp(log_BV) * log_BV).sum(axis=-1, keepdims=True)
