"""What a watermark is made of: the part of a generation config that its detector needs as well."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phi3_jax.config import unknown_name
from phi3_jax.generation.config_checks import is_number, is_whole


@dataclass(frozen=True)
class WatermarkingConfig:
    """Which tokens a watermark favours, and how much (Kirchenbauer et al. 2023).

    Attributes:
      greenlist_ratio: part of the vocabulary that is favoured, in (0, 1).
      bias: what is added to their logits.
      hashing_key: what the draw of the favoured tokens starts from; the detector needs it too.
      seeding_scheme: "lefthash", the draw depends on the tokens before; "selfhash", on the token
        in question as well, which is slower and harder to remove.
      context_width: on how many tokens it depends.

    Raises:
      ValueError: for values out of range.
    """

    greenlist_ratio: float = 0.25
    bias: float = 2.0
    hashing_key: int = 15485863
    seeding_scheme: str = "lefthash"
    context_width: int = 1

    def __post_init__(self):
        table = {
            "greenlist_ratio": ("in (0, 1)", lambda x: is_number(x) and 0 < x < 1),
            "bias": ("a finite number", is_number),
            "hashing_key": ("a whole number in [0, 2**63)", lambda x: is_whole(x, 0, 2**63)),
            "seeding_scheme": ("'lefthash' or 'selfhash'", ("lefthash", "selfhash").__contains__),
            "context_width": ("a whole number in [1, 2**31)", lambda x: is_whole(x, 1)),
        }
        for name, (limit, holds) in table.items():
            value = getattr(self, name)
            if not holds(value):
                raise ValueError(f"watermarking_config has {name} {value!r}, must be {limit}")

    @classmethod
    def of(cls, value: Any) -> "WatermarkingConfig":
        """A config as it is, or made of a mapping of its fields, as generation_config.json has it.

        Raises:
          ValueError: for something else, an unknown field, and the fields of SynthID's watermark.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(
                f"watermarking_config is {value!r}, must be a WatermarkingConfig, a dict of its "
                "fields, or None"
            )
        names = [field.name for field in dataclasses.fields(cls)]
        for name in value:
            if name in ("ngram_len", "keys"):
                raise ValueError(
                    f"watermarking_config has {name!r}, a setting of SynthID, which is not "
                    f"supported; the watermark here has {', '.join(names)}"
                )
            if name not in names:
                raise ValueError(unknown_name("setting of watermarking_config", name, names))
        return cls(**value)
