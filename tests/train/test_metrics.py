"""What is known of devices, and what is read of a run."""

from types import SimpleNamespace

import pytest

from train.metrics import peak_flops, read_metrics


@pytest.mark.parametrize(
    "kind, tflops",
    [
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("Tesla T4", 65),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
    ],
)
def test_the_peak_of_a_device_is_told_by_its_name(kind, tflops):
    assert peak_flops(SimpleNamespace(device_kind=kind)) == tflops * 1e12  # ty: ignore


def test_other_devices_have_no_peak():
    assert peak_flops(SimpleNamespace(device_kind="cpu")) is None  # ty: ignore


@pytest.mark.parametrize("line", [b"\0\0\0", b"[" * 100_000, b'{"kind": "\xff"}'])
def test_a_line_that_is_none_names_the_file(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(ValueError, match="metrics.jsonl' has a line that is not JSON"):
        read_metrics(tmp_path / "metrics.jsonl")
