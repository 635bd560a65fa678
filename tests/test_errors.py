"""docs/errors.md has every error, as the code says it, and no message leaves the user alone."""

import ast
import re
from pathlib import Path

import error_messages
import list_errors
import pytest

from phi3_jax.config import Phi3Config
from phi3_jax.folder import find_folder
from phi3_jax.sharding import make_mesh
from train.config import load_config
from train.records import open_records

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def modules():
    return list_errors.modules()


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs/errors.md").read_text(encoding="utf-8")


def words_of(text: str) -> str:
    return " ".join(re.findall(r"[A-Za-z]+", text))


def test_the_page_is_what_the_code_says(modules, page):
    assert list_errors.page(modules) == page, "python scripts/list_errors.py > docs/errors.md"


def test_every_raised_text_is_on_the_page(modules, page):
    """Read without the tool: the longest text in each raise statement, by its words alone."""
    missing, statements = [], 0
    page = words_of(page)
    for module in modules:
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.Raise) or node.exc is None:
                continue
            statements += 1
            texts = [
                inside.value
                for inside in ast.walk(node.exc)
                if isinstance(inside, ast.Constant) and isinstance(inside.value, str)
            ]
            if (words := words_of(max(texts, key=len, default=""))) not in page:
                missing.append(f"{module.name}:{node.lineno}: {words}")
    assert not missing
    assert statements > 250


def test_what_is_left_out_is_still_there(modules):
    places = set()
    for module in modules:
        for functions, classes, _ in error_messages.walk(module.tree, [], []):
            places.add(".".join([module.name, *classes, *(f.name for f in functions)]))
    assert error_messages.PASSED_ON | error_messages.WORDS_OF_OTHERS <= places


@pytest.mark.parametrize(
    ("call", "home"),
    [
        (lambda: Phi3Config(rope_scaling=3), "phi3_jax.rope_parameters"),
        (lambda: Phi3Config(head_dim=7), "phi3_jax.rope_parameters"),
        (lambda: find_folder("no/such/folder"), "phi3_jax.folder"),
        (lambda: make_mesh(data=-1, fsdp=-1), "phi3_jax.sharding"),
        (lambda: make_mesh(data=3), "phi3_jax.sharding"),
        (lambda: load_config("sft_tiny_cpu", ["steps"]), "train.config"),
        (lambda: load_config("sft_tiny_cpu", ["lora.rank=x"]), "train.config_values"),
        (lambda: open_records("no/such/file.jsonl"), "train.records"),
    ],
)
def test_what_is_raised_is_what_was_read(modules, call, home):
    with pytest.raises((ValueError, OSError)) as raised:
        call()
    [module] = [module for module in modules if module.name == home]
    message = " ".join(str(raised.value).split())
    patterns = {
        entry.message: re.sub(r"\\\{.*?\\\}", ".*", re.escape(entry.message))
        for entry in error_messages.Reader(modules).entries(module)
        if entry.kind == type(raised.value).__name__
    }
    assert [text for text, pattern in patterns.items() if re.fullmatch(pattern, message)], message


HELPERS = """
LIMIT = "at least 4"
def hint(name):
    return f" (did you mean {name!r}?)" if name else ""
def broken(what) -> OSError:
    return OSError(f"{what} is broken; make it anew")
"""


@pytest.mark.parametrize(
    ("raised", "kind", "message", "parts"),
    [
        (
            'raise ValueError(f"x is {x!r}, must be {LIMIT}")',
            "ValueError",
            "x is {x}, must be at least 4",
            ("x is {x}", "must be at least 4"),
        ),
        (
            'raise ValueError(f"no {x}{hint(x)}; there are " f"{\', \'.join(sorted(self.known))}")',
            "ValueError",
            "no {x}[ (did you mean {x}?)]; there are {known}",
            ("no {x}[ (did you mean {x}?)]", "there are {known}"),
        ),
        (
            'raise broken(f"file {str(x)!r}") from None',
            "OSError",
            "file {x} is broken; make it anew",
            ("file {x} is broken", "make it anew"),
        ),
        (
            'way = "wait"\n    if x:\n        way = "go on"\n    raise KeyError(f"{x}; {way} now")',
            "KeyError",
            "{x}; (wait / go on) now",
            ("{x}", "(wait / go on) now"),
        ),
        (
            'raise ValueError(f"{len(x)} rows in {x} cannot be read: {_brief(error)}")',
            "ValueError",
            "{number of x} rows in {x} cannot be read: {error}",
            ("{number of x} rows in {x} cannot be read: {error}", "as the error in it says"),
        ),
        (
            'warnings.warn(f"{x} has no use")',
            "warning",
            "{x} has no use",
            ("{x} has no use", ""),
        ),
    ],
)
def test_messages_are_read_off_the_code(raised, kind, message, parts):
    module = error_messages.Module("train.some", f"{HELPERS}\ndef check(self, x):\n    {raised}\n")
    [*_, entry] = error_messages.Reader([module]).entries(module)
    assert (entry.kind, entry.message, entry.parts()) == (kind, message, parts)
    assert entry.functions == ["check"]


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("self.config.vocab_size", "vocab_size"),
        ("ids_BT.shape", "shape of ids"),
        ("steps[-1]", "last of steps"),
        ("sizes['data'] * over", "data * over"),
        ("folder / 'config.json'", "folder / config.json"),
        ("values.get('r')", "r"),
        ("texts and texts[1]", "texts"),
        ("checkpoints.path(step)", "path"),
        ("_KNOWN_NAMES", "known names"),
    ],
)
def test_values_are_named_for_readers_of_the_message(value, name):
    assert error_messages.value_name(ast.parse(value, mode="eval").body) == name


@pytest.mark.parametrize(
    "row",
    ["phi3-doctor | 0 or 1", "phi3-convert verify | 0 or 1", "phi3-train run | 75",
     "phi3-train | 1", "phi3-plan | 3", "phi3-plan | 1 or 2"],
)  # fmt: skip
def test_statuses_are_on_the_page(page, row):
    assert f"\n| {row} | " in page


@pytest.mark.parametrize(
    ("raised", "why"),
    [
        ("raise ValueError(elsewhere(x))", "cannot be read"),
        ("raise ValueError(x)", "cannot be read"),
        ('raise ValueError(f"{x}; {x}")', "cannot be read, or says too little"),
        ('raise ValueError(f"{x}: empty")', "says too little"),
        ('raise ValueError(f"{x} is too large")', "tells no way out"),
        ('raise ValueError("the file is not there")', "tells no way out"),
        ("raise x", "PASSED_ON"),
        ("warnings.warn(x)", "cannot be read"),
    ],
)
def test_what_cannot_be_read_or_says_too_little_is_refused(raised, why):
    module = error_messages.Module("train.some", f"def check(x):\n    {raised}\n")
    with pytest.raises(error_messages.Unreadable, match=why):
        list(error_messages.Reader([module]).entries(module))


def test_a_module_without_a_place_is_refused():
    with pytest.raises(error_messages.Unreadable, match="serve has no place in GROUPS"):
        list_errors.group_of("serve.http")
    assert list_errors.group_of("phi3_jax.text.chat") == "Tokenizer and chat template"
    assert list_errors.group_of("phi3_jax.text.streamers") == "Generating"
