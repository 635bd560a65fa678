"""scripts/first_hour.py: what it runs and where; that it runs at all takes minutes."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "first_hour.py"


@pytest.fixture(scope="module")
def script():
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.fixture
def hour(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/checkout")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    return script.Hour(sys.executable, tmp_path / "an hour")


def test_its_commands_are_those_of_the_readme(script):
    models, training = script.readme_commands()
    assert "phi3-convert verify Phi-3-mini-4k-instruct phi3-orbax" in models
    runs = [line for line in training if line.startswith("phi3-train sft_tiny_cpu")]
    assert len(runs) == 2 and all(line.endswith(script.FEW) for line in runs)
    assert "phi3-train export lora my-adapter --adapter" in training


def test_a_step_sees_nothing_of_this_environment(hour, tmp_path):
    names = "PYTHONPATH", "XDG_CACHE_HOME", "HOME"
    code = f"import os; print([os.environ.get(name) for name in {names}], os.getcwd())"
    home, work = str(tmp_path / "an hour" / "home"), tmp_path / "an hour" / "work"
    assert hour.step("look", [sys.executable, "-c", code]) == f"{[None, None, home]} {work}\n"
    assert list(hour.seconds) == ["look"]


@pytest.mark.parametrize(
    "command, words",
    [
        ("echo out; exit 3", "(?s)'step' ended with status 3.*out"),
        ("echo 'UserWarning: old' >&2", "(?s)'step' warned.*old"),
    ],
)
def test_what_fails_or_warns_ends_it_and_is_shown(hour, command, words):
    with pytest.raises(SystemExit, match=words):
        hour.step("step", command)


def test_the_table_has_a_row_for_every_step(script):
    found = script.table({"Python 3.11": {"a | b": 1.26, "c": 2.0}, "Python 3.12": {"a | b": 3.0}})
    assert found.splitlines() == [
        "| seconds | Python 3.11 | Python 3.12 |",
        "| --- | ---: | ---: |",
        r"| a \| b | 1.3 | 3.0 |",
        "| c | 2.0 |  |",
        "| all | 3 | 3 |",
    ]
