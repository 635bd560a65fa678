"""Every command and every block of code in the README runs."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from pages import DEMO, ROOT, use_commands

README = (ROOT / "README.md").read_text(encoding="utf-8")
# The two commands that set everything up; CI runs them as they stand.
SETUP = {'bash scripts/demo.sh "What is the capital of France?"', "bash scripts/test.sh"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A working folder in which the names that the README uses are the demo model."""
    for name in ("Phi-3-mini-4k-instruct", "microsoft/Phi-3-mini-4k-instruct"):
        shutil.copytree(DEMO, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def commands(tmp_path, monkeypatch):
    use_commands(tmp_path, monkeypatch)


def test_python_blocks_run_in_order(folders, capsys):
    space: dict = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), space)
    assert capsys.readouterr().out.startswith("The capital of France is Paris.")
    assert space["result"].sequences.shape[0] == 2 and space["out"].loss > 0
    assert (folders / "my-phi3" / "config.json").is_file()


def run_lines(lines: list[str]) -> str:
    """What the commands print, one after the other."""
    output = ""
    for line in lines:
        done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        output += done.stdout + done.stderr
    return output


def test_commands_run_in_order(folders, commands):
    setup, lines, *_ = [block.splitlines() for block in blocks("sh")]
    assert set(setup) == SETUP
    output = run_lines(lines)
    assert "tokens/s" in output
    assert ": equal" in output


@pytest.mark.slow
def test_training_commands_run_in_order(folders, commands):
    _, _, lines, _ = [block.splitlines() for block in blocks("sh")]
    shutil.copytree(ROOT / "configs" / "tiny_skill", "skill")
    # The fewest steps that the schedule allows: what 300 lead to is in the README.
    few = " steps=21 evaluation.batches=1"
    lines = [line + few * line.startswith("phi3-train sft_tiny_cpu") for line in lines]
    output = run_lines(lines)
    assert "of 200 exactly right" in output and "step 21/21" in output
    assert (folders / "my-model" / "config.json").is_file()
    assert (folders / "my-adapter" / "adapter_config.json").is_file()


def test_setup_commands_are_what_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    for command in SETUP:
        assert command in ci


def test_map_names_what_is_there():
    table = README.partition("## Map")[2].partition("## ")[0]
    for row in re.findall(r"^\| (`.*?) \|", table, flags=re.M):
        names = re.findall(r"`([^`]+)`", row)
        folder = Path(names[0]).parent
        for name in names:
            path = ROOT / name if "/" in name else ROOT / folder / name
            assert path.exists(), name
