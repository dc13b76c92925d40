"""What must not be true of a shipped kernel's machine code; each finding says which launch, which architecture, why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgan.kernels._launch import Launch
from fastgan.profile.compiled import Compiled, Failure, vector_bits
from fastgan.profile.cuda_code import CudaCode
from fastgan.profile.devices import ARCHITECTURES, DEVICES
from fastgan.profile.global_loads import TileLoad

_HALF = ("f16", "bf16")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: "compile", "spill", "launch", "tensor core" or "scalar load".
        label: of the launch.
        kernel, arch: which code.
        message: what is wrong, with numbers.
    """

    kind: str
    label: str
    kernel: str
    arch: int
    message: str

    def __str__(self) -> str:
        return f"{self.label}: {self.kernel} on sm_{self.arch}: {self.kind}: {self.message}"


def check(label: str, launch: Launch, result: Compiled | Failure) -> list[Finding]:
    """Everything that is wrong with one launch's code; Triton has tensor cores from sm_80 on."""
    if isinstance(result, Failure):
        return [Finding("compile", label, result.kernel, result.arch, result.message)]
    problems = [*_resources(result), *_tensor_cores(launch, result), *_loads(launch, result)]
    return [Finding(kind, label, result.kernel, result.arch, message) for kind, message in problems]


def check_cuda(kernels: Iterable[CudaCode]) -> list[Finding]:
    """Everything that is wrong with the code of CUDA C++ kernels."""
    return [
        Finding(kind, "csrc/cuda", code.kernel, code.arch, message)
        for code in kernels
        for kind, message in _resources(code)
    ]


def _resources(result: Compiled | CudaCode) -> Iterator[tuple[str, str]]:
    code = result.code
    if code.spills or code.stack:
        yield "spill", f"{code.spills} instructions move {code.stack} bytes per thread through local memory"
    if result.occupancy == 0:
        limits = ARCHITECTURES[result.arch]
        yield (
            "launch",
            f"{result.shared} bytes of shared memory, {code.registers} registers and {result.warps} warps per block do "
            f"not fit an SM, which gives a block {limits.shared_per_block} bytes and has {limits.registers} registers",
        )


def _tensor_cores(launch: Launch, result: Compiled) -> Iterator[tuple[str, str]]:
    if result.arch < 80 or result.code.tensor:
        return
    wanted = [(kind, precision) for kind, precision in result.products if kind in _HALF or precision.startswith("tf32")]
    if wanted:
        yield "tensor core", f"products of {_named(wanted)} without a tensor-core instruction"
    elif _beyond_cuda_cores(launch, result.arch):
        yield (
            "tensor core",
            f"{launch.flops:.3g} FLOP on half types over {launch.bytes:.3g} bytes without a matrix product: float32 "
            "arithmetic takes longer than the memory",
        )


def _named(products: Iterable[tuple[str, str]]) -> str:
    return ", ".join(sorted(kind if kind in _HALF else f"{kind} ({precision})" for kind, precision in products))


def _beyond_cuda_cores(launch: Launch, arch: int) -> bool:
    """Whether a launch on half tensors would be held up by float32 arithmetic on a device of ``arch``."""
    tensors = [x for x in launch.arguments.values() if isinstance(x, Tensor) and x.ndim > 1]
    largest = max(tensors, key=lambda x: x.numel(), default=None)
    if largest is None or largest.dtype not in (torch.float16, torch.bfloat16):
        return False
    return any(d.arch == arch and launch.flops / d.fp32 > launch.bytes / d.bandwidth for d in DEVICES)


def _turned_for_tf32(tile: TileLoad, result: Compiled) -> bool:
    """Whether a tile is read element by element because sm_90's or sm_100's product of TF32 takes it in no other way.

    Both read their operands from shared memory, float32 ones only with the depth of the product along the line (PTX
    ISA, wgmma.mma_async: only 16-bit types can be transposed; tcgen05.mma: only with a swizzle of 32-byte atoms, which
    Triton does not have). What lies the other way in device memory is turned on its way there, which cp.async does one
    element at a time; a warp's addresses are neighbours all the same.
    """
    return tile.turned and tile.element_bits == 32 and not {"HGMMA", "UTCHMMA"}.isdisjoint(result.code.tensor)


def _loads(launch: Launch, result: Compiled) -> Iterator[tuple[str, str]]:
    """Tiles that are read element by element where every thread could read 128 bits at once.

    Less than that is not asked for: Triton knows of a stride only whether 16 divides it. A tensor with fewer elements
    than the tile is a table that is looked up (a slope or a weight per sample), not a stream.
    """
    for tile in result.tiles:
        tensors = [launch.arguments.get(name) for name in tile.arguments]
        if not tensors or not all(isinstance(x, Tensor) for x in tensors):
            continue
        several = tile.elements >= 2 * 32 * result.warps
        streamed = all(x.numel() >= tile.elements for x in tensors)
        allowed = 32 if _turned_for_tf32(tile, result) else min(map(vector_bits, tensors))
        if tile.scalar and several and streamed and allowed == 128:
            names = "/".join(tile.arguments)
            yield (
                "scalar load",
                f"{names} at line {tile.line} is read {tile.element_bits} bits at a time, its memory allows 128",
            )
