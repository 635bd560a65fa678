"""A GenerationConfig as the compiled step sees it, and what it knows of the rows so far.

The processors themselves are in processors.py (what a row may continue with), warpers.py (how the
distribution is cut before drawing) and watermark.py; here they are put in the reference's order
(`_get_logits_processor` of transformers).
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.config_checks import as_token_ids
from phi3_jax.generation import processors, warpers
from phi3_jax.generation.choice import choose
from phi3_jax.generation.config import GenerationConfig
from phi3_jax.generation.processors import SequenceBias
from phi3_jax.generation.watermark import Watermark

# f(tokens_BS, length_B, logits_BV) -> logits_BV, traceable by jax
LogitsProcessor = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def aligned_left(ids_BT: np.ndarray, mask_BT: np.ndarray, capacity: int) -> np.ndarray:
    """The rows' own tokens from column 0 on, -1 behind them: int32 [B, capacity]."""
    rows, columns = np.nonzero(mask_BT)
    tokens_BS = np.full((len(ids_BT), capacity), -1, np.int32)
    tokens_BS[rows, (np.cumsum(mask_BT, axis=1) - 1)[rows, columns]] = ids_BT[rows, columns]
    return tokens_BS


@flax.struct.dataclass
class Past:
    """What processors know of the rows; None for what no processor asks for.

    Rows are aligned on the left, without the padding of the prompt: a padded row looks as it does
    alone.

    Attributes:
      step: int32, tokens chosen so far.
      tokens_BS: int32, the rows' own tokens, prompt and continuation; -1 behind them.
      length_B: int32, how many those are.
      prompt_B: int32, how many of them are the prompt's.
      seen_BV: bool, the ids that each row holds.
      prompt_seen_BV: bool, the ids that each row's prompt holds.
    """

    step: jax.Array
    tokens_BS: jax.Array | None = None
    length_B: jax.Array | None = None
    prompt_B: jax.Array | None = None
    seen_BV: jax.Array | None = None
    prompt_seen_BV: jax.Array | None = None

    @classmethod
    def of(
        cls, settings: "Settings", input_ids: np.ndarray, attention_mask: np.ndarray, capacity: int
    ) -> "Past":
        """The past before the first token is chosen, in numpy arrays.

        Args:
          settings: they say what is asked for.
          input_ids: int32 [B, T], padded on the left.
          attention_mask: bool [B, T], False for padding.
          capacity: S, the most tokens a row can come to hold.
        """
        rows, columns = np.nonzero(attention_mask)
        ids = input_ids[rows, columns]
        length_B = attention_mask.sum(axis=1, dtype=np.int32)
        past: dict[str, Any] = {"step": np.zeros((), np.int32)}
        if settings.needs_tokens:
            tokens_BS = aligned_left(input_ids, attention_mask, capacity)
            past |= {"tokens_BS": tokens_BS, "length_B": length_B}
        if settings.encoder_no_repeat_ngram_size is not None:
            past["prompt_B"] = length_B.copy()
        penalties = (settings.repetition_penalty, settings.encoder_repetition_penalty)
        for name, penalty in zip(("seen_BV", "prompt_seen_BV"), penalties, strict=True):
            if penalty is not None:
                past[name] = np.zeros((len(input_ids), settings.vocab_size), bool)
                past[name][rows, ids] = True
        return cls(**past)

    def append(self, token_B: jax.Array) -> "Past":
        """The past with one more token of every row."""
        rows_B = jnp.arange(len(token_B))
        grown, length_B = {}, self.length_B
        if self.tokens_BS is not None and length_B is not None:
            grown["tokens_BS"] = self.tokens_BS.at[rows_B, length_B].set(token_B)
            grown["length_B"] = length_B + 1
        if self.seen_BV is not None:
            grown["seen_BV"] = self.seen_BV.at[rows_B, token_B].set(True)
        return dataclasses.replace(self, step=self.step + 1, **grown)

    def take(self, rows: jax.Array) -> "Past":
        """The past of these rows, by their numbers."""
        return jax.tree.map(lambda x: x if x.ndim == 0 else x[rows], self)


