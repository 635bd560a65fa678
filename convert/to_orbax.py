"""The job that turns a Hugging Face folder into a converted one."""

from pathlib import Path

from convert.progress import Report, silent
from phi3_jax.config import Phi3Config
from phi3_jax.folder import check_apart, copy_side_files, find_folder, folder_kind, staged_folder
from phi3_jax.hf_format import HFWeights
from phi3_jax.orbax_format import OrbaxWriter, create_arrays
from phi3_jax.read_ahead import read_ahead


def to_orbax(
    source: str | Path, target: str | Path, force: bool = False, report: Report = silent
) -> None:
    """Converts safetensors to an Orbax checkpoint, bit by bit, with one layer in memory at a time.

    Args:
      source: an HF folder, or the id of one on the hub.
      target: the new folder; it appears whole or not at all.
      force: replace a model folder that is already there.
      report: called with the bytes converted so far and in all.

    Raises:
      FileExistsError: where the target exists, without force.
      ValueError: before anything is written, where the source's weights are not those of its
        config.
    """
    folder = find_folder(source)
    if folder_kind(folder) != "hf":
        raise ValueError(f"{str(source)!r} is converted already; to-hf goes the other way")
    check_apart(folder, target)
    weights = HFWeights(folder, Phi3Config.from_pretrained(folder))
    total = sum(leaf.nbytes for leaf in weights.leaves.values())
    done = 0
    with staged_folder(target, force) as stage:
        copy_side_files(folder, stage)
        create_arrays(stage, weights.table, weights.leaves)
        with OrbaxWriter(stage, weights.table) as writer:
            parts = read_ahead(lambda part: weights.read(*part), weights.table.parts)
            for (path, layer), array in parts:
                writer.write(path, layer, array)
                done += array.nbytes
                report(done, total)
