"""Machines that are not here: their compilers' devices, and what their chips can do.

A TPU's name is its generation and its shape in chips, as libtpu takes it ("v5e:2x4"); a GPU's how
many there are, of one host ("h100:8") or of hosts x GPUs ("h100:2x8").
"""

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from train.metrics import peak_flops

# libtpu asks the cloud what machine it is on, unless told, and refuses to be loaded by a second
# process; the CUDA plugin looks for a driver. Set before either is loaded.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any; it does not limit the topologies
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}


@dataclass(frozen=True)
class Chip:
    """What one device of a machine has.

    Attributes:
      name: of the chip.
      hbm_bytes: main memory: for a TPU what its compiler lets a program use, for a GPU all of it.
      flops: bfloat16 operations a second.
      hbm_bandwidth: bytes a second, read and written together.
      link_bandwidth: bytes a second that it can send over all its links, within a slice or a host.
      network_bandwidth: bytes a second that it can send to other slices; None for a GPU.
      clock_hz: of a TPU's matrix units, in which its compiler counts; None for a GPU.
    """

    name: str
    hbm_bytes: int
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float | None
    clock_hz: float | None


@dataclass(frozen=True)
class Machine:
    """Devices that programs can be compiled for and that run nothing.

    Attributes:
      topology: its name, as asked for.
      num_slices: how many of that topology there are, joined by the data-centre network.
      chip: of each device. A device of a tpu7x is half a chip.
      devices: of all slices, in the compiler's order.
    """

    topology: str
    num_slices: int
    chip: Chip
    devices: list[jax.Device]


@dataclass(frozen=True)
class _Tpu:
    """A generation; per device, as Chip.

    memory_gib is what libtpu 0.0.52 calls available in its error for a program that is too large.
    Bandwidths are those of https://cloud.google.com/tpu/docs, of its pages about each generation:
    halved where they hold for both directions, and again for a tpu7x, whose devices are half a
    chip; of a v4's links those of arXiv:2304.01433, and of its network, which no page tells,
    those of a v5p. The clock follows from the peak: in a cycle each place of a matrix unit does
    one multiply-add. There are `units` of them, of 128 x 128 places, from v6e on of 256 x 256.
    Some pages tell two units for v6e and tpu7x, others four for v6e; the cycles that the compiler
    gives for a large product are too few for two.
    """

    memory_gib: float
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    units: int
    unit_size: int
    dims: int
    pod: int
    shapes: tuple[str, ...]


_TPUS = {
    "v4": _Tpu(30.75, 1228e9, 300e9, 6.25e9, 8, 128, 3, 4096, ("1x1x1", "2x2x1", "2x2x2", "4x4x4")),
    "v5e": _Tpu(
        15.75, 819e9, 200e9, 3.125e9, 4, 128, 2, 256, ("1x1", "2x2", "2x4", "4x4", "16x16")
    ),
    "v5p": _Tpu(
        95.73, 2765e9, 600e9, 6.25e9, 8, 128, 3, 8960, ("1x1x1", "2x2x1", "2x2x2", "4x4x4")
    ),
    "v6e": _Tpu(
        31.24, 1640e9, 400e9, 12.5e9, 4, 256, 2, 256, ("1x1", "2x2", "2x4", "4x4", "16x16")
    ),
    "tpu7x": _Tpu(
        94.74, 3690e9, 300e9, 6.25e9, 4, 256, 3, 9216, ("1x1x1", "2x2x1", "2x2x2", "4x4x4")
    ),
}
_OTHER_NAMES = {
    **dict.fromkeys(("v5litepod", "v5lite", "v5-lite"), "v5e"),
    **dict.fromkeys(("v7x", "v7", "tpu7", "ironwood"), "tpu7x"),
    **dict.fromkeys(("v6", "v6lite", "trillium"), "v6e"),
}


@dataclass(frozen=True)
class _Gpu:
    """A card; bandwidths as Chip, the target a GpuTargetConfigProto with what the data sheet of
    https://www.nvidia.com/data-center and CUDA's table of compute capabilities say.
    """

    memory: int
    hbm_bandwidth: float
    link_bandwidth: float
    target: str


_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared} threads_per_core_limit: 2048 core_count: {cores}
  fpus_per_core: {fpus} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: {cache}
  clock_rate_ghz: {clock} device_memory_size: {memory} shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {major} }} registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 8 }} device_description_str: "{name}"
