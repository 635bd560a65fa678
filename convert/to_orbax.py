"""The job that turns a Hugging Face folder into a converted one."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from convert.progress import Report, silent
from phi3_jax.config import Phi3Config
from phi3_jax.folder import check_apart, copy_side_files, find_folder, folder_kind, staged_folder
from phi3_jax.hf_format import QUANTIZATIONS, QUANTIZED, HFWeights, LeafPath, WeightTable
from phi3_jax.orbax_format import OrbaxWriter, create_arrays
from phi3_jax.read_ahead import read_ahead
from phi3_jax.safetensors_files import Leaf


def to_orbax(
    source: str | Path,
    target: str | Path,
    force: bool = False,
    report: Report = silent,
    quantize: str | None = None,
) -> None:
    """Converts safetensors to an Orbax checkpoint, bit by bit, with one layer in memory at a time.

    Args:
      source: an HF folder, or the id of one on the hub.
      target: the new folder; it appears whole or not at all.
      force: replace a model folder that is already there.
      report: called with the bytes converted so far and in all.
      quantize: "int8" or "nf4" for the matrices of the layers and the head, which are then no
        longer those of the source; the rest is converted bit by bit.

    Raises:
      FileExistsError: where the target exists, without force.
      ValueError: before anything is written, where the source's weights are not those of its
        config, or for another `quantize`.
    """
    if quantize not in (None, *QUANTIZATIONS):
        raise ValueError(f"quantize is {quantize!r}, must be one of {', '.join(QUANTIZATIONS)}")
    folder = find_folder(source)
    if folder_kind(folder) != "hf":
        raise ValueError(f"{str(source)!r} is converted already; to-hf goes the other way")
    check_apart(folder, target)
    config = Phi3Config.from_pretrained(folder)
    weights = HFWeights(folder, config)
    total = sum(leaf.nbytes for leaf in weights.leaves.values())
    done = 0
    table = WeightTable(config, weights.table.head, quantize)
    with staged_folder(target, force) as stage:
        copy_side_files(folder, stage)
        create_arrays(stage, table, _stored_leaves(weights, table))
        with OrbaxWriter(stage, table) as writer:
            parts = read_ahead(lambda part: weights.read(*part), weights.table.parts)
            for (path, layer), array in parts:
                for own, part in _stored_parts(path, array, table):
                    writer.write(own, layer, part)
                done += array.nbytes
                report(done, total)


def _stored_leaves(weights: HFWeights, table: WeightTable) -> dict[LeafPath, Leaf]:
    """What is stored of the weights: each as it is, or its values and scales."""
    return {
        own: Leaf(table.shape(own), table.weights[own].integers or leaf.dtype)
        for path, leaf in weights.leaves.items()
        for own in table.stored(path)
    }


def _stored_parts(
    path: LeafPath, array: np.ndarray, table: WeightTable
) -> Iterator[tuple[LeafPath, np.ndarray]]:
    """One layer of a weight as it is stored."""
    stored = table.stored(path)
    if len(stored) == 1:
        yield path, array
        return
    from phi3_jax.quantized import quantize_weight  # starts JAX

    outputs = len(QUANTIZED[path if path in QUANTIZED else ("model", *path)].hf_axes[0])
    weight = quantize_weight(array, str(table.quantized), outputs)
    yield from zip(stored, map(np.asarray, (weight.values, weight.scales)), strict=True)
