"""The benchmark scripts run, on small models."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from reference import config_values
from train_runs import small_run, write_chat_model, write_page

import phi3_jax as phi3

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    "changes",
    [dict(optimizer=dict(freeze=["model.embed_tokens.*"])), dict(lora=dict(rank=2))],
    ids=["frozen", "lora"],
)
def test_train_step(changes, tmp_path, monkeypatch, capsys):
    write_chat_model(tmp_path / "model")
    page = write_page(small_run(tmp_path, **changes))
    monkeypatch.setattr(sys, "argv", ["train_step", str(page), "--steps", "1"])
    runpy.run_path(str(ROOT / "benchmarks" / "train_step.py"), run_name="__main__")
    assert "s a step (median of 1)" in capsys.readouterr().out


def test_make_checkpoint_and_convert(tmp_path, monkeypatch):
    config = phi3.Phi3Config(**config_values("gqa"))
    monkeypatch.setattr(phi3.Phi3Config, "preset", lambda name: config)
    folder = tmp_path / "model"
    monkeypatch.setattr(sys, "argv", ["make", "--preset", "small", "--out", str(folder)])
    runpy.run_path(str(ROOT / "benchmarks" / "make_checkpoint.py"), run_name="__main__")
    model, params = phi3.from_pretrained(folder, dtype=None)
    assert model.config.num_hidden_layers == 3
    assert params["lm_head"]["weight"].dtype == "bfloat16"

    script = str(ROOT / "benchmarks" / "convert.py")
    done = subprocess.run(
        [sys.executable, script, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    for word in ("plain copy", "to-orbax", "to-hf", "verify", "peak RSS"):
        assert word in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"], "what it writes is removed"


def test_generate(monkeypatch, capsys):
    small = ["--layers", "1", "--tokens", "3", "--prompt", "5", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["generate", *small, "--only", "sampling;num_beams=4"])
    runpy.run_path(str(ROOT / "benchmarks" / "generate.py"), run_name="__main__")
    out = capsys.readouterr().out
    for name in ("bare loop", "plain", "sampling", "num_beams=4"):
        assert f"\n{name} " in out
