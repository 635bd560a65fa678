"""Machines by name. Where libtpu or the CUDA plugin is not installed, what they do is skipped."""

import importlib.util
import os

import pytest

from plan.machines import ENVIRONMENT, machine


@pytest.mark.parametrize(
    "topology, instead",
    [
        ("v5e-8", "v5e:2x4"),
        ("v5litepod-16", "v5e:4x4"),
        ("v7x:2x2x1", "tpu7x:2x2x1"),
        ("v6:2x4", "v6e:2x4"),
        ("v5e", "v5e:1x1"),
        ("v5e:", "v5e:1x1"),
        ("v5e:2x", "v5e:2x4"),
        ("v5e:0x2", "v5e:2x2"),  # libtpu would end the process
        ("V5E:2x4", "v5e:2x4"),
        ("v5e:4x4x4", "2 sizes and at most 256 chips, as in v5e:16x16"),
        ("v5e:16x32", "2 sizes and at most 256 chips, as in v5e:16x16"),
        ("v5p:2x2", "3 sizes and at most 8,960 chips, as in v5p:4x4x4"),
        ("h100-8", "h100:8, or hosts x GPUs, as h100:2x8"),
        ("h100:2x2x8", "h100:2x8"),
        ("b200:8", "known are v4, v5e, v5p, v6e, tpu7x, h100, a100"),
    ],
)
def test_what_to_write_for_a_name_that_is_none(topology, instead):
    with pytest.raises(ValueError, match=f"'{topology}' is not a topology.*{instead}"):
        machine(topology)


def test_slices_are_counted_from_one_and_of_tpus():
    with pytest.raises(ValueError, match="0 slices of v5e:2x4"):
        machine("v5e:2x4", 0)
    with pytest.raises(ValueError, match="GPUs have no slices, got 2; write h100:2x8 for two"):
        machine("h100:8", 2)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="v5e:2x4 needs the TPU compiler.* pip install libtpu"):
        machine("v5e:2x4")


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is not None, reason="the plugin is here"
)
def test_without_the_cuda_plugin():
    with pytest.raises(RuntimeError, match="h100:8 needs.* pip install jax-cuda12-plugin"):
        machine("h100:8")


@pytest.mark.parametrize(
    "topology, slices, devices, kind, gigahertz",
    [
        ("v4:2x2x1", 1, 4, "TPU v4", 1.05),  # a chip each, not a core
        ("v5e:1x1", 1, 1, "TPU v5 lite", 1.5),
        ("v5e:2x4", 2, 16, "TPU v5 lite", 1.5),
        ("v5p:1x1x1", 1, 1, "TPU v5", 1.75),
        ("v6e:2x4", 1, 8, "TPU v6 lite", 1.75),
        ("tpu7x:2x2x1", 1, 8, "TPU7x", 2.2),  # half a chip each
    ],
)
def test_tpus(topology, slices, devices, kind, gigahertz, monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    found = machine(topology, slices)
    assert len(found.devices) == devices
    assert {device.device_kind for device in found.devices} == {kind}
    assert (found.topology, found.num_slices) == (topology, slices)
    assert found.chip.clock_hz == pytest.approx(gigahertz * 1e9, rel=0.01)
    assert found.chip.hbm_bytes / 2**30 == pytest.approx(
        {"TPU v4": 30.75, "TPU v5e": 15.75, "TPU v5p": 95.73, "TPU v6e": 31.24, "TPU 7x": 94.74}[
            found.chip.name
        ]
    )
    assert os.environ["TPU_SKIP_MDS_QUERY"] == ENVIRONMENT["TPU_SKIP_MDS_QUERY"]


def test_a_shape_that_libtpu_refuses():
    pytest.importorskip("libtpu")
    with pytest.raises(ValueError, match="libtpu refuses 'v5e:3x3': .*not divisible.* 1x1, 2x2"):
        machine("v5e:3x3")


@pytest.mark.parametrize(
    "topology, hosts, gpus, flops", [("h100:8", 1, 8, 989e12), ("a100:2x4", 2, 4, 312e12)]
)
def test_gpus(topology, hosts, gpus, flops):
    pytest.importorskip("jax_cuda12_plugin")
    found = machine(topology)
    processes = [device.process_index for device in found.devices]
    assert processes == [host for host in range(hosts) for _ in range(gpus)]
    assert found.chip.flops == flops
    assert found.chip.clock_hz is None and found.chip.network_bandwidth is None
