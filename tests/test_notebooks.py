"""The notebooks: each .ipynb is its source, small and without output, and installs in one cell.

That they run is checked by nbmake: `pytest --nbmake notebooks/*.ipynb` (extra `notebooks`).
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
MAKE = "jupytext --update --to ipynb notebooks/*.py"


def cells(source, kind="code"):
    notebook = json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def install_cells(source):
    return [cell for cell in cells(source) if '"pip"' in cell]


@pytest.fixture
def pip(monkeypatch):
    """The commands that would be run; the checkout is on no path until a cell puts it there."""
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path) != ROOT])
    return commands


def install(source):
    exec(compile(install_cells(source)[0], source.name, "exec"), {})


def pretend(monkeypatch, missing, there):
    """Modules that find_spec is to find or not, whatever is installed."""
    found = importlib.util.find_spec

    def find_spec(name):
        return None if name in missing else sys if name in there else found(name)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def test_there_are_three():
    names = {source.stem for source in SOURCES}
    assert names == {"quickstart", "convert_and_verify", "lora_finetune"}
    assert names == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_notebook_is_its_source(source):
    jupytext = pytest.importorskip("jupytext")
    made = [(cell.cell_type, cell.source) for cell in jupytext.read(source).cells]
    notebook = jupytext.read(source.with_suffix(".ipynb"))
    there = [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert there == made, f"make it again: {MAKE}"


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_notebook_is_small_and_has_no_output(source):
    path = source.with_suffix(".ipynb")
    assert path.stat().st_size < 100_000
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None, f"{path}: {MAKE}"
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


def test_each_installs_in_one_cell_and_begins_with_the_model():
    assert len({tuple(install_cells(source)) for source in SOURCES}) == 1
    for source in SOURCES:
        assert len(install_cells(source)) == 1
        assert cells(source)[0].startswith("MODEL = None")
        assert cells(source)[1] == install_cells(source)[0]


@pytest.mark.parametrize("folder", [".", "notebooks"])
def test_nothing_is_installed_in_a_checkout(folder, monkeypatch, pip):
    monkeypatch.chdir(ROOT / folder)
    install(SOURCES[0])
    assert not pip
    assert sys.path[0] == str(ROOT)


@pytest.mark.parametrize("missing", ["flax", "grain", "matplotlib"])
def test_what_is_missing_is_installed_from_the_checkout_with_the_plugin_that_is_there(
    missing, monkeypatch, pip
):
    monkeypatch.chdir(ROOT / "notebooks")
    pretend(monkeypatch, {missing, "libtpu", "jax_cuda13_plugin"}, {"jax_cuda12_plugin"})
    install(SOURCES[0])
    assert len(pip) == 1
    assert pip[0][:4] == [sys.executable, "-m", "pip", "install"]
    assert {f"{ROOT}[train,cuda12]", "matplotlib"} <= set(pip[0])


def test_elsewhere_what_is_missing_is_that_of_the_installed_package(tmp_path, monkeypatch, pip):
    monkeypatch.chdir(tmp_path)
    plugins = {"libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin"}
    pretend(monkeypatch, {"grain", *plugins}, {"phi3_jax"})
    install(SOURCES[0])
    assert "phi3-jax[train]" in pip[0]


def test_elsewhere_without_the_package_the_way_out_is_said(tmp_path, monkeypatch, pip):
    monkeypatch.chdir(tmp_path)
    pretend(monkeypatch, {"phi3_jax"}, ())
    with pytest.raises(ImportError, match="is no checkout of phi3-jax.*open the notebook where it"):
        install(SOURCES[0])
    assert not pip
