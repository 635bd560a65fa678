"""The messages of errors, read off the code: what scripts/list_errors.py writes down.

A message is read where it is raised: f-strings with their {placeholders}, conditional expressions,
local variables, constants and helpers that make text. A message that cannot be read that way, or
that tells no way out, is an error here: none is left out in silence.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# Where an error is raised again as it came: its message stands where it was made.
PASSED_ON = {
    "phi3_jax.orbax_format.OrbaxWriter.__exit__",  # of a write in the background
    "phi3_jax.processes.by_all",  # of this process, when all have ended
    "phi3_jax.text.streamers.TextIteratorStreamer.__next__",  # of the thread that generates
    "phi3_jax.text.streamers.AsyncTextIteratorStreamer.__anext__",
    "convert.inspect_folder.inspect_folder",
    "train.loop.open_data",  # of several data at once
}
# The words are a chat template's.
WORDS_OF_OTHERS = {"phi3_jax.text.chat._raise_exception"}
# No errors of a user: what a subclass has to write, and a second signal.
NO_ERRORS = {"NotImplementedError", "KeyboardInterrupt", "typer.Exit"}
# Lists of lines that become one message by `raise_problems`, or are printed one by one.
PROBLEM_LISTS = {"problems"}
PROBLEM_FUNCTIONS = {"differences", "_check_tied_head", "_unknown_settings", "_differences"}
PRINTERS = {"print", "say", "_say"}
PRINTED = re.compile(r"(error|warning): ")

# Of its own, besides values: a verb for what was wrong, and one for the limit or the way out, as in
# "{name} is {value}, must be {limit}". With fewer, one of the two is left to be guessed.
FEWEST_WORDS = 2
# Where a message turns from what was wrong to what would be right. Behind a semicolon stands the
# way out; "must", "expected" and "needs" begin the limit; a question asks for the likely slip.
TURN = re.compile(
    r"(; "
    r"|[,:.(] ?(?=(must|expected|needs?|(which|it) (needs|must)|this (call|model|version)|it has to"
    r"|(`?pip install|write|set|give|load|begin|put|leave|take|use)\b|`pip|known are|one of))"
    r"| (?=must\b|needs? )"
    r"|\. (?=Before ))"
)
# Calls that leave a value what it is, and those that tell something of it.
SHOWN = {"str", "repr", "int", "sorted", "list", "tuple", "dict", "dtype", "join", "getattr"}
MEASURES = {"len": "number", "type": "type", "np.shape": "shape"}
AXES = {"B": "rows", "T": "tokens"}
WRAPPED = "as the error in it says"


class Unreadable(Exception):
    """A message that cannot be read off the code, or says too little."""


@dataclass
class Entry:
    """A message as a template, its type, and the functions that it comes from."""

    message: str
    kind: str
    module: str
    functions: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Whether it has to tell a way out: no warning, no line of a list."""
        return self.kind not in ("warning", "line of a list")

    def parts(self) -> tuple[str, str]:
        """What was wrong, and the way out; the second is "" where the message has none."""
        turns = [turn.span() for turn in TURN.finditer(self.message)]
        for start, end in turns:
            if not depth(self.message[:start]):
                return self.message[:start], self.message[end:]
        if turns:  # only in what is chosen from: the whole of that
            start = turns[0][0]
            while depth(self.message[:start]):
                start -= 1
            return self.message[:start], self.message[start:]
        # What another library says is all that is known.
        return self.message, WRAPPED if re.search(r"\{[^}]*error\b", self.message) else ""


def depth(text: str) -> int:
    """How many brackets are open at the end of a text."""
    return sum(text.count(mark) for mark in "({[") - sum(text.count(mark) for mark in ")}]")


class Module:
    """A parsed module, with what its names mean."""

    def __init__(self, name: str, source: str):
        self.name = name
        self.tree = ast.parse(source)
        self.helpers: dict[str, ast.FunctionDef] = {}
        self.constants: dict[str, str] = {}
        self.imports: dict[str, tuple[str, str]] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef):
                self.helpers[node.name] = node
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    self.imports[alias.asname or alias.name] = (node.module, alias.name)
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                self.constants[ast.unparse(node.targets[0])] = str(node.value.value)


