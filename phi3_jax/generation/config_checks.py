"""What settings of a generation may be: each alone, all together, and for a vocabulary."""

import dataclasses
import difflib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from phi3_jax.config_checks import as_token_ids

# The cuts that only drawing has a use for, in the order in which they are applied.
SAMPLING_SETTINGS = (
    "temperature",
    "top_h",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)

# What `cache_implementation` may be, and the kind of cache that it asks for.
CACHE_KINDS = {
    None: "full",
    "dynamic": "full",
    "static": "full",
    "sliding_window": "sliding_window",
    "hybrid": "sliding_window",
    "quantized": "quantized",
}
_ON_THE_HOST = ("offloaded", "offloaded_static", "offloaded_hybrid", "offloaded_hybrid_chunked")

_HUB = "the reference has it in code on the hub only"
_ONE_TOKENIZER = "it is for a draft model with another tokenizer, and there has to be one"
_COMPILED = "each step is a program compiled by jax.jit"

# The reference's settings that mean nothing here: the values that ask for nothing (as None and
# empty lists do), and why others are refused.
ABSENT: dict[str, tuple[tuple[Any, ...], str]] = {
    "decoder_start_token_id": ((), "it is for encoder-decoder models"),
    "is_assistant": ((False,), "the draft model is an argument of the call"),
    "assistant_early_exit": ((), "Phi-3's inner layers have no head to draft with"),
    "assistant_lookbehind": ((10,), _ONE_TOKENIZER),
    "target_lookbehind": ((10,), _ONE_TOKENIZER),
    "assistant_ensemble_weight": ((), "drafts are checked so that they change no distribution"),
    "speculation_type": ((), "the draft model is an argument of the call"),
    "use_mtp": ((False,), "Phi-3 has no heads for tokens further on"),
    "compile_config": ((), _COMPILED),
    "disable_compile": ((False,), f"{_COMPILED}; jax.disable_jit() is the way without"),
    "continuous_batching_config": ((), "a call is one batch from beginning to end"),
    # One program runs on all devices, so none can be left waiting for another: nothing to do.
    "synced_gpus": ((False, True), "it is True or False"),
    "low_memory": ((False,), _HUB),
    "penalty_alpha": ((0.0,), _HUB),
    "dola_layers": ((), _HUB),
    "diversity_penalty": ((0.0,), _HUB),
    "num_beam_groups": ((1,), _HUB),
    "constraints": ((), f"{_HUB}; prefix_allowed_tokens_fn limits the tokens"),
    "force_words_ids": ((), f"{_HUB}; prefix_allowed_tokens_fn limits the tokens"),
}

# What a call takes beside settings, by `phi3_jax.generate`.
ARGUMENTS = (
    "input_ids", "attention_mask", "generation_config", "seed", "mesh", "streamer",
    "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "assistant",
    "negative_prompt_ids", "negative_prompt_attention_mask", "tokenizer", "grammar", "cache",
    "custom_generate", "use_model_defaults",
)  # fmt: skip
_NOWHERE = "the reference has none either; a logits_processor can do it"

# Names that others have for something, and what there is here.
_ELSEWHERE = {
    **dict.fromkeys(ARGUMENTS, "it is an argument of generate"),
    "assistant_model": "it is generate's argument 'assistant'",
    "past_key_values": "it is generate's argument 'cache'",
    "inputs": "it is generate's argument 'input_ids'",
    "inputs_embeds": "it is not taken, prompts are token ids",
    "return_dict": "the result is always an object",
    "top_n_sigma": _NOWHERE,
    "presence_penalty": _NOWHERE,
    "frequency_penalty": _NOWHERE,
}


def unknown_setting(name: str, known: Iterable[str]) -> str:
    """The message for a name that is no setting: where it belongs, or the nearest few names."""
    if name in _ELSEWHERE:
        hint = _ELSEWHERE[name]
    else:
        near = difflib.get_close_matches(name, [*known, *ARGUMENTS])
        names = " or ".join(map(repr, near))
        hint = f"did you mean {names}?" if near else "GenerationConfig describes those that are"
    return f"unknown generation setting {name!r}; {hint}"


