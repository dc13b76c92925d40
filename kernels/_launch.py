"""A launch of a Triton kernel as data: decided by a launcher, run on a device, or only compiled and counted.

A launcher plans its launches from shapes, dtypes and strides alone, so a plan can be made of meta tensors where no GPU
is: the GPU report compiles what it names and adds up its bytes and operations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: the ``@triton.jit`` function.
        grid: programs per axis.
        arguments: run-time parameters by name: tensors (on meta where the launch is only planned), numbers, None.
        constants: ``tl.constexpr`` parameters by name.
        num_warps, num_stages: as Triton takes them.
        max_registers: that a thread may take. None leaves it to the assembler, which aims at an occupancy and spills a
            few registers for it.
        bytes: modelled traffic with device memory: what this launch must at least read and write, each element once.
        flops: modelled floating-point operations, a multiply-add being two.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    bytes: int = 0
    flops: int = 0
    max_registers: int | None = None

    def settings(self) -> dict[str, int | None]:
        """Triton's options."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.max_registers}

    def run(self) -> None:
        """Launch on the device of the tensors; asynchronous there, as every CUDA launch."""
        if _recording:
            _recording[-1].append(self)
        if _planning:
            return
        # Triton launches on the current device, whichever device the tensors are on.
        with _on_device_of(self.arguments):
            self.kernel[self.grid](**self.arguments, **self.constants, **self.settings())


def _on_device_of(arguments: Mapping[str, Any]) -> contextlib.AbstractContextManager[Any]:
    for value in arguments.values():
        tensor = value[0] if isinstance(value, tuple) and value else value
        if isinstance(tensor, torch.Tensor):
            return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
    return contextlib.nullcontext()


_recording: list[list[Launch]] = []
_planning = 0


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches that run inside the ``with`` block, in order: ``with recorded() as launches: ...``."""
    launches: list[Launch] = []
    _recording.append(launches)
    try:
        yield launches
    finally:
        _recording.remove(launches)


def planning() -> bool:
    """Whether launches are only planned, so that no device may be asked for what it is."""
    return _planning > 0


@contextlib.contextmanager
def planned() -> Iterator[list[Launch]]:
    """As :func:`recorded`, but nothing runs: what launchers would launch, on tensors that have no memory."""
    global _planning
    _planning += 1
    try:
        with recorded() as launches:
            yield launches
    finally:
        _planning -= 1
