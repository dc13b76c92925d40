"""Tests of the Triton kernels under Triton's interpreter, which runs their programs one after the other in NumPy; the
same tests run compiled where they are given a GPU (device.py says how).

What the interpreter cannot show: rounding of tensor cores (TF32, bfloat16), races between programs, and anything that
a compiler does. Programs are run in shuffled order to show that no result depends on which one is the last.

Interpreted tests need a process of their own, with TRITON_INTERPRET=1 from its start: tests/test_triton_interpreted.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from device import device, interpreted, on_device

__all__ = ["device", "on_device"]


@pytest.fixture(autouse=True, scope="session")
def patched_once() -> Iterator[None]:
    """Replace triton.language by NumPy once per launch and module.

    The interpreter does it again for every call of a device function inside a kernel, which takes ten times as long as
    what the function computes, and changes nothing: the language is replaced already while a kernel runs.
    """
    from triton.runtime import interpreter

    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: dict[int, Any] = {}

    def run_patched(executor: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        run(executor, *args, **kwargs)

    def patch_once(fn: Any) -> Any:
        # By module: Triton's own functions see other names of the language than a kernel does.
        module = id(fn.__globals__)
        if module not in patched:
            patched[module] = patch(fn)
        return patched[module]

    with pytest.MonkeyPatch.context() as context:
        context.setattr(interpreter, "_patch_lang", patch_once)
        context.setattr(interpreter.GridExecutor, "__call__", run_patched)
        yield


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Uninitialised tensors hold NaN, seeds are fixed."""
    torch.manual_seed(0)
    # On a GPU some of torch's own operators, which the tests compare with, have no deterministic form.
    torch.use_deterministic_algorithms(True, warn_only=not interpreted())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def shuffled(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``shuffled(seed)``: from now on the interpreter runs the programs of one-dimensional grids in another order;
    a GPU has its own."""
    if not interpreted():
        return lambda seed: None
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    set_grid_idx, set_grid_dim = builder.set_grid_idx, builder.set_grid_dim
    order: list[int] = []

    def shuffle(seed: int) -> None:
        shuffler = random.Random(seed)

        def grid_dim(nx: int, ny: int, nz: int) -> None:
            order[:] = range(nx)
            shuffler.shuffle(order)
            set_grid_dim(nx, ny, nz)

        def grid_idx(x: int, y: int, z: int) -> None:
            set_grid_idx(order[x], y, z)

        monkeypatch.setattr(builder, "set_grid_dim", grid_dim)
        monkeypatch.setattr(builder, "set_grid_idx", grid_idx)

    return shuffle


@pytest.fixture
def launches() -> Iterator[list[Any]]:
    """The launches that the test has run so far."""
    from fastgan.kernels._launch import recorded

    with recorded() as found:
        yield found
