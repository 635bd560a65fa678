"""Watermarks: a part of the vocabulary, other after every token, is made likelier, and found again.

The lists are those of transformers' WatermarkLogitsProcessor on torch's CPU, bit for bit, so that
either detects what the other wrote (arXiv:2301.10226, arXiv:2306.04634). There the green list is
the start of torch.randperm: a Fisher-Yates shuffle that draws with the Mersenne Twister MT19937
(doi:10.1145/272991.272995), seeded by the tokens before.
"""

import collections
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from phi3_jax.generation.watermarking_config import WatermarkingConfig

# The words of MT19937's state, and how far apart those are that are mixed.
STATE, APART = 624, 397

# Self-hashing rates this many of the most likely tokens, by a table of this many numbers.
CANDIDATES, TABLE = 40, 1000003


def shuffled(seed: int, size: int, count: int) -> list[int]:
    """The first entries of torch.randperm(size) on a CPU generator with that seed."""
    words = np.random.RandomState(seed & 0xFFFFFFFF).randint(0, 2**32, count, dtype=np.uint32)
    order = list(range(size))
    for place, word in enumerate(words.tolist()):
        other = place + word % (size - place)
        order[place], order[other] = order[other], order[place]
    return order[:count]


@functools.lru_cache(maxsize=4)
def _left_seeds(key: int, vocab_size: int) -> np.ndarray:
    """The seed behind each token, uint32 [V], for seeding by the last token alone."""
    seeds = [key * token % (2**64 - 1) & 0xFFFFFFFF for token in range(vocab_size)]
    return np.array(seeds, np.uint32)


@functools.lru_cache(maxsize=4)
def _hashes(key: int, vocab_size: int) -> np.ndarray:
    """A number for each token, uint64 [V], for seeding by the token itself and those before."""
    table = shuffled(key, TABLE, min(vocab_size, TABLE))
    return np.resize(table, vocab_size).astype(np.uint64) + np.uint64(1)


