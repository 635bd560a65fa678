"""The table of the compilers' figures: what is counted in a program, what is said of failures."""

import importlib
import json
import sys
from pathlib import Path

import pytest

import phi3_jax as phi3

SCRIPTS = Path(__file__).parent.parent.parent / "benchmarks"

# Two layers in a loop of 2; each gathers 2 MiB for 8 devices, in the background, and reduces 12 KiB
# of a norm's gradient; behind it 4 MiB of a matrix's gradient are reduced.
PROGRAM = """HloModule step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(f32[] %a, f32[] %b)
}

%body (state: (s32[], bf16[131072], f32[3072])) -> (s32[], bf16[131072], f32[3072]) {
  %state = (s32[], bf16[131072]{0}, f32[3072]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %share = bf16[131072]{0} get-tuple-element(%state), index=1
  %norm = f32[3072]{0} get-tuple-element(%state), index=2
  %begun = (bf16[131072]{0}, bf16[1048576]{0}) all-gather-start(%share), channel_id=1, \
replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, use_global_device_ids=true
  %whole = bf16[1048576]{0} all-gather-done(%begun)
  %reduced = f32[3072]{0} all-reduce(%norm), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, \
use_global_device_ids=true, to_apply=%add
  ROOT %next = (s32[], bf16[131072]{0}, f32[3072]{0}) tuple(%i, %share, %reduced)
}

%condition (state.1: (s32[], bf16[131072], f32[3072])) -> pred[] {
  %state.1 = (s32[], bf16[131072]{0}, f32[3072]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %two = s32[] constant(2)
  ROOT %more = pred[] compare(%i.1, %two), direction=LT
}

ENTRY %main (start: (s32[], bf16[131072], f32[3072]), gradient: f32[1048576]) -> f32[1048576] {
  %start = (s32[], bf16[131072]{0}, f32[3072]{0}) parameter(0)
  %gradient = f32[1048576]{0} parameter(1)
  %layers = (s32[], bf16[131072]{0}, f32[3072]{0}) while(%start), condition=%condition, \
body=%body, backend_config={"known_trip_count":{"n":"2"}}
  ROOT %summed = f32[1048576]{0} all-reduce(%gradient), channel_id=3, \
replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, to_apply=%add
}
"""


@pytest.fixture
def aot(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("aot")


def table(aot, monkeypatch, capsys, *arguments) -> list[list[str]]:
    """The cells that a run prints."""
    monkeypatch.setattr(sys, "argv", ["aot", *arguments])
    aot.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_what_a_step_sends(aot):
    step = aot.read_step(7, PROGRAM, layers=2)
    assert step.peak == 7
    assert step.whole_sums == 1, "not the norms'"
    assert step.sent == 7 / 8 * 2**21 + 2 * 7 / 8 * 4 * 3072
    assert step.waiting == "1 of 3"


def test_the_floor_is_three_times_a_layers_weights(aot):
    # 3072 x (96 heads of 96 + 32 heads of 96 + 3 x 8192) of 2 bytes are 216 MiB.
    shape = phi3.Phi3Config.preset("phi-3-mini-4k-instruct")
    assert aot.floor(shape, 8) == 3 * 216 * 2**20 * 7 / 8


def test_maxtext_stands_beside_ours(aot, tmp_path, monkeypatch, capsys):
    """Its interpreter is asked for its program, and that is read as ours is."""
    (tmp_path / "program.txt").write_text(PROGRAM)
    figures = {"peak": 9 * 2**30, "versions": {"maxtext": "0.2.5"}}
    (tmp_path / "figures.json").write_text(json.dumps(figures))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ncp {tmp_path}/*.* "$3"\n')
    python.chmod(0o755)
    ours = lambda page, topology, shape: aot.read_step(2**33, PROGRAM, shape.num_hidden_layers)  # noqa: E731
    monkeypatch.setattr(aot, "our_step", ours)
    arguments = ["--rows", "train", "--layers", "2", "--maxtext-python", str(python)]
    rows = table(aot, monkeypatch, capsys, *arguments)
    assert rows[0][3] == "maxtext 0.2.5"
    assert [row[2:] for row in rows[1:3]] == [["8.00", "9.00"], ["1", "1"]]
    assert "base_num_decoder_layers=2" in (tmp_path / "asked").read_text()


def test_a_compiler_that_is_missing_is_said(aot, monkeypatch, capsys):
    def missing(topology):
        raise RuntimeError(f"{topology} needs\nlibtpu")

    monkeypatch.setattr(aot, "machine", missing)
    rows = table(aot, monkeypatch, capsys, "--rows", "attention,decode")
    assert [row[0] for row in rows] == [
        "attention: not compiled, v5e:1x1 needs libtpu",
        "decode: not compiled, v5e:2x4 needs libtpu",
    ]


def test_an_unknown_row_is_refused(aot, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        table(aot, monkeypatch, capsys, "--rows", "train,inference")
    assert "inference: known are train, decode" in capsys.readouterr().err
