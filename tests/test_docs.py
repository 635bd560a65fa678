"""Every block of code on the pages of the site runs, and what they state is what the code has."""

import importlib.util
import re
import tomllib

import matplotlib
import pytest
from pages import DOCS, ROOT, blocks, run_page, work_in
from typer.testing import CliRunner

import phi3_jax as phi3
from phi3_jax.hf_format import WeightTable
from phi3_jax.sharding import RULES, abstract_params

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Their commands are for machines that are not here; tests/plan and tests/train have what they call.
ELSEWHERE = {"launch.md", "plan.md"}
PAGES = {
    str(path.relative_to(DOCS)): path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md")
}
RUN = sorted(
    name
    for name, text in PAGES.items()
    if name not in ELSEWHERE and any(block.language in ("sh", "python") for block in blocks(text))
)
# Half a minute and more, for which they train or compile.
LONG = {"tutorial.md", "how-to/convert.md", "how-to/generate.md", "how-to/fine-tune.md"} | {
    "reference/training.md"
}


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", [name for name in RUN if name not in LONG])
def test_blocks_run_in_order(name, tmp_path, monkeypatch):
    work_in(tmp_path, monkeypatch)
    run_page(PAGES[name], parity=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LONG))
def test_long_pages_run_in_order(name, tmp_path, monkeypatch):
    work_in(tmp_path, monkeypatch)
    run_page(PAGES[name], parity=False)


def test_pages_that_run_are_there():
    assert LONG < set(RUN)
    assert {"index.md", "explanation/longrope.md"} < set(RUN)
    comments = [block.comment for name in RUN for block in blocks(PAGES[name])]
    assert set(comments) == {"", "parity", "printed"}
    # Under another name a block would not be run.
    languages = {block.language for text in PAGES.values() for block in blocks(text)}
    assert not languages & {"bash", "shell", "console", "py", "pycon", "python3"}


def test_extras_are_there():
    extras = PROJECT["optional-dependencies"]
    named = re.findall(r"pip install '(?:phi3-jax|\.)\[(.*?)\]'", "\n".join(PAGES.values()))
    assert len(named) > 5
    assert {extra for names in named for extra in names.split(",")} <= set(extras)


# --- Reference -------------------------------------------------------------------------------


def test_command_reference_is_what_the_commands_say():
    wanted = script("command_reference").page()
    assert PAGES["reference/commands.md"] == wanted, "python scripts/command_reference.py"


def test_command_reference_has_the_options_of_help():
    """Found independently of how the page is made."""
    reference = script("command_reference")
    sections = re.split(r"^##+ ", reference.page(), flags=re.M)
    texts = dict(section.split("\n", 1) for section in sections)
    apps = [(entry[0], entry[2]) for entry in reference.entries() if entry[2] is not None]
    assert {name.split()[0] for name, _ in apps} == set(PROJECT["scripts"])
    for name, function in apps:
        app = reference.typer.Typer(add_completion=False)
        app.command()(function)
        shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
        found = set(re.findall(r"^\W*(--[a-z][-a-z]*)", shown, flags=re.M)) - {"--help"}
        assert found == set(re.findall(r"`(--[a-z][-a-z]*)", texts[name])), name


def test_python_reference_has_every_public_name():
    named = re.findall(r"^::: phi3_jax\.(\w+)$", PAGES["reference/python.md"], flags=re.M)
    assert sorted([*named, "__version__"]) == phi3.__all__


# --- Explanation -----------------------------------------------------------------------------


def table(name: str, head: str) -> list[list[str]]:
    """The cells of a page's table."""
    lines = PAGES[name].split(f"| {head} |", 1)[1].splitlines()[2:]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines[: next(i for i, line in enumerate(lines) if not line)]
    ]


def test_weights_are_those_of_the_code():
    weights = WeightTable(phi3.Phi3Config.preset("phi-3-medium-4k-instruct"))
    wanted = [
        [f"`{row.hf_name}`", str(list(weights.hf_shape(path))), f"`{'.'.join(path)}`", row.axes,
         str(list(weights.shape(path)))]
        for path, row in weights.weights.items()
    ]  # fmt: skip
    assert table("explanation/weights.md", "in the file") == wanted


def test_rules_are_those_of_the_code():
    page = "explanation/sharding.md"
    rules = {
        name.strip("`"): tuple(axis.strip("` ") for axis in axes.split(","))
        for name, axes, _ in table(page, "logical axis | cut over")
    }
    assert rules == RULES


def test_names_of_parameters_are_those_of_the_code():
    """Each parameter alone on its axes: the page's names say how the mesh cuts it."""
    config = phi3.Phi3Config.preset("phi-4-mini-instruct")
    mesh = phi3.make_mesh(data=1, fsdp=2, tensor=4)
    params = abstract_params(phi3.Phi3ForCausalLM(config, mesh=mesh))["model"]
    layers = params["layers"]
    found = {**layers["self_attn"], **layers["mlp"], "norms": layers["input_layernorm"]}
    found["embed_tokens"] = params["embed_tokens"]
    for cells in table("explanation/sharding.md", "parameter | axes"):
        leaf = found.pop(re.findall(r"\w+", cells[0])[0])["weight"]
        names = re.findall(r"`(\w+)`|(-)", cells[2])
        wanted = [
            next((axis for axis in RULES.get(name, ()) if axis != "sequence"), None)
            for name, _ in names
        ]
        spec = list(leaf.sharding.spec)
        assert spec[len(spec) - len(names) :] == wanted, cells
        assert spec[: len(spec) - len(names)] in ([None], [])
    assert not found


def test_drawings_are_those_of_the_code(tmp_path):
    """By their texts: where matplotlib puts them is its own affair."""
    matplotlib.use("agg")
    drawings = script("drawings")
    drawings.draw(tmp_path)
    texts = lambda path: re.findall(r"<text.*?>(.*?)</text>", path.read_text(), flags=re.S)  # noqa: E731
    for name in drawings.DRAWINGS:
        wanted = texts(tmp_path / f"{name}.svg")
        assert wanted and texts(drawings.FOLDER / f"{name}.svg") == wanted, (
            "python scripts/drawings.py"
        )
    assert {path.stem for path in drawings.FOLDER.glob("*.svg")} == set(drawings.DRAWINGS)
