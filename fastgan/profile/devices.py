"""What is known about GPUs without having one: datasheet peaks of devices, and the limits of architectures.

Nothing here was measured. A roofline from these peaks is a bound that no kernel beats, not a forecast of its time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_KIB = 1024


@dataclass(frozen=True)
class Architecture:
    """What one SM (streaming multiprocessor) holds at a time; sizes in bytes.

    Attributes:
        arch: 80 is sm_80.
        warps, blocks: most that are resident on an SM.
        shared: shared memory of an SM.
        shared_per_block: most that one block may ask for, its reserved part not counted.
        shared_unit: shared memory is handed out in multiples of this.
        shared_reserved: what the system takes from every block's shared memory.
        registers: 32-bit registers of an SM, handed out to a warp in multiples of register_unit.
    """

    arch: int
    warps: int
    blocks: int
    shared: int
    shared_per_block: int
    shared_unit: int
    shared_reserved: int
    registers: int = 65536
    register_unit: int = 256
    warp_slots: int = 4  # warps are spread over so many partitions, each with its share of the registers

    def resident_warps(self, registers: int, shared: int, warps: int) -> int:
        """Warps of a kernel that are resident on an SM; 0 if the kernel cannot be launched.

        Args:
            registers: per thread.
            shared: bytes per block that the kernel uses, without the system's part.
            warps: per block.
        """
        if shared > self.shared_per_block or registers > 255:
            return 0
        per_warp = _ceil_to(registers * 32, self.register_unit)
        by_registers = self.registers // self.warp_slots // per_warp * self.warp_slots // warps
        taken = _ceil_to(shared + self.shared_reserved, self.shared_unit)
        by_shared = self.shared // taken if taken else self.blocks
        return warps * min(self.blocks, self.warps // warps, by_registers, by_shared)

    def occupancy(self, registers: int, shared: int, warps: int) -> float:
        """:meth:`resident_warps` as a share of what an SM can hold: theoretical, whatever the grid."""
        return self.resident_warps(registers, shared, warps) / self.warps


def _ceil_to(value: int, unit: int) -> int:
    return -(-value // unit) * unit


ARCHITECTURE_SOURCE = (
    'CUDA C++ Programming Guide 13.0, "Compute Capabilities", table of technical specifications per compute capability '
    "(https://docs.nvidia.com/cuda/cuda-c-programming-guide/#features-and-technical-specifications), and "
    "cuda_occupancy.h of CUDA 13.0 for how registers and shared memory are handed out"
)
ARCHITECTURES = {
    found.arch: found
    for found in (
        Architecture(75, 32, 16, 64 * _KIB, 64 * _KIB, 256, 0),
        Architecture(80, 64, 32, 164 * _KIB, 163 * _KIB, 128, _KIB),
        Architecture(86, 48, 16, 100 * _KIB, 99 * _KIB, 128, _KIB),
        Architecture(89, 48, 24, 100 * _KIB, 99 * _KIB, 128, _KIB),
        Architecture(90, 64, 32, 228 * _KIB, 227 * _KIB, 128, _KIB),
        Architecture(100, 64, 32, 228 * _KIB, 227 * _KIB, 128, _KIB),
        Architecture(120, 48, 24, 100 * _KIB, 99 * _KIB, 128, _KIB),
    )
}


@dataclass(frozen=True)
class Device:
    """Datasheet peaks of one device: dense, without sparsity, products accumulated in float32.

    Attributes:
        name: as people call it.
        arch: 80 is sm_80.
        sms: streaming multiprocessors.
        half: FLOP/s of float16 products on tensor cores; bfloat16 is the same where there is any.
        tf32: FLOP/s of TF32 products on tensor cores; None where there are none.
        fp32: FLOP/s of float32 arithmetic outside the tensor cores.
        bandwidth: bytes per second of device memory.
        source: datasheet and its address; what was derived from it and how.
    """

    name: str
    arch: int
    sms: int
    half: float
    tf32: float | None
    fp32: float
    bandwidth: float
    source: str

    def peak(self, dtype: torch.dtype, *, tf32: bool = False) -> float | None:
        """FLOP/s for products of ``dtype``; None where the device computes them in no native way (bfloat16 on sm_75).

        Raises:
            ValueError: a dtype without a peak here.
        """
        if dtype == torch.bfloat16 and self.arch < 80:
            return None
        if dtype in (torch.float16, torch.bfloat16):
            return self.half
        if dtype == torch.float32:
            return self.tf32 if tf32 and self.tf32 is not None else self.fp32
        raise ValueError(f"peak: dtype must be float16, bfloat16 or float32, got {dtype}")

    def roofline(self, bytes: float, flops: float, dtype: torch.dtype, *, tf32: bool = False) -> float | None:
        """Seconds that the peaks alone ask for: max(bytes / bandwidth, flops / peak); no launch overhead is in it."""
        peak = self.peak(dtype, tf32=tf32)
        return None if peak is None else max(bytes / self.bandwidth, flops / peak)


_T, _G = 1e12, 1e9
_HALVED = "tensor peaks are half of the sheet's, which are with sparsity"

DEVICES = (
    Device(
        "T4", 75, 40, 65 * _T, None, 8.1 * _T, 320 * _G,
        "NVIDIA T4 datasheet (https://www.nvidia.com/en-us/data-center/tesla-t4/); SMs: 2560 CUDA cores / 64",
    ),
    Device(
        "A10", 86, 72, 125 * _T, 62.5 * _T, 31.2 * _T, 600 * _G,
        "NVIDIA A10 datasheet (https://www.nvidia.com/en-us/data-center/products/a10-gpu/); SMs: GA102 with 9216 CUDA "
        "cores / 128",
    ),
    Device(
        "A100", 80, 108, 312 * _T, 156 * _T, 19.5 * _T, 2039 * _G,
        "NVIDIA A100 datasheet, SXM 80 GB (https://www.nvidia.com/en-us/data-center/a100/); SMs: A100 whitepaper",
    ),
    Device(
        "L4", 89, 58, 121 * _T, 60 * _T, 30.3 * _T, 300 * _G,
        f"NVIDIA L4 datasheet (https://www.nvidia.com/en-us/data-center/l4/); {_HALVED}; SMs: deviceQuery reports 58, "
        "which at its 2.04 GHz gives the sheet's 30.3 TFLOP/s",
    ),
    Device(
        "RTX 4070", 89, 46, 58.3 * _T, 29.15 * _T, 29.15 * _T, 504 * _G,
        "NVIDIA's page of the GeForce RTX 4070 (https://www.nvidia.com/en-us/geforce/graphics-cards/40-series/rtx-4070-"
        "family/): 5888 CUDA cores, 2.475 GHz, 504 GB/s; peaks derived: per SM and clock 128 FMA in float32 and TF32, "
        "256 in float16 with float32 accumulation, the ratios of the Ada whitepaper's table for the RTX 4090",
    ),
    Device(
        "RTX 4090", 89, 128, 165.2 * _T, 82.6 * _T, 82.6 * _T, 1008 * _G,
        "NVIDIA Ada GPU architecture whitepaper, appendix A (https://images.nvidia.com/aem-dam/Solutions/geforce/ada/"
        "nvidia-ada-gpu-architecture.pdf)",
    ),
    Device(
        "H100", 90, 132, 989.5 * _T, 494.5 * _T, 67 * _T, 3350 * _G,
        f"NVIDIA H100 datasheet, SXM5 (https://www.nvidia.com/en-us/data-center/h100/); {_HALVED}; SMs: its whitepaper",
    ),
    Device(
        "H200", 90, 132, 989.5 * _T, 494.5 * _T, 67 * _T, 4800 * _G,
        f"NVIDIA H200 datasheet, SXM (https://www.nvidia.com/en-us/data-center/h200/); {_HALVED}; SMs: as H100",
    ),
    Device(
        "B200", 100, 148, 2250 * _T, 1100 * _T, 75 * _T, 8000 * _G,
        "NVIDIA HGX B200 and DGX B200 datasheets, an eighth of a board (https://www.nvidia.com/en-us/data-center/hgx/ "
        f"and https://www.nvidia.com/en-us/data-center/dgx-b200/); {_HALVED}; SMs: 18944 CUDA cores / 128",
    ),
)  # fmt: skip


def device(name: str) -> Device:
    """The device of that name.

    Raises:
        ValueError: no such device.
    """
    for found in DEVICES:
        if found.name == name:
            return found
    raise ValueError(f"device: name must be one of {', '.join(d.name for d in DEVICES)}, got {name!r}")
