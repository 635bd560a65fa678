"""Rows and meshes against memory and time."""

import importlib.util
import io

import pytest
from rich.console import Console

from plan import sweep as module
from plan.programs import DecodeJob, TrainJob, parse_mesh
from plan.sweep import Point, check_drawing, draw, show_sweep, sweep
from train.config import load_config


@pytest.fixture
def asked(figures, monkeypatch):
    """Jobs that would have been compiled; those of 12 rows a device and more do not fit."""
    jobs = []

    def compile_job(job, machine):
        jobs.append(job)
        mesh = dict(module.make_mesh(job.mesh, machine.devices).shape)
        batch = job.batch if isinstance(job, DecodeJob) else job.config.batch_size
        rows = batch // (mesh["data"] * mesh["fsdp"])
        return figures(mesh=mesh, fits=rows < 12, peak_bytes=rows * 2**16, seconds=float(rows))

    monkeypatch.setattr(module, "compile_job", compile_job)
    return jobs


MESHES = [parse_mesh("fsdp=-1"), parse_mesh("fsdp=2,tensor=-1")]


def test_a_mesh_is_left_where_rows_no_longer_fit(small, cpu_machine, asked):
    job = DecodeJob("small", small(), 1, 40, parse_mesh("tensor=-1"))
    said = []
    points = sweep(job, cpu_machine(4), MESHES, [16, 1, 3, 32], said.append)
    assert [job.batch for job in asked] == [4, 12, 64, 2, 6, 32]
    assert [point.rows for point in points] == [1, 3, 16] * 2
    assert [point.figures.fits for point in points] == [True, True, False] * 2
    assert "fsdp=2 tensor=2 with 3 rows" in said[4]


def test_parts_of_a_batch_stay_as_many(small, cpu_machine, asked):
    job = TrainJob(
        "page", load_config("sft_mini_4k_v5e8", ["accumulate=3", "batch_size=24"]), small()
    )
    sweep(job, cpu_machine(4), MESHES[1:], [1, 2], lambda text: None)
    assert [(job.config.batch_size, job.config.accumulate) for job in asked] == [(6, 3), (12, 3)]
    with pytest.raises(ValueError, match="--rows is 0, 2; give numbers from 1 on"):
        sweep(job, cpu_machine(4), MESHES, [0, 2], lambda text: None)


def points_of(figures):
    other = {"data": 1, "fsdp": 8, "sequence": 1, "tensor": 1}
    too_large = figures(fits=False, peak_bytes=3 * 2**20, estimate=None, seconds=None, mfu=None)
    return [
        Point(1, figures(mesh=other, seconds=12.5)),
        Point(2, figures(mesh=other)),
        Point(1, figures()),
        Point(2, too_large),
        Point(1, figures(fits=False, peak_bytes=None, mfu=None, mesh={"tensor": 8})),
    ]


def test_a_line_for_each_point(figures):
    text = io.StringIO()
    show_sweep(Console(file=text, width=100, highlight=False), points_of(figures))
    assert max(map(len, text.getvalue().splitlines())) <= 100
    lines = [" ".join(line.split()) for line in text.getvalue().splitlines()]
    full, three = "#" * 20, "#" * 15 + "." * 5
    assert f"fsdp=8 1 {three} 0.00 {'#' * 6 + '.' * 6} 12.5 s 655 40.0%" in lines
    assert f"2 {three} 0.00 {'#' * 12} 25 s 655 40.0%" in lines
    assert f"2 {full} 0.00 does not fit - - -" in lines
    assert f"tensor=8 1 {full} ? does not fit - - -" in lines


def test_a_picture(figures, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    draw(points_of(figures), path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000


def test_matplotlib_is_asked_for_before_the_compiling(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'phi3-jax\[plan\]'"):
        check_drawing()
