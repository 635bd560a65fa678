"""The command `phi3-generate`, and what every command that generates needs."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from phi3_jax import compilation_cache
from phi3_jax.interrupts import ctrl_c_ends_imports
from phi3_jax.timing import Timing

EMBEDDED_MODEL = Path(__file__).parent / "tiny_demo"

Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m",
        help="Folder of a Phi-3 model, as Hugging Face has it or converted, or a hub id. "
        "Without it, the tiny demo model that comes with the package.",
    ),
]  # fmt: skip
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        help="At most so many tokens of an answer; by default what the cache has room for."
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(help="Above 0: sample; 0: the most likely token. By default as the folder says."),
]
TopP = Annotated[
    float | None,
    typer.Option(help="Sample from the likeliest tokens, whose probabilities add up to this."),
]
TopK = Annotated[int | None, typer.Option(help="Sample from so many tokens, the likeliest.")]
MinP = Annotated[
    float | None,
    typer.Option(help="Sample from tokens at least this part as likely as the likeliest."),
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Above 1: what is in the text already becomes less likely.")
]
Seed = Annotated[int, typer.Option(help="Seed of sampling.")]
Dtype = Annotated[
    str, typer.Option(help="auto (as stored), float32, bfloat16 or float16: weights and compute.")
]
System = Annotated[str | None, typer.Option(help="A system message before the conversation.")]
CacheLength = Annotated[
    int | None,
    typer.Option(
        help="Room for so many tokens, prompt and answer together; by default 4096, or as many "
        "positions as the model has if those are fewer."
    ),
]
Stats = Annotated[bool, typer.Option("--stats", help="Print where time and memory went to stderr.")]


class UserError(Exception):
    """An error whose text is all that the user needs."""


def say(text: str) -> None:
    """Prints what is not the answer, to stderr."""
    print(text, file=sys.stderr, flush=True)


def run_command(function: Callable[..., None]) -> None:
    """Runs a typer command; an error that is the user's becomes one line and exit status 1."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(epilog=compilation_cache.HELP)(function)
    if sys.stdin is None:  # closed by the shell: <&-
        sys.stdin = open(os.devnull)
    try:
        with ctrl_c_ends_imports():
            app()
    except (ValueError, OSError, UserError) as error:
        say(f"error: {error}")
        sys.exit(1)


def begin() -> Timing:
    """Imports what loading and generating need, sets JAX up, and returns the running clock."""
    timing = Timing()
    import phi3_jax.checkpoint
    import phi3_jax.text.generator  # noqa: F401

    compilation_cache.keep_compiled_programs()
    timing.lap("start")
    return timing


def load_model(model: str, dtype: str) -> tuple[Any, Any, Any]:
    """(folder, model, params) of a folder or hub id, on all devices."""
    import jax

    import phi3_jax as phi3
    from phi3_jax.folder import find_folder

    folder = find_folder(model)
    mesh = phi3.make_mesh() if jax.device_count() > 1 else None
    stored = None if dtype == "auto" else dtype
    network, params = phi3.from_pretrained(folder, dtype=stored, mesh=mesh)
    return folder, network, jax.block_until_ready(params)


def load_generator(model: str | None, dtype: str, cache_length: int | None):
    """The TextGenerator of a folder or hub id, or of the embedded model, on all devices."""
    import phi3_jax as phi3

    if model is None:
        say(
            "No --model given: using the embedded phi3-tiny-demo, a very small model for trying "
            "things out. It is not Phi-3."
        )
    folder, network, params = load_model(str(EMBEDDED_MODEL) if model is None else model, dtype)
    tokenizer = phi3.Tokenizer.from_pretrained(folder)
    return phi3.TextGenerator(network, params, tokenizer, cache_length=cache_length)


def given_settings(**options: float | list[str] | None) -> dict[str, Any]:
    """The options that were given; the rest is left to the folder."""
    return {name: value for name, value in options.items() if value is not None}


def check_settings(settings: dict[str, Any]) -> None:
    """Refuses settings that no model takes, before one is loaded.

    Raises:
      ValueError: as GenerationConfig does.
    """
    from phi3_jax.generation.config import GenerationConfig
    from phi3_jax.text.generator import with_implied_sampling

    GenerationConfig.from_call(with_implied_sampling(settings)).check()


def print_answer(pieces: Iterator[str]) -> str:
    """Prints pieces as they come and returns them joined."""
    answer = []
    for piece in pieces:
        answer.append(piece)
        print(piece, end="", flush=True)
    print(flush=True)
    return "".join(answer)


