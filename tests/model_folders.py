"""Small model folders on disk, of random weights."""

import json
from pathlib import Path

import numpy as np
from reference import config_values, hf_weights

from phi3_jax.config import Phi3Config
from phi3_jax.safetensors_files import DTYPES, MAX_SHARD_BYTES, Leaf, SafetensorsWriter

SIDE_FILES = {
    "generation_config.json": b'{"eos_token_id": [2, 7], "pad_token_id": 0}\n',
    "tokenizer.model": b"\x00\x01not text\xff",
    "tokenizer_config.json": b'{ "chat_template" :  "kept as it is" }',
    "added_tokens.json": b"{}",
    "special_tokens_map.json": b"{}\r\n",
}


def write_tensors(
    folder: Path, tensors: dict[str, np.ndarray], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes any tensors as safetensors."""
    kinds = {name: Leaf(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    with SafetensorsWriter(folder, kinds, max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def write_hf_folder(
    folder: Path,
    case: str = "gqa",
    dtype: str = "BF16",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    side_files: dict[str, bytes] | None = None,
    **config_changes,
) -> dict[str, np.ndarray]:
    """Writes a model of one of reference.CASES and returns its tensors by HF's names."""
    config = Phi3Config(**{**config_values(case), **config_changes})
    weights = hf_weights(config, case)
    tensors = {name: tensor.astype(DTYPES[dtype]) for name, tensor in weights.items()}
    folder.mkdir(parents=True)
    # Not as save_pretrained would write it: it has to arrive byte for byte.
    config_json = {**config.to_dict(), "dtype": DTYPES[dtype].name, "unknown_key": [1, 2]}
    (folder / "config.json").write_text(json.dumps(config_json))
    for name, content in (SIDE_FILES if side_files is None else side_files).items():
        (folder / name).write_bytes(content)
    write_tensors(folder, tensors, max_shard_bytes)
    return tensors
