"""What generation_config.json says: how to choose tokens and when to stop."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from phi3_jax.config import Phi3Config
from phi3_jax.config_checks import as_token_ids
from phi3_jax.frozen_mapping import FrozenMapping, thaw
from phi3_jax.generation import config_checks
from phi3_jax.generation.config_checks import SAMPLING_SETTINGS as SAMPLING_SETTINGS
from phi3_jax.generation.watermarking_config import WatermarkingConfig
from phi3_jax.json_files import read_json_object

GENERATION_CONFIG_FILE = "generation_config.json"


@dataclass(frozen=True, init=False, repr=False)
class GenerationConfig:
    """Settings of one generation, with the names and defaults of the reference.

    Only what was given counts when configs are laid over one another (`over`): a call wins over
    a passed config, that over the folder's generation_config.json, that over the special tokens in
    its config.json, those over the defaults below. None means "none", not "the default":
    `eos_token_id=None` lets nothing but the length stop a row, and a switch is off. In a
    generation_config.json null means that nothing was said, since transformers writes it for every
    open setting. Lists become tuples, numpy's values Python's; an empty list is as good as none.
    `GenerationConfig(top_k=3).over(config)` is a config with another value; dataclasses.replace,
    which would take every setting for a given one, is refused.

    Lengths and ends:
      max_new_tokens: tokens to add to the prompt; wins over max_length. Without either, 20.
      max_length: columns of prompt, padding included, and continuation together.
      min_new_tokens, min_length: as those; no row ends before. The first wins.
      max_time: seconds after which no more tokens are begun.
      stop_strings: texts that end a row; the tokens that hold them stay in the output.
      eos_token_id: an id or several that end a row; the id itself stays in the output.
      pad_token_id: what finished rows emit.
      bos_token_id: what a generation without a prompt begins with.

    Strategy:
      do_sample: draw from the distribution instead of taking its maximum.
      num_beams: beams kept for each row; 1 for no beam search.
      num_return_sequences: continuations of each row, beside one another in the output.
      early_stopping: beam search ends with num_beams finished candidates (True), when a better one
        is unlikely (False), or when there can be none ("never").
      length_penalty: finished beams' log-probabilities are divided by their length to this power.
      guidance_scale: classifier-free guidance, how far the scores move from those without the
        prompt, or with a negative one; 1 is none.
      token_healing: the prompt's last token may be replaced by a longer one that begins with it.
      prompt_lookup_num_tokens: tokens drafted from the prompt's own n-grams.
      max_matching_ngram_size: the longest n-gram looked up so; 2 if None.
      num_assistant_tokens: tokens that a draft model drafts at a time.
      num_assistant_tokens_schedule: "constant"; with "heuristic" or "heuristic_transient" two more
        after a draft that was right throughout, one fewer after another.
      assistant_confidence_threshold: a draft ends at a token less likely than that.

    Scores, in the order in which they are changed:
      sequence_bias: {ids: bias}, added to the last id's logit where those before it stand; kept as
        pairs.
      encoder_repetition_penalty: above 1 favours the prompt's ids.
      repetition_penalty: divides positive and multiplies negative logits of ids that the row holds
        already, prompt included; in greedy decoding too.
      no_repeat_ngram_size: n-grams of that size come up once; encoder_no_repeat_ngram_size: those
        of the prompt never.
      bad_words_ids: lists of ids that never come up in a row.
      forced_bos_token_id: the only choice behind a prompt of one token.
      forced_eos_token_id: one id or several, the only choices for the last token.
      remove_invalid_values: nan becomes 0, infinities the largest numbers.
      exponential_decay_length_penalty: (start, factor); from start new tokens on, ends become
        likelier by a power of the factor.
      suppress_tokens, begin_suppress_tokens: ids that never come up, or not as the first token.
      temperature, top_h, top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff: how the
        distribution is cut before drawing, in this order; no part of decoding without do_sample.
      watermarking_config: a WatermarkingConfig or a dict of its fields.
      renormalize_logits: log-probabilities again at the end.

    Cache:
      use_cache: False leaves the cache out of the result; the tokens are the same, since they are
        computed with one either way.
      cache_implementation: None, "dynamic" and "static" are the full cache; "sliding_window" and
        "hybrid" keep no more than the model's window; "quantized" keeps 8 bits a number.
      cache_config: {"nbits": 8} may stand beside "quantized".
      max_cache_len: tokens a row's cache is made for; a request that needs more is refused.
      prefill_chunk_size: tokens of the prompt that are run at a time.

    Outputs:
      output_scores, output_logits, output_hidden_states, output_attentions: of each step, kept for
        the result.
      return_dict_in_generate: without effect, the result is always an object.

    Attributes:
      extra: other keys of a generation_config.json, saved again, and the reference's settings that
        have no meaning here.
      given: names of the settings that were given.

    Raises:
      ValueError: for an unknown name, with the nearest known ones, and for values out of range.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int | None = 0
    min_new_tokens: int | None = None
    early_stopping: bool | Literal["never"] = False
    max_time: float | None = None
    stop_strings: str | tuple[str, ...] | None = None
    do_sample: bool = False
    num_beams: int = 1
    use_cache: bool = True
    cache_implementation: str | None = None
    cache_config: FrozenMapping | None = None
    max_cache_len: int | None = None
    prefill_chunk_size: int | None = None
    temperature: float | None = 1.0
    top_k: int | None = 50
    top_p: float | None = 1.0
    min_p: float | None = None
    top_h: float | None = None
    typical_p: float | None = 1.0
    epsilon_cutoff: float | None = 0.0
    eta_cutoff: float | None = 0.0
    repetition_penalty: float | None = 1.0
    encoder_repetition_penalty: float | None = 1.0
    length_penalty: float = 1.0
    no_repeat_ngram_size: int | None = 0
    encoder_no_repeat_ngram_size: int | None = 0
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    renormalize_logits: bool = False
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | tuple[int, ...] | None = None
    remove_invalid_values: bool = False
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: tuple[int, ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = None
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] | None = None
    token_healing: bool = False
    guidance_scale: float | None = None
    watermarking_config: WatermarkingConfig | None = None
    num_return_sequences: int = 1
    output_attentions: bool = False
    output_hidden_states: bool = False
    output_scores: bool = False
    output_logits: bool = False
    return_dict_in_generate: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    num_assistant_tokens: int = 20
    num_assistant_tokens_schedule: str = "constant"
    assistant_confidence_threshold: float | None = 0.4
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int | None = None
    extra: FrozenMapping = FrozenMapping()
    given: frozenset[str] = frozenset()

    def __init__(self, extra: Mapping[str, Any] | None = None, **settings: Any):
        known = {field.name: field.default for field in dataclasses.fields(self)}
        del known["extra"], known["given"]
        others = dict(extra or {})
        for name in settings.keys() - known.keys():
            if name not in config_checks.ABSENT:
                raise ValueError(config_checks.unknown_setting(name, known))
            others[name] = _frozen(settings.pop(name))
        for name, default in known.items():
            value = _kept(name, settings[name], default) if name in settings else default
            object.__setattr__(self, name, value)
        object.__setattr__(self, "extra", FrozenMapping(others))
        object.__setattr__(self, "given", frozenset(settings))

    def __repr__(self) -> str:
        given = [f"{name}={getattr(self, name)!r}" for name in sorted(self.given)]
        extra = [f"extra={self.extra!r}"] if self.extra else []
        return f"GenerationConfig({', '.join(given + extra)})"

    @classmethod
    def from_call(cls, settings: Mapping[str, Any]) -> "GenerationConfig":
        """The settings of a call.

        Raises:
          ValueError: for an unknown name, with the nearest known ones, and values out of range.
        """
        if "extra" in settings:
            raise ValueError("unknown generation setting 'extra'; give each setting by its name")
        return cls(**settings)

    @classmethod
    def from_model_config(cls, config: Phi3Config) -> "GenerationConfig":
        """The settings that a model's own config has: its special tokens."""
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        return cls(**{name: getattr(config, name) for name in names})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "GenerationConfig | None":
        """Reads `generation_config.json` in a folder; None where there is none.

        Raises:
          ValueError: naming the file, where it is not JSON or holds values out of range.
        """
        path = Path(folder) / GENERATION_CONFIG_FILE
        if not path.is_file():
            return None
        values = read_json_object(path)
        try:
            names = {field.name for field in dataclasses.fields(cls)} - {"extra", "given"}
            # Files of transformers write null for a setting that was left open.
            known = {k: v for k, v in values.items() if k in names and v is not None}
            extra = {k: v for k, v in values.items() if k not in names}
            return cls(**known, extra=extra)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def over(self, base: "GenerationConfig") -> "GenerationConfig":
        """This config's given settings laid over those of another."""
        settings = {**base._given_settings(), **self._given_settings()}
        return GenerationConfig(**settings, extra={**base.extra, **self.extra})

    def _given_settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.given}

    @property
    def cache_kind(self) -> str:
        """The cache that cache_implementation asks for: full, sliding_window or quantized."""
        return config_checks.CACHE_KINDS[self.cache_implementation]

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a row, empty where nothing does."""
        return as_token_ids(self.eos_token_id)

    def new_tokens(self, prompt: int, max_positions: int) -> int:
        """How many tokens to add to a prompt of that many tokens.

        Raises:
          ValueError: where max_length, or the model's positions, leave no room behind the prompt,
            and where fewer are added than min_new_tokens or min_length ask for.
        """
        new = self._most_new_tokens(prompt, max_positions)
        least = self.min_new_tokens
        name, limit = "min_new_tokens", least
        if least is None:
            least = (self.min_length or 0) - prompt
            name, limit = "min_length", self.min_length
        if least > new:
            raise ValueError(
                f"{name} is {limit}, and {new} tokens are added to a prompt of {prompt}; give a "
                f"max_new_tokens of at least {least}, or lower {name}"
            )
        return new

    def _most_new_tokens(self, prompt: int, max_positions: int) -> int:
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            if prompt >= max_positions:
                raise ValueError(
                    f"the prompt has {prompt} tokens and the model {max_positions} positions "
                    "(max_position_embeddings); give max_new_tokens to go beyond them"
                )
            return min(20, max_positions - prompt)
        if self.max_length <= prompt:
            raise ValueError(
                f"the prompt has {prompt} tokens and max_length is {self.max_length}; raise "
                "max_length, or give max_new_tokens, which does not count the prompt"
            )
        return self.max_length - prompt

    def check(self) -> None:
        """Raises ValueError for what cannot be generated with: settings that are not here,
        contradictions, and limits of sampling out of range where there is sampling.
        """
        config_checks.check_together(self)

    def check_ids(self, vocab_size: int) -> None:
        """Raises ValueError for ids outside the vocabulary that would have to be chosen or written,
        and for suppressed tokens that leave none.

        The ends of a row and suppressed tokens may lie beyond: they cannot come up.
        """
        config_checks.check_ids(self, vocab_size)

    def idle_settings(self, names: Iterable[str]) -> dict[str, str]:
        """Those of the settings named that have no effect beside the others, with the reason.

        Values that change nothing anyway are not among them.
        """
        return config_checks.idle(self, names)

    def to_dict(self) -> dict[str, Any]:
        """The content of a generation_config.json: what was given, and what came along."""
        settings = {name: thaw(value) for name, value in self._given_settings().items()}
        if self.watermarking_config is not None:
            settings["watermarking_config"] = dataclasses.asdict(self.watermarking_config)
        return {**self.extra.thaw(), **settings}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `generation_config.json` into a folder."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        (Path(folder) / GENERATION_CONFIG_FILE).write_text(text, encoding="utf-8")


def _frozen(value: Any) -> Any:
    """numpy's numbers and arrays as Python's, lists as tuples, mappings read-only."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return FrozenMapping({key: _frozen(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    return value


def _kept(name: str, value: Any, default: Any) -> Any:
    """A setting's value, checked, in the one form that it is kept in."""
    if value is None and name in config_checks.NONE_IS_DEFAULT:
        return default
    if name == "sequence_bias" and isinstance(value, Mapping):
        value = tuple(value.items())
    value = _frozen(value)
    config_checks.check_value(name, value)
    if value is None:
        return None
    if name == "watermarking_config":
        return WatermarkingConfig.of(value)
    if name == "exponential_decay_length_penalty":
        return value[0], float(value[1])
    if name == "sequence_bias":
        # Of a sequence that stands there twice, the last counts, as in a dict.
        return tuple({word: float(bias) for word, bias in value}.items())
    return float(value) if name in config_checks.FLOATS else value
