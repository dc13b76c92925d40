"""Where the tests of the Triton kernels run.

One set of cases serves two places. By default that is the CPU: the process has TRITON_INTERPRET=1 and Triton's
interpreter runs the kernels. With FASTGAN_TEST_DEVICE=cuda (and without TRITON_INTERPRET) it is a GPU: ``make
gpu-check`` runs the same files so. A test takes its device from the fixture ``device``, or from :data:`DEVICE` where a
module needs it, and makes every tensor there.

What only one of the two can show is asked for by ``interpreted()``: the interpreter multiplies in float32 what tensor
cores would multiply in TF32 or bfloat16, so a tolerance for those belongs to the GPU.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

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
            "the tests of the Triton kernels need TRITON_INTERPRET=1 (Triton's interpreter on the CPU, in a process of "
            f"its own) or {VARIABLE}=cuda (a GPU)"
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