@flax.struct.dataclass
class Settings:
    """A GenerationConfig as a compiled step sees it.

    A processor that is off is None (or False) and costs nothing; the others' values are arguments
    of the program, so that another value compiles nothing. Attributes are named as in
    GenerationConfig; where a moment counts, it is the number of tokens chosen before it.

    Attributes:
      min_steps: int32, before which no row ends (min_length, min_new_tokens).
      forced_bos, forced_eos, begin_suppress: the step, int32, and the tokens, bool [V].
      suppress_V: bool.
      exponential_decay: the last step without it, int32, and the factor's logarithm.
      top_p: float32, the mass that may go, 1 - p.
      eos_ids: int32, at least 8, filled with -1.
      pad_id: int32, what finished rows emit.
      logits_processor: further processors, after the others and before the warpers.
      min_tokens_to_keep: tokens that warpers leave: one, or under beams one more than there are
        ends. Static, so under beams the number of ends is a part of the program.
    """

    sequence_bias: SequenceBias | None
    encoder_repetition_penalty: jax.Array | None
    repetition_penalty: jax.Array | None
    no_repeat_ngram_size: jax.Array | None
    encoder_no_repeat_ngram_size: jax.Array | None
    bad_words: SequenceBias | None
    min_steps: jax.Array | None
    forced_bos: tuple[jax.Array, jax.Array] | None
    forced_eos: tuple[jax.Array, jax.Array] | None
    exponential_decay: tuple[jax.Array, jax.Array] | None
    suppress_V: jax.Array | None
    begin_suppress: tuple[jax.Array, jax.Array] | None
    temperature: jax.Array | None
    top_h: jax.Array | None
    top_k: jax.Array | None
    top_p: jax.Array | None
    min_p: jax.Array | None
    typical_p: jax.Array | None
    epsilon_cutoff: jax.Array | None
    eta_cutoff: jax.Array | None
    watermark: Watermark | None
    eos_ids: jax.Array
    pad_id: jax.Array
    remove_invalid_values: bool = flax.struct.field(pytree_node=False)
    renormalize_logits: bool = flax.struct.field(pytree_node=False)
    logits_processor: tuple[LogitsProcessor, ...] = flax.struct.field(pytree_node=False)
    do_sample: bool = flax.struct.field(pytree_node=False)
    num_beams: int = flax.struct.field(pytree_node=False)
    min_tokens_to_keep: int = flax.struct.field(pytree_node=False)
    vocab_size: int = flax.struct.field(pytree_node=False)

    @classmethod
    def of(
        cls,
        config: GenerationConfig,
        vocab_size: int,
        prompt_width: int = 1,
        max_new_tokens: int | None = None,
        logits_processor: Iterable[LogitsProcessor] = (),
    ) -> "Settings":
        """The settings that a config asks for.

        A processor whose value changes nothing is off, as in the reference. Ids beyond the
        vocabulary cannot come up, so they are of no consequence among ends and suppressed tokens.

        Args:
          config: the request's.
          vocab_size: V.
          prompt_width: columns of the prompt, padding included; lengths count them.
          max_new_tokens: the last of them is where forced_eos_token_id comes; None for nowhere.
          logits_processor: callables f(tokens_BS, length_B, logits_BV) -> logits_BV, traceable by
            jax; tokens and lengths as in `Past`.

        Raises:
          ValueError: for ids outside the vocabulary that have to exist and suppressed tokens that
            leave none (`GenerationConfig.check_ids`), and for a processor that cannot be called.
        """
        config.check_ids(vocab_size)
        logits_processor = tuple(logits_processor)
        for processor in logits_processor:
            if not callable(processor):
                raise ValueError(
                    f"logits_processor holds {processor!r}, must hold functions "
                    "f(tokens_BS, length_B, logits_BV) -> logits_BV"
                )
        eos_ids = [token for token in config.eos_token_ids if token < vocab_size]
        # As in the reference: without a padding id, finished rows repeat the first end id.
        pad_id = config.pad_token_id
        if pad_id is None:
            pad_id = eos_ids[0] if eos_ids else 0

        def number(value, off=None, dtype=jnp.float32):
            return None if value is None or value == off else jnp.asarray(value, dtype)

        def warper(value, off=None, dtype=jnp.float32):
            return number(value, off, dtype) if config.do_sample else None

        def tokens(ids):
            mask_V = np.zeros(vocab_size, bool)
            mask_V[[token for token in as_token_ids(ids) if token < vocab_size]] = True
            return jnp.asarray(mask_V) if mask_V.any() else None

        def at(step, ids):
            mask_V = None if step is None else tokens(ids)
            return None if mask_V is None else (jnp.asarray(step, jnp.int32), mask_V)

        def biases(pairs):
            return SequenceBias.of(pairs, vocab_size) if pairs else None

        words = config.bad_words_ids or ()
        bad_words = [ids for ids in words if len(ids) > 1 or ids[0] not in eos_ids]
        # On wherever it is asked for, so that a longer prompt compiles nothing.
        least, skipped = config.min_new_tokens, 0
        if least is None:
            least, skipped = config.min_length, prompt_width
        last = None if max_new_tokens is None else max_new_tokens - 1
        # A text begins behind the token that is forced.
        begin = int(config.forced_bos_token_id is not None and prompt_width <= 1)
        decay, mark = config.exponential_decay_length_penalty, config.watermarking_config
        if decay is not None:
            start, factor = decay
            decay = (jnp.asarray(start, jnp.int32), jnp.asarray(math.log(factor), jnp.float32))
        # Under beams one that is no end, which can go on.
        keep = max(2, len(config.eos_token_ids) + 1) if config.num_beams > 1 else 1
        return cls(
            sequence_bias=biases(config.sequence_bias),
            # Inverse, as in the reference: above 1 the prompt's tokens become likelier.
            encoder_repetition_penalty=number(1 / (config.encoder_repetition_penalty or 1.0), 1.0),
            repetition_penalty=number(config.repetition_penalty, 1.0),
            no_repeat_ngram_size=number(config.no_repeat_ngram_size, 0, jnp.int32),
            encoder_no_repeat_ngram_size=number(config.encoder_no_repeat_ngram_size, 0, jnp.int32),
            bad_words=biases([(ids, -math.inf) for ids in bad_words]),
            min_steps=number(least - skipped, dtype=jnp.int32) if least and eos_ids else None,
            forced_bos=at(1 - prompt_width, config.forced_bos_token_id),
            forced_eos=at(last, config.forced_eos_token_id),
            exponential_decay=decay,
            suppress_V=tokens(config.suppress_tokens),
            begin_suppress=at(begin, config.begin_suppress_tokens),
            temperature=warper(config.temperature, 1.0),
            top_h=warper(config.top_h),
            top_k=warper(config.top_k and max(config.top_k, keep), 0, jnp.int32),
            top_p=None if config.top_p is None else warper(1.0 - config.top_p, 0.0),
            min_p=warper(config.min_p, 0.0),
            typical_p=warper(config.typical_p, 1.0),
            epsilon_cutoff=warper(config.epsilon_cutoff, 0.0),
            eta_cutoff=warper(config.eta_cutoff, 0.0),
            watermark=None if mark is None else Watermark.of(mark, vocab_size),
            # Filled up to eight with what no token is, so that without beams one more end
            # compiles nothing.
            eos_ids=jnp.asarray(eos_ids + [-1] * (8 - len(eos_ids)), jnp.int32),
            pad_id=jnp.asarray(pad_id, jnp.int32),
            remove_invalid_values=config.remove_invalid_values,
            renormalize_logits=config.renormalize_logits,
            logits_processor=logits_processor,
            do_sample=config.do_sample,
            num_beams=config.num_beams,
            min_tokens_to_keep=keep,
            vocab_size=vocab_size,
        )

    @property
    def needs_tokens(self) -> bool:
        """Whether a processor asks for the rows' tokens themselves."""
        biases = (self.sequence_bias, self.bad_words)
        return (
            self.no_repeat_ngram_size is not None
            or self.encoder_no_repeat_ngram_size is not None
            or any(bias is not None and bias.longer is not None for bias in biases)
            or self.watermark is not None
            or bool(self.logits_processor)
        )

    def process(
        self, past: Past, logits_BV: jax.Array, allowed_BW: jax.Array | None = None
    ) -> jax.Array:
        """The scores to choose from, float32 [B, V], -inf for what is removed.

        Args:
          past: of the same rows; under beams the beams of an item are neighbours.
          logits_BV: of the next token; under beams the log-probabilities so far.
          allowed_BW: uint32 [B, ceil(V / 32)], bit i of word w is set where the token 32 w + i may
            be chosen; None for all.

        Raises:
          ValueError: where one of logits_processor gives something else than logits [B, V].
        """
        scores_BV = logits_BV.astype(jnp.float32)
        known: Any = past  # what a processor asks for is there
        step, tokens_BS, length_B = known.step, known.tokens_BS, known.length_B

        if self.sequence_bias is not None:
            scores_BV = self.sequence_bias.add(scores_BV, tokens_BS, length_B)
        for penalty, seen_BV in (
            (self.encoder_repetition_penalty, known.prompt_seen_BV),
            (self.repetition_penalty, known.seen_BV),
        ):
            if penalty is not None:
                scores_BV = processors.repetition_penalty(scores_BV, seen_BV, penalty)
        for n, end_B in (
            (self.no_repeat_ngram_size, length_B),
            (self.encoder_no_repeat_ngram_size, known.prompt_B),
        ):
            if n is not None:
                scores_BV = processors.no_repeat_ngram(scores_BV, tokens_BS, length_B, end_B, n)
        if self.bad_words is not None:
            scores_BV = self.bad_words.add(scores_BV, tokens_BS, length_B)
        if self.min_steps is not None:
            scores_BV = processors.remove(scores_BV, self._eos_V & (step < self.min_steps))
        if allowed_BW is not None:
            scores_BV = processors.only_allowed(scores_BV, allowed_BW, self.num_beams)
        for forced in (self.forced_bos, self.forced_eos):
            if forced is not None:
                moment, forced_V = forced
                scores_BV = processors.force(scores_BV, forced_V, step == moment)
        if self.remove_invalid_values:
            scores_BV = processors.remove_invalid_values(scores_BV)
        if self.exponential_decay is not None:
            start, log_factor = self.exponential_decay
            steps = jnp.maximum(step - start, 0)
            scores_BV = processors.exponential_decay(scores_BV, self._eos_V, steps, log_factor)
        if self.suppress_V is not None:
            scores_BV = processors.remove(scores_BV, self.suppress_V)
        if self.begin_suppress is not None:
            moment, suppress_V = self.begin_suppress
            scores_BV = processors.remove(scores_BV, suppress_V & (step == moment))
        for processor in self.logits_processor:
            scores_BV = _applied(processor, tokens_BS, length_B, scores_BV)
        scores_BV = self._warp(scores_BV)
        if self.watermark is not None:
            scores_BV = self.watermark.add(scores_BV, tokens_BS, length_B)
        if self.renormalize_logits:
            scores_BV = jax.nn.log_softmax(scores_BV, axis=-1)
        return scores_BV

    @property
    def _eos_V(self):
        return (jnp.arange(self.vocab_size)[:, None] == self.eos_ids).any(axis=1)

    def _warp(self, scores_BV):
        whole_BV = scores_BV
        if self.temperature is not None:
            scores_BV = scores_BV / self.temperature
        for warper, value in ((warpers.top_h, self.top_h), (warpers.top_k, self.top_k)):
            if value is not None:
                scores_BV = warper(scores_BV, value)
        for warper, value in (
            (warpers.top_p, self.top_p),
            (warpers.min_p, self.min_p),
            (warpers.typical, self.typical_p),
            (warpers.epsilon, self.epsilon_cutoff),
            (warpers.eta, self.eta_cutoff),
        ):
            if value is not None:
                scores_BV = warper(scores_BV, value, self.min_tokens_to_keep)
        if scores_BV is whole_BV:
            return scores_BV
        # Some of them sort and compare, and lose a NaN by it.
        return jnp.where(jnp.isnan(whole_BV).any(axis=-1, keepdims=True), jnp.nan, scores_BV)

    def draw(self, scores_BV: jax.Array, key: jax.Array) -> jax.Array:
        """The next token of every row, int32 [B]: the best, or with do_sample one drawn; NO_TOKEN
        for a row with a NaN.
        """
        return choose(scores_BV, key if self.do_sample else None)


def _applied(processor: LogitsProcessor, tokens_BS, length_B, scores_BV):
    """What a user's processor makes of the scores, float32."""
    processed_BV = processor(tokens_BS, length_B, scores_BV)
    is_array = isinstance(processed_BV, jax.Array | np.ndarray)
    if not is_array or processed_BV.shape != scores_BV.shape:
        what = f"shape {processed_BV.shape}" if is_array else f"a {type(processed_BV).__name__}"
        raise ValueError(
            f"the logits_processor {getattr(processor, '__qualname__', repr(processor))} returned "
            f"{what}, must return logits of shape {scores_BV.shape}"
        )
    return jnp.asarray(processed_BV, jnp.float32)
