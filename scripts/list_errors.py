"""Writes docs/errors.md: every error that a user can meet, read off the code.

python scripts/list_errors.py > docs/errors.md
python scripts/list_errors.py --check     # status 1 where the file is not what the code says
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

from error_messages import WRAPPED, Entry, Module, Reader, Scope, Unreadable

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "errors.md"
PACKAGES = ("phi3_jax", "convert", "train", "plan", "configs")

# What a user is doing when a module raises: the longest name that a module begins with counts.
GROUPS = {
    "The config of a model": (
        "phi3_jax.config",
        "phi3_jax.config_checks",
        "phi3_jax.rope_parameters",
    ),
    "Model folders: finding, loading, saving": (
        "phi3_jax",
        "phi3_jax.checkpoint",
        "phi3_jax.compilation_cache",
        "phi3_jax.folder",
        "phi3_jax.hf_format",
        "phi3_jax.orbax_format",
        "phi3_jax.processes",
        "phi3_jax.quantized",
        "phi3_jax.safetensors_files",
    ),
    "Tokenizer and chat template": (
        "phi3_jax.text.chat",
        "phi3_jax.text.token_text",
        "phi3_jax.text.tokenizer",
        "phi3_jax.text.vocabulary",
    ),
    "Calling a model": (
        "phi3_jax.attention_kernels",
        "phi3_jax.cache",
        "phi3_jax.classification",
        "phi3_jax.inputs",
        "phi3_jax.layers",
        "phi3_jax.model",
    ),
    "Meshes": ("phi3_jax.sharding",),
    "Generating": ("phi3_jax.chat_cli", "phi3_jax.cli", "phi3_jax.generation", "phi3_jax.text"),
    "Looking at an installation": ("phi3_jax.doctor",),
    "Converting": ("convert",),
    "Training: the config of a run": ("train.config", "train.config_values"),
    "Training: data": ("train.batches", "train.examples", "train.records"),
    "Training: a run": ("train",),
    "Training: adapters and quantised weights": (
        "train.lora",
        "train.peft_format",
        "train.quantize",
    ),
    "Evaluating and exporting": ("train.evaluate", "train.export", "train.lm_eval"),
    "Planning": ("plan",),
}

# Where a message need not tell one.
NO_WAY_OUT = {
    "warning": "none is needed: all goes on",
    "line of a list": "in the message that has the list",
}
# What runs a command, and turns errors into lines.
ENTRIES = {"main", "run_command"}

INTRODUCTION = """\
# Errors

Made by `python scripts/list_errors.py` from the code; a test keeps it so. A message says what was
wrong, the value, the limit and the way out. Here it is cut in two at that turn, which is a comma, a
semicolon or a full stop. To find yours, search the page for some words of it: {names} stand for
values, as in `{shape of labels}`, (one / another) for what is chosen from, and [what may be
missing]. Long messages are one line here. `printed` is what a command says without an exception,
`warning` a Python warning, and `line of a list` a part of one message that lists all problems at
once.

