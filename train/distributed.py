"""The processes of a run find each other (`jax.distributed`), however they were launched."""

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import jax

# What is read, and what an error shows of it.
_VARIABLES = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_COORDINATOR_PORT",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    "JAX_LOCAL_DEVICE_IDS",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_MCA_orte_hnp_uri",
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_STEP_NUM_NODES",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "TPU_WORKER_HOSTNAMES",
    "TPU_PROCESS_ADDRESSES",
    "TPU_WORKER_ID",
    "TPU_SKIP_MDS_QUERY",
    "MEGASCALE_COORDINATOR_ADDRESS",
    "MEGASCALE_NUM_SLICES",
    "MEGASCALE_SLICE_ID",
    "JOB_COMPLETION_INDEX",
)


def initialize() -> None:
    """Joins the processes that were launched together; does nothing for a process on its own.

    What was launched is read from the environment: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, or what Open MPI, SLURM (`srun`), a TPU pod (Google Compute Engine or GKE) or an
    indexed Job of Kubernetes leaves there. To be called before the first use of a device; later
    calls do nothing.

    A process that is alone on its host has all devices of it. Of several, each has the GPU of its
    number on the host, unless CUDA_VISIBLE_DEVICES leaves it only one, or JAX_LOCAL_DEVICE_IDS
    names others.

    Raises:
      ValueError: where the environment is incomplete, or the processes do not come together, with
        what was found and what to set.
    """
    if jax.distributed.is_initialized():
        return
    config: Any = jax.config
    arguments = launch_arguments(os.environ, tpu="tpu" in (config.jax_platforms or ""))
    if arguments is None:
        return
    try:
        jax.distributed.initialize(**arguments)
    except Exception as error:
        raise _error(os.environ, f"the processes did not come together: {error}") from error


def launch_arguments(environ: Mapping[str, str], tpu: bool) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` has to be told; None for a process on its own.

    Args:
      environ: environment variables.
      tpu: whether jax has found TPU chips (it then puts "tpu" in its config), or was told so.

    Raises:
      ValueError: as `initialize`.
    """
    address = environ.get("JAX_COORDINATOR_ADDRESS")
    if address is not None and not address.rpartition(":")[2].isdecimal():
        raise _error(environ, f"JAX_COORDINATOR_ADDRESS is {address!r}, must be HOST:PORT")
    if "JAX_NUM_PROCESSES" in environ or "JAX_PROCESS_ID" in environ:
        index = "JAX_PROCESS_ID" if "JAX_PROCESS_ID" in environ else "JOB_COMPLETION_INDEX"
        count, process = _place(environ, "JAX_NUM_PROCESSES", index)
        finds_address, local = False, None
    elif "OMPI_COMM_WORLD_SIZE" in environ:
        count, process = _place(environ, "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
        finds_address = "OMPI_MCA_orte_hnp_uri" in environ  # Open MPI 5 has it no more
        alone = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
        local = None if alone else environ.get("OMPI_COMM_WORLD_LOCAL_RANK")
    elif "SLURM_STEP_NODELIST" in environ:
        # A shell inside of an allocation is a step of one task, whatever the allocation is for.
        tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
        count, process = _place(environ, tasks, "SLURM_PROCID")
        finds_address = True
        alone = environ.get("SLURM_STEP_NUM_NODES") == str(count)
        local = None if alone else environ.get("SLURM_LOCALID")
    elif tpu:
        return _on_tpu(environ)
    elif "JOB_COMPLETION_INDEX" in environ:
        if importlib.util.find_spec("kubernetes") is None:
            raise _error(environ, "an indexed Job of Kubernetes does not tell how many pods it has")
        return {}
    elif address is not None:
        raise _error(environ, "JAX_COORDINATOR_ADDRESS alone does not tell which process this is")
    else:
        return None
    if count == 1:
        return None
    if address is None and not finds_address:
        raise _error(environ, f"there are {count} processes, and nothing tells where the first is")
    arguments: dict[str, Any] = {"num_processes": count, "process_id": process}
    if address is not None:
        arguments |= {"coordinator_address": address, "cluster_detection_method": "deactivate"}
    if "JAX_LOCAL_DEVICE_IDS" not in environ:  # which jax reads
        bound = environ.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0
        # An empty list is all of them; without it jax takes one a process, whatever there are.
        arguments["local_device_ids"] = [] if local is None or bound else [int(local)]
    return arguments


def _on_tpu(environ: Mapping[str, str]) -> dict[str, Any] | None:
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
    if hosts is None:
        # On Compute Engine jax asks the metadata server of the machine, unless it must not.
        return None if "TPU_SKIP_MDS_QUERY" in environ else {}
    slices = int(environ.get("MEGASCALE_NUM_SLICES", 1))
    return {} if slices * len(hosts.split(",")) > 1 else None


def _place(environ: Mapping[str, str], count: str, index: str) -> tuple[int, int]:
    """How many processes two variables say there are, and which of them this is."""
    processes, process = environ.get(count, ""), environ.get(index, "")
    if processes == "1" and not process:
        return 1, 0
    if not (processes.isdecimal() and process.isdecimal() and int(process) < int(processes)):
        raise _error(environ, f"{count} is {processes!r} and {index} {process!r}")
    return int(processes), int(process)


def _error(environ: Mapping[str, str], what: str) -> ValueError:
    found = [f"{name}={environ[name]}" for name in _VARIABLES if name in environ]
    return ValueError(
        f"{what} (found {', '.join(found) or 'no variables of a launcher'}). Before the first use "
        "of a device set JAX_COORDINATOR_ADDRESS=HOST:PORT (of process 0, alike in all), "
        "JAX_NUM_PROCESSES and JAX_PROCESS_ID (0, 1, ...) in each process, or JAX_NUM_PROCESSES=1 "
        "for a process on its own"
    )
