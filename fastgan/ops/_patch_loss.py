"""The registered ops behind patch_loss: the loss, its gradient, and the gradient of that.

All three know four functions f of a logit, each with a constant called its anchor (as csrc/cpu/patch_loss.cpp does):

    bce     softplus(x) - anchor · x        square  (x - anchor)²
    linear  anchor · x                      hinge   max(0, 1 + anchor · x)

The loss op saves the slopes f'(x) of the sides that want gradients, unscaled and in the dtype of accumulation, in one
tensor; the gradient op multiplies them by scale · sample_weight / elements · grad_loss. So half gradients are rounded
once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.ops import _check, _library
from fastgan.reference.patch_loss import bce, fraction


def _value(x: Tensor, form: str, anchor: float) -> Tensor:
    if form == "bce":
        return bce(x, anchor)
    if form == "square":
        return (x - anchor).square()
    return anchor * x if form == "linear" else F.relu(1.0 + anchor * x)


def _slope(x: Tensor, form: str, anchor: float) -> Tensor:
    if form == "bce":
        return (1.0 - anchor) * torch.sigmoid(x) - anchor * torch.sigmoid(-x)
    if form == "square":
        return 2.0 * (x - anchor)
    if form == "linear":
        return torch.full_like(x, anchor)
    return torch.full_like(x, anchor).masked_fill(1.0 + anchor * x <= 0.0, 0.0)


def _curvature(x: Tensor, form: str) -> Tensor:
    if form == "bce":
        return torch.sigmoid(x) * torch.sigmoid(-x)
    return torch.full_like(x, 2.0 if form == "square" else 0.0)


def _logits(real: list[Tensor], fake: list[Tensor], paired: bool) -> list[Tensor]:
    """What f is applied to: the real maps, then the fake maps; or real - fake, pair by pair."""
    compute = _check.accumulate_dtype((real or fake)[0].dtype)
    if paired:
        return [r.to(compute) - f.to(compute) for r, f in zip(real, fake, strict=True)]
    return [x.to(compute) for x in (*real, *fake)]


def _factor(x: Tensor, i: int, scale: list[float], sample_weight: Tensor | None) -> Tensor | float:
    """What multiplies f for entry ``i`` of _logits: a number, or [N, 1, ...]."""
    factor = scale[i % len(scale)] / max(x.numel(), 1)
    return factor if sample_weight is None else factor * sample_weight.reshape(-1, *[1] * (x.ndim - 1))


def _wanted(
    real: list[Tensor], fake: list[Tensor], paired: bool, real_slopes: bool, fake_slopes: bool
) -> list[tuple[Tensor, int, float]]:
    """For each wanted gradient: its map, the entry of _logits that it comes from, the map's sign in that entry."""
    wanted = [(x, i, 1.0) for i, x in enumerate(real)] if real_slopes else []
    if fake_slopes:
        offset = 0 if paired else len(real)
        wanted += [(x, offset + i, -1.0 if paired else 1.0) for i, x in enumerate(fake)]
    return wanted


def _in_memory_order(x: Tensor) -> Tensor:
    """[elements], in the order of memory: the slopes of a channels_last map are stored channels last."""
    return x.permute(0, 2, 3, 1).reshape(-1) if _last(x) else x.reshape(-1)


def _from_memory_order(flat: Tensor, like: Tensor) -> Tensor:
    if not _last(like):
        return flat.view(like.shape)
    n, c, h, w = like.shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)


