"""Writes docs/reference/commands.md from what the commands' --help is made of.

python scripts/command_reference.py
"""

import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import typer
from typer.models import ArgumentInfo, OptionInfo

from phi3_jax.chat_cli import chat
from phi3_jax.cli import generate
from phi3_jax.compilation_cache import HELP
from phi3_jax.doctor import doctor

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "commands.md"
TYPES = {str: "TEXT", int: "INTEGER", float: "NUMBER", Path: "PATH"}
HEAD = f"""\
# Commands

Made from what the commands' `--help` is made of, by `scripts/command_reference.py`. An error that
the user can mend is one line on stderr; the exit status is then not 0.

`phi3-generate`, `phi3-chat`, `phi3-train run` and `phi3-train eval`: {HELP[0].lower()}{HELP[1:]}
"""

# (heading, what stands under it, the function of a command)
Entry = tuple[str, str, Callable | None]


def entries() -> Iterator[Entry]:
    """Each command as it is typed, and each program that has several of them."""
    for name, function in (
        ("phi3-generate", generate),
        ("phi3-chat", chat),
        ("phi3-doctor", doctor),
    ):
        yield name, function.__doc__ or "", function
    for name in ("convert", "train", "plan"):
        yield from _of_app(f"phi3-{name}", importlib.import_module(f"{name}.cli").app)


def _of_app(name: str, app: typer.Typer) -> Iterator[Entry]:
    yield name, str(app.info.help), None
    for command in app.registered_commands:
        function = command.callback
        assert function is not None
        yield f"{name} {command.name or function.__name__}", function.__doc__ or "", function
    for group in app.registered_groups:
        assert group.typer_instance is not None
        yield from _of_app(f"{name} {group.name}", group.typer_instance)


class Parameter(typing.NamedTuple):
    """An argument or option."""

    typed: str
    usage: str  # empty for what may be left out
    text: str
    is_option: bool


def parameters(function: Callable) -> list[Parameter]:
    """Arguments first."""
    hints = typing.get_type_hints(function, include_extras=True)
    given = inspect.signature(function).parameters.values()
    found = [_parameter(one, *typing.get_args(hints[one.name])) for one in given]
    return sorted(found, key=lambda parameter: parameter.is_option)


def _parameter(
    parameter: inspect.Parameter, kind: typing.Any, info: ArgumentInfo | OptionInfo
) -> Parameter:
    required = parameter.default is inspect.Parameter.empty
    text = (info.help or "").replace("|", "\\|").replace("*", "\\*")
    text += "" if text.endswith(".") else "."
    if isinstance(info, ArgumentInfo):
        name = parameter.name.upper()
        more = "..." if list in map(typing.get_origin, (kind, *typing.get_args(kind))) else ""
        return Parameter(name, name if required else f"[{name}]{more}", text, False)
    # In an annotation the first name is where a default would be.
    names = [*([info.default] if isinstance(info.default, str) else []), *(info.param_decls or ())]
    typed = ", ".join(names or [f"--{parameter.name.replace('_', '-')}"])
    if value := info.metavar or _value(kind):
        typed += f" {value}"
    if not required and parameter.default is not None and parameter.default is not False:
        text += f" Default: `{parameter.default}`."
    return Parameter(typed, typed if required else "", text, True)


def _value(kind: typing.Any) -> str:
    """What stands for an option's value; nothing for a flag."""
    if isinstance(kind, types.UnionType):
        kind = next(one for one in typing.get_args(kind) if one is not types.NoneType)
    if typing.get_origin(kind) is list:
        kind = typing.get_args(kind)[0]
    return "" if kind is bool else TYPES[kind]


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for name, text, function in entries():
        words = name.split()
        lines.append(f"{'#' * (1 + len(words))} {name}\n")
        if function is not None:
            rows = parameters(function)
            usage = " ".join([name, *(row.usage for row in rows if row.usage), "[OPTIONS]"])
            lines.append(f"```text\n{usage}\n```\n")
        lines.append(f"{inspect.cleandoc(text)}\n")
        if function is not None:
            lines.append("| | |\n|---|---|")
            lines += [f"| `{row.typed}` | {row.text} |" for row in rows]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