def is_whole(value: Any, low: int, beyond: int = 2**31) -> bool:
    """Whether a value is an int in [low, beyond)."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < beyond


def is_number(value: Any) -> bool:
    """Whether a value is an int or float, finite as a float."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and abs(value) <= sys.float_info.max


def _is_token_list(value: Any) -> bool:
    return isinstance(value, tuple) and all(is_whole(token, 0) for token in value)


def _is_token_or_list(value: Any) -> bool:
    return is_whole(value, 0) or _is_token_list(value)


def _is_text_or_list(value: Any) -> bool:
    texts = (value,) if isinstance(value, str) else value
    return isinstance(texts, tuple) and all(isinstance(text, str) and text for text in texts)


def _is_word_list(value: Any) -> bool:
    return isinstance(value, tuple) and all(_is_token_list(word) and word for word in value)


def _is_bias(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value)
        and _is_word_list(tuple(word for word, _ in value))
        and all(is_number(bias) or bias == float("-inf") for _, bias in value)
    )


def _is_decay(value: Any) -> bool:
    if not isinstance(value, tuple) or len(value) != 2:
        return False
    start, factor = value
    return is_whole(start, 0) and is_number(factor) and factor > 0


Limit = tuple[str, Callable[[Any], bool]]

_SCHEDULES = ("constant", "heuristic", "heuristic_transient")
_AT_LEAST_0: Limit = ("a whole number in [0, 2**31)", lambda x: is_whole(x, 0))
_AT_LEAST_1: Limit = ("a whole number in [1, 2**31)", lambda x: is_whole(x, 1))
_NUMBER: Limit = ("a finite number", is_number)
_ABOVE_0: Limit = ("a finite number above 0", lambda x: is_number(x) and x > 0)
_TOKEN: Limit = ("a token id", lambda x: is_whole(x, 0))
_TOKENS: Limit = ("a list of token ids", _is_token_list)
_ENDS: Limit = ("an id, a list of ids", _is_token_or_list)
_SWITCH: Limit = ("True or False", lambda x: isinstance(x, bool))

LIMITS: dict[str, Limit] = {
    "max_length": _AT_LEAST_1,
    "max_new_tokens": _AT_LEAST_1,
    "min_length": _AT_LEAST_0,
    "min_new_tokens": _AT_LEAST_0,
    "early_stopping": (
        "True, False or 'never'",
        lambda x: isinstance(x, bool) or x == "never",
    ),
    "max_time": ("a finite number of seconds above 0", _ABOVE_0[1]),
    "stop_strings": ("a text or a list of texts, none of them empty", _is_text_or_list),
    "do_sample": _SWITCH,
    "num_beams": _AT_LEAST_1,
    "use_cache": _SWITCH,
    "cache_implementation": ("a name", lambda x: isinstance(x, str)),
    "cache_config": ("a mapping", lambda x: isinstance(x, Mapping)),
    "max_cache_len": _AT_LEAST_1,
    "prefill_chunk_size": _AT_LEAST_1,
    # What sampling takes of these is narrower (_SAMPLING_LIMITS); a folder may hold more.
    "temperature": _NUMBER,
    "top_k": ("a whole number below 2**31", lambda x: is_whole(x, -(2**31))),
    "top_p": _NUMBER,
    "min_p": _NUMBER,
    "top_h": _NUMBER,
    "typical_p": _NUMBER,
    "epsilon_cutoff": _NUMBER,
    "eta_cutoff": _NUMBER,
    "repetition_penalty": _ABOVE_0,
    "encoder_repetition_penalty": _ABOVE_0,
    "length_penalty": _NUMBER,
    "no_repeat_ngram_size": _AT_LEAST_0,
    "encoder_no_repeat_ngram_size": _AT_LEAST_0,
    "bad_words_ids": ("a list of lists of token ids, none of them empty", _is_word_list),
    "renormalize_logits": _SWITCH,
    "forced_bos_token_id": _TOKEN,
    "forced_eos_token_id": _ENDS,
    "remove_invalid_values": _SWITCH,
    "exponential_decay_length_penalty": ("a whole number and a factor above 0", _is_decay),
    "suppress_tokens": _TOKENS,
    "begin_suppress_tokens": _TOKENS,
    "sequence_bias": (
        "{(id, ...): number} or [[[id, ...], number], ...] with finite numbers or -inf",
        _is_bias,
    ),
    "token_healing": _SWITCH,
    "guidance_scale": _NUMBER,
    "num_return_sequences": _AT_LEAST_1,
    "output_attentions": _SWITCH,
    "output_hidden_states": _SWITCH,
    "output_scores": _SWITCH,
    "output_logits": _SWITCH,
    "return_dict_in_generate": _SWITCH,
    "pad_token_id": _TOKEN,
    "bos_token_id": _TOKEN,
    "eos_token_id": _ENDS,
    "num_assistant_tokens": _AT_LEAST_1,
    "num_assistant_tokens_schedule": (f"one of {', '.join(_SCHEDULES)}", _SCHEDULES.__contains__),
    "assistant_confidence_threshold": ("in [0, 1]", lambda x: is_number(x) and 0 <= x <= 1),
    "prompt_lookup_num_tokens": _AT_LEAST_1,
    "max_matching_ngram_size": _AT_LEAST_1,
}

