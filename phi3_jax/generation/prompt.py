"""What a caller gives to generate from: checked, and laid out as rows of a cache."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from phi3_jax.config import Phi3Config
from phi3_jax.generation.config import GenerationConfig


@dataclass
class Rows:
    """The rows of a cache: prompts, and under guidance their negative prompts.

    Attributes:
      ids, mask: int32 and bool [R, T], left-padded to one width.
      copies: how many continuations each prompt gets.
      batch: prompts among the rows, the first ones.
    """

    ids: np.ndarray
    mask: np.ndarray
    batch: int
    copies: int = 1

    @property
    def spread(self) -> np.ndarray:
        """Numbers of the rows as the continuations hold them: each prompt's side by side."""
        numbers = np.arange(len(self.ids)).reshape(-1, self.batch)
        return np.repeat(numbers, self.copies, axis=1).reshape(-1).astype(np.int32)


def read_prompt(
    config: Phi3Config,
    settings: GenerationConfig,
    input_ids: Any,
    attention_mask: Any,
    name: str = "input_ids",
) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a prompt and which of them are tokens: int32 and bool [B, T].

    Without a mask all are tokens, unless the padding id occurs and is no end id (the reference's
    rule). Without ids the prompt is one row of bos_token_id.

    Raises:
      ValueError: for ids outside the vocabulary, padding on the right, rows without a token.
    """
    if input_ids is None and name == "input_ids":
        if settings.bos_token_id is None:
            raise ValueError("without input_ids generation begins with bos_token_id: give one")
        input_ids = [[settings.bos_token_id]]
    ids = _array(input_ids)
    if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"{name} has shape {ids.shape} and dtype {ids.dtype}, expected whole numbers "
            "[batch, tokens] with at least one token; pad shorter rows on the left"
        )
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        bad = ids[(ids < 0) | (ids >= config.vocab_size)][0]
        raise ValueError(
            f"{name} holds {bad}, outside the vocabulary of {config.vocab_size}; "
            "does the tokenizer belong to this model?"
        )
    pad_id = settings.pad_token_id
    if attention_mask is None and pad_id is not None and pad_id not in settings.eos_token_ids:
        attention_mask = ids != pad_id
    mask = _array(np.ones(ids.shape, bool) if attention_mask is None else attention_mask)
    numbers = mask.dtype == bool or jnp.issubdtype(mask.dtype, jnp.number)
    if mask.shape != ids.shape or not numbers or (mask != mask).any():
        raise ValueError(
            f"the attention mask of {name} has shape {mask.shape} and dtype {mask.dtype}, expected "
            f"their shape, {ids.shape}, and 0 for padding, 1 for tokens"
        )
    mask = mask != 0
    for row, last in enumerate(mask[:, -1]):
        if not last:
            where = "the prompt" if name == "input_ids" else name
            what = "padding on the right" if mask[row].any() else "no token at all"
            raise ValueError(
                f"row {row} of {where} has {what}; rows must hold a token in their last "
                "column: pad on the left"
            )
    return ids.astype(np.int32), mask


def _array(rows: Any) -> np.ndarray:
    """Rows as an array; an empty one where they are of unequal length."""
    try:
        return np.asarray(rows)
    except ValueError:
        return np.empty(0)


def with_negative_prompts(
    ids_BT: np.ndarray, mask_BT: np.ndarray, negative: tuple[np.ndarray, np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts, and under them their negative prompts: [2 B, widest], padded on the left.

    negative: ids and mask of B rows or of one for all; None for the last token of each prompt,
    as in the reference.

    Raises:
      ValueError: for another number of rows.
    """
    ids_BN, mask_BN = (ids_BT[:, -1:], mask_BT[:, -1:]) if negative is None else negative
    if len(ids_BN) not in (1, len(ids_BT)):
        raise ValueError(
            f"negative_prompt_ids have {len(ids_BN)} rows and input_ids {len(ids_BT)}; give one "
            "for each prompt, or a single one for all"
        )
    if len(ids_BN) == 1:
        ids_BN, mask_BN = (np.repeat(x, len(ids_BT), axis=0) for x in (ids_BN, mask_BN))
    width = max(ids_BT.shape[1], ids_BN.shape[1])
    left = lambda x: np.pad(x, ((0, 0), (width - x.shape[1], 0)))  # noqa: E731
    ids = np.concatenate([left(ids_BT), left(ids_BN)])
    return ids, np.concatenate([left(mask_BT), left(mask_BN)])
