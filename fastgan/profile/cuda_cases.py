"""What the CUDA C++ kernels move, beside Triton's and plain torch's: the same calls on each backend.

An op of CUDA C++ counts as one kernel that reads each of its tensors once and writes each result once, unless its case
says that it reads some of them again; tests/simt runs the kernels and asserts what they read and write. The cases keep
off what depends on the GPU: convolutions whose depth is shared among blocks, planes that not every block has room for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import fastgan
from fastgan import ops
from fastgan.profile.devices import Device
from fastgan.profile.traffic import CUDA, Kernel, count

BACKENDS = ("cuda", "triton", "reference")
_DEVICE = "cuda"
_HALF = torch.float16
_LAST = torch.channels_last


@dataclass(frozen=True)
class CudaCase:
    """One call that a kernel of CUDA C++ serves.

    Attributes:
        op, name: for people.
        inputs: makes the arguments of ``call``.
        call: the fastgan call, on the backend in force.
        flops: float32 operations of the kernel where they may matter, 0 where they do not.
        dtype: of the products among them.
        launches: of the op's kernels.
        again: bytes that it moves beyond each tensor once.
        least_arch: the architecture from which on the kernel runs.
    """

    op: str
    name: str
    inputs: Callable[[], list[Any]]
    call: Callable[..., Any]
    flops: int = 0
    dtype: torch.dtype = torch.float32
    launches: int = 1
    again: int = 0
    least_arch: int = 75


@dataclass(frozen=True)
class CudaTraffic:
    """The kernels of one case by backend; a backend that cannot run it has a reason in their place."""

    case: CudaCase
    kernels: dict[str, list[Kernel] | str]

    def runs_on(self, backend: str, device: Device) -> bool:
        """Whether the device has the instructions of the backend's kernel."""
        return backend != "cuda" or device.arch >= self.case.least_arch


def _map(*shape: int, dtype: torch.dtype = _HALF, layout: torch.memory_format = _LAST) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=_DEVICE, memory_format=layout)


def _vector(*shape: int) -> Tensor:
    return torch.empty(shape, device=_DEVICE)


def _modulated(size: int, channels: int) -> CudaCase:
    def inputs() -> list[Any]:
        weight = _map(channels, channels, 3, 3)
        tensors = (_map(1, channels, size, size), weight, _vector(1, channels))
        return [*tensors, _vector(size, size), _vector(), _vector(channels), ops.weight_energy(weight)]

    def call(x: Tensor, weight: Tensor, style: Tensor, noise: Tensor, strength: Tensor, bias: Tensor,
             energy: ops.WeightEnergy) -> Tensor:  # fmt: skip
        epilogue = ops.Epilogue(noise=noise, noise_strength=strength, bias=bias, act="lrelu", clamp=256.0)
        return ops.modulated_conv2d(x, weight, style, padding=1, weight_energy=energy, epilogue=epilogue)

    flops = 2 * 9 * channels**2 * size**2
    name = f"3×3, {channels}→{channels} at {size}², NHWC"
    return CudaCase("modulated_conv2d", name, inputs, call, flops, _HALF, least_arch=80)


def _resample(name: str, x: Sequence[int], dtype: torch.dtype, layout: torch.memory_format, **options: Any) -> CudaCase:
    def call(image: Tensor, fir: Tensor) -> Tensor:
        return ops.upfirdn2d(image, fir, **options)

    return CudaCase("upfirdn2d", name, lambda: [_map(*x, dtype=dtype, layout=layout), _vector(4)], call)