# Numbers that are kept as floats: the reference takes no whole ones there.
FLOATS = {name for name, limit in LIMITS.items() if limit in (_NUMBER, _ABOVE_0)} | {
    "max_time",
    "assistant_confidence_threshold",
}

# None is no value of these; the other switches and counts are what they are by default then.
_NEVER_NONE = {
    "use_cache",
    "length_penalty",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
}
NONE_IS_DEFAULT = {name for name, limit in LIMITS.items() if limit is _SWITCH} - _NEVER_NONE | {
    "early_stopping",
    "num_beams",
    "num_return_sequences",
}

_SAMPLING_LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (
        lambda x: x > 0,
        "above 0; do_sample=False takes the most likely, as 0 does in a command or TextGenerator",
    ),
    "top_h": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "top_k": (lambda x: x >= 0, "at least 1, or 0 to keep all"),
    "top_p": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    "min_p": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    "typical_p": (lambda x: 0 < x <= 1, "in (0, 1]; 1 keeps all"),
    "epsilon_cutoff": (lambda x: 0 <= x < 1, "in [0, 1); 0 keeps all"),
    "eta_cutoff": (lambda x: 0 <= x < 1, "in [0, 1); 0 keeps all"),
}


def check_value(name: str, value: Any) -> None:
    """Refuses what no use of a setting could accept.

    Raises:
      ValueError: naming the setting, the value and what it may be.
    """
    if name not in LIMITS or (value is None and name not in _NEVER_NONE):
        return
    limit, holds = LIMITS[name]
    if not holds(value):
        none = "" if name in _NEVER_NONE | NONE_IS_DEFAULT else ", or None"
        raise ValueError(f"{name} is {value!r}, must be {limit}{none}")


def check_together(config: Any) -> None:
    """Refuses what cannot be generated with: settings that are not here, and contradictions.

    Raises:
      ValueError: naming the settings, their values and the way out.
    """
    for name, (neutral, reason) in ABSENT.items():
        value = config.extra.get(name)
        if value not in (None, (), *neutral):
            raise ValueError(
                f"{name} is {value!r}, which is not supported: {reason}; leave it out of the "
                "call, or out of the folder's generation_config.json"
            )
    if config.do_sample:
        for name, (holds, limit) in _SAMPLING_LIMITS.items():
            value = getattr(config, name)
            if value is not None and not holds(value):
                raise ValueError(f"{name} is {value!r}, must be {limit}")
    _check_cache(config)
    _check_sequences(config)
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        value = getattr(config, name)
        forced = as_token_ids(value)
        if forced and not set(forced) - set(config.suppress_tokens or ()):
            raise ValueError(
                f"{name} is {value!r} and suppress_tokens holds all of it, which "
                "leaves no token to choose; take it out of one of them (min_new_tokens keeps "
                "rows from ending early)"
            )


