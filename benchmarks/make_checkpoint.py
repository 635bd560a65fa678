"""Writes a Hugging Face folder of random weights in the size of a published model, or of any.

    python benchmarks/make_checkpoint.py --preset phi-3-mini-4k-instruct --out DIR

One tensor at a time, in shards as transformers makes them. Values are those of bfloat16, and the
same in either dtype. For measuring conversions and loading without a download; a model of this
folder writes noise.
"""

import argparse
import json
from pathlib import Path

import ml_dtypes
import numpy as np

from phi3_jax.config import Phi3Config
from phi3_jax.folder import staged_folder
from phi3_jax.hf_format import WeightTable
from phi3_jax.safetensors_files import Leaf, SafetensorsWriter

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
BLOCK = 1 << 22


def random_tensor(shape: tuple[int, ...], scale: float, rng: np.random.Generator) -> np.ndarray:
    """Normal values, ones for norms; made in blocks, since float32 takes twice the room."""
    if len(shape) == 1:
        return np.ones(shape, BFLOAT16)
    tensor = np.empty(shape, BFLOAT16)
    flat = tensor.reshape(-1)
    for start in range(0, flat.size, BLOCK):
        part = flat[start : start + BLOCK]
        part[:] = rng.standard_normal(part.size, np.float32) * np.float32(scale)
    return tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="phi-3-mini-4k-instruct")
    parser.add_argument("--config", type=Path, help="a config.json, in place of a preset")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.config is None:
        config = Phi3Config.preset(arguments.preset)
    else:
        config = Phi3Config.from_dict(json.loads(arguments.config.read_text()))
    dtype = np.dtype(arguments.dtype)
    table = WeightTable(config)
    tensors = table.hf_leaves({path: Leaf(table.shape(path), dtype) for path in table.weights})
    rng = np.random.default_rng(arguments.seed)
    with staged_folder(arguments.out) as stage:
        config.save_pretrained(stage)
        with SafetensorsWriter(stage, tensors) as writer:
            for name, leaf in tensors.items():
                tensor = random_tensor(leaf.shape, config.initializer_range, rng)
                writer.write(name, tensor.astype(dtype, copy=False))
    total = sum(leaf.nbytes for leaf in tensors.values())
    print(f"wrote {arguments.out}: {len(tensors)} tensors, {total:,} bytes")


if __name__ == "__main__":
    main()