def generate(
    prompt: Annotated[
        str,
        typer.Argument(
            help="What to ask; - reads it from the input. After -- it may begin with a dash."
        ),
    ],
    model: Model = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    num_beams: Annotated[
        int | None,
        typer.Option(help="Beam search with so many beams; the answer comes at the end, whole."),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Stop after this text, which is printed too; may be repeated."),
    ] = None,
    json_schema: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Answer with JSON of the schema in this file."),
    ] = None,
    draft_model: Annotated[
        str | None,
        typer.Option(help="A small model of the same vocabulary that guesses tokens ahead."),
    ] = None,
    num_draft_tokens: Annotated[
        int | None, typer.Option(help="How many tokens the draft model guesses at a time.")
    ] = None,
    prompt_lookup_num_tokens: Annotated[
        int | None, typer.Option(help="Guess so many tokens ahead from what the prompt repeats.")
    ] = None,
    max_time: Annotated[
        float | None, typer.Option(help="Seconds after which the answer ends.")
    ] = None,
    kv_bits: Annotated[
        int | None, typer.Option(help="8: keep keys and values in 8 bits a number.")
    ] = None,
    prompt_cache_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep here what is computed of the prompt; where the file exists, a prompt that "
            "begins alike is not computed anew.",
        ),
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    system: System = None,
    cache_length: CacheLength = None,
    stats: Stats = False,
) -> None:
    """Answers one prompt; the answer goes to stdout as it comes, all else to stderr."""
    text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
    if not text.strip():
        raise UserError("the prompt is empty; give some text, or - and text on the input")
    settings = given_settings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        num_beams=num_beams,
        stop_strings=stop,
        prompt_lookup_num_tokens=prompt_lookup_num_tokens,
        num_assistant_tokens=num_draft_tokens,
        max_time=max_time,
    )
    if num_draft_tokens is not None and draft_model is None:
        raise UserError("--num-draft-tokens is what a draft model guesses; give --draft-model too")
    check_drafts(
        {
            "--draft-model": draft_model,
            "--prompt-lookup-num-tokens": prompt_lookup_num_tokens,
            "--num-beams": None if num_beams == 1 else num_beams,
            "--json-schema": json_schema,
        }
    )
    if kv_bits not in (None, 8):
        raise UserError(f"--kv-bits is {kv_bits}, must be 8 where it is given")
    kind = {} if kv_bits is None else {"cache_implementation": "quantized"}
    if prompt_cache_file is not None:
        from phi3_jax.generation.prompt_cache import check_path

        prompt_cache_file = prompt_cache_file.expanduser()
        check_path(prompt_cache_file)
    grammar = {} if json_schema is None else {"grammar": read_json_schema(json_schema)}
    timing = begin()
    check_settings(settings | kind)
    generator = load_generator(model, dtype, cache_length)
    if draft_model is not None:
        settings["assistant"] = load_model(draft_model, dtype)[1:]
    timing.lap("load")
    messages = [{"role": "user", "content": text}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    if prompt_cache_file is not None:
        kind = prompt_cache_settings(prompt_cache_file, generator, messages, kind)
    settings |= kind | grammar
    print_answer(timing.watch(generator.stream(messages, seed, **settings)))
    if stats:
        say(timing.report(len(generator.encode(messages)), at_once=(num_beams or 1) > 1))


def read_json_schema(path: Path):
    """The Grammar of a JSON schema in a file."""
    from phi3_jax.text.guided import Grammar

    text = path.read_text(encoding="utf-8")
    try:
        return Grammar.from_json_schema(text)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def check_drafts(options: dict[str, Any]) -> None:
    """Refuses what does not go with the ways to guess tokens, which are the first two options."""
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1 and given[0] in list(options)[:2]:
        raise UserError(f"{given[0]} and {given[1]} do not go together: leave one of them out")


def prompt_cache_settings(
    path: Path, generator, messages: list[dict[str, str]], kind: dict[str, Any]
) -> dict[str, Any]:
    """The settings with which the prompt in a file is used; without a file, these messages are
    computed, kept as `kind` says and written there.
    """
    from phi3_jax.generation.prompt_cache import PromptCache

    if not path.exists():
        cache = generator.cache_prompt(messages, **kind)
        cache.save(path)
        return {"cache": cache}
    cache = PromptCache.load(path, generator.model, params=generator.params)
    if kind and not cache.cache.is_quantized:
        raise UserError(
            f"{path} has keys and values that are not in 8 bits; leave out --kv-bits, or name "
            "another file"
        )
    # Of a cache that is of no use, the new one would not take its kind.
    original_max = generator.model.config.original_max_position_embeddings
    return {"cache": cache} if cache.reusable(generator.encode(messages), original_max) else kind


def generate_command() -> None:
    """Entry point of `phi3-generate`."""
    run_command(generate)