def _words(seed_R: jax.Array, count: jax.Array, most: int) -> jax.Array:
    """What MT19937 gives for each seed: uint32 [R, most], of which the first count are right."""

    def fill(word_R, place):
        word_R = (word_R ^ word_R >> 30) * np.uint32(1812433253) + place
        return word_R, word_R

    places = jnp.arange(1, STATE, dtype=jnp.uint32)
    _, rest = lax.scan(fill, seed_R, places, unroll=16)

    def mixed(high, low):
        word = high & np.uint32(0x80000000) | low & np.uint32(0x7FFFFFFF)
        return word >> 1 ^ jnp.where(low & 1 == 1, np.uint32(0x9908B0DF), np.uint32(0))

    def block(number, carry):
        state, words = carry
        last = STATE - APART
        pairs = mixed(state[:-1], state[1:])
        first = state[APART:] ^ pairs[:last]
        second = first ^ pairs[last : 2 * last]
        left = STATE - 1 - 2 * last
        third = second[:left] ^ pairs[2 * last :]
        end = second[left : left + 1] ^ mixed(state[-1:], first[:1])
        state = jnp.concatenate([first, second, third, end])
        word = state ^ state >> 11
        word ^= word << 7 & np.uint32(0x9D2C5680)
        word ^= word << 15 & np.uint32(0xEFC60000)
        word ^= word >> 18
        return state, lax.dynamic_update_slice_in_dim(words, word, number * STATE, axis=0)

    blocks = -(-most // STATE)
    words = jnp.zeros((blocks * STATE, len(seed_R)), jnp.uint32)
    state = jnp.concatenate([seed_R[None], rest])
    _, words = lax.fori_loop(0, -(-count // STATE), block, (state, words))
    return words[:most].T


def green_list(seed_R: jax.Array, size: jax.Array, vocab_size: int) -> jax.Array:
    """The tokens among the first `size` of the shuffle of each seed: bool [R, V].

    Not swap by swap. The swap at a place takes the word there to a place behind it, where it stays
    until the next swap that meets this place, or until its own turn. So what ends at a place
    behind the first `size` was, before the last swap that met the place, at the place whose turn
    it was; where that was brought there by an earlier swap, follow on. Following all chains at
    once, twice as far each time, takes some five rounds, and what ends behind is not green.
    """
    place_V = jnp.arange(vocab_size)
    word_RV = _words(seed_R, size, vocab_size)
    ahead = (word_RV % (vocab_size - place_V).astype(jnp.uint32)).astype(jnp.int32)
    moved_RV = (place_V < size) & (ahead > 0)
    other_RV = jnp.where(moved_RV, place_V + ahead, vocab_size)
    rows_R1 = jnp.arange(len(seed_R))[:, None]
    from_RV = jnp.full(ahead.shape, -1).at[rows_R1, other_RV].max(place_V, mode="drop")
    from_RV = jnp.where(from_RV >= 0, from_RV, place_V)

    def further(two):
        return two[1], jnp.take_along_axis(two[1], two[1], axis=1)

    _, origin_RV = lax.while_loop(
        lambda two: (two[0] != two[1]).any(), further, further((from_RV, from_RV))
    )
    red_RV = jnp.where(place_V >= size, origin_RV, vocab_size)
    return jnp.ones(ahead.shape, bool).at[rows_R1, red_RV].set(False, mode="drop")


@flax.struct.dataclass
class SelfHash:
    """Seeding by the candidate itself and the tokens before it.

    Attributes:
      high_V, low_V: uint32, halves of the key times the token's number, modulo 2^64.
      factor_V: uint32, the token's number.
      back_W: int32, how far back the tokens that count are, 0 the candidate.
    """

    high_V: jax.Array
    low_V: jax.Array
    factor_V: jax.Array
    back_W: jax.Array

    def seeds(self, tokens_BS: jax.Array, length_B: jax.Array, token_BC: jax.Array) -> jax.Array:
        """The seed behind each candidate, uint32 [B, C].

        The reference multiplies int64 numbers, whose overflow wraps, and takes their minimum, then
        that modulo 2^64 - 1: a negative one loses 1.
        """
        place_BW = length_B[:, None] - self.back_W
        before_BW = jnp.take_along_axis(tokens_BS, place_BW, axis=1, mode="clip")
        near_BCW = jnp.where(self.back_W == 0, token_BC[:, :, None], before_BW[:, None, :])
        factor, low = self.factor_V[token_BC][:, :, None], self.low_V[near_BCW]
        high = self.high_V[near_BCW] * factor + _high_product(low, factor)
        low, high = low * factor, high.astype(jnp.int32)
        least_BC = high.min(axis=-1)
        low_BC = jnp.where(high == least_BC[:, :, None], low, np.uint32(0xFFFFFFFF)).min(axis=-1)
        return low_BC - (least_BC < 0)


def _high_product(a, b):
    """The upper half of the products of uint32 numbers."""
    a0, a1, b0, b1 = a & 0xFFFF, a >> 16, b & 0xFFFF, b >> 16
    middle = a1 * b0 + (a0 * b0 >> 16)
    return a1 * b1 + (middle >> 16) + ((middle & 0xFFFF) + a0 * b1 >> 16)


@flax.struct.dataclass
class Watermark:
    """A WatermarkingConfig as the compiled step sees it.

    Attributes:
      greenlist_size: int32.
      bias: float32, what green tokens gain.
      context_width: int32; shorter rows are left alone.
      seeding: for lefthash uint32 [V], the seed behind each token.
    """

    greenlist_size: jax.Array
    bias: jax.Array
    context_width: jax.Array
    seeding: jax.Array | SelfHash

    @classmethod
    def of(cls, config: WatermarkingConfig, vocab_size: int) -> "Watermark":
        """The watermark that a config asks for."""
        if config.seeding_scheme == "lefthash":
            seeding = jnp.asarray(_left_seeds(config.hashing_key, vocab_size))
        else:
            hashes_V = _hashes(config.hashing_key, vocab_size)
            product_V = hashes_V * np.uint64(config.hashing_key % 2**64)
            # Filled up with the candidate itself, which a minimum does not mind.
            width = max(8, 1 << (config.context_width - 1).bit_length())
            back_W = np.zeros(width, np.int32)
            back_W[: config.context_width] = np.arange(config.context_width)
            seeding = SelfHash(
                high_V=jnp.asarray((product_V >> np.uint64(32)).astype(np.uint32)),
                low_V=jnp.asarray(product_V.astype(np.uint32)),
                factor_V=jnp.asarray(hashes_V.astype(np.uint32)),
                back_W=jnp.asarray(back_W),
            )
        return cls(
            greenlist_size=jnp.asarray(int(vocab_size * config.greenlist_ratio), jnp.int32),
            bias=jnp.asarray(config.bias, jnp.float32),
            context_width=jnp.asarray(config.context_width, jnp.int32),
            seeding=seeding,
        )

    def add(self, scores_BV: jax.Array, tokens_BS: jax.Array, length_B: jax.Array) -> jax.Array:
        """Adds the bias to the green tokens (WatermarkLogitsProcessor)."""
        if isinstance(self.seeding, SelfHash):
            green_BV = self._green_candidates(self.seeding, scores_BV, tokens_BS, length_B)
        else:
            last_B1 = jnp.take_along_axis(tokens_BS, length_B[:, None] - 1, axis=1, mode="clip")
            seed_B = self.seeding[last_B1[:, 0]]
            green_BV = green_list(seed_B, self.greenlist_size, scores_BV.shape[1])
        green_BV &= (length_B >= self.context_width)[:, None]
        return jnp.where(green_BV, scores_BV + self.bias, scores_BV)

    def _green_candidates(self, seeding: SelfHash, scores_BV, tokens_BS, length_B):
        """The most likely tokens that are in the list which they themselves seed."""
        vocab_size = scores_BV.shape[1]
        _, token_BC = lax.top_k(scores_BV, min(CANDIDATES, vocab_size))
        seed_BC = seeding.seeds(tokens_BS, length_B, token_BC)

        def rate(candidate):
            token_B, seed_B = candidate
            green_BV = green_list(seed_B, self.greenlist_size, vocab_size)
            return jnp.take_along_axis(green_BV, token_B[:, None], axis=1)[:, 0]

        # A few at a time: each needs several arrays of [B, V].
        green_CB = lax.map(rate, (token_BC.T, seed_BC.T), batch_size=8)
        green_BV = jnp.zeros(scores_BV.shape, bool)
        return jnp.put_along_axis(green_BV, token_BC, green_CB.T, axis=1, inplace=False)


@dataclass(frozen=True)
class WatermarkDetectorOutput:
    """What a detector found, numpy [B] each.

    Attributes:
      num_tokens_scored, num_green_tokens, green_fraction: how many of the tokens are green.
      z_score: by how many standard deviations that is more than without a watermark.
      p_value: how likely so many are without a watermark; confidence is 1 less that.
      prediction: bool, whether z_score is above the threshold.
    """

    num_tokens_scored: np.ndarray
    num_green_tokens: np.ndarray
    green_fraction: np.ndarray
    z_score: np.ndarray
    p_value: np.ndarray
    prediction: np.ndarray
    confidence: np.ndarray


class WatermarkDetector:
    """Tells whether texts carry a watermark (transformers.WatermarkDetector)."""

    def __init__(
        self,
        vocab_size: int,
        bos_token_id: int | None,
        watermarking_config: WatermarkingConfig | Mapping[str, Any],
        ignore_repeated_ngrams: bool = False,
    ):
        """What the texts were made with.

        Args:
          vocab_size: of the model.
          bos_token_id: is no part of the text at its start.
          watermarking_config: as in generation, a WatermarkingConfig or a dict of its fields.
          ignore_repeated_ngrams: count equal tokens behind equal ones once.

        Raises:
          ValueError: for a config that is none (`WatermarkingConfig.of`).
        """
        self.config = WatermarkingConfig.of(watermarking_config)
        self.bos_token_id = bos_token_id
        self.ignore_repeated_ngrams = ignore_repeated_ngrams
        self.vocab_size = vocab_size
        self._is_green = functools.lru_cache(maxsize=1024)(self._rate)

    def _rate(self, ngram: tuple[int, ...]) -> bool:
        """Whether the last token of an n-gram is green behind the others."""
        key = self.config.hashing_key
        if self.config.seeding_scheme == "lefthash":
            seed = key * ngram[-2] % (2**64 - 1)
        else:
            hashes = _hashes(key, self.vocab_size)[list(ngram)]
            products = hashes * np.uint64(key % 2**64) * hashes[-1]
            seed = int(products.view(np.int64).min()) % (2**64 - 1)
        size = int(self.vocab_size * self.config.greenlist_ratio)
        return ngram[-1] in shuffled(seed, self.vocab_size, size)

    def __call__(self, input_ids: Any, z_threshold: float = 3.0) -> WatermarkDetectorOutput:
        """Rates texts.

        Args:
          input_ids: integers [B, T], without padding.
          z_threshold: in standard deviations.

        Raises:
          ValueError: for ids that are not integers [B, T] in the vocabulary, where some rows begin
            with the beginning-of-text token and some do not, and for rows too short to rate a
            token.
        """
        ids_BT = np.asarray(input_ids)
        if ids_BT.ndim != 2 or not ids_BT.size or not np.issubdtype(ids_BT.dtype, np.integer):
            raise ValueError(
                f"input_ids has shape {ids_BT.shape} and dtype {ids_BT.dtype}, must be integers "
                "[B, T]; one text is [[id, ...]]"
            )
        outside = ids_BT[(ids_BT < 0) | (ids_BT >= self.vocab_size)]
        if outside.size:
            raise ValueError(
                f"input_ids holds {outside[0]}, outside the vocabulary of {self.vocab_size}; does "
                "the tokenizer belong to this model?"
            )
        begins_B = ids_BT[:, 0] == self.bos_token_id
        if begins_B.any() != begins_B.all():
            raise ValueError(
                f"{begins_B.sum()} of {len(begins_B)} rows begin with bos_token_id "
                f"{self.bos_token_id}; tokenize all with it, or all without"
            )
        if begins_B.all():
            ids_BT = ids_BT[:, 1:]
        width = self.config.context_width
        if ids_BT.shape[1] <= width:
            raise ValueError(
                f"rows have {ids_BT.shape[1]} tokens, must have more than context_width {width}"
            )
        n = width + (self.config.seeding_scheme == "lefthash")
        rows = [self._count(np.lib.stride_tricks.sliding_window_view(row, n)) for row in ids_BT]
        scored_B, green_B = np.array(rows, np.float64).T
        share = self.config.greenlist_ratio
        z_B = (green_B - share * scored_B) / np.sqrt(scored_B * share * (1 - share))
        p_B = np.array([0.5 * math.erfc(z / math.sqrt(2)) for z in z_B])
        return WatermarkDetectorOutput(
            num_tokens_scored=scored_B,
            num_green_tokens=green_B,
            green_fraction=green_B / scored_B,
            z_score=z_B,
            p_value=p_B,
            prediction=z_B > z_threshold,
            confidence=1 - p_B,
        )

    def _count(self, ngrams: np.ndarray) -> tuple[int, int]:
        """How many tokens are rated, and how many of them green."""
        times = collections.Counter(map(tuple, ngrams.tolist()))
        if self.ignore_repeated_ngrams:
            times = dict.fromkeys(times, 1)
        green = sum(count for ngram, count in times.items() if self._is_green(ngram))
        return sum(times.values()), green
