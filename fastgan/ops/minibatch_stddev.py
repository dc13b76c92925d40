"""Minibatch standard deviation: how much the samples of a group differ, as further channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops import _check
from fastgan.ops._epilogue import dense, is_channels_last
from fastgan.ops._library import define
from fastgan.ops._plans import find_plan
from fastgan.reference import minibatch_stddev as reference

_BACKENDS = {"triton": backends.triton_can_run, "cpp": backends.cpp_can_run, "reference": backends.always}


def minibatch_stddev(
    x: Tensor, *, group_size: int = 4, num_channels: int = 1, eps: float = 1e-8, backend: str | None = None
) -> Tensor:
    """Append to each sample √(variance within its group + eps), averaged over a share of the channels and all pixels.

    Half types are computed in float32 and rounded once; autocast leaves ``x`` as it is. The result is contiguous or, if
    ``x`` is and num_channels is 1, channels_last; any other ``x`` is copied once.

    Args:
        x: [N, C, H, W], floating point; N a multiple of min(group_size, N), C of num_channels.
        group_size: samples in a group, ≥ 1; a smaller batch is one group. Group m holds the samples m, m + M, m + 2M, …
            of a batch with M groups.
        num_channels: statistics per group, each over C / num_channels channels.
        eps: > 0, under the root.
        backend: see :func:`fastgan.backend`.

    Returns:
        [N, C + num_channels, H, W], ``x``'s dtype.

    Raises:
        ValueError: sizes that do not divide; eps not above 0; a backend that cannot run.
        TypeError: ``x`` is not a tensor.

    Gradients: any order; the first order is one kernel, the second runs in torch's own. Saved for backward: ``x``.

    Source: Karras et al., "Progressive Growing of GANs", 2018, section 3.
    """
    options = (group_size, num_channels, eps, backend)
    chosen, group, eps = find_plan("minibatch_stddev", _make_plan, (x,), options)
    if chosen == "reference":
        y = reference.minibatch_stddev(x, group_size=group, num_channels=num_channels, eps=eps)
    else:
        y = _op(dense(x) if num_channels == 1 else x.contiguous(), group, num_channels, eps)
    if _check.DEBUG:
        _check.no_nan("minibatch_stddev", y)
    return y


def _make_plan(
    x: Tensor, group_size: int, num_channels: int, eps: float, backend: str | None
) -> tuple[str, int, float]:
    """(backend, samples in a group, eps)."""
    op = "minibatch_stddev"
    _check.tensor(op, "x", x, ndim=4)
    n, channels, height, width = x.shape
    if 0 in (channels, height, width):
        raise ValueError(f"{op}: x must have C, H and W of at least 1, got {list(x.shape)}")
    group = min(group_size, max(n, 1))
    if group_size < 1 or n % group:
        raise ValueError(f"{op}: group_size must be at least 1 and divide N = {n}, got {group_size}")
    if num_channels < 1 or channels % num_channels:
        raise ValueError(f"{op}: num_channels must be at least 1 and divide C = {channels}, got {num_channels}")
    if not eps > 0:
        raise ValueError(f"{op}: eps must be above 0, got {eps}")
    return backends.choose(op, backend, _BACKENDS, x.device, x.dtype), group, float(eps)


def _empty_result(x: Tensor, shape: Sequence[int]) -> Tensor:
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _fallback(x: Tensor, group_size: int, num_channels: int, eps: float) -> Tensor:
    y = reference.minibatch_stddev(x, group_size=group_size, num_channels=num_channels, eps=eps)
    return _empty_result(x, y.shape).copy_(y)


def _fake(x: Tensor, group_size: int, num_channels: int, eps: float) -> Tensor:
    return _empty_result(x, (x.shape[0], x.shape[1] + num_channels, *x.shape[2:]))


def _setup_context(ctx, inputs, output) -> None:
    x, *ctx.settings = inputs
    ctx.save_for_backward(x)


def _backward(ctx, grad_y: Tensor):
    (x,) = ctx.saved_tensors
    return _grad_op(grad_y, x, *ctx.settings), None, None, None


_op = define(
    "minibatch_stddev",
    "(Tensor x, int group_size, int num_channels, float eps) -> Tensor",
    fallback=_fallback,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    triton="minibatch_stddev.minibatch_stddev",
)


# ----------------------------------------------------------------------------------------------------------------------
# fastgan::minibatch_stddev_grad: gx = gy + w · (x − mean over the group) / s on x's channels, with s the deviation of
# each value and w the sum of the statistic's cotangent over the values that it stands for, divided by their number.


def _grouped(x: Tensor, group_size: int, num_channels: int) -> Tensor:
    """[N, C, H, W] -> [members, groups, statistics, C / statistics, H, W]."""
    n, c, h, w = x.shape
    return x.reshape(group_size, n // group_size, num_channels, c // num_channels, h, w)


def _deviation(x: Tensor, group_size: int, num_channels: int, eps: float) -> tuple[Tensor, Tensor]:
    """x − mean and s, grouped."""
    groups = _grouped(x, group_size, num_channels)
    centred = groups - groups.mean(0)
    # A mean that is large against the spread rounds as much as the spread is: what is left of it is taken off as well.
    centred = centred - centred.mean(0)
    return centred, (centred.square().mean(0) + eps).sqrt()


def _weight(grad_y: Tensor, values: Tensor, num_channels: int) -> Tensor:
    """w of each group and statistic, [groups, statistics, 1, 1, 1]; ``values`` is the grouped x."""
    members, groups = values.shape[:2]
    statistic = grad_y[:, -num_channels:].reshape(members, groups, num_channels, -1).sum((0, 3))
    return (statistic / (members * values[0, 0, 0].numel()))[:, :, None, None, None]


def _grad_fallback(grad_y: Tensor, x: Tensor, group_size: int, num_channels: int, eps: float) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    wide = _check.accumulate_dtype(x.dtype)
    centred, s = _deviation(x.to(wide), group_size, num_channels, eps)
    weight = _weight(grad_y.to(wide), centred, num_channels)
    return torch.empty_like(x).copy_(grad_y[:, : x.shape[1]] + (weight * centred / s).reshape(x.shape))


def _grad_fake(grad_y: Tensor, x: Tensor, group_size: int, num_channels: int, eps: float) -> Tensor:
    return torch.empty_like(x)


def _grad_setup(ctx, inputs, output) -> None:
    grad_y, x, *ctx.settings = inputs
    ctx.save_for_backward(grad_y, x)


def _grad_backward(ctx, h: Tensor):
    """⟨h, gy + w · centred / s⟩ by gy and by x, where ds/dx = centred / (members · s)."""
    grad_y, x = ctx.saved_tensors
    members, num_channels, eps = ctx.settings
    if x.numel() == 0:
        return torch.zeros_like(grad_y), torch.zeros_like(x), None, None, None
    wide = _check.accumulate_dtype(x.dtype)
    centred, s = _deviation(x.to(wide), members, num_channels, eps)
    grouped_h = _grouped(h.to(wide), members, num_channels)
    along = (grouped_h * centred).sum(0)
    grad_gy = grad_x = None
    if ctx.needs_input_grad[0]:
        mean = (along / s).mean((2, 3, 4)) / members
        spread = mean.repeat(members, 1)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        grad_gy = torch.cat([h, spread.to(h.dtype)], 1)
    if ctx.needs_input_grad[1]:
        weight = _weight(grad_y.to(wide), centred, num_channels)
        grad_x = weight * ((grouped_h - grouped_h.mean(0)) / s - along * centred / (members * s.pow(3)))
        grad_x = grad_x.reshape(x.shape).to(x.dtype)
    return grad_gy, grad_x, None, None, None


_grad_op = define(
    "minibatch_stddev_grad",
    "(Tensor grad_y, Tensor x, int group_size, int num_channels, float eps) -> Tensor",
    fallback=_grad_fallback,
    fake=_grad_fake,
    setup_context=_grad_setup,
    backward=_grad_backward,
    triton="minibatch_stddev.minibatch_stddev_grad",
)
