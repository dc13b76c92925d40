"""What the tests of losses over lists of maps share: tensors as NumPy's arrays, and ops on simulated kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import simt_build
import torch
from torch import Tensor

ONE_SCHEDULE = (("random", 3),)


def flat(x: Tensor, *, written: bool = False) -> np.ndarray:
    """The elements of a dense tensor in the order of memory, as NumPy has the dtype; ``written`` by the kernel."""
    elements = x.detach().as_strided((x.numel(),), (1,))
    array = (elements.view(torch.uint16) if x.dtype == torch.bfloat16 else elements).numpy()
    if not written:
        array.flags.writeable = False
    return array


def unwritten(*shape: int, like: Tensor | None = None) -> Tensor:
    """A float32 tensor, or one like another, that is not a number anywhere yet."""
    return torch.full(shape, torch.nan) if like is None else torch.full_like(like, torch.nan)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Simulated:
    """Calls of one file of kernels.

    Attributes:
        schedules: under which each call runs.
        traffic: per call (function, what simt_build.run returned).
    """

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.schedules: Sequence[tuple[str, int]] = simt_build.SCHEDULES
        self.traffic: list[tuple[str, list[tuple[str, int, int]]]] = []

    def run(self, function: str, *arguments: Any) -> None:
        traffic = simt_build.run(self.module, function, *arguments, schedules=self.schedules)
        self.traffic.append((function, traffic))


@contextmanager
def on_simulated_kernels(
    monkeypatch: pytest.MonkeyPatch, op: ModuleType, kernels: dict[str, Callable[..., Any]]
) -> Iterator[None]:
    """Inside, ``backend="cuda"`` of ``op`` takes CPU tensors, and its registered ops are ``kernels``."""
    monkeypatch.setitem(op._CAN_RUN, "cuda", lambda *facts, **more: None)
    with torch.library._scoped_library("fastgan", "IMPL") as library:
        for name, function in kernels.items():
            library.impl(name, function, "CPU")
        yield
