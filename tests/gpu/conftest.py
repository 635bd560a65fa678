"""Programs compiled for GPU without one: skipped where jax's CUDA plugin or cuDNN is missing.

`pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cudnn-cu12 nvidia-cublas-cu12
nvidia-cuda-runtime-cu12 nvidia-cuda-nvrtc-cu12 nvidia-cuda-nvcc-cu12`, no driver needed.
"""

import math

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh

from phi3_jax.sharding import MESH_AXES

# What the compiler has to know of an H100 SXM, by its data sheet, as a GpuTargetConfigProto.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@pytest.fixture(scope="session")
def gpu_mesh():
    """A function (shape) -> Mesh of up to eight H100s of one host: data x fsdp x tensor, and where
    it has a fourth size, that of sequence.

    Its devices run nothing; what is lowered for shapes placed on them can be compiled.
    """
    pytest.importorskip("jax_cuda12_plugin")
    pytest.importorskip("nvidia.cudnn")

    def mesh(shape: tuple[int, ...] = (1, 1, 1)) -> Mesh:
        described = topologies.get_topology_desc(
            platform="cuda", topology_name="h100", target_config=H100, topology="1x1x8"
        )
        devices = np.array(described.devices[: math.prod(shape)])
        data, fsdp, tensor, *sequence = shape
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