The commands turn the errors in the next table into `error: MESSAGE` on stderr; another error
comes with its traceback. What is not in the table ends with status 0, and arguments that do not
parse with status 2, as in every program made with typer. What the operating system says (no such
file, no space) is an `OSError` in its own words. `phi3-doctor` says what is missing or broken in an
installation.
"""


def group_of(module: str) -> str:
    """What a user does when a module raises."""
    known = {name: group for group, names in GROUPS.items() for name in names}
    while module not in known:
        if "." not in module:
            raise Unreadable(f"{module} has no place in GROUPS")
        module = module.rpartition(".")[0]
    return known[module]


def merged(entries: Iterable[Entry]) -> list[Entry]:
    """One entry for a message and its type in a module."""
    found: dict[tuple[str, str, str], Entry] = {}
    for entry in entries:
        key = (entry.message, entry.kind, entry.module)
        first = found.setdefault(key, Entry(*key))
        first.functions += [name for name in entry.functions if name not in first.functions]
    return list(found.values())


def exits(module: Module, reader: Reader) -> Iterator[str]:
    """Rows of the statuses that commands end with on purpose, and of what becomes one line."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    scripts = settings["project"]["scripts"].items()
    homes = {name: entry.partition(":")[0] for name, entry in scripts}
    commands = [name for name, home in homes.items() if home == module.name]
    entries = [function for name, function in module.helpers.items() if name in ENTRIES]
    told = {ast.unparse(node.func) for node in calls(entries)}
    for name, function in module.helpers.items():
        ends = list(statuses(function, module, reader))
        caught = [
            ast.unparse(node.type).strip("()")
            for node in ast.walk(function)
            if isinstance(node, ast.ExceptHandler) and node.type and name in ENTRIES
        ]
        if not ends and not caught or name in told:
            continue
        summary = (ast.get_docstring(function) or "").partition("\n\n")[0].replace("\n", " ")
        # What runs commands may be of another module.
        others = [
            command
            for command, home in homes.items()
            if name in ENTRIES and reader.modules[home].imports.get(name) == (module.name, name)
        ]
        called = " ".join([", ".join([*commands, *others]), *subcommand(function)])
        yield f"| {called} | {' or '.join(sorted(ends))} | {summary} | {', '.join(caught)} |"


def calls(functions: Iterable[ast.FunctionDef]) -> Iterator[ast.Call]:
    for function in functions:
        yield from (node for node in ast.walk(function) if isinstance(node, ast.Call))


def statuses(function: ast.FunctionDef, module: Module, reader: Reader) -> Iterator[str]:
    """What a function ends the program with; what runs a command may do so through a helper."""
    for node in calls([function]):
        called = ast.unparse(node.func)
        if called in ("sys.exit", "typer.Exit"):
            ends = node.args[0]
            for value in (ends.body, ends.orelse) if isinstance(ends, ast.IfExp) else (ends,):
                yield reader.shown(value, Scope(module, [], node.lineno)).strip("{}")
        elif called in module.helpers and function.name in ENTRIES:
            yield from statuses(module.helpers[called], module, reader)


def subcommand(function: ast.FunctionDef) -> list[str]:
    """The name under which typer has a function, if it has one: `@app.command(NAME)`."""
    return [
        decorator.args[0].value
        for decorator in function.decorator_list
        if isinstance(decorator, ast.Call)
        and decorator.args
        and isinstance(decorator.args[0], ast.Constant)
    ]


def code(text: str) -> str:
    text = text.replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`" if text else ""


def page(modules: list[Module]) -> str:
    """The whole of docs/errors.md.

    Raises:
      Unreadable: for the first message that cannot be read, or tells no way out.
    """
    reader = Reader(modules)
    entries = merged(entry for module in modules for entry in reader.entries(module))
    lines = [INTRODUCTION, "| command | ends with status | when | errors that become one line |"]
    lines += ["|---|---|---|---|"]
    for module in modules:
        lines += exits(module, reader)
    for group in GROUPS:
        some = [entry for entry in entries if group_of(entry.module) == group]
        lines += ["", f"## {group}", "", "| what was wrong | way out | type, and where |"]
        lines += ["|---|---|---|"]
        for entry in some:
            wrong, way_out = entry.parts()
            if way_out != WRAPPED:
                # Of "(; one / ; another)" the marks at which the message turns.
                way_out = code(re.sub(r"(^\(|/ )[;:] ", r"\1", way_out)) or NO_WAY_OUT[entry.kind]
            places = ", ".join(f"`{entry.module}.{name}`" for name in entry.functions)
            lines.append(f"| {code(wrong)} | {way_out} | {entry.kind}, {places} |")
    return "\n".join(lines) + "\n"


def modules() -> list[Module]:
    """All modules of the packages."""
    found = []
    for path in (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found.append(Module(name, path.read_text(encoding="utf-8")))
    return found


def main() -> int:
    try:
        text = page(modules())
    except Unreadable as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if "--check" not in sys.argv[1:]:
        print(text, end="")
        return 0
    same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
    if not same:
        print("error: docs/errors.md is old; make it by scripts/list_errors.py", file=sys.stderr)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
