"""The benchmark scripts run, on small models."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

from reference import config_values

import phi3_jax as phi3

ROOT = Path(__file__).parent.parent.parent


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
