"""The command `phi3-chat`."""

import json
import sys
from typing import Any

from phi3_jax.cli import (
    CacheLength,
    Dtype,
    MaxNewTokens,
    MinP,
    Model,
    RepetitionPenalty,
    Seed,
    Stats,
    System,
    Temperature,
    TopK,
    TopP,
    begin,
    check_settings,
    given_settings,
    load_generator,
    print_answer,
    run_command,
    say,
)
from phi3_jax.json_files import parse_json

HELP_TEXT = """\
!help              this list
!clear             forget the conversation
!save FILE         write the conversation to a JSON file
!set NAME=VALUE    change a generation setting, e.g. !set temperature=0.7; null takes it back
!exit              leave (so does the end of the input)
A slash works as well as the exclamation mark."""


def chat(
    model: Model = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    system: System = None,
    cache_length: CacheLength = None,
    stats: Stats = False,
) -> None:
    """A conversation; !help lists what can be typed besides messages."""
    settings = given_settings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    timing = begin()
    check_settings(settings)
    generator = load_generator(model, dtype, cache_length)
    timing.lap("load")
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
        timing.lap("typing")
        try:
            answer = print_answer(timing.watch(generator.stream(asked, seed, **settings)))
        except ValueError as error:
            say(f"error: {error}\n(!clear forgets the conversation)")
            continue
        except KeyboardInterrupt:
            say("\n(stopped; this turn is forgotten)")
            continue
        history[:] = [*asked, {"role": "assistant", "content": answer}]
        if stats:
            say(timing.report(len(generator.encode(asked))))


def _obey(command: str, history: list, opening: list, settings: dict[str, Any]) -> bool:
    """Carries out a command of the chat; False to leave."""
    name, _, argument = command.partition(" ")
    argument = argument.strip()
    if name == "exit":
        return False
    if name == "clear":
        history[:] = opening
        say("(conversation forgotten)")
    elif name == "save":
        _save(argument, history)
    elif name == "set" and "=" not in argument:
        say("error: !set needs NAME=VALUE, e.g. !set temperature=0.7")
    elif name == "set":
        key, _, value = argument.partition("=")
        try:
            changed = {**settings, key.strip(): _value(value.strip())}
            check_settings(changed)
        except ValueError as error:
            say(f"error: {error}")
        else:
            settings.clear()
            settings.update(given_settings(**changed))
            say(f"({json.dumps(settings)})")
    else:
        if name != "help":
            say(f"error: there is no command {name!r}; use one of these:")
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
        return parse_json(text)
    except ValueError:
        raise ValueError(f"{text!r} must be a number, list, true, false or null") from None


def chat_command() -> None:
    """Entry point of `phi3-chat`."""
    run_command(chat)