def _check_cache(config: Any) -> None:
    kind = config.cache_implementation
    if kind in _ON_THE_HOST:
        raise ValueError(
            f"cache_implementation is {kind!r}, which is not supported: the cache stays on the "
            "devices; 'sliding_window' and 'quantized' make it smaller, a mesh shares it out"
        )
    if kind not in CACHE_KINDS:
        known = ", ".join(name for name in CACHE_KINDS if name)
        raise ValueError(f"cache_implementation is {kind!r}, must be one of {known}, or None")
    details = dict(config.cache_config or {})
    if details and (kind != "quantized" or details != {"nbits": 8}):
        raise ValueError(
            f"cache_config is {details!r} for the cache {kind!r}; there is only {{'nbits': 8}}, "
            "for 'quantized'"
        )


def _check_sequences(config: Any) -> None:
    count, beams = config.num_return_sequences, config.num_beams
    if beams == 1 and count > 1 and not config.do_sample:
        raise ValueError(
            f"num_return_sequences is {count} and greedy decoding has only one; give "
            f"do_sample=True, or num_beams={count} or more"
        )
    if 1 < beams < count:
        raise ValueError(
            f"num_return_sequences is {count} and num_beams {beams}; there are no more sequences "
            "than beams: raise num_beams, or ask for fewer"
        )
    if beams > 1 and config.prompt_lookup_num_tokens is not None:
        raise ValueError(
            f"prompt_lookup_num_tokens is {config.prompt_lookup_num_tokens} and num_beams "
            f"{beams}; drafts are for greedy decoding and sampling: leave one of them out"
        )


def idle(config: Any, names: Iterable[str]) -> dict[str, str]:
    """Those of the settings named that have no effect beside the others, and why."""
    least = ("min_length", "min_new_tokens", "exponential_decay_length_penalty")
    table = [
        (config.do_sample, "without do_sample=True", SAMPLING_SETTINGS),
        (config.num_beams > 1, "without num_beams > 1", ("early_stopping", "length_penalty")),
        (config.max_new_tokens is None, "beside max_new_tokens", ("max_length",)),
        (config.min_new_tokens is None, "beside min_new_tokens", ("min_length",)),
        (
            config.prompt_lookup_num_tokens is not None,
            "without prompt_lookup_num_tokens",
            ("max_matching_ngram_size",),
        ),
        (config.eos_token_ids, "without eos_token_id", least),
    ]
    names = set(names)
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return {
        name: f"no effect {why}"
        for holds, why, affected in table
        for name in affected
        if not holds and name in names and getattr(config, name) not in (None, (), defaults[name])
    }


def check_ids(config: Any, vocab_size: int) -> None:
    """Refuses ids that would have to be chosen, or written, and are in no vocabulary, and
    suppressed tokens that leave none.

    The ends of a row and suppressed tokens may lie beyond: they cannot come up.

    Raises:
      ValueError: naming the setting, the id and the vocabulary.
    """
    suppressed = {*(config.suppress_tokens or ()), *(config.begin_suppress_tokens or ())}
    if sum(token < vocab_size for token in suppressed) == vocab_size:
        names = [n for n in ("suppress_tokens", "begin_suppress_tokens") if getattr(config, n)]
        raise ValueError(
            f"{' and '.join(names)} hold the whole vocabulary of {vocab_size}, which leaves no "
            "token to choose; leave some out"
        )
    words = {
        "bad_words_ids": config.bad_words_ids or (),
        "sequence_bias": [word for word, _ in config.sequence_bias or ()],
    }
    for name in ("pad_token_id", "forced_bos_token_id", "forced_eos_token_id"):
        words[name] = [as_token_ids(getattr(config, name))]
    for name, several in words.items():
        for token in (token for word in several for token in word):
            if token >= vocab_size:
                what = "is" if is_whole(getattr(config, name), 0) else "holds"
                raise ValueError(
                    f"{name} {what} {token}, outside the vocabulary of {vocab_size}; does the "
                    "tokenizer belong to this model?"
                )
