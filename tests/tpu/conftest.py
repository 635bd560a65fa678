"""Programs compiled by the TPU compiler, which needs no TPU: skipped where libtpu is missing."""

import math

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh

from phi3_jax.sharding import MESH_AXES

# libtpu asks the cloud what machine it is on, unless told, and refuses to be loaded by a second
# process at a time (a lock that guards the devices, of which there are none here).
WITHOUT_DEVICES = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any; it does not limit the topologies
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@pytest.fixture(scope="session")
def tpu_devices():
    """A function (topology, slices) -> the devices of so many slices of a topology.

    They run nothing; what is lowered for shapes placed on them can be compiled:
    `jax.jit(f).lower(jax.ShapeDtypeStruct(shape, dtype, sharding=...)).compile()`.
    """
    pytest.importorskip("libtpu")

    def devices(topology: str, slices: int = 1) -> list:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in WITHOUT_DEVICES.items():
                patch.setenv(name, value)
            described = topologies.get_topology_desc(
                platform="tpu", topology_name=topology, num_slices=slices
            )
        return described.devices

    return devices


@pytest.fixture(scope="session")
def tpu_mesh(tpu_devices):
    """A function (topology, shape) -> Mesh of the topology's first devices.

    A shape is data x fsdp x tensor, and where it has a fourth size, that of sequence.
    """

    def mesh(topology: str = "v5e:2x4", shape: tuple[int, ...] = (1, 1, 1)) -> Mesh:
        data, fsdp, tensor, *sequence = shape
        devices = np.array(tpu_devices(topology)[: math.prod(shape)])
        return Mesh(devices.reshape(data, fsdp, *sequence or (1,), tensor), MESH_AXES)

    return mesh


@pytest.fixture(autouse=True)
def compile_as_users_do():
    """Without the settings of the other tests: exact products, programs kept from run to run."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    # A program for devices that are not here can be written to the cache and not be read again.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
    with jax.default_matmul_precision("default"):
        yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
