"""`phi3-convert`: conversions between safetensors and Orbax, and what shows that they are right."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from phi3_jax.interrupts import ctrl_c_ends_imports

app = typer.Typer(
    help="Convert Phi-3 weights between Hugging Face safetensors and Orbax, bit by bit.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Source = Annotated[str, typer.Argument(help="A model folder, or the id of one on the hub.")]
Target = Annotated[str, typer.Argument(help="The new folder.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a model folder that is there.")]
Quantize = Annotated[
    str | None,
    typer.Option(
        help="int8 or nf4 for the matrices, for inference: half or a quarter of the bytes of 16 "
        "bits. What the model loses is measured and printed, with one model in memory at a time."
    ),
]
Text = Annotated[
    Path | None,
    typer.Option(
        help="Measure that on the first 256 tokens of this UTF-8 file; by default on a text that "
        "comes along."
    ),
]


@app.command("to-orbax")
def _to_orbax(
    source: Source,
    target: Target,
    force: Force = False,
    quantize: Quantize = None,
    text: Text = None,
) -> None:
    """Turn a Hugging Face folder into one with an Orbax checkpoint."""
    from convert.progress import progress_bar
    from convert.to_orbax import to_orbax

    if text is not None and quantize is None:
        raise ValueError(
            "--text is what --quantize is measured on; it needs --quantize int8 or nf4"
        )
    words = None if text is None else text.read_text(encoding="utf-8")  # before what takes long
    with progress_bar("to Orbax") as report:
        to_orbax(source, target, force, report, quantize)
    print(f"wrote {target}")
    if quantize is not None:
        from convert.quantization_error import TEXT, quantization_error

        try:
            error = quantization_error(source, target, TEXT if words is None else words)
            print(f"{quantize} {error}")
        except ValueError as reason:  # the folder is there all the same
            print(f"{quantize}: what it changes was not measured: {reason}")


@app.command("to-hf")
def _to_hf(source: Source, target: Target, force: Force = False) -> None:
    """Turn a converted folder into one that transformers loads."""
    from convert.progress import progress_bar
    from convert.to_hf import to_hf

    with progress_bar("to safetensors") as report:
        to_hf(source, target, force, report)
    print(f"wrote {target}")


@app.command("verify")
def _verify(
    first: Annotated[str, typer.Argument(help="A model folder of either format.")],
    second: Annotated[str, typer.Argument(help="Another.")],
) -> None:
    """Compare every tensor of two folders bit by bit, and configs; status 1 where they differ."""
    from convert.progress import progress_bar
    from convert.verify import verify

    with progress_bar("comparing") as report:
        result = verify(first, second, report)
    for line in result.differences:
        print(line)
    compared = f"{result.tensors} tensors, {result.nbytes} bytes compared"
    print(
        f"{compared}: {len(result.differences)} differ"
        if result.differences
        else f"{compared}: equal"
    )
    raise typer.Exit(1 if result.differences else 0)


@app.command("inspect")
def _inspect(path: Source) -> None:
    """List keys, shapes, dtypes and bytes of a folder of either format, and its config; status 1
    where they do not fit.
    """
    from convert.inspect_folder import inspect_folder

    text, problems = inspect_folder(path)
    print(text)
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    raise typer.Exit(1 if problems else 0)


def main() -> None:
    """Runs the command line; what the user can mend is one line on stderr and status 1."""
    # Orbax starts JAX, which would take a TPU or the memory of a GPU. Nothing here needs them.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        with ctrl_c_ends_imports():
            app()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
