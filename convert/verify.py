"""The job that compares two model folders, of either format, bit by bit."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.progress import Report, silent
from phi3_jax.checkpoint import open_weights
from phi3_jax.config import CONFIG_FILE, Phi3Config
from phi3_jax.folder import find_folder
from phi3_jax.read_ahead import read_ahead


@dataclass(frozen=True)
class Comparison:
    """What two folders have in common.

    Attributes:
      tensors: how many tensors both hold, by HF's names.
      nbytes: bytes of those.
      differences: one line for each field of the config that is not the same in both, and one for
        each tensor that is not the same bits.
    """

    tensors: int
    nbytes: int
    differences: list[str]


def verify(first: str | Path, second: str | Path, report: Report = silent) -> Comparison:
    """Compares every tensor of two model folders, and the config that the tensors are used by.

    Tokenizers and generation settings are not compared.

    Raises:
      ValueError: where a folder's weights are not those of its own config.
    """
    folders = [find_folder(name) for name in (first, second)]
    configs = [Phi3Config.from_pretrained(folder) for folder in folders]
    a, b = (open_weights(*pair) for pair in zip(folders, configs, strict=True))
    places = [
        {weights.table.hf_name(*part): part for part in weights.table.parts} for weights in (a, b)
    ]
    both = [name for name in places[0] if name in places[1]]
    kinds = [weights.table.hf_leaves(weights.leaves) for weights in (a, b)]
    total = sum(kinds[0][name].nbytes for name in both)
    done = 0

    def unequal(name: str) -> str | None:
        leaves = [kind[name] for kind in kinds]
        if leaves[0] != leaves[1]:
            return " and ".join(f"{leaf.dtype} {leaf.shape}" for leaf in leaves)
        # As integers of the same width: a NaN equals itself, and 0 is not -0.
        bits = (
            weights.read(*where[name]).view(f"u{leaves[0].dtype.itemsize}")
            for weights, where in zip((a, b), places, strict=True)
        )
        count = np.count_nonzero(np.not_equal(*bits))
        return f"{count} values differ" if count else None

    differences = _config_differences(*configs)
    for name, difference in read_ahead(unequal, both):
        if difference:
            differences.append(f"{name}: {difference}")
        done += kinds[0][name].nbytes
        report(done, total)
    for here, there, folder in ((0, 1, folders[0]), (1, 0, folders[1])):
        only = places[here].keys() - places[there].keys()
        differences += [f"{name}: only in {str(folder)!r}" for name in sorted(only)]
    return Comparison(len(both), total, differences)


def _config_differences(a: Phi3Config, b: Phi3Config) -> list[str]:
    """One line for each field that differs; keys that mean nothing to the model do not count."""
    names = [field.name for field in dataclasses.fields(Phi3Config) if field.name != "extra"]
    return [
        f"{CONFIG_FILE}: {name} is {getattr(a, name)} and {getattr(b, name)}"
        for name in names
        if getattr(a, name) != getattr(b, name)
    ]
