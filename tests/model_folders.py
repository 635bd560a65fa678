"""Small model folders on disk, of random weights."""

import json
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict
from reference import config_values, hf_weights, params_of

from phi3_jax.config import Phi3Config
from phi3_jax.hf_format import Head, head_of
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
    head: Head = "lm_head",
    **config_changes,
) -> dict[str, np.ndarray]:
    """Writes a model of one of reference.CASES and returns its tensors by HF's names."""
    config = Phi3Config(**{**config_values(case), **config_changes})
    weights = hf_weights(config, case, head)
    tensors = {name: tensor.astype(DTYPES[dtype]) for name, tensor in weights.items()}
    folder.mkdir(parents=True)
    # Not as save_pretrained would write it: it has to arrive byte for byte.
    config_json = {**config.to_dict(), "dtype": DTYPES[dtype].name, "unknown_key": [1, 2]}
    (folder / "config.json").write_text(json.dumps(config_json))
    for name, content in (SIDE_FILES if side_files is None else side_files).items():
        (folder / name).write_bytes(content)
    write_tensors(folder, tensors, max_shard_bytes)
    return tensors


def tensors_in(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of an HF folder, as the safetensors library reads them."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: x for f in files for name, x in safetensors.numpy.load_file(f).items()}


def params_in(folder: Path, dtype: str = "bfloat16") -> dict:
    """path -> leaf of the model in an HF folder, put together without the library's reader."""
    tensors = tensors_in(folder)
    params = params_of(Phi3Config.from_pretrained(folder), tensors, head_of(tensors))
    return flatten_dict(jax.tree.map(lambda leaf: leaf.astype(dtype), params))


def assert_same(params: dict, expected: dict) -> None:
    """That a parameter tree is path -> leaf, bit by bit, and zero where it is larger."""
    params = flatten_dict(params)
    assert params.keys() == expected.keys()
    for path, leaf in params.items():
        assert leaf.dtype == expected[path].dtype, path
        array, wanted = np.asarray(leaf), np.asarray(expected[path])
        part = array[tuple(map(slice, wanted.shape))]
        bits = f"u{wanted.dtype.itemsize}"
        np.testing.assert_array_equal(part.view(bits), wanted.view(bits), str(path))
        assert np.count_nonzero(array) == np.count_nonzero(part), path
