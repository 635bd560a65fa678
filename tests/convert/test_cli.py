"""`phi3-convert`: what it prints, and its exit status."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from model_folders import write_hf_folder, write_tensors

from convert.cli import main

ROOT = Path(__file__).parent.parent.parent


def run(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["phi3-convert", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


def test_the_whole_way(tmp_path, monkeypatch, capsys):
    hf, orbax, back = (tmp_path / name for name in ("hf", "orbax", "back"))
    tensors = write_hf_folder(hf)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    equal = f"21 tensors, {nbytes} bytes compared: equal\n"
    go = lambda *arguments: run(monkeypatch, capsys, *arguments)  # noqa: E731
    assert go("to-orbax", hf, orbax) == (0, f"wrote {orbax}\n", "")
    assert go("to-hf", orbax, back) == (0, f"wrote {back}\n", "")
    assert go("verify", hf, orbax) == (0, equal, "")
    assert go("verify", hf, back) == (0, equal, "")
    status, out, err = go("inspect", orbax)
    assert (status, err) == (0, "") and "hidden_size = 48" in out

    status, out, err = go("to-orbax", hf, orbax)
    assert (status, out) == (1, "")
    assert err == f"error: {str(orbax)!r} exists; replace it with force (--force)\n"
    assert go("to-orbax", hf, orbax, "--force")[0] == 0

    tensors["model.norm.weight"] = np.flip(tensors["model.norm.weight"])
    write_tensors(back, tensors)
    status, out, err = go("verify", orbax, back)
    assert (status, err) == (1, "")
    assert out.splitlines()[0].startswith("model.norm.weight: ")
    assert out.splitlines()[1].endswith("bytes compared: 1 differ")


def test_errors_are_one_message(tmp_path, monkeypatch, capsys):
    write_hf_folder(tmp_path / "hf")
    config = tmp_path / "hf" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 2}))
    status, out, err = run(monkeypatch, capsys, "to-orbax", tmp_path / "hf", tmp_path / "new")
    assert (status, out) == (1, "")
    assert err.startswith("error: 6 problems with the weights in ") and err.count("\n") == 7
    status, out, err = run(monkeypatch, capsys, "inspect", tmp_path / "missing")
    assert (status, out) == (1, "") and err.startswith("error: there is no folder")
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"no")
    status, out, err = run(monkeypatch, capsys, "inspect", tmp_path / "hf")
    assert status == 1 and err.startswith("problem: model.safetensors: ")


def test_quantised(tmp_path, monkeypatch, capsys):
    hf, small = tmp_path / "hf", tmp_path / "small"
    write_hf_folder(hf)
    go = lambda *arguments: run(monkeypatch, capsys, "to-orbax", hf, *arguments)  # noqa: E731
    status, out, err = go(small, "--quantize", "int8")
    assert (status, err) == (0, "")
    assert re.fullmatch(
        rf"wrote {re.escape(str(small))}\nint8 on 256 random ids \(the folder has no tokenizer "
        r"that can be read\): logits off by \d\.\d\d%\n",
        out,
    )
    status, out, err = go(tmp_path / "new", "--quantize", "int4")
    assert (status, err) == (1, "error: quantize is 'int4', must be one of int8, nf4\n")
    (tmp_path / "text").write_text("A text.")
    status, out, err = go(tmp_path / "new", "--text", tmp_path / "text")
    assert status == 1 and err.startswith("error: --text is what --quantize is measured on")
    missing = tmp_path / "missing"
    status, out, err = go(tmp_path / "new", "--quantize", "nf4", "--text", missing)
    assert status == 1 and "missing" in err and not (tmp_path / "new").exists()
    write_hf_folder(tmp_path / "judge", head="score", num_labels=3)
    judge = ["to-orbax", tmp_path / "judge", tmp_path / "new", "--quantize", "nf4"]
    status, out, err = run(monkeypatch, capsys, *judge)
    assert status == 0 and "nf4: what it changes was not measured" in out


@pytest.mark.parametrize("arguments", [["to-orbax", "x"], ["verify", "x"], ["nonsense"]])
def test_wrong_usage_is_status_2(monkeypatch, capsys, arguments):
    assert run(monkeypatch, capsys, *arguments)[0] == 2


def test_it_runs_as_a_module_and_needs_no_compiler_to_look(tmp_path):
    write_hf_folder(tmp_path / "hf")
    command = [sys.executable, "-X", "importtime", "-m", "convert.cli", "inspect"]
    ran = subprocess.run(
        [*command, str(tmp_path / "hf")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "lm_head.weight" in ran.stdout
    imported = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines()}
    assert "phi3_jax.config" in imported and not {"jax", "torch", "tensorstore"} & imported
