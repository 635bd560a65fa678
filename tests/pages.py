"""The blocks of code in Markdown pages, and what running them needs."""

import contextlib
import io
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
DEMO = ROOT / "phi3_jax" / "tiny_demo"
# Runs need not learn anything here.
FEW = (
    " steps=2 batch_size=8 optimizer.warmup_steps=1 evaluation.batches=1 evaluation.sample_tokens=2"
)


class Block(NamedTuple):
    """A block of code, and the comment right above it: "parity" needs transformers, "printed" is
    what the block before it prints among other things.
    """

    language: str
    code: str
    comment: str


def blocks(text: str) -> list[Block]:
    """Those of a page, in order."""
    found = re.findall(r"^(?:<!-- (\w+) -->\n)?```(\w+)\n(.*?)^```", text, flags=re.M | re.S)
    return [Block(language, code, comment) for comment, language, code in found]


def use_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's commands on the PATH, whether it is installed or not."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, entry in scripts.items():
        module, function = entry.split(":")
        command = folder / name
        command.write_text(
            f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
            f"from {module} import {function}\n{function}()\n"
        )
        command.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def work_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with what the pages find there: models, all of them the demo, and little
    data.
    """
    use_commands(folder, monkeypatch)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(folder)
    models = ("Phi-3-mini-4k-instruct", "microsoft/Phi-3-mini-4k-instruct", "phi3_jax/tiny_demo")
    for name in models:
        shutil.copytree(DEMO, folder / name)
    for name in ("data", "configs/tiny_skill"):
        (folder / name).mkdir(parents=True)
        for split in (ROOT / "configs" / "tiny_skill").glob("*.jsonl"):
            with split.open(encoding="utf-8") as lines:
                some = [next(lines) for _ in range(16)]
            (folder / name / split.name).write_text("".join(some), encoding="utf-8")


def run_page(text: str, parity: bool) -> str:
    """Runs a page's sh and python blocks in the working folder, and gives all that they print.

    parity: those that are marked so, too.
    """
    space: dict = {"__name__": "page"}
    printed = everything = ""
    for block in blocks(text):
        if block.comment == "printed":
            assert block.code.strip() in printed, f"expected {block.code}in\n{printed}"
        elif block.comment == "parity" and not parity:
            continue
        elif block.language == "sh":
            printed = _run_sh(block.code)
        elif block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as stdout:
                exec(compile(block.code, "page", "exec"), space)
            printed = stdout.getvalue()
        everything += printed
    return everything


def _run_sh(code: str) -> str:
    lines = [line + FEW * line.startswith("phi3-train sft_tiny_cpu") for line in code.splitlines()]
    command = ["bash", "-exuo", "pipefail", "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr
