"""The commands `phi3-generate` and `phi3-chat`."""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

EMBEDDED_MODEL = Path(__file__).parent / "tiny_demo"

HELP_TEXT = """\
!help              this list
!clear             forget the conversation
!save FILE         write the conversation to a JSON file
!set NAME=VALUE    change a generation setting, e.g. !set temperature=0.7; null takes it back
!exit              leave (so does the end of the input)
A slash works as well as the exclamation mark."""

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
    typer.Option(help="Length of an answer in tokens; by default as long as the cache."),
]
Temperature = Annotated[
    float | None,
    typer.Option(help="Above 0: sample; 0: the most likely token. By default as the folder says."),
]
TopP = Annotated[
    float | None, typer.Option(help="Sample from the most likely tokens of this mass.")
]
Seed = Annotated[int, typer.Option(help="Seed of sampling.")]
Dtype = Annotated[
    str, typer.Option(help="auto (as stored), float32, bfloat16 or float16: weights and compute.")
]
System = Annotated[str | None, typer.Option(help="A system message before the conversation.")]
CacheLength = Annotated[
    int | None, typer.Option(help="Tokens of prompt and answer together; by default 4096 or less.")
]
Stats = Annotated[
    bool, typer.Option("--stats", help="Print tokens per second and peak memory to stderr.")
]


class UserError(Exception):
    """An error whose text is all that the user needs."""


def say(text: str) -> None:
    """Prints what is not the answer, to stderr."""
    print(text, file=sys.stderr, flush=True)


def run_command(function: Callable[..., None]) -> None:
    """Runs a typer command; an error that is the user's becomes one line and exit status 1."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(function)
    try:
        app()
    except (ValueError, OSError, UserError) as error:
        say(f"error: {error}")
        sys.exit(1)


def load_generator(model: str | None, dtype: str, cache_length: int | None):
    """The TextGenerator of a folder or hub id, or of the embedded model, on all devices."""
    import jax

    import phi3_jax as phi3
    from phi3_jax.folder import find_folder

    if model is None:
        say(
            "No --model given: using the embedded phi3-tiny-demo, a very small model for trying "
            "things out. It is not Phi-3."
        )
    folder = EMBEDDED_MODEL if model is None else find_folder(model)
    mesh = phi3.make_mesh() if jax.device_count() > 1 else None
    stored = None if dtype == "auto" else dtype
    network, params = phi3.from_pretrained(folder, dtype=stored, mesh=mesh)
    tokenizer = phi3.Tokenizer.from_pretrained(folder)
    return phi3.TextGenerator(network, params, tokenizer, mesh, cache_length)


def given_settings(**options: float | None) -> dict[str, Any]:
    """The options that were given; the rest is left to the folder."""
    return {name: value for name, value in options.items() if value is not None}


@dataclass
class Timing:
    """Times one answer while its pieces pass through."""

    prompt_tokens: int
    tokens: int = 0
    first_s: float = 0.0
    rest_s: float = 0.0

    def watch(self, pieces: Iterator[str]) -> Iterator[str]:
        """The same pieces; the last one is what was left over and no token of its own."""
        start = last = time.perf_counter()
        count = 0
        for piece in pieces:
            now = time.perf_counter()
            if count == 0:
                self.first_s = now - start
            else:
                self.tokens, self.rest_s = count, last - start - self.first_s
            count, last = count + 1, now
            yield piece

    def report(self, load_s: float) -> str:
        """What --stats prints."""
        later = self.tokens - 1
        rate = f"{later / self.rest_s:.1f} tokens/s" if later > 0 else "-"
        prompt_rate = self.prompt_tokens / self.first_s
        return (
            f"load {load_s:.2f} s | prompt {self.prompt_tokens} tokens, {prompt_rate:.1f} tokens/s "
            f"(with compiling) | decode {self.tokens} tokens, {rate} | "
            f"peak memory {peak_memory_gb():.2f} GB"
        )


def peak_memory_gb() -> float:
    """Peak memory of the fullest device where it counts that, else of the process, in 1e9 bytes."""
    import jax

    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [entry["peak_bytes_in_use"] for entry in stats if "peak_bytes_in_use" in entry]
    if peaks:
        return max(peaks) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


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
    settings = given_settings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    start = time.perf_counter()
    generator = load_generator(model, dtype, cache_length)
    load_s = time.perf_counter() - start
    messages = [{"role": "user", "content": text}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    timing = Timing(len(generator.encode(messages)))
    print_answer(timing.watch(generator.stream(messages, seed, **settings)))
    if stats:
        say(timing.report(load_s))


def chat(
    model: Model = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    system: System = None,
    cache_length: CacheLength = None,
    stats: Stats = False,
) -> None:
    """A conversation; !help lists what can be typed besides messages."""
    settings = given_settings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    start = time.perf_counter()
    generator = load_generator(model, dtype, cache_length)
    load_s = time.perf_counter() - start
    opening = [{"role": "system", "content": system}] if system else []
    history = list(opening)
    say("!help lists the commands, !exit leaves.")
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        text = line.strip()
        if not text:
            continue
        if text[0] in "!/":
            if not _obey(text[1:], history, opening, settings):
                return
            continue
        asked = [*history, {"role": "user", "content": text}]
        try:
            timing = Timing(len(generator.encode(asked)))
            answer = print_answer(timing.watch(generator.stream(asked, seed, **settings)))
        except ValueError as error:
            say(f"error: {error}\n(!clear forgets the conversation)")
            continue
        except KeyboardInterrupt:
            say("\n(stopped; this turn is forgotten)")
            continue
        history[:] = [*asked, {"role": "assistant", "content": answer}]
        if stats:
            say(timing.report(load_s))


def _obey(command: str, history: list, opening: list, settings: dict[str, Any]) -> bool:
    """Carries out a command of the chat; False to leave."""
    from phi3_jax.generation.config import GenerationConfig
    from phi3_jax.text.generator import with_implied_sampling

    name, _, argument = command.partition(" ")
    argument = argument.strip()
    if name == "exit":
        return False
    if name == "clear":
        history[:] = opening
        say("(conversation forgotten)")
    elif name == "save":
        _save(argument, history)
    elif name == "set":
        key, _, value = argument.partition("=")
        try:
            changed = {**settings, key.strip(): _value(value.strip())}
            GenerationConfig.from_call(with_implied_sampling(changed)).check()
        except ValueError as error:
            say(f"error: {error}")
        else:
            settings.clear()
            settings.update(given_settings(**changed))
            say(f"({json.dumps(settings)})")
    else:
        if name != "help":
            say(f"error: there is no command {name!r}")
        say(HELP_TEXT)
    return True


def _save(name: str, history: list) -> None:
    if not name:
        say("error: !save needs a file name")
        return
    try:
        with open(name, "x", encoding="utf-8") as file:
            json.dump(history, file, indent=1, ensure_ascii=False)
    except OSError as error:
        say(f"error: {error}")
    else:
        say(f"(saved {len(history)} messages to {name})")


def _value(text: str) -> Any:
    """A setting's value as typed: JSON, or Python's words for the same."""
    text = {"True": "true", "False": "false", "None": "null"}.get(text, text)
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(f"{text!r} is no number, list, true, false or null") from None


def generate_command() -> None:
    """Entry point of `phi3-generate`."""
    run_command(generate)


def chat_command() -> None:
    """Entry point of `phi3-chat`."""
    run_command(chat)
