"""Where the tests of the Triton kernels run.

One set of cases serves two places. By default that is the CPU: the process has TRITON_INTERPRET=1 and Triton's
interpreter runs the kernels. With FASTGAN_TEST_DEVICE=cuda (and without TRITON_INTERPRET) it is a GPU: ``make
gpu-check`` runs the same files so. ``on_device`` puts what a test makes there, tensors and generators that name no
device; a test that must name one takes the fixture ``device``.

What only one of the two can show is asked for by ``interpreted()``: the interpreter multiplies in float32 what tensor
cores would multiply in TF32 or bfloat16, so a tolerance for those belongs to the GPU.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping

import pytest
import torch

VARIABLE = "FASTGAN_TEST_DEVICE"


def choose(environment: Mapping[str, str], cuda_is_available: bool) -> str:
    """Return "cpu" or "cuda" from the environment.

    Raises:
        RuntimeError: the two variables contradict each other, or the GPU that was asked for is not there.
    """
    wanted = environment.get(VARIABLE, "cpu")
    interpreted = environment.get("TRITON_INTERPRET") == "1"
    if wanted not in ("cpu", "cuda"):
        raise RuntimeError(f"{VARIABLE} must be cpu or cuda, got {wanted!r}")
    if wanted == "cpu" and not interpreted:
        raise RuntimeError(
            "the tests of the Triton kernels need a device: set TRITON_INTERPRET=1 before Python starts (Triton's "
            "interpreter on the CPU, in a process of its own: tests/test_triton_interpreted.py does that), or "
            f"{VARIABLE}=cuda (a GPU: make gpu-check does that)"
        )
    if wanted == "cuda" and interpreted:
        raise RuntimeError(f"{VARIABLE}=cuda runs compiled kernels: unset TRITON_INTERPRET")
    if wanted == "cuda" and not cuda_is_available:
        raise RuntimeError(f"{VARIABLE}=cuda, but torch sees no CUDA device")
    return wanted


DEVICE = choose(os.environ, torch.cuda.is_available())


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for the device."""
    return DEVICE == "cpu"


@pytest.fixture
def device() -> torch.device:
    """Where the test makes its tensors."""
    return torch.device(DEVICE)


@pytest.fixture(autouse=True)
def on_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test makes without naming a device is made on :data:`DEVICE`."""
    if interpreted():
        yield
        return
    # torch's default device does not reach generators, and one of the CPU cannot fill a tensor of a GPU.
    monkeypatch.setattr(torch, "Generator", functools.partial(torch.Generator, device=DEVICE))
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)
