"""What `phi3-train` does before the work begins."""

import sys
from pathlib import Path

import pytest

from phi3_jax import compilation_cache
from train.cli import main

ROOT = Path(__file__).parent.parent.parent


class ReachedError(Exception):
    pass


@pytest.mark.parametrize(
    "arguments",
    [
        ["sft_tiny_cpu"],
        ["eval", str(ROOT / "phi3_jax" / "tiny_demo"), str(ROOT / "configs" / "tiny_skill")],
    ],
    ids=["run", "eval"],
)
def test_commands_that_compile_keep_their_programs(arguments, monkeypatch, tmp_path):
    def stop():
        raise ReachedError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compilation_cache, "keep_compiled_programs", stop)
    monkeypatch.setattr(sys, "argv", ["phi3-train", *arguments])
    with pytest.raises(ReachedError):
        main()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["run", "eval"])
def test_help_says_where_and_how_not_to(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["phi3-train", command, "--help"])
    with pytest.raises(SystemExit):
        main()
    out = capsys.readouterr().out
    assert "phi3-jax/compilation" in out and "JAX_ENABLE_COMPILATION_CACHE=false" in out


def test_help_names_the_pages(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["phi3-train", "--help"])
    with pytest.raises(SystemExit) as stopped:
        main()
    words = " ".join(capsys.readouterr().out.split())
    assert not stopped.value.code and "sft_tiny_cpu, smoke_cpu," in words
