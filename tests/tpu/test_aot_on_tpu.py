"""The figures of benchmarks/aot.py that a small program has."""

import importlib
from pathlib import Path

import pytest

import phi3_jax as phi3


def test_attention_holds_a_copy_of_its_output_and_no_scores(monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.syspath_prepend(Path(__file__).parent.parent.parent / "benchmarks")
    aot = importlib.import_module("aot")
    (row,) = aot.attention_rows(phi3.Phi3Config.preset(aot.PRESET), None)
    assert "4096 tokens, 32 heads of 96" in row.figure
    assert 0 < float(row.ours) <= 0.03
