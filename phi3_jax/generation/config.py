"""What generation_config.json says: how to choose tokens and when to stop."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_jax.config import Phi3Config, as_token_ids, unknown_name
from phi3_jax.frozen_mapping import FrozenMapping

GENERATION_CONFIG_FILE = "generation_config.json"

SAMPLING_SETTINGS = ("temperature", "top_k", "top_p", "min_p")

# Settings of the reference that this version does not have, with the values that change nothing
# (as None and empty lists do). Generating with another value is refused rather than ignored.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "guidance_scale": (1.0,),
    "renormalize_logits": (False,),
    "remove_invalid_values": (False,),
    "token_healing": (False,),
    **dict.fromkeys(
        (
            "max_time",
            "penalty_alpha",
            "dola_layers",
            "constraints",
            "force_words_ids",
            "stop_strings",
            "top_h",
            "bad_words_ids",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "exponential_decay_length_penalty",
            "suppress_tokens",
            "begin_suppress_tokens",
            "sequence_bias",
            "watermarking_config",
            "prompt_lookup_num_tokens",
        ),
        (),
    ),
}


@dataclass(frozen=True, init=False)
class GenerationConfig:
    """Settings of one generation, with the names and defaults of the reference.

    Only what was given counts when configs are laid over one another (`over`): a call wins over
    a passed config, that over the folder's generation_config.json, that over the special tokens in
    its config.json, those over the defaults below. None means "none", not "the default":
    `eos_token_id=None` lets nothing but the length stop a row. In a generation_config.json null
    means that nothing was said, since transformers writes it for every open setting.

    Attributes:
      max_new_tokens: tokens to add to the prompt; wins over max_length. Without either, 20.
      max_length: tokens of prompt and continuation together.
      do_sample: draw from the distribution instead of taking its maximum.
      temperature, top_k, top_p, min_p: how the distribution is cut before drawing, applied in
        this order; they have no part in greedy decoding.
      repetition_penalty: divides positive and multiplies negative logits of ids that the row holds
        already, prompt included; in greedy decoding too.
      eos_token_id: an id or several that end a row; the id itself stays in the output.
      pad_token_id: what finished rows emit.
      bos_token_id: kept for the folder's sake.
      max_cache_len: tokens a row's cache is made for; a request that needs more is refused.
      extra: other keys of a generation_config.json, saved again.

    Raises:
      ValueError: for an unknown name, with the nearest known one, and for values out of range.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    do_sample: bool = False
    temperature: float | None = 1.0
    top_k: int | None = 50
    top_p: float | None = 1.0
    min_p: float | None = None
    repetition_penalty: float | None = 1.0
    eos_token_id: int | tuple[int, ...] | list[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    max_cache_len: int | None = None
    extra: FrozenMapping = FrozenMapping()
    given: frozenset[str] = frozenset()

    def __init__(self, extra: Mapping[str, Any] | None = None, **settings: Any):
        known = {field.name: field.default for field in dataclasses.fields(self)}
        del known["extra"], known["given"]
        for name, value in settings.items():
            if name not in known:
                raise ValueError(unknown_name("generation setting", name, list(known)))
            # numpy's numbers and arrays become Python's
            value = value.tolist() if hasattr(value, "tolist") else value
            settings[name] = tuple(value) if isinstance(value, list) else value
        for name, default in known.items():
            object.__setattr__(self, name, settings.get(name, default))
        object.__setattr__(self, "extra", FrozenMapping(extra))
        object.__setattr__(self, "given", frozenset(settings))
        _check_kinds(self)

    @classmethod
    def from_call(cls, settings: Mapping[str, Any]) -> "GenerationConfig":
        """The settings of a call; those that are not here may be named with their neutral values.

        Raises:
          ValueError: for an unknown name, with the nearest known one.
        """
        absent = {name: value for name, value in settings.items() if name in _WITHOUT_EFFECT}
        if "extra" in settings:
            raise ValueError("unknown generation setting 'extra'")
        present = {name: value for name, value in settings.items() if name not in absent}
        return cls(**present, extra=absent)

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
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError(f"holds a {type(values).__name__}, expected a JSON object")
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
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a row, empty where nothing does."""
        return as_token_ids(self.eos_token_id)

    def new_tokens(self, prompt: int, max_positions: int) -> int:
        """How many tokens to add to a prompt of that many tokens.

        Raises:
          ValueError: where max_length, or the model's positions, leave no room behind the prompt.
        """
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
        """Raises ValueError for what cannot be generated with: settings that are not here, and
        limits of sampling out of range where there is sampling.
        """
        for name, neutral in _WITHOUT_EFFECT.items():
            value = self.extra.get(name)
            if value not in (None, (), *neutral):
                raise ValueError(
                    f"{name} is {value!r}, which is not supported; leave it out of the call, or "
                    f"out of the folder's {GENERATION_CONFIG_FILE}"
                )
        if not self.do_sample:
            return
        table = [
            ("temperature", lambda x: x > 0, "above 0; do_sample=False takes the most likely"),
            ("top_k", lambda x: x >= 0, "at least 1, or 0 to keep all"),
            ("top_p", lambda x: 0 <= x <= 1, "in [0, 1]"),
            ("min_p", lambda x: 0 <= x <= 1, "in [0, 1]"),
        ]
        for name, holds, limit in table:
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ValueError(f"{name} is {value!r}, must be {limit}")

    def to_dict(self) -> dict[str, Any]:
        """The content of a generation_config.json: what was given, and what came along."""
        settings = FrozenMapping(self._given_settings()).thaw()
        return {**self.extra.thaw(), **settings}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `generation_config.json` into a folder."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        (Path(folder) / GENERATION_CONFIG_FILE).write_text(text, encoding="utf-8")


def _check_kinds(config: GenerationConfig) -> None:
    """What no use of a value could accept."""

    def is_number(value, kinds):
        return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)

    at_least_1 = ("a whole number of at least 1", int, lambda x: x >= 1)
    token = ("a token id", int, lambda x: x >= 0)
    number = ("a number", (int, float), lambda x: True)
    table = {
        **dict.fromkeys(("max_new_tokens", "max_length", "max_cache_len"), at_least_1),
        **dict.fromkeys(("pad_token_id", "bos_token_id"), token),
        **dict.fromkeys(("temperature", "top_p", "min_p"), number),
        "top_k": ("a whole number", int, lambda x: True),
        "repetition_penalty": ("a number above 0", (int, float), lambda x: x > 0),
    }
    for name, (limit, kinds, holds) in table.items():
        value = getattr(config, name)
        if value is not None and not (is_number(value, kinds) and holds(value)):
            raise ValueError(f"{name} is {value!r}, must be {limit}, or None")
    if not isinstance(config.do_sample, bool):
        raise ValueError(f"do_sample is {config.do_sample!r}, must be True or False")
    for end in config.eos_token_ids:
        if not is_number(end, int) or end < 0:
            raise ValueError(
                f"eos_token_id is {config.eos_token_id!r}, must be an id, a list of ids or None"
            )
