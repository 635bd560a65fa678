"""What reading all data of a run has found, kept for its next start."""

import contextlib
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from train.config import DataConfig

# To be raised when documents are made otherwise than before, or other things are kept of them.
_VERSION = 1
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class DataCache:
    """Arrays by name in an .npz file.

    Attributes:
      path: of the file.
      key: of what they were found in; under another key they are not there.
    """

    path: Path
    key: str

    def load(self) -> dict[str, np.ndarray] | None:
        """The arrays; None where they are not there or cannot be read."""
        try:
            with np.load(self.path, allow_pickle=False) as file:
                arrays = dict(file)
            return arrays if arrays.pop("key") == self.key else None
        except Exception:  # of many kinds, one for each way a file can be broken
            return None

    def save(self, arrays: dict[str, np.ndarray]) -> None:
        """Writes the arrays, in the first process; where that fails, they are not there."""
        if jax.process_index() != 0:
            return
        values: dict[str, Any] = {**arrays, "key": np.array(self.key)}
        part = self.path.with_name(f".{self.path.name}.part")
        try:
            with open(part, "wb") as file:
                np.savez(file, **values)
            os.replace(part, self.path)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def cache_key(files: Iterable[Path], data: DataConfig, tokenizer: Path) -> str:
    """Changes with all that the documents are made from.

    Args:
      files: of the data; told by their paths, sizes and times.
      data: how documents are made.
      tokenizer: its folder; told by what is in its files.
    """
    told: list[object] = [_VERSION, data.sequence_length, data.mask_prompt, data.long_documents]
    for path in files:
        found = path.stat()
        # The time of the last change of all, too: archives and copies set that of the content.
        told += [str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ctime_ns]
    for name in _TOKENIZER_FILES:
        path = tokenizer / name
        told.append(hashlib.blake2b(path.read_bytes()).hexdigest() if path.is_file() else None)
    return hashlib.blake2b(repr(told).encode(), digest_size=16).hexdigest()