def _last(x: Tensor) -> bool:
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _forward_plain(
    real: list[Tensor],
    fake: list[Tensor],
    sample_weight: Tensor | None,
    scale: list[float],
    form: str,
    real_anchor: float,
    fake_anchor: float,
    cut: float,
    paired: bool,
    real_slopes: bool,
    fake_slopes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = _logits(real, fake, paired)
    loss = logits[0].new_zeros(())
    slopes = [logits[0].new_empty(0)]
    for i, x in enumerate(logits):
        is_fake = i >= len(real)
        anchor = fake_anchor if is_fake else real_anchor
        loss = loss + (_factor(x, i, scale, sample_weight) * _value(x, form, anchor)).sum()
        if (real_slopes or fake_slopes) if paired else (fake_slopes if is_fake else real_slopes):
            slopes.append(_in_memory_order(_slope(x, form, anchor)))
    empty = torch.empty(0, device=loss.device)
    above = [fraction(x > cut) for x in logits[: len(real)]]
    below = above if paired else [fraction(x <= cut) for x in logits[len(real) :]]
    return (
        loss,
        torch.stack(above) if above else empty,
        torch.stack(below) if below else empty.clone(),
        torch.cat(slopes),
    )


def _forward_fake(
    real: list[Tensor],
    fake: list[Tensor],
    sample_weight: Tensor | None,
    scale: list[float],
    form: str,
    real_anchor: float,
    fake_anchor: float,
    cut: float,
    paired: bool,
    real_slopes: bool,
    fake_slopes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first = (real or fake)[0]
    compute = _check.accumulate_dtype(first.dtype)
    if paired:
        counted = real if real_slopes or fake_slopes else []
    else:
        counted = [*(real if real_slopes else ()), *(fake if fake_slopes else ())]
    return (
        first.new_empty((), dtype=compute),
        first.new_empty(len(real), dtype=torch.float32),
        first.new_empty(len(fake), dtype=torch.float32),
        first.new_empty(sum(x.numel() for x in counted), dtype=compute),
    )


def _split(slopes: Tensor, wanted: list[tuple[Tensor, int, float]]) -> dict[int, Tensor]:
    """The slopes of each entry of _logits that wants any, in its map's shape."""
    start, pieces = 0, {}
    for x, entry, _ in wanted:
        if entry not in pieces:
            pieces[entry] = _from_memory_order(slopes[start : start + x.numel()], x)
            start += x.numel()
    return pieces


def _bwd_plain(
    grad_loss: Tensor,
    slopes: Tensor,
    real: list[Tensor],
    fake: list[Tensor],
    sample_weight: Tensor | None,
    scale: list[float],
    form: str,
    paired: bool,
    real_slopes: bool,
    fake_slopes: bool,
) -> list[Tensor]:
    wanted = _wanted(real, fake, paired, real_slopes, fake_slopes)
    pieces = _split(slopes, wanted)
    gradients = []
    for x, entry, sign in wanted:
        factor = _factor(x, entry, scale, sample_weight) * (sign * grad_loss)
        gradients.append(torch.empty_like(x).copy_(pieces[entry] * factor))
    return gradients


def _bwd_fake(
    grad_loss: Tensor,
    slopes: Tensor,
    real: list[Tensor],
    fake: list[Tensor],
    sample_weight: Tensor | None,
    scale: list[float],
    form: str,
    paired: bool,
    real_slopes: bool,
    fake_slopes: bool,
) -> list[Tensor]:
    return [torch.empty_like(x) for x, _, _ in _wanted(real, fake, paired, real_slopes, fake_slopes)]


def _bwd_bwd_plain(cotangents: list[Tensor], grad_loss: Tensor, slopes: Tensor, *rest: Any) -> list[Tensor]:
    real, fake, sample_weight, scale, form, paired, real_slopes, fake_slopes = rest
    logits = _logits(real, fake, paired)
    wanted = _wanted(real, fake, paired, real_slopes, fake_slopes)
    pieces = _split(slopes, wanted)
    grad_grad_loss = torch.zeros_like(grad_loss)
    seen: dict[int, Tensor | float] = dict.fromkeys(pieces, 0.0)
    for (_, entry, sign), v in zip(wanted, cotangents, strict=True):
        seen[entry] = seen[entry] + sign * v.to(slopes.dtype)
    for entry, v in seen.items():
        grad_grad_loss = grad_grad_loss + (_factor(v, entry, scale, sample_weight) * v * pieces[entry]).sum()
    gradients = []
    for x, entry, sign in wanted:
        factor = _factor(x, entry, scale, sample_weight) * (sign * grad_loss)
        gradients.append(torch.empty_like(x).copy_(factor * seen[entry] * _curvature(logits[entry], form)))
    return [grad_grad_loss, *gradients]


def _bwd_bwd_fake(cotangents: list[Tensor], grad_loss: Tensor, slopes: Tensor, *rest: Any) -> list[Tensor]:
    return [torch.empty_like(grad_loss), *_bwd_fake(grad_loss, slopes, *rest)]


def _setup_forward(ctx: Any, inputs: tuple, output: tuple) -> None:
    real, fake, sample_weight, scale, form, _, _, _, paired, real_slopes, fake_slopes = inputs
    ctx.save_for_backward(output[3], sample_weight, *real, *fake)
    ctx.reals = len(real)
    ctx.setting = (scale, form, paired, real_slopes, fake_slopes)


def _by_map(
    gradients: list[Tensor], reals: int, fakes: int, real_slopes: bool, fake_slopes: bool
) -> list[Tensor | None]:
    """One entry per map: its gradient, or None for a side without."""
    if not real_slopes:
        return [*[None] * reals, *gradients]
    return gradients if fake_slopes else [*gradients, *[None] * fakes]


def _check_recorded(ctx: Any, real_slopes: bool, fake_slopes: bool) -> None:
    needed = ctx.needs_input_grad
    if (any(needed[: ctx.reals]) and not real_slopes) or (any(needed[ctx.reals : -1]) and not fake_slopes):
        raise RuntimeError(
            "fastgan::patch_loss: a map needs a gradient, but the op was called without its side's slopes"
        )


def _setup_bwd(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    grad_loss, slopes, real, fake, sample_weight, *setting = inputs
    ctx.save_for_backward(grad_loss, slopes, sample_weight, *real, *fake)
    ctx.reals = len(real)
    ctx.setting = setting


def _setup_bwd_bwd(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    """Nothing is saved: there is no third order."""


def _no_third_order(ctx: Any, *cotangents: Tensor) -> list[Tensor | None]:
    raise NotImplementedError(
        "patch_loss: the fused op has gradients of first and second order; for higher ones call it with "
        "backend='reference' (fastgan.reference.patch_loss)"
    )


_SETTING = (
    "Tensor grad_loss, Tensor slopes, Tensor[] real, Tensor[] fake, Tensor? sample_weight, float[] scale, str form, "
    "bool paired, bool real_slopes, bool fake_slopes"
)


class _Family:
    """The three ops on one set of kernels, and their autograd: a loss's gradients are computed where it was.

    Attributes:
        op, bwd_op, bwd_bwd_op: the registered ops.
        forward, bwd, bwd_bwd: functions that call them through autograd.
    """

    def __init__(self, suffix: str, *, triton: bool) -> None:
        def define(name: str, schema: str, fallback: Callable[..., Any], fake: Callable[..., Any]) -> Any:
            kernel = f"patch_loss.{name}" if triton else None
            return _library.define(name + suffix, schema, fallback=fallback, fake=fake, triton=kernel)

        self.op = define(
            "patch_loss",
            "(Tensor[] real, Tensor[] fake, Tensor? sample_weight, float[] scale, str form, float real_anchor,"
            " float fake_anchor, float cut, bool paired, bool real_slopes, bool fake_slopes)"
            " -> (Tensor, Tensor, Tensor, Tensor)",
            _forward_plain,
            _forward_fake,
        )
        self.bwd_op = define("patch_loss_bwd", f"({_SETTING}) -> Tensor[]", _bwd_plain, _bwd_fake)
        self.bwd_bwd_op = define(
            "patch_loss_bwd_bwd", f"(Tensor[] cotangents, {_SETTING}) -> Tensor[]", _bwd_bwd_plain, _bwd_bwd_fake
        )
        self.forward = _library.register_autograd(
            self.op,
            differentiable=lambda real, fake, *rest: (*real, *fake),
            setup_context=_setup_forward,
            backward=self._backward,
            ask_engine=False,
        )
        self.bwd = _library.register_autograd(
            self.bwd_op,
            differentiable=lambda grad_loss, slopes, real, fake, *rest: (grad_loss, *real, *fake),
            setup_context=_setup_bwd,
            backward=self._bwd_backward,
            ask_engine=False,
        )
        self.bwd_bwd = _library.register_autograd(
            self.bwd_bwd_op,
            differentiable=lambda cotangents, grad_loss, slopes, real, fake, *_: (*cotangents, grad_loss, *real, *fake),
            setup_context=_setup_bwd_bwd,
            backward=_no_third_order,
        )

    def _backward(self, ctx: Any, grad_loss: Tensor) -> list[Tensor | None]:
        slopes, sample_weight, *maps = ctx.saved_tensors
        reals = ctx.reals
        real_slopes, fake_slopes = ctx.setting[-2:]
        if not (real_slopes and fake_slopes):
            _check_recorded(ctx, real_slopes, fake_slopes)
        if torch.is_grad_enabled():
            found = self.bwd(grad_loss, slopes, maps[:reals], maps[reals:], sample_weight, *ctx.setting)
        else:
            # Straight to the kernel: autograd's own entry would only find that it has nothing to record.
            with torch._C._AutoDispatchBelowAutograd():
                found = self.bwd_op(grad_loss, slopes, maps[:reals], maps[reals:], sample_weight, *ctx.setting)
        if real_slopes and fake_slopes:
            return found
        return _by_map(found, reals, len(maps) - reals, real_slopes, fake_slopes)

    def _bwd_backward(self, ctx: Any, *cotangents: Tensor) -> list[Tensor | None]:
        grad_loss, slopes, sample_weight, *maps = ctx.saved_tensors
        reals = ctx.reals
        first, *rest = self.bwd_bwd(
            list(cotangents), grad_loss, slopes, maps[:reals], maps[reals:], sample_weight, *ctx.setting
        )
        return [first, *_by_map(rest, reals, len(maps) - reals, *ctx.setting[-2:])]


_shared = _Family("", triton=True)
forward = _shared.forward
_forward, _bwd, _bwd_bwd = _shared.op, _shared.bwd_op, _shared.bwd_bwd_op
# The same ops on CUDA C++: Triton's kernels have the others' place on the GPU.
forward_cuda = _Family("_cuda", triton=False).forward