"""


def _gpu(link_bandwidth: float, **target: Any) -> _Gpu:
    text = _TARGET.format(**target)
    return _Gpu(target["memory"], target["bandwidth"], link_bandwidth, text)


_GPUS = {
    "h100": _gpu(
        450e9, name="NVIDIA H100 80GB HBM3", major=9, cores=132, fpus=128, clock=1.98,
        shared=233472, optin=232448, cache=52428800, memory=84942979072, bandwidth=3352320000000,
    ),
    "a100": _gpu(
        300e9, name="NVIDIA A100-SXM4-80GB", major=8, cores=108, fpus=64, clock=1.41,
        shared=167936, optin=166912, cache=41943040, memory=85100068864, bandwidth=2039040000000,
    ),
}  # fmt: skip


def machine(topology: str, num_slices: int = 1) -> Machine:
    """A machine by the name of its topology.

    Sets the variables of ENVIRONMENT that are not set. JAX_PLATFORMS=cpu before jax's first use
    keeps it from looking for devices that are here.

    Args:
      topology: "v4:2x2x1", "v5e:2x4", "v5p:4x4x4", "v6e:16x16", "tpu7x:2x2x2", "h100:8",
        "a100:2x8", ...; of a v4 a device is a chip, of a tpu7x half a chip.
      num_slices: of a TPU.

    Raises:
      ValueError: for a name that is none of those, or a shape that the compiler refuses.
      RuntimeError: if libtpu or jax's CUDA plugin is not installed, with the command.
    """
    name, _, size = topology.partition(":")
    known = name in _TPUS or name in _GPUS
    if not known or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
        raise ValueError(f"{topology!r} is not a topology{_instead(topology)}")
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    sizes = [int(part) for part in size.split("x")]
    if name in _GPUS:
        return _gpus(topology, name, sizes, num_slices)
    return _tpus(topology, name, sizes, num_slices)


def _tpus(topology: str, name: str, sizes: list[int], num_slices: int) -> Machine:
    tpu = _TPUS[name]
    if len(sizes) != tpu.dims or math.prod(sizes) > tpu.pod:
        raise ValueError(
            f"{topology!r} is not a topology: the shape of a {name} must have {tpu.dims} sizes and "
            f"at most {tpu.pod:,} chips, as in {name}:{tpu.shapes[-1]}"
        )
    if num_slices < 1:
        raise ValueError(f"there are {num_slices} slices of {topology}, must be at least 1")
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError(f"{topology} needs the TPU compiler, libtpu: pip install libtpu")
    options: dict[str, Any] = {}
    if math.prod(sizes) == 1:
        options["chips_per_host_bounds"] = (1,) * 3
    if name == "v4":
        options["chip_config_name"] = "megacore"
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, num_slices=num_slices, **options
        )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"libtpu refuses {topology!r}: {str(error).splitlines()[0]}; "
            f"take one of {', '.join(tpu.shapes)}"
        ) from None
    devices = list(described.devices)
    flops = peak_flops(devices[0])
    assert flops is not None  # the table has all generations
    chip = Chip(
        name=f"TPU {name.removeprefix('tpu')}",
        hbm_bytes=round(tpu.memory_gib * 2**30),
        flops=flops,
        hbm_bandwidth=tpu.hbm_bandwidth,
        link_bandwidth=tpu.link_bandwidth,
        network_bandwidth=tpu.network_bandwidth,
        clock_hz=flops / (2 * tpu.units * tpu.unit_size**2),
    )
    return Machine(topology, num_slices, chip, devices)


def _gpus(topology: str, name: str, sizes: list[int], num_slices: int) -> Machine:
    gpu = _GPUS[name]
    if len(sizes) > 2:
        raise ValueError(f"{topology!r} is not a topology: write {name}:8, or {name}:2x8 for hosts")
    if num_slices != 1:
        raise ValueError(
            f"GPUs have no slices, got {num_slices}; write {name}:2x8 for two hosts of eight"
        )
    hosts, gpus = sizes if len(sizes) == 2 else (1, sizes[0])
    try:
        described = topologies.get_topology_desc(
            platform="cuda",
            topology_name=name,
            target_config=gpu.target,
            topology=f"1x{hosts}x{gpus}",
        )
    except (RuntimeError, NotImplementedError) as error:
        raise RuntimeError(
            f"{topology} needs jax's CUDA plugin and cuDNN, no driver: pip install "
            "jax-cuda12-plugin jax-cuda12-pjrt nvidia-cudnn-cu12 nvidia-cublas-cu12 "
            "nvidia-cuda-runtime-cu12 nvidia-cuda-nvrtc-cu12 nvidia-cuda-nvcc-cu12 "
            f"({error})"
        ) from None
    devices = list(described.devices)
    flops = peak_flops(devices[0])
    assert flops is not None  # the table has both
    chip = Chip(
        name=devices[0].device_kind,
        hbm_bytes=gpu.memory,
        flops=flops,
        hbm_bandwidth=gpu.hbm_bandwidth,
        link_bandwidth=gpu.link_bandwidth,
        network_bandwidth=None,
        clock_hz=None,
    )
    return Machine(topology, num_slices, chip, devices)


def _instead(topology: str) -> str:
    """What to write for a name that is not known."""
    name = re.split(r"[:=_\-]", topology.lower())[0]
    name = _OTHER_NAMES.get(name, name)
    if name in _TPUS:
        shapes = ", ".join(f"{name}:{shape}" for shape in _TPUS[name].shapes)
        return f": a {name} is named by its shape in chips: {shapes}"
    if name in _GPUS:
        return f": write how many, as {name}:8, or hosts x GPUs, as {name}:2x8"
    return f": known are {', '.join([*_TPUS, *_GPUS])}, as v5e:2x4 or h100:8"
