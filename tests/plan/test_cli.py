"""phi3-plan on a machine of CPU devices: what is printed and written, and how it ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from plan import advice, cli, machines
from plan.programs import DecodeJob, Program

ROOT = Path(__file__).parent.parent.parent
TOPOLOGY = ("--topology", "cpu:2")
DECODE = ("decode", "MODEL", "--batch", "6", "--cache", "40")
TRAIN = ("train", "sft_mini_4k_v5e8", "--preset", "MODEL", *TOPOLOGY)


@pytest.fixture
def run(monkeypatch, capsys, cpu_machine, small, tmp_path):
    """Runs the command on two CPU devices; returns exit status, stdout and stderr. MODEL is the
    folder of a small model.
    """
    small().save_pretrained(tmp_path / "small")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")

    def call(*arguments, hbm_bytes=2**24):
        made = lambda topology, num_slices=1: cpu_machine(2, hbm_bytes)  # noqa: E731
        monkeypatch.setattr(machines, "machine", made)
        given = [str(tmp_path / "small") if one == "MODEL" else one for one in arguments]
        monkeypatch.setattr(sys, "argv", ["phi3-plan", *given])
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code or 0
        return status, *capsys.readouterr()

    return call


def test_a_job_that_fits(run, tmp_path):
    status, out, err = run(*DECODE, *TOPOLOGY, "--json", str(tmp_path / "plan.json"))
    assert status == 0 and not err
    assert "decode small on cpu:2 (2 x slow chip), tensor=2" in out
    assert "fits" in out and "which binds" in out and "nothing was run" in out
    values = json.loads((tmp_path / "plan.json").read_text())
    (figures,) = values["figures"]
    assert figures["fits"] and figures["tokens"] == 6 and values["advice"] == []


def test_a_job_that_does_not_fit_gets_advice_and_status_3(run, monkeypatch):
    """As JSON on stdout, with the tables beside it."""
    monkeypatch.setattr(advice, "MOST_TRIES", 1)
    status, out, err = run(*DECODE, *TOPOLOGY, "--json", "-", hbm_bytes=1000)
    assert status == 3
    values = json.loads(out)
    assert not values["figures"][0]["fits"] and values["figures"][0]["limit_bytes"] == 1000
    assert [one["change"] for one in values["advice"]] == ["--ring-cache"]
    assert "DOES NOT FIT" in err and "trying --ring-cache (1 of at most 1)" in err
    assert "does not fit with any of these 1" in err


def test_meshes_side_by_side_and_caches(run):
    status, out, err = run(
        "prefill", "MODEL", "--batch", "2", "--tokens", "40", *TOPOLOGY, "--ring-cache",
        "--compare", "tensor=2", "--compare", "fsdp=2",
    )  # fmt: skip
    assert status == 0 and err.count("compiling") == 2
    lines = out.splitlines()
    first, second = (next(i for i, x in enumerate(lines) if x.startswith(m)) for m in ("te", "fs"))
    assert second == first + 1 and "DOES NOT FIT" not in out
    assert "sliding-window cache of 40" in err


def test_a_sweep(run, monkeypatch, figures, tmp_path):
    jobs = []

    def compile_job(job, machine):
        jobs.append(job)
        return figures(fits=job.config.batch_size < 16)

    monkeypatch.setattr("plan.sweep.compile_job", compile_job)
    changes = ["data.sequence_length=24", "accumulate=2"]
    status, out, err = run(
        "sweep", *TRAIN[:2], *changes, *TRAIN[2:], "--rows", "1,4", "--mesh", "fsdp=2"
    )
    assert status == 0 and "train page" in out and "does not fit" in out
    assert [job.config.batch_size for job in jobs] == [4, 16]
    assert jobs[0].shape.hidden_size == 48 and jobs[0].config.data.sequence_length == 24
    # The page's own mesh where none is named; status 3 where nothing fits.
    monkeypatch.setattr("plan.sweep.compile_job", lambda job, machine: figures(fits=False))
    assert run("sweep", *DECODE[:2], "--cache", "40", *TOPOLOGY, "--rows", "8")[0] == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((*TRAIN, "mode.remat=full"), "no 'mode.remat' (did you mean 'model'?)"),
        ((*TRAIN, "mesh.fsdp=3"), "does not make 2 devices"),
        ((*TRAIN, "data.sequence_length=24", "batch_size=1", "accumulate=1"), "take a multiple of"),
        ((*TRAIN, "--compare", "fsdp"), "write for example fsdp=4,tensor=2"),
        (("train", "sft_mini", *TOPOLOGY), "'sft_mini' is no config"),
        ((*TRAIN[:2], "--preset", "phi-5", *TOPOLOGY), "no preset 'phi-5'"),
        (("train", "sft_mini_128k", *TOPOLOGY), "--preset names the sizes to take"),
        ((*DECODE, *TOPOLOGY, "--quantized-cache", "--ring-cache"), "take one of them"),
        (("sweep", *DECODE[:2], "--cache", "40", *TOPOLOGY, "--rows", "1-4"), "as 1,2,4"),
    ],
)
def test_what_was_asked_wrongly_is_one_line_and_status_2(run, arguments, message):
    status, out, err = run(*arguments)
    assert status == 2 and not out
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


class Failing:
    """A lowered program that the compiler fails on."""

    def compile(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\n  in a pass")


def test_what_failed_is_one_line_and_status_1(run, monkeypatch):
    program = Program(Failing(), {"tensor": 2}, {"params": 5}, 6, 1e9, 1e6)
    with monkeypatch.context() as patch:
        patch.setattr(DecodeJob, "lower", lambda job, devices: program)
        status, _, err = run(*DECODE, *TOPOLOGY)
    assert status == 1 and err == (
        "error: the compiler for cpu:2 failed: INTERNAL: RET_CHECK failure\n"
    )
    status, _, err = run(*DECODE, *TOPOLOGY, "--json", "/nowhere/plan.json")
    assert status == 1 and err.count("\n") == 1 and "/nowhere/plan.json" in err
    assert run("decode", "MODEL", "--batch", "0", "--cache", "40", *TOPOLOGY)[0] == 2


def test_errors_of_others_keep_their_traceback(run, monkeypatch):
    monkeypatch.setattr("plan.figures.compile_job", lambda job, machine: json.loads("x"))
    with pytest.raises(json.JSONDecodeError):
        run(*DECODE, *TOPOLOGY)


@pytest.mark.parametrize(
    "topology, given, platforms",
    [("v5e:2x4", None, "cpu"), ("h100:8", None, "cpu,cuda"), ("h100:8", "cpu", "cpu")],
)
def test_jax_is_told_where_to_run_before_it_starts(topology, given, platforms):
    script = f"""
import os, sys
from plan import cli
assert "jax" not in sys.modules
try:
    cli._machine({topology!r}, 1)
except RuntimeError:
    pass
print(os.environ["JAX_PLATFORMS"])
"""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    if given is not None:
        environment["JAX_PLATFORMS"] = given
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.stdout.split()[-1:] == [platforms], done.stderr[-2000:]
