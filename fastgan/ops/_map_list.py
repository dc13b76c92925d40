"""What the losses over lists of maps have in common on CUDA C++ (csrc/cuda/map_list.h)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan import backends

_MOST_PER_SAMPLE = 2**31  # the kernels count the elements of a sample in 32 bits


def cuda_can_run(device: torch.device, dtype: torch.dtype, maps: Sequence[Tensor]) -> str | None:
    """The CUDA backend's conditions for a loss over ``maps`` [N, ...]: None, or the reason why it cannot run."""
    reason = backends.cuda_can_run(device, dtype)
    if reason is not None:
        return reason
    most = max([x.numel() // max(1, x.shape[0]) for x in maps])
    return (
        f"it takes less than {_MOST_PER_SAMPLE} elements per sample, got {most}" if most >= _MOST_PER_SAMPLE else None
    )