@dataclass
class Scope:
    """Where a message stands, and for a helper what it was called with."""

    module: Module
    functions: list[ast.FunctionDef]
    line: int
    given: dict[str, str] = field(default_factory=dict)
    depth: int = 0


class Reader:
    """Reads the messages of a set of modules."""

    def __init__(self, modules: list[Module]):
        self.modules = {module.name: module for module in modules}

    # --- Expressions as text ------------------------------------------------------------------

    def text(self, node: ast.expr, scope: Scope) -> str | None:
        """An expression that makes text as a template; None for a mere value."""
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else None
        if isinstance(node, ast.JoinedStr):
            return "".join(self.shown(part, scope) for part in node.values)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            if self.text(node.left, scope) is None and self.text(node.right, scope) is None:
                return None  # a sum of numbers
            return self.shown(node.left, scope) + self.shown(node.right, scope)
        if isinstance(node, ast.IfExp):
            both = self.text(node.body, scope), self.text(node.orelse, scope)
            if both == (None, None):
                return None
            return one_of([self.shown(node.body, scope), self.shown(node.orelse, scope)])
        if isinstance(node, ast.Name):
            return self.text_of_name(node.id, scope)
        if isinstance(node, ast.Call):
            return self.text_of_call(node, scope)
        return None

    def shown(self, node: ast.expr, scope: Scope) -> str:
        """As `text`; a mere value is its name in braces."""
        if isinstance(node, ast.FormattedValue):
            node = node.value
        text = self.text(node, scope)
        return "{" + value_name(node) + "}" if text is None else text

    def text_of_name(self, name: str, scope: Scope) -> str | None:
        if name in scope.given:
            return scope.given[name]
        for function in reversed(scope.functions):
            values = assigned(function.body, name, scope.line, [])
            if values and scope.depth < 5:
                inner = Scope(scope.module, scope.functions, scope.line, scope.given)
                inner.depth = scope.depth + 1
                texts = [self.text(value, inner) for value in values]
                return None if None in texts else one_of([text or "" for text in texts])
        if name in scope.module.constants:
            return scope.module.constants[name]
        home, original = scope.module.imports.get(name, ("", ""))
        return self.modules[home].constants.get(original) if home in self.modules else None

    def text_of_call(self, node: ast.Call, scope: Scope) -> str | None:
        """What a function of the project returns: a text, or an error with one."""
        if (message := message_of(node)) is not node:
            return self.text(message, scope)
        found = self.helper(node.func, scope.module)
        if found is None or scope.depth >= 5:
            return None
        module, function = found
        names = [argument.arg for argument in function.args.args if argument.arg != "self"]
        values = dict(zip(names, node.args, strict=False))
        values |= {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
        given = {name: self.shown(value, scope) for name, value in values.items()}
        texts = []
        for inside in ast.walk(function):
            if isinstance(inside, ast.Return) and inside.value is not None:
                inner = Scope(module, [function], inside.lineno, given, scope.depth + 1)
                texts.append(self.text(message_of(inside.value), inner))
        if texts and None not in texts:
            return one_of([text or "" for text in texts])
        # What shortens a text for show.
        return self.text(node.args[0], scope) if len(node.args) == 1 else None

    def helper(self, called: ast.expr, module: Module) -> tuple[Module, ast.FunctionDef] | None:
        """The function of the project that a call means: of this module, or imported by name."""
        *owner, name = ast.unparse(called).split(".")
        if owner in ([], ["self"]) and name in module.helpers:
            return module, module.helpers[name]
        home, original = module.imports.get(owner[0] if owner else name, ("", ""))
        other = self.modules.get(f"{home}.{original}" if owner else home)
        if other is not None and name in other.helpers:
            return other, other.helpers[name]
        return None

    # --- Messages -----------------------------------------------------------------------------

    def entries(self, module: Module) -> Iterator[Entry]:
        """The messages of a module, in the order of its lines."""
        for functions, classes, node in walk(module.tree, [], []):
            inside = ".".join([*classes, *(function.name for function in functions)])
            if isinstance(node, ast.Raise) and node.exc is not None:
                yield from self.raised(node.exc, Scope(module, functions, node.lineno), inside)
                continue
            for message, kind in told(node, functions):
                scope = Scope(module, functions, message.lineno)
                if kind != "printed":
                    yield from self.entry(message, kind, scope, inside)
                elif PRINTED.match(self.text(message, scope) or ""):
                    yield from self.entry(message, kind, scope, inside)

    def raised(self, error: ast.expr, scope: Scope, inside: str) -> Iterator[Entry]:
        """The message of one raise statement."""
        place = f"{scope.module.name}.{inside}"
        kind = ast.unparse(error.func if isinstance(error, ast.Call) else error)
        if kind in NO_ERRORS or place in WORDS_OF_OTHERS:
            return
        if not isinstance(error, ast.Call):
            if place not in PASSED_ON:
                raise Unreadable(f"{place} raises {kind} as it came: add it to PASSED_ON")
            return
        messages: list[ast.expr] = [error]
        if found := self.helper(error.func, scope.module):
            kind = ast.unparse(found[1].returns) if found[1].returns else "?"
        elif isinstance(choice := message_of(error), ast.IfExp):
            messages = [choice.body, choice.orelse]
        else:
            messages = [choice]
        for message in messages:
            yield from self.entry(message, kind, scope, inside)

    def entry(self, node: ast.expr, kind: str, scope: Scope, inside: str) -> Iterator[Entry]:
        place = f"{scope.module.name}.{inside}"
        text = re.sub(r"\s+", " ", self.text(node, scope) or "").strip()
        own = re.findall(r"[A-Za-z-]+", re.sub(r"\{[^}]*\}", "", text))
        if (not own and place in PASSED_ON) or (
            len(own) < FEWEST_WORDS and re.search(r": \{[^}]*(error|reason)[^}]*\}$", text)
        ):
            return  # it only adds where: the words stand where they were made
        entry = Entry(text, kind, scope.module.name, [inside])
        if len(own) < (FEWEST_WORDS if entry.is_whole and kind != "printed" else 1):
            raise Unreadable(f"{place}: cannot be read, or says too little: {ast.unparse(node)}")
        if entry.is_whole and not entry.parts()[1]:
            raise Unreadable(f"{place}: tells no way out: {text}")
        yield entry


def told(node: ast.AST, functions: list[ast.FunctionDef]) -> Iterator[tuple[ast.expr, str]]:
    """Messages that are not raised where they are made, each with its kind."""
    listed = bool(functions) and functions[-1].name in PROBLEM_FUNCTIONS
    if isinstance(node, ast.Call) and node.args:
        called = ast.unparse(node.func)
        owner, _, method = called.rpartition(".")
        if called == "warnings.warn":
            yield node.args[0], "warning"
        elif called in PRINTERS:
            yield node.args[0], "printed"
        elif method == "append" and (listed or owner.removeprefix("self.") in PROBLEM_LISTS):
            yield node.args[0], "line of a list"
    elif value := list_of_problems(node, listed):
        for inside in ast.walk(value):
            lines = inside.elts if isinstance(inside, ast.List) else []
            if isinstance(inside, ast.ListComp | ast.GeneratorExp):
                lines = [inside.elt]
            for line in lines:
                if isinstance(line, ast.JoinedStr):
                    yield line, "line of a list"


def list_of_problems(node: ast.AST, listed: bool) -> ast.expr | None:
    """What is returned by a function of PROBLEM_FUNCTIONS, or put into one of PROBLEM_LISTS."""
    if isinstance(node, ast.Return) and listed:
        return node.value
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in PROBLEM_LISTS:
        return node.value
    if isinstance(node, ast.AugAssign) and ast.unparse(node.target) in PROBLEM_LISTS:
        return node.value
    return None


def message_of(node: ast.expr) -> ast.expr:
    """The message in `SomeError(message)`; another expression as it is."""
    if isinstance(node, ast.Call) and node.args:
        if ast.unparse(node.func).endswith("Error"):
            return node.args[0]
    return node


def assigned(body: list[ast.stmt], name: str, line: int, values: list[ast.expr]) -> list[ast.expr]:
    """What a variable may have been set to when a line is reached: the last value that is set on
    every way there, and what is set on some ways after it.
    """
    for statement in body:
        if statement.lineno >= line:
            break
        if isinstance(statement, ast.Assign) and name in map(ast.unparse, statement.targets):
            values = [statement.value]
            continue
        blocks = [
            block
            for block in (getattr(statement, key, []) for key in ("body", "orelse", "finalbody"))
            if block
        ]
        blocks += [handler.body for handler in getattr(statement, "handlers", [])]
        around = [b for b in blocks if b[0].lineno <= line <= (b[-1].end_lineno or 0)]
        for block in around or blocks:
            inner = assigned(block, name, line, values if around else [])
            values = inner if around else [*values, *inner]
    return values


def one_of(texts: list[str]) -> str:
    """Several texts that a message may have in a place; in brackets where it may have none."""
    some = list(dict.fromkeys(filter(None, texts)))
    joined = " / ".join(some)
    if len(some) < len(set(texts)):
        return f"[{joined}]"
    return joined if len(some) == 1 else f"({joined})"


def value_name(node: ast.expr) -> str:
    """What a value is to a reader of the message, without how the code gets it."""
    match node:
        case ast.Attribute(value=owner, attr="__name__"):
            return value_name(owner)
        case (
            ast.Attribute(value=owner, attr="shape" | "dtype" as what)
            | ast.Attribute(value=ast.Name(id="error") as owner, attr=what)
        ):
            return f"{what} of {value_name(owner)}"
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return plain_name(name)
        case ast.Call():
            return name_of_call(node)
        case ast.GeneratorExp(generators=[first, *_]) | ast.ListComp(generators=[first, *_]):
            return value_name(first.iter)
        case ast.Subscript(slice=ast.Constant(value=str(key))):
            return key
        case ast.Subscript(value=owner, slice=ast.UnaryOp()):
            return f"last of {value_name(owner)}"
        case ast.Subscript(value=owner) | ast.Starred(value=owner):
            return value_name(owner)
        case ast.BoolOp(op=ast.And(), values=[*_, last]):
            return value_name(last)
        case ast.BoolOp(values=values):
            return " or ".join(map(value_name, values))
        case ast.Tuple(elts=values) | ast.List(elts=values):
            return ", ".join(map(value_name, values))
        case ast.BinOp(left=left, op=op, right=right):
            left, right = ast.Name(value_name(left)), ast.Name(value_name(right))
            return ast.unparse(ast.BinOp(left, op, right))
    return ast.unparse(node).replace("'", "")


def name_of_call(node: ast.Call) -> str:
    """What a call gives; the value itself where it is only made fit for show."""
    called = ast.unparse(node.func)
    owner, _, name = called.rpartition(".")
    private = called.startswith("_") and len(node.args) == 1
    if name in SHOWN or private:
        return value_name(node.args[0])
    if called in MEASURES:
        return f"{MEASURES[called]} of {value_name(node.args[0])}"
    if called == "map":
        return value_name(node.args[1])
    if isinstance(node.func, ast.Attribute) and name in ("strip", "splitlines", "pop"):
        return value_name(node.func.value)
    if name == "get":
        key = node.args[0]
        return str(key.value) if isinstance(key, ast.Constant) else owner
    return plain_name(name.removeprefix("get_"))


def plain_name(name: str) -> str:
    """A variable's name without marks for the reader of the code: axes, privacy, capitals."""
    name = AXES.get(name, name).removeprefix("_")
    return name.lower().replace("_", " ") if name.isupper() else re.sub(r"_[A-Z]+n?$", "", name)


def walk(
    node: ast.AST, functions: list[ast.FunctionDef], classes: list[str]
) -> Iterator[tuple[list[ast.FunctionDef], list[str], ast.AST]]:
    """All nodes in order, with the functions and classes that they are in."""
    for child in ast.iter_child_nodes(node):
        yield functions, classes, child
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from walk(child, [*functions, child], classes)  # type: ignore[list-item]
        elif isinstance(child, ast.ClassDef):
            yield from walk(child, functions, [*classes, child.name])
        else:
            yield from walk(child, functions, classes)
