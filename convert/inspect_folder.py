"""The job that says what is in a model folder, without reading the weights."""

import math
from pathlib import Path

from phi3_jax.config import Phi3Config
from phi3_jax.folder import find_folder, folder_kind
from phi3_jax.hf_format import SCORE
from phi3_jax.safetensors_files import DTYPES, SafetensorsFolder


def inspect_folder(source: str | Path) -> tuple[str, list[str]]:
    """Lists the tensors of a folder of either format, and its config.

    Returns:
      The text, and one line for everything that is wrong with the files.

    Raises:
      FileNotFoundError: where there is no such folder.
      ValueError: where it holds no model.
    """
    folder = find_folder(source)
    kind = folder_kind(folder)
    problems: list[str] = []
    quantized = None
    if kind == "hf":
        files = SafetensorsFolder(folder)
        problems += files.problems
        rows = [
            (name, entry.shape, DTYPES.get(entry.dtype, entry.dtype), entry.nbytes)
            for name, entry in files.entries.items()
        ]
    else:
        # Not at the top: a look at safetensors need not wait for JAX.
        from phi3_jax.orbax_format import leaf_of, open_arrays

        arrays, quantized, problems = open_arrays(folder)
        leaves = {".".join(path): leaf_of(array) for path, array in arrays.items()}
        rows = [(name, *leaf, leaf.nbytes) for name, leaf in leaves.items()]
    what = "safetensors" if kind == "hf" else "converted (Orbax)"
    lines = [f"{folder}: {what}{f', quantised ({quantized})' if quantized else ''}", ""]
    cells = [(name, str(list(shape)), str(dtype), f"{size:,}") for name, shape, dtype, size in rows]
    widths = [max((len(row[column]) for row in cells), default=0) for column in range(4)]
    for name, shape, dtype, size in cells:
        lines.append(
            f"{name:{widths[0]}}  {shape:{widths[1]}}  {dtype:{widths[2]}}  {size:>{widths[3]}}"
        )
    total = sum(row[3] for row in rows)
    parameters = sum(math.prod(shape) for _, shape, _, _ in rows)
    lines += ["", f"{len(rows)} tensors, {parameters:,} parameters, {total:,} bytes", ""]
    try:
        config = Phi3Config.from_pretrained(folder)
        lines += _describe(config)
        if SCORE.hf_name in (row[0] for row in rows):
            lines.append(f"id2label = {config.id2label}")
    except (FileNotFoundError, ValueError) as error:
        problems.append(str(error))
    return "\n".join(lines), problems


def _describe(config: Phi3Config) -> list[str]:
    shown = (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "tie_word_embeddings",
        "max_position_embeddings",
        "original_max_position_embeddings",
        "sliding_window",
    )
    lines = [f"{name} = {getattr(config, name)}" for name in shown]
    rope = config.rope_parameters
    return [*lines, f"rope = {rope['rope_type']}, theta {rope['rope_theta']}"]
