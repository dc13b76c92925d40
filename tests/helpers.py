"""What the tests of several ops share: the rule of accuracy, memory layouts, and counting kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# What two ways of rounding the same float64 value to a dtype may differ by, relative to the largest element: 2 units in
# the last place.
FLOORS = {torch.float64: 4e-15, torch.float32: 3e-7, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def max_error(actual: Tensor, reference: Tensor) -> float:
    """max |actual - reference| / max |reference|, in float64; 0 for empty tensors."""
    if reference.numel() == 0:
        assert actual.numel() == 0
        return 0.0
    scale = reference.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((actual.double() - reference.double()).abs().max() / scale)


def assert_close_to_float64(
    fused: Tensor, eager: Tensor, reference: Tensor, *, floor: float | None = None, what: str = "result"
) -> None:
    """The rule of accuracy: the error of ``fused`` is at most twice that of ``eager``, plus a floor of its dtype.

    Args:
        fused, eager: the same quantity from the op and from eager torch, in the same dtype.
        reference: in float64.
        floor: relative to the largest element of ``reference``; None takes FLOORS of the dtype.
        what: for the message.
    """
    assert fused.shape == reference.shape, f"{what}: shape {list(fused.shape)}, expected {list(reference.shape)}"
    assert fused.dtype == eager.dtype, f"{what}: dtype {fused.dtype}, expected {eager.dtype}"
    allowed = 2 * max_error(eager, reference) + (FLOORS[fused.dtype] if floor is None else floor)
    error = max_error(fused, reference)
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def layouts(x: Tensor) -> dict[str, Tensor]:
    """``x`` [N, C, H, W] with the same values in the layouts that ops must take."""
    wide = x.new_full((*x.shape[:3], 2 * x.shape[3] + 1), float("nan"))
    wide[..., 1::2] = x
    return {
        "contiguous": x.contiguous(),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "sliced": wide[..., 1::2],
        "expanded": x[:1].expand_as(x),
    }


class CountOps(TorchDispatchMode):
    """Counts the calls that reach kernels inside its ``with`` block: ``counter["fastgan.patch_loss"]``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[f"{func.namespace}.{func._opname}"] += 1
        return func(*args, **(kwargs or {}))


def gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """The result of ``function(*inputs)`` and the gradients of its inner product with a fixed random cotangent."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = function(*leaves)
    generator = torch.Generator().manual_seed(seed)
    cotangent = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result)
    return [result.detach(), *torch.autograd.grad(result, leaves, cotangent)]
