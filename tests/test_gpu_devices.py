"""The tables of the GPU report: what an architecture holds, and datasheets' peaks."""

from __future__ import annotations

import pytest
import torch

from fastgan.profile.devices import ARCHITECTURES, DEVICES, device


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "resident"),
    [
        # From cudaOccMaxActiveBlocksPerMultiprocessor of CUDA 13.0's cuda_occupancy.h.
        (80, 32, 0, 8, 64),
        (80, 33, 0, 8, 48),
        (80, 255, 0, 8, 8),
        (80, 64, 100 * 1024, 4, 4),
        (86, 64, 48 * 1024, 8, 16),
        (90, 168, 100 * 1024, 8, 8),
        (75, 64, 32 * 1024, 4, 8),
        (120, 128, 0, 8, 16),
        (80, 16, 0, 1, 32),
        (89, 64, 100 * 1024, 4, 0),
    ],
)
def test_occupancy(arch: int, registers: int, shared: int, warps: int, resident: int) -> None:
    assert ARCHITECTURES[arch].resident_warps(registers, shared, warps) == resident
    assert ARCHITECTURES[arch].occupancy(registers, shared, warps) == resident / ARCHITECTURES[arch].warps


@pytest.mark.parametrize("found", DEVICES, ids=lambda d: d.name)
def test_datasheets_agree_with_themselves(found) -> None:
    # float32: SMs × CUDA cores × 2 × clock, with a clock that GPUs have.
    cores = {75: 64, 80: 64}.get(found.arch, 128)
    assert 1.3e9 < found.fp32 / (found.sms * cores * 2) < 2.6e9
    assert found.half / (found.tf32 or found.fp32 * 8) == pytest.approx(2 if found.tf32 else 1, rel=0.03)
    assert "https://" in found.source
    assert found.arch in ARCHITECTURES


def test_roofline() -> None:
    a100 = device("A100")
    assert a100.roofline(2.039e9, 0, torch.float16) == pytest.approx(1e-3)
    assert a100.roofline(1, 312e9, torch.bfloat16) == pytest.approx(1e-3)
    assert a100.roofline(1, 19.5e9, torch.float32) == pytest.approx(1e-3)
    assert a100.roofline(1, 156e9, torch.float32, tf32=True) == pytest.approx(1e-3)
    assert device("T4").roofline(1, 1, torch.bfloat16) is None
    with pytest.raises(ValueError, match=r"dtype must be float16, bfloat16 or float32, got torch\.float64"):
        a100.peak(torch.float64)
    with pytest.raises(ValueError, match=r"name must be one of T4, .*, got 'GTX'"):
        device("GTX")