def _filtered(size: int, channels: int, up: int) -> CudaCase:
    taps, wide = 6 * up, size * up + 12
    flops = 2 * channels * (size * wide * 6 + wide**2 * 6 + wide * size * 12 + size**2 * 12)

    def call(x: Tensor, fu: Tensor, fd: Tensor, bias: Tensor) -> Tensor:
        return ops.filtered_lrelu(x, fu, fd, bias, up=up, down=2, padding=taps // 2 + 6, clamp=256.0)

    def inputs() -> list[Any]:
        x = _map(1, channels, size, size, layout=torch.contiguous_format)
        return [x, _vector(taps), _vector(12), _vector(channels)]

    return CudaCase("filtered_lrelu", f"{channels} at {size}², up {up}, down 2, NCHW", inputs, call, flops)


def _norm(size: int, channels: int, layout: torch.memory_format) -> CudaCase:
    def call(x: Tensor) -> Tensor:
        return ops.norm_act(x, act="relu")

    def inputs() -> list[Any]:
        return [_map(1, channels, size, size, layout=layout)]

    name = f"instance, {channels} at {size}², {'NHWC' if layout == _LAST else 'NCHW'}"
    # In NHWC: moments of slices, these put together, and x once more.
    launches, again = (3, 2 * channels * size**2) if layout == _LAST else (1, 0)
    return CudaCase("norm_act", name, inputs, call, launches=launches, again=again)


def _critic_maps() -> list[Tensor]:
    return [_map(16, 1, size, size, layout=torch.contiguous_format) for size in (30, 14, 6)]


def _features() -> list[Tensor]:
    return [_map(4, channels, size, size) for channels, size in ((64, 128), (128, 64), (256, 32), (512, 31))]


def _sigma(shapes: Sequence[Sequence[int]]) -> Callable[[], list[Any]]:
    def inputs() -> list[Any]:
        weights = [torch.empty(*shape, device=_DEVICE) for shape in shapes]
        return [weights, [_vector(w.shape[0]) for w in weights], [_vector(w[0].numel()) for w in weights]]

    return inputs


_CRITIC = [(64, 6, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (1, 512, 4, 4)]

CASES = (
    *(_modulated(size, channels) for size, channels in ((64, 512), (128, 256), (256, 128))),
    _resample("blur behind an up-sampling convolution, 128 at 257², NHWC", (1, 128, 257, 257), _HALF, _LAST, padding=1),
    _resample("up 2 of the image, 3 at 128², NCHW", (1, 3, 128, 128), torch.float32, torch.contiguous_format,
              up=2, padding=(2, 1), gain=4),
    _resample("down 2, 128 at 256², NHWC", (1, 128, 256, 256), _HALF, _LAST, down=2, padding=1),
    _filtered(148, 128, 2),
    _filtered(148, 128, 4),
    _norm(64, 256, torch.contiguous_format),
    _norm(128, 128, torch.contiguous_format),
    _norm(64, 256, _LAST),
    CudaCase("patch_loss", "hinge, critic, three scales, batch 16", lambda: [_critic_maps(), _critic_maps()],
             lambda real, fake: ops.patch_loss(real, fake, mode="hinge").loss),
    CudaCase("feature_matching_loss", "l1, four maps, batch 4, NHWC", lambda: [_features(), _features()],
             ops.feature_matching_loss),
    CudaCase("spectral_sigma", "patch critic, float32", _sigma(_CRITIC), ops.spectral_sigma),
    CudaCase("spectral_sigma", "twelve 512×512×3×3, float32", _sigma([(512, 512, 3, 3)] * 12), ops.spectral_sigma),
)  # fmt: skip


def cuda_traffic(cases: Sequence[CudaCase] = CASES) -> list[CudaTraffic]:
    """Count every case on every backend, without gradients."""
    with torch.no_grad():
        return [CudaTraffic(case, {name: _on(name, case) for name in BACKENDS}) for case in cases]


def _on(backend: str, case: CudaCase) -> list[Kernel] | str:
    def call(*inputs: Any) -> Any:
        with fastgan.backend(backend):
            return case.call(*inputs)

    try:
        kernels = count(call, case.inputs)
    except ValueError as error:
        reason = str(error).partition("cannot run this call: ")[2]
        if not reason:
            raise
        return reason
    return [part for kernel in kernels for part in (_split(kernel, case) if kernel.name.endswith(CUDA) else [kernel])]


def _split(kernel: Kernel, case: CudaCase) -> list[Kernel]:
    """The op's launches: what they compute and read again stands in no schema."""
    first = replace(kernel, bytes=kernel.bytes + case.again, flops=case.flops, dtype=case.dtype)
    return [first] + [replace(kernel, bytes=0, flops=0)] * (case.launches - 1)
