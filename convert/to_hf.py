"""The job that turns a converted folder into a Hugging Face one."""

from pathlib import Path

from convert.progress import Report, silent
from phi3_jax.config import Phi3Config
from phi3_jax.folder import check_apart, copy_side_files, find_folder, folder_kind, staged_folder
from phi3_jax.orbax_format import OrbaxWeights
from phi3_jax.read_ahead import read_ahead
from phi3_jax.safetensors_files import SafetensorsWriter


def to_hf(
    source: str | Path, target: str | Path, force: bool = False, report: Report = silent
) -> None:
    """Converts an Orbax checkpoint to safetensors, bit by bit, with one layer in memory at a time.

    Args:
      source: a converted folder, or the id of one on the hub.
      target: the new folder, which transformers loads; it appears whole or not at all.
      force: replace a model folder that is already there.
      report: called with the bytes converted so far and in all.

    Raises:
      FileExistsError: where the target exists, without force.
      ValueError: before anything is written, where the source's weights are not those of its
        config, or are quantised.
    """
    folder = find_folder(source)
    if folder_kind(folder) != "orbax":
        raise ValueError(f"{str(source)!r} holds safetensors already; to-orbax goes the other way")
    check_apart(folder, target)
    weights = OrbaxWeights(folder, Phi3Config.from_pretrained(folder))
    table = weights.table
    if table.quantized is not None:
        raise ValueError(
            f"{str(source)!r} is quantised ({table.quantized}), which safetensors of this model "
            "have no form for; convert the original weights"
        )
    total = sum(leaf.nbytes for leaf in weights.leaves.values())
    done = 0
    with staged_folder(target, force) as stage:
        copy_side_files(folder, stage)
        with SafetensorsWriter(stage, table.hf_leaves(weights.leaves)) as writer:
            read = lambda part: table.to_hf(part[0], weights.read(*part))  # noqa: E731
            for (path, layer), tensor in read_ahead(read, table.parts):
                writer.write(table.hf_name(path, layer), tensor)
                done += tensor.nbytes
                report(done, total)
