"""A model of random weights for the same checks: real ones are not here."""

from pathlib import Path

from model_folders import write_hf_folder

from phi3_jax.cli import EMBEDDED_MODEL

# Of reference.CASES: both of what the real ones have.
NAME = "longrope_window"
GOLDEN = Path(__file__).parent / "small.json"


def write_small_model(folder: Path) -> None:
    """A folder of bfloat16 weights with the tokenizer of the embedded model."""
    side_files = {file.name: file.read_bytes() for file in EMBEDDED_MODEL.glob("tokenizer*")}
    write_hf_folder(folder, NAME, side_files=side_files, vocab_size=1024)
