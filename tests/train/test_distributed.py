"""How a process is told of the others: what launchers leave in the environment, and real pairs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from train.distributed import initialize, launch_arguments

ROOT = Path(__file__).parent.parent.parent

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
OPEN_MPI_5 = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
OPEN_MPI_4 = OPEN_MPI_5 | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911"}
EXPLICIT = {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
ADDRESS = {"JAX_COORDINATOR_ADDRESS": "host-0:1234"}
PAIR = {"num_processes": 2, "process_id": 0}
GIVEN = {"coordinator_address": "host-0:1234", "cluster_detection_method": "deactivate"}


@pytest.mark.parametrize(
    "environ, tpu, wanted",
    [
        # One process: a plain machine, a notebook in a pod, shells in allocations, one TPU host.
        ({}, False, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, False, None),
        (SLURM | {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, False, None),
        (OPEN_MPI_4 | {"OMPI_COMM_WORLD_SIZE": "1"}, False, None),
        (SLURM | {"JAX_NUM_PROCESSES": "1"}, False, None),
        ({"JOB_COMPLETION_INDEX": "0", "JAX_NUM_PROCESSES": "1"}, False, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, True, None),
        ({"TPU_SKIP_MDS_QUERY": "1"}, True, None),
        # A TPU machine of Compute Engine, a pod of GKE, two slices of one host.
        ({}, True, {}),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, True, {}),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True, {}),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, False, None),
        # Several tasks a host share its GPUs out; a task alone has all, and one that was bound.
        (SLURM, False, PAIR | {"local_device_ids": [0]}),
        (
            SLURM | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "0,1"},
            False,
            {"num_processes": 2, "process_id": 1, "local_device_ids": [1]},
        ),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "1"}, False, PAIR | {"local_device_ids": []}),
        (SLURM | {"SLURM_STEP_NUM_NODES": "2"}, False, PAIR | {"local_device_ids": []}),
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, False, PAIR),
        (SLURM | ADDRESS, False, PAIR | GIVEN | {"local_device_ids": [0]}),
        (OPEN_MPI_4, False, PAIR | {"local_device_ids": [0]}),
        (OPEN_MPI_5 | ADDRESS, False, PAIR | GIVEN | {"local_device_ids": [0]}),
        (
            OPEN_MPI_4 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
            False,
            PAIR | {"local_device_ids": []},
        ),
        (EXPLICIT | ADDRESS, False, PAIR | GIVEN | {"local_device_ids": []}),
        (EXPLICIT | ADDRESS | SLURM, False, PAIR | GIVEN | {"local_device_ids": []}),
        (
            {"JOB_COMPLETION_INDEX": "0", "JAX_NUM_PROCESSES": "2"} | ADDRESS,
            False,
            PAIR | GIVEN | {"local_device_ids": []},
        ),
    ],
)
def test_what_launchers_say(environ, tpu, wanted):
    assert launch_arguments(environ, tpu) == wanted


@pytest.mark.parametrize(
    "environ, words",
    [
        (ADDRESS, "alone does not tell which process this is"),
        (
            EXPLICIT,
            r"2 processes, and nothing tells where the first is \(found JAX_NUM_PROCESSES=2",
        ),
        (OPEN_MPI_5, "2 processes, and nothing tells where the first is"),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "host"}, "'host', must be HOST:PORT"),
        (ADDRESS | {"JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES is '' and JAX_PROCESS_ID '0'"),
        (ADDRESS | {"JAX_NUM_PROCESSES": "2"}, "is '2' and JOB_COMPLETION_INDEX ''"),
        (ADDRESS | EXPLICIT | {"JAX_PROCESS_ID": "2"}, "is '2' and JAX_PROCESS_ID '2'"),
        (SLURM | {"SLURM_PROCID": "x"}, "SLURM_NTASKS is '2' and SLURM_PROCID 'x'"),
        ({"JOB_COMPLETION_INDEX": "1"}, r"how many pods it has \(found JOB_COMPLETION_INDEX=1\)"),
    ],
)
def test_what_they_leave_out_is_said(environ, words, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no client of Kubernetes
    with pytest.raises(ValueError, match=words) as raised:
        launch_arguments(environ, tpu=False)
    assert "set JAX_COORDINATOR_ADDRESS=HOST:PORT" in str(raised.value)


WORKER = """
import jax
from train.distributed import initialize
initialize()
initialize()
print("RESULT", jax.process_index(), jax.process_count(), len(jax.devices()), flush=True)
initialize()
"""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(environ: dict[str, str]) -> subprocess.Popen:
    plain = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", WORKER],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=plain | environ,
    )


def result(worker: subprocess.Popen) -> list[str]:
    out, err = worker.communicate(timeout=300)
    assert worker.returncode == 0, err
    return next(line for line in out.splitlines() if line.startswith("RESULT ")).split()[1:]


def test_a_process_on_its_own():
    """In a pod, where jax would warn and fail; a warning fails here too."""
    assert result(start({"KUBERNETES_SERVICE_HOST": "10.0.0.1"})) == ["0", "1", "1"]


@pytest.mark.parametrize(
    "environ, index",
    [
        (SLURM, ("SLURM_PROCID", "SLURM_LOCALID")),
        (OPEN_MPI_4, ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")),
        (EXPLICIT, ("JAX_PROCESS_ID",)),
    ],
    ids=["slurm", "open-mpi", "explicit"],
)
def test_two_processes_find_each_other(environ, index):
    port = free_port()
    where = {"JAX_COORDINATOR_PORT": port}
    if environ is EXPLICIT:
        where = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}"}
    workers = [start(environ | where | dict.fromkeys(index, str(process))) for process in range(2)]
    for process, worker in enumerate(workers):
        assert result(worker) == [str(process), "2", "2"]


def test_a_failure_says_what_was_found(monkeypatch):
    def taken(**_):
        raise RuntimeError("Address already in use")

    monkeypatch.setattr(jax.distributed, "initialize", taken)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    for name, value in (EXPLICIT | ADDRESS).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="did not come together: Address already in use") as raised:
        initialize()
    assert "found JAX_COORDINATOR_ADDRESS=host-0:1234, JAX_NUM_PROCESSES=2" in str(raised.value)
    assert "set JAX_COORDINATOR_ADDRESS=HOST:PORT" in str(raised.value)
