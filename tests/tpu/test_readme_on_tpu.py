"""The README's commands for machines that are not here."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
*_, LINES = re.findall(r"^```sh\n(.*?)^```", README, flags=re.M | re.S)


@pytest.mark.parametrize("line", LINES.splitlines())
def test_it_runs(line, tmp_path, monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command, *arguments = shlex.split(line)
    assert command == "phi3-plan"
    run = [sys.executable, "-m", "plan.cli", *arguments]
    done = subprocess.run(run, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "nothing was run" in done.stdout
    assert arguments[0] != "train" or ": fits" in done.stdout
    assert ("plan.png" in line) == (tmp_path / "plan.png").is_file()
