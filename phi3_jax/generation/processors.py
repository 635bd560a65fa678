"""How the next token is chosen from the logits, by the reference's rules, in its order."""

import flax.struct
import jax
import jax.numpy as jnp

from phi3_jax.generation.config import GenerationConfig


def top_k(logits_BV: jax.Array, k: jax.typing.ArrayLike) -> jax.Array:
    """Removes what is below the k-th largest; ties with it stay (TopKLogitsWarper)."""
    k = jnp.minimum(k, logits_BV.shape[-1])
    kth = jnp.take(jnp.sort(logits_BV, axis=-1), logits_BV.shape[-1] - k, axis=-1)
    return jnp.where(logits_BV < kth[:, None], -jnp.inf, logits_BV)


def top_p(logits_BV: jax.Array, tail: jax.typing.ArrayLike) -> jax.Array:
    """Keeps the smallest set of most likely tokens whose mass is at least p (TopPLogitsWarper).

    tail is 1 - p, subtracted in float64 as in the reference: for p = 0.8 and a token of just that
    mass, float32 would keep one token more.
    """
    order = jnp.argsort(logits_BV, axis=-1)
    ascending = jnp.take_along_axis(logits_BV, order, axis=-1)
    mass = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
    removed = (mass <= tail).at[:, -1].set(False)
    ascending = jnp.where(removed, -jnp.inf, ascending)
    return jnp.put_along_axis(logits_BV, order, ascending, axis=-1, inplace=False)


def min_p(logits_BV: jax.Array, p: jax.typing.ArrayLike) -> jax.Array:
    """Removes what is less likely than p times the most likely (MinPLogitsWarper)."""
    probs = jax.nn.softmax(logits_BV, axis=-1)
    return jnp.where(probs < p * probs.max(axis=-1, keepdims=True), -jnp.inf, logits_BV)


def repetition_penalty(
    logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.typing.ArrayLike
) -> jax.Array:
    """Makes ids that a row holds less likely, once however often it holds them
    (RepetitionPenaltyLogitsProcessor).
    """
    lowered = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return jnp.where(seen_BV, lowered, logits_BV)


@flax.struct.dataclass
class Settings:
    """A GenerationConfig as a compiled step sees it.

    A processor that is off is None and costs nothing; the others' values are arguments of the
    program, so that another value compiles nothing.
    """

    repetition_penalty: jax.Array | None
    temperature: jax.Array | None
    top_k: jax.Array | None
    top_p: jax.Array | None
    min_p: jax.Array | None
    eos_ids: jax.Array
    pad_id: jax.Array
    do_sample: bool = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, config: GenerationConfig, vocab_size: int) -> "Settings":
        """The settings that a config asks for.

        A processor whose value changes nothing is off, as in the reference. Ids beyond the
        vocabulary cannot come up, so they are of no consequence among the ends of a row; the
        padding id is written into the output and has to exist.

        Raises:
          ValueError: for a padding id outside the vocabulary.
        """
        eos_ids = [token for token in config.eos_token_ids if token < vocab_size]
        # As in the reference: without a padding id, finished rows repeat the first end id.
        pad_id = config.pad_token_id
        if pad_id is None:
            pad_id = eos_ids[0] if eos_ids else 0
        if pad_id >= vocab_size:
            raise ValueError(f"pad_token_id is {pad_id}, outside the vocabulary of {vocab_size}")

        def number(value, off, dtype):
            return None if value is None or value == off else jnp.asarray(value, dtype)

        def warper(value, off, dtype):
            return number(value, off, dtype) if config.do_sample else None

        return cls(
            repetition_penalty=number(config.repetition_penalty, 1.0, jnp.float32),
            temperature=warper(config.temperature, 1.0, jnp.float32),
            top_k=warper(config.top_k, 0, jnp.int32),
            top_p=None if config.top_p is None else warper(1.0 - config.top_p, 0.0, jnp.float32),
            min_p=warper(config.min_p, 0.0, jnp.float32),
            # Filled up to eight with what no token is, so that one more end compiles nothing.
            eos_ids=jnp.asarray(eos_ids + [-1] * (8 - len(eos_ids)), jnp.int32),
            pad_id=jnp.asarray(pad_id, jnp.int32),
            do_sample=config.do_sample,
        )

    def process(self, logits_BV: jax.Array, seen_BV: jax.Array | None = None) -> jax.Array:
        """The logits to choose from, -inf for what is removed.

        seen_BV: bool, the ids that each row holds; needed where there is a repetition penalty.
        """
        if self.repetition_penalty is not None and seen_BV is not None:
            logits_BV = repetition_penalty(logits_BV, seen_BV, self.repetition_penalty)
        if self.temperature is not None:
            logits_BV = logits_BV / self.temperature
        for function, value in ((top_k, self.top_k), (top_p, self.top_p), (min_p, self.min_p)):
            if value is not None:
                logits_BV = function(logits_BV, value)
        return logits_BV

    def choose(
        self, logits_BV: jax.Array, key: jax.Array, seen_BV: jax.Array | None = None
    ) -> jax.Array:
        """The next token of every row, int32 [B].

        Each row has a key of its own, from its number in the batch: what its neighbours hold, and
        how many there are, does not change its draws.
        """
        logits_BV = self.process(logits_BV, seen_BV)
        if not self.do_sample:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(logits_BV.shape[0]))
        drawn = jax.vmap(jax.random.categorical)(keys, logits_BV)
        return drawn.astype(jnp.int32)
