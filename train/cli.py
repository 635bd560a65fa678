"""`phi3-train`: fine-tuning runs, and what comes before and after them."""

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from phi3_jax import compilation_cache
from phi3_jax.interrupts import ctrl_c_ends_imports
from train.config import config_names, load_config

app = typer.Typer(
    help="Fine-tune Phi-3: `phi3-train CONFIG section.name=value ...` starts a run, or goes on "
    f"with one. CONFIG is one of {', '.join(config_names())}, or a .py file with get_config().",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigName = Annotated[str, typer.Argument(help="A page of configs/, or the path of a .py file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes of it: section.name=value each; train/config.py has all names."),
]
Run = Annotated[str, typer.Argument(help="The folder of a run.")]
Step = Annotated[int | None, typer.Option(help="A checkpoint's step; by default the last one.")]


@app.command("run", epilog=compilation_cache.HELP)
def _run(config: ConfigName, overrides: Overrides = None) -> None:
    """Fine-tune; `run` itself may be left out. Status 75: told to stop, saved, to be run again."""
    loaded = load_config(config, overrides or ())
    from train.distributed import initialize

    initialize()
    compilation_cache.keep_compiled_programs()
    from train.loop import train
    from train.preemption import PREEMPTED_STATUS

    if train(loaded).preempted:
        raise typer.Exit(PREEMPTED_STATUS)


@app.command("check")
def _check(config: ConfigName, overrides: Overrides = None) -> None:
    """Read all data of a run, name every bad line, and say what a step will see."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX is imported
    loaded = load_config(config, overrides or ())
    import jax

    import phi3_jax as phi3
    from train.loop import load_tokenizer, open_data
    from train.state import Setup

    _, tokenizer = load_tokenizer(loaded)
    learnt, valid = open_data(loaded, tokenizer)
    steps = loaded.steps or learnt.steps
    assert steps is not None, "epochs have an end"
    Setup(loaded, phi3.make_mesh(devices=jax.devices()[:1]), steps)  # refuses what `run` would
    print("train:", *learnt.summary(), sep="\n  ")
    if valid is None:
        print("valid: none")
    else:
        print("valid:", *valid.summary(), sep="\n  ")
    print(f"steps: {steps:,}, of {loaded.batch_size:,} rows each")


@app.command("export")
def _export(
    run: Run,
    target: Annotated[str, typer.Argument(help="The new folder.")],
    adapter: Annotated[
        bool, typer.Option("--adapter", help="The LoRA adapter alone, in PEFT's form.")
    ] = False,
    step: Step = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the weights written; by default as the run's model has them."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a model or adapter that is there.")
    ] = False,
) -> None:
    """Write what a run has learnt as a Hugging Face folder."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from train.export import export

    export(run, target, adapter, step, dtype, force)
    print(f"wrote {target}")


@app.command("eval", epilog=compilation_cache.HELP)
def _eval(
    model: Annotated[str, typer.Argument(help="A model folder, a hub id, or a run's folder.")],
    data: Annotated[
        str, typer.Argument(help="A jsonl, parquet or arrayrecord file; of a folder, its test.*")
    ],
    answers: Annotated[
        bool, typer.Option("--answers", help="Also answer the questions, and compare exactly.")
    ] = False,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens a row; by default 2048, or as many as the model has.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows at a time.")] = 8,
    dtype: Annotated[str, typer.Option(help="Of weights and compute.")] = "float32",
    step: Step = None,
) -> None:
    """Perplexity of a model on data; with --answers, how many questions it answers exactly."""
    import phi3_jax as phi3
    from train.batches import Batches
    from train.config import DataConfig
    from train.evaluate import exact_match, perplexity, questions
    from train.export import load_for_use, source_of
    from train.records import open_records

    if batch_size < 1:
        raise ValueError(f"--batch-size is {batch_size}, must be at least 1")
    source = source_of(model, dtype, step)
    positions = phi3.Phi3Config.from_pretrained(source).max_position_embeddings
    length = min(2048, positions) if sequence_length is None else sequence_length
    if not 2 <= length <= positions:
        raise ValueError(
            f"--sequence-length is {length}, must be from 2 to the {positions} positions that the "
            "model has (max_position_embeddings)"
        )
    records = open_records(data, "test")
    settings = DataConfig(path=data, sequence_length=length, long_documents="split")
    tokenizer = phi3.Tokenizer.from_pretrained(source)
    batches = Batches(records, tokenizer, settings, batch_size, 1, 0, 1, shuffle=False)
    assert batches.steps is not None, "an epoch has an end"
    if answers:
        questions(records[i] for i in range(len(records)))  # names what asks nothing, at once
    compilation_cache.keep_compiled_programs()
    network, params, tokenizer = load_for_use(model, dtype, step)
    rows = range(batch_size)
    found = perplexity(network, params, batches.iterate(0, batches.steps, rows))
    print(
        f"perplexity {found.perplexity:.4f}, loss {found.loss:.4f}, {found.tokens:,} tokens learnt"
    )
    if batches.longest > length:
        print(f"documents are of up to {batches.longest:,} tokens: split into rows of {length:,}")
    if answers:
        match = exact_match(network, params, tokenizer, (records[i] for i in range(len(records))))
        share = match.right / match.asked
        print(f"answers {match.right} of {match.asked} exactly right ({share:.1%})")
        for wrong in match.wrong[:5]:
            question = wrong.messages[-1]["content"]
            print(f"  {question!r}: {wrong.answer!r}, expected {wrong.expected!r}")


def main() -> None:
    """Runs the command line; what the user can mend is one line on stderr and status 1."""
    arguments = sys.argv[1:]
    commands = {command.name for command in app.registered_commands}
    if arguments and arguments[0] not in commands and not arguments[0].startswith("-"):
        arguments = ["run", *arguments]
    try:
        with ctrl_c_ends_imports():
            app(arguments)
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        if isinstance(error, ValueError) and not _is_ours(error):
            traceback.print_exception(error)
        hint = "; pip install 'phi3-jax[train]'" if _lacks_extra(error) else ""
        print(f"error: {error}{hint}", file=sys.stderr, flush=True)
        _leave()


def _leave() -> None:
    """Ends with status 1. In a run of several processes at once: in leaving, JAX would wait minutes
    for the others, who wait for this one.
    """
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(1)
    sys.exit(1)


def _is_ours(error: Exception) -> bool:
    """Whether this project raised it, in words for users; others need their traceback."""
    last = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    root = Path(__file__).parent.parent
    return any(last.is_relative_to(root / name) for name in ("phi3_jax", "train", "configs"))


def _lacks_extra(error: Exception) -> bool:
    return isinstance(error, ModuleNotFoundError) and error.name in ("grain", "optax")


if __name__ == "__main__":
    main()
