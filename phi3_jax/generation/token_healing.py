"""Token healing: a prompt that ends inside of what would be one token goes on as if it did not.

"http:" followed by "//" is one token to the vocabulary, and a model that has never seen the two
apart does not go on with "//". So the last tokens of the prompt are taken back, and the first new
ones have to begin with their text.
"""

import functools
from bisect import bisect_left
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from phi3_jax.generation.constraints import Rows, allowed_bits


class TokenText(Protocol):
    """What is asked of a tokenizer."""

    special_ids: frozenset[int]
    pad_token_id: int | None

    def token_bytes(self, vocab_size: int) -> tuple[bytes, ...]: ...


def heal(
    tokenizer: TokenText, input_ids: np.ndarray, attention_mask: np.ndarray, vocab_size: int
) -> tuple[np.ndarray, np.ndarray, "Healed"]:
    """Prompts without the tokens at their ends that a longer token could have covered.

    Taken back is the longest text of whole tokens at the end of a row that one token of the
    vocabulary holds and goes on after; never a special token, nor the first one of a row.

    Args:
      tokenizer: of the model, a `Tokenizer`.
      input_ids: int32 [B, T], left-padded.
      attention_mask: bool [B, T], False for padding.
      vocab_size: ids of the model.

    Returns:
      ids and mask as they came in, narrower where every row has lost a column, and the constraint
      that gives the rows their text back.
    """
    words = _words(tokenizer.token_bytes(vocab_size), frozenset(tokenizer.special_ids))
    rows = [ids[mask] for ids, mask in zip(input_ids, attention_mask, strict=True)]
    kept = [len(row) - words.taken_back(row) for row in rows]
    width = max(kept)
    ids = np.full((len(rows), width), tokenizer.pad_token_id or 0, np.int32)
    mask = np.zeros((len(rows), width), bool)
    for index, (row, length) in enumerate(zip(rows, kept, strict=True)):
        ids[index, width - length :] = row[:length]
        mask[index, width - length :] = True
    texts = [words.text(row[length:]) for row, length in zip(rows, kept, strict=True)]
    return ids, mask, Healed(words, texts)


class Healed:
    """The `Constraint` that rows begin with given texts, in UTF-8."""

    def __init__(self, words: "_Words", texts: Sequence[bytes]):
        self._words, self._texts = words, texts

    def allowed(self, sequences: Rows, step: int) -> np.ndarray | None:
        """As in `Constraint`: None as soon as all rows have their text back."""
        copies = len(sequences) // len(self._texts)
        missing = []
        for row, tokens in enumerate(sequences):
            if tokens is None:
                missing.append(b"")
                continue
            new = self._words.text(tokens[len(tokens) - step :])
            missing.append(self._texts[row // copies][len(new) :])
        if not any(missing):
            return None
        return np.stack([self._words.beginning(text) for text in missing])


class _Words:
    """The tokens that are text, in the order of their bytes."""

    def __init__(self, token_bytes: tuple[bytes, ...], special_ids: frozenset[int]):
        self._token_bytes = token_bytes
        own = [(text, id) for id, text in enumerate(token_bytes) if text and id not in special_ids]
        self._texts, self._ids = zip(*sorted(own), strict=True)
        self._longest = max(map(len, self._texts))
        self._special_ids = special_ids

    def text(self, tokens: np.ndarray) -> bytes:
        return b"".join(self._token_bytes[token] for token in tokens.tolist())

    def _starting_with(self, text: bytes) -> tuple[int, int]:
        """Where the tokens stand that are `text` or go on after it."""
        beyond = text + b"\xff" * self._longest  # after every token that starts with text
        return bisect_left(self._texts, text), bisect_left(self._texts, beyond)

    def taken_back(self, row: np.ndarray) -> int:
        """How many tokens at the end of a row are to be taken back."""
        best, text = 0, b""
        for count, token in enumerate(row[:0:-1].tolist(), start=1):
            word = self._token_bytes[token]
            text = word + text
            if token in self._special_ids or not word or len(text) >= self._longest:
                break
            start, end = self._starting_with(text)
            if start < end and self._texts[end - 1] != text:
                best = count
        return best

    def beginning(self, text: bytes) -> np.ndarray:
        """The tokens that begin with `text` or are its beginning, as bits; all without a text."""
        vocab_size = len(self._token_bytes)
        if not text:
            return np.full(-(-vocab_size // 32), 0xFFFFFFFF, np.uint32)
        start, end = self._starting_with(text)
        ids = list(self._ids[start:end])
        for length in range(1, len(text)):
            place = bisect_left(self._texts, text[:length])
            while place < len(self._texts) and self._texts[place] == text[:length]:
                ids.append(self._ids[place])
                place += 1
        return allowed_bits(ids, vocab_size)


_words = functools.lru_cache(maxsize=4)(_Words)
