"""What a row may continue with: rules on the logits that hold for greedy decoding too.

Pure functions of arrays, each after one class of transformers' logits_process.py, which its
docstring names. The tokens of a row stand on the left of tokens_BS, without padding.
"""

from collections.abc import Iterable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

ArrayLike = jax.typing.ArrayLike


def repetition_penalty(logits_BV: jax.Array, seen_BV: jax.Array, penalty: ArrayLike) -> jax.Array:
    """Makes ids that a row holds less likely, once however often it holds them
    (RepetitionPenaltyLogitsProcessor; with the inverse of the penalty
    EncoderRepetitionPenaltyLogitsProcessor).
    """
    lowered = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return jnp.where(seen_BV, lowered, logits_BV)


def no_repeat_ngram(
    logits_BV: jax.Array,
    tokens_BS: jax.Array,
    length_B: jax.Array,
    end_B: jax.Array,
    n: ArrayLike,
) -> jax.Array:
    """Removes tokens that would complete an n-gram of the row's first end_B tokens
    (NoRepeatNGramLogitsProcessor; for those of the prompt EncoderNoRepeatNGramLogitsProcessor).
    """

    def compare(back, match_BS):
        last_B1 = jnp.take_along_axis(tokens_BS, length_B[:, None] - back, axis=1, mode="clip")
        return match_BS & (jnp.roll(tokens_BS, back, axis=1) == last_B1)

    # A column matches where the n - 1 tokens before it are the row's last n - 1.
    column_S = jnp.arange(tokens_BS.shape[1])
    match_BS = (column_S >= n - 1) & (column_S < end_B[:, None])
    match_BS = lax.fori_loop(1, n, compare, match_BS)
    vocab_size = logits_BV.shape[1]
    banned_BS = jnp.where(match_BS, tokens_BS, vocab_size)
    rows_B1 = jnp.arange(len(tokens_BS))[:, None]
    return logits_BV.at[rows_B1, banned_BS].set(-jnp.inf, mode="drop")


@flax.struct.dataclass
class SequenceBias:
    """Biases of tokens, and of tokens behind certain others.

    Attributes:
      single_V: float32, of single tokens.
      longer: of sequences, None where all are single tokens: int32 [N, P], the tokens before the
        biased one, on the right, -1 before them; int32 [N], the biased token; float32 [N], its
        bias. Rows that fill up have the bias 0.
    """

    single_V: jax.Array
    longer: tuple[jax.Array, jax.Array, jax.Array] | None

    @classmethod
    def of(cls, pairs: Iterable[tuple[Sequence[int], float]], vocab_size: int) -> "SequenceBias":
        """From pairs of a sequence and its bias; of equal sequences the last counts.

        N and P are filled up to powers of two, so that a list of similar size compiles nothing.
        """
        table = {tuple(ids): bias for ids, bias in pairs}
        single_V = np.zeros(vocab_size, np.float32)
        for ids, bias in table.items():
            if len(ids) == 1:
                single_V[ids[0]] = bias
        longer = [(ids, bias) for ids, bias in table.items() if len(ids) > 1]
        if not longer:
            return cls(jnp.asarray(single_V), None)
        rows = _power_of_two(len(longer))
        width = _power_of_two(max(len(ids) for ids, _ in longer) - 1)
        prefix_NP = np.full((rows, width), -1, np.int32)
        last_N, bias_N = np.zeros(rows, np.int32), np.zeros(rows, np.float32)
        for row, (ids, bias) in enumerate(longer):
            prefix_NP[row, width - len(ids) + 1 :] = ids[:-1]
            last_N[row], bias_N[row] = ids[-1], bias
        filled = (jnp.asarray(prefix_NP), jnp.asarray(last_N), jnp.asarray(bias_N))
        return cls(jnp.asarray(single_V), filled)

    def add(self, logits_BV: jax.Array, tokens_BS: jax.Array, length_B: jax.Array) -> jax.Array:
        """Adds the biases of the tokens that may come next (SequenceBiasLogitsProcessor,
        NoBadWordsLogitsProcessor); without longer sequences tokens and lengths are not looked at.
        """
        bias_BV = jnp.broadcast_to(self.single_V, logits_BV.shape)
        if self.longer is not None:
            prefix_NP, last_N, bias_N = self.longer
            width = prefix_NP.shape[1]
            place_BP = length_B[:, None] - width + jnp.arange(width)
            last_BP = jnp.take_along_axis(tokens_BS, place_BP, axis=1, mode="clip")
            # Before a row's first token stands what no prefix holds.
            last_BP = jnp.where(place_BP >= 0, last_BP, -2)
            same_BNP = (last_BP[:, None, :] == prefix_NP) | (prefix_NP == -1)
            found_BN = jnp.where(same_BNP.all(axis=-1), bias_N, 0.0)
            bias_BV = bias_BV.at[:, last_N].add(found_BN)
        return logits_BV + bias_BV


def _power_of_two(count: int) -> int:
    return max(8, 1 << (count - 1).bit_length())


def remove(logits_BV: jax.Array, removed: jax.Array) -> jax.Array:
    """Sets what is marked in removed, bool [V] or [B, V], to -inf (SuppressTokensLogitsProcessor;
    MinLengthLogitsProcessor where it holds for the ends).
    """
    return jnp.where(removed, -jnp.inf, logits_BV)


def only_allowed(logits_BV: jax.Array, allowed_BW: jax.Array, num_beams: int = 1) -> jax.Array:
    """Removes what is not allowed (PrefixConstrainedLogitsProcessor).

    Where that removes everything of all the num_beams rows of an item, its allowed tokens get 0:
    a rule further up has removed them, and what is allowed wins.
    """
    shifts = jnp.arange(32, dtype=jnp.uint32)
    bits_BV = (allowed_BW[:, :, None] >> shifts & 1).reshape(len(allowed_BW), -1)
    allowed_BV = bits_BV[:, : logits_BV.shape[1]] == 1
    kept_BV = remove(logits_BV, ~allowed_BV)
    nothing_B = jnp.isneginf(kept_BV.max(axis=1)).reshape(-1, num_beams).all(axis=1)
    nothing_B = jnp.repeat(nothing_B, num_beams)
    return jnp.where(nothing_B[:, None] & allowed_BV, 0.0, kept_BV)


def force(logits_BV: jax.Array, forced_V: jax.Array, now: ArrayLike) -> jax.Array:
    """Where `now`, leaves only the marked tokens, with equal scores (ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor).
    """
    return jnp.where(now, jnp.where(forced_V, 0.0, -jnp.inf), logits_BV)


def remove_invalid_values(logits_BV: jax.Array) -> jax.Array:
    """NaN becomes 0, infinities the largest numbers of their sign (InfNanRemoveLogitsProcessor)."""
    return jnp.nan_to_num(logits_BV)


def exponential_decay(
    logits_BV: jax.Array, eos_V: jax.Array, steps: ArrayLike, log_factor: ArrayLike
) -> jax.Array:
    """Raises the ends by their size times factor^steps - 1 (ExponentialDecayLengthPenalty);
    ends that other rules have removed stay removed.
    """
    raised = logits_BV + jnp.abs(logits_BV) * jnp.expm1(steps * log_factor)
    return jnp.where(eos_V & jnp.isfinite(logits_BV), raised, logits_BV)
