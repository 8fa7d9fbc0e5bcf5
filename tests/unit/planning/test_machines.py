"""The GPU of a device's name, and the measurement of one without a data sheet."""

import pytest

from minisft.planning.machines import GPUS, gpu_of_device_name, measure_gpu


@pytest.mark.parametrize(("device", "name"), [
    ("NVIDIA H100 80GB HBM3", "h100"),
    ("NVIDIA H100 PCIe", "h100-pcie"),
    ("NVIDIA H100 NVL", "h100-nvl"),
    ("NVIDIA H200", "h200"),
    ("NVIDIA B200", "b200"),
    ("NVIDIA GB200", "gb200"),
    ("NVIDIA B300 SXM6 AC", "b300"),
    ("NVIDIA A100-SXM4-80GB", "a100"),
    ("NVIDIA A100-PCIE-40GB", "a100-pcie"),
    ("NVIDIA A10", "a10"),
    ("NVIDIA L4", "l4"),
    ("NVIDIA L40S", "l40s"),
    ("NVIDIA GeForce RTX 5090", "5090"),
    ("AMD Instinct MI300X", "mi300x"),
])  # fmt: skip
def test_a_device_has_the_data_sheet_of_its_own_name(device, name):
    found = gpu_of_device_name(device)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize(
    "device", ["NVIDIA A10G", "NVIDIA L40", "Tesla V100-SXM2-32GB", "NVIDIA GeForce RTX 4090D", ""]
)
def test_another_device_has_none(device):
    assert gpu_of_device_name(device) is None


def test_a_gpu_without_a_data_sheet_is_measured():
    """On the CPU, as the same products and additions are timed."""
    found = measure_gpu("Some GPU", device="cpu", size=256)
    assert found.name == "Some GPU"
    assert found.kind == "gpu"
    assert all(1e8 < found.flops[precision] < 1e14 for precision in ("fp32", "bf16", "fp16"))
    assert 1e8 < found.bandwidth < 1e13
    assert "measured" in found.source
    assert "assumed" in found.source


def test_no_gpu_is_slower_in_half_precision():
    assert all(gpu.flops["bf16"] > gpu.flops["fp32"] for gpu in GPUS.values())
