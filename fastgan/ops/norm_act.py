"""Instance, batch or adaptive normalisation with the activation that follows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops import _check
from fastgan.ops._epilogue import contiguous, dense
from fastgan.ops._library import define
from fastgan.ops.activation_grad import activation_grad
from fastgan.reference import norm_act as reference
from fastgan.reference.activation import ACTIVATIONS, activate, resolve

Running = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, float]

_BACKENDS = {"cuda": backends.cuda_can_run, "cpp": backends.cpp_can_run, "reference": backends.always}


def norm_act(
    x: Tensor,
    *,
    kind: str = "instance",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running: Running | None = None,
    eps: float = 1e-5,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Normalise each channel, scale and shift it, activate.

        y = gain · act(weight · (x − mean) / √(var + eps) + bias)

    ``var`` is the biased variance. Half types are computed in float32 and rounded once; statistics are put together in
    float64, and a mean that is large against the spread costs nothing; autocast leaves ``x`` as it is. The result is
    contiguous or, if ``x`` is, channels_last; an ``x`` that is neither is copied once.

    Args:
        x: [N, C, H, W], floating point. N = 0 gives an empty result and leaves ``running`` as it is.
        kind: "instance" takes mean and variance per sample and channel, "batch" per channel.
        weight, bias: [C], or [N, C] for adaptive and class-conditional normalisation; any floating dtype; None for 1
            and 0.
        running: for kind "batch" only.
            None: the statistics are those of ``x``.
            (mean, var), each [C]: they are used in place of ``x``'s, and nothing changes (evaluation).
            (mean, var, momentum): the statistics are those of ``x``, and mean and var advance in place, outside
            autograd, as in torch.nn.BatchNorm2d (training): kept ← (1 − momentum) · kept + momentum · seen, where the
            variance seen is the unbiased one.
        eps: added to the variance.
        act: linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus or swish.
        alpha: slope of lrelu below zero; None means 0.2.
        gain: factor on the activation, 1 unless given; None means √2 for relu, lrelu and swish, 1 for the others.
        backend: see :func:`fastgan.backend`. "cuda", only where it is named, takes every option in float32, bfloat16
            and float16: one read of a contiguous ``x`` where the values of a mean fit in shared memory, else two.

    Returns:
        [N, C, H, W], ``x``'s dtype.

    Raises:
        ValueError: wrong shapes, an unknown kind or activation, ``running`` with kind "instance", statistics of a
            single value, tensors on different devices, a backend that cannot run.
        TypeError: an argument that must be a tensor is not.

    Gradients: 1st and 2nd order for ``x``, ``weight`` and ``bias``, one kernel each (of the second order, on the GPU,
    plain torch); none for ``running``. The reference differentiates without end. Saved for backward: ``x``, ``weight``,
    ``bias`` and the statistics.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015, algorithm 1; Ulyanov et al., "Instance Normalization", 2016,
    equation 5; adaptive: Huang and Belongie, "Arbitrary Style Transfer in Real-time", 2017, equation 8.
    """
    op = "norm_act"
    _check_tensors(op, kind, x, weight, bias)
    _check.one_of(op, "act", act, ACTIVATIONS)
    if running is not None:
        _check_running(op, kind, running, x)
    fixed = running is not None and len(running) == 2
    batch = kind == "batch"
    values = x.shape[2] * x.shape[3] * (x.shape[0] if batch else 1)
    if values == 1 and not fixed:
        raise ValueError(f"{op}: x must have more than 1 value per channel to take its variance, got {list(x.shape)}")
    chosen = backends.choose(op, backend, _BACKENDS, x.device, x.dtype)
    if chosen == "reference":
        y = reference.norm_act(
            x, kind=kind, weight=weight, bias=bias, running=running, eps=eps, act=act, alpha=alpha, gain=gain
        )
    else:
        wide = _check.accumulate_dtype(x.dtype)
        weight, bias = (None if t is None else contiguous(t, wide) for t in (weight, bias))
        statistics = [contiguous(t.detach(), torch.float64) for t in running[:2]] if fixed else (None, None)
        compute = _cuda_op if chosen == "cuda" else _op
        y, mean, var = compute(dense(x), weight, bias, *statistics, batch, float(eps), act, *resolve(act, alpha, gain))
        if running is not None and not fixed and values > 0:
            _advance(running, mean, var, values)
    _check.no_nan(op, y)
    return y


def _check_tensors(op: str, kind: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    _check.tensor(op, "x", x, ndim=4)
    n, channels, height, width = x.shape
    if 0 in (channels, height, width):
        raise ValueError(f"{op}: x must have C, H and W of at least 1, got {list(x.shape)}")
    _check.one_of(op, "kind", kind, ("instance", "batch"))
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        _check.tensor(op, name, value)
        if value.shape not in ((channels,), (n, channels)):
            raise ValueError(
                f"{op}: {name} must be [C] = [{channels}] or [N, C] = [{n}, {channels}], got {list(value.shape)}"
            )
    _check.same_device(op, x=x, weight=weight, bias=bias)


def _check_running(op: str, kind: str, running: Running, x: Tensor) -> None:
    if kind != "batch":
        raise ValueError(f"{op}: running must be None for kind 'instance', got {type(running).__name__}")
    if not isinstance(running, tuple) or len(running) not in (2, 3):
        raise ValueError(f"{op}: running must be (mean, var) or (mean, var, momentum), got {running!r}")
    for name, value in zip(("running mean", "running var"), running[:2], strict=True):
        _check.tensor(op, name, value)
        if value.shape != (x.shape[1],):
            raise ValueError(f"{op}: {name} must be [C] = [{x.shape[1]}], got {list(value.shape)}")
        _check.same_device(op, x=x, **{name: value})
    if len(running) == 3 and not 0 <= running[2] <= 1:
        raise ValueError(f"{op}: running momentum must be within 0 .. 1, got {running[2]}")


@torch.no_grad()
def _advance(running: Running, mean: Tensor, var: Tensor, values: int) -> None:
    kept_mean, kept_var, momentum = running
    for kept, seen, factor in ((kept_mean, mean, 1.0), (kept_var, var, values / (values - 1))):
        # Not lerp_, which wants one dtype.
        kept.mul_(1 - momentum).add_(seen, alpha=momentum * factor)


# ----------------------------------------------------------------------------------------------------------------------
# What stands in for the kernels: the same formulas (csrc/cpu/norm_problem.h derives them) in plain torch.


class _Settings(NamedTuple):
    """The fixed arguments of a gradient, in the order of the schemas."""

    batch: bool
    fixed: bool  # the statistics were given, they do not follow x
    eps: float
    act: str
    alpha: float
    gain: float

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions of x that one mean runs over."""
        return (0, 2, 3) if self.batch else (2, 3)

    def mean(self, t: Tensor) -> Tensor:
        """<t> of each group, to broadcast against x; 0 where the statistics do not follow x."""
        return t.new_zeros(()) if self.fixed else t.mean(self.dims, keepdim=True)

    def slope(self, g: Tensor, z: Tensor, order: int) -> Tensor:
        """g · gain · act'(z), or act'' for order 2."""
        return activation_grad(g, z, self.act, self.alpha, self.gain, None, False, order)


def _per_channel(t: Tensor | None, missing: float, like: Tensor) -> Tensor:
    """A parameter or statistic, [C] or [N, C], to broadcast against x."""
    return like.new_full((), missing) if t is None else t.to(like.dtype).reshape(-1, like.shape[1], 1, 1)


def _normalised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """r = 1 / √(var + eps), u = (x − mean) · r, w and z = u · w + b, in the dtype of sums."""
    x = x.to(_check.accumulate_dtype(x.dtype))
    r = (_per_channel(var, 1.0, x.double()) + eps).rsqrt()
    u = ((x.double() - _per_channel(mean, 0.0, x.double())) * r).to(x.dtype)
    w = _per_channel(weight, 1.0, x)
    return r.to(x.dtype), u, w, u * w + _per_channel(bias, 0.0, x)


def _parameter_grad(per_value: Tensor, parameter: Tensor | None, wanted: bool) -> Tensor:
    if not wanted:
        return per_value.new_empty(0)
    return per_value.sum((0, 2, 3) if parameter.ndim == 1 else (2, 3))


def _like(x: Tensor, value: Tensor, wanted: bool) -> Tensor:
    return torch.empty_like(x).copy_(value) if wanted else x.new_empty(0)


# ----------------------------------------------------------------------------------------------------------------------
# fastgan::norm_act: y and, unless they are given, the statistics in float64.


def _fallback(x, weight, bias, mean, var, batch, eps, act, alpha, gain):
    found = x.new_empty(0, dtype=torch.float64), x.new_empty(0, dtype=torch.float64)
    if mean is None:
        dims = (0, 2, 3) if batch else (2, 3)
        found = mean, var = x.double().mean(dims), x.double().var(dims, correction=0)
    z = _normalised(x, weight, bias, mean, var, eps)[3]
    return torch.empty_like(x).copy_(activate(z, act, alpha, gain, None)), *found


def _fake(x, weight, bias, mean, var, batch, eps, act, alpha, gain):
    shape = [0] if mean is not None else [x.shape[1]] if batch else [x.shape[0], x.shape[1]]
    return torch.empty_like(x), *(x.new_empty(shape, dtype=torch.float64) for _ in range(2))


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, mean, var, batch, *rest = inputs
    ctx.settings = _Settings(batch, mean is not None, *rest)
    ctx.save_for_backward(x, weight, bias, *(output[1:] if mean is None else (mean, var)))


def _wanted(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """None in place of the empty tensors that stand for gradients that were not wanted."""
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]


# ----------------------------------------------------------------------------------------------------------------------
# fastgan::norm_act_grad: the gradients of x, weight and bias, each empty if it is not wanted. mean and var are what x
# has; the formula of its own gradient follows x through them.


def _grad_fallback(gy, x, weight, bias, mean, var, *rest):
    settings, needs = _Settings(*rest[:6]), rest[6:]
    r, u, w, z = _normalised(x, weight, bias, mean, var, settings.eps)
    g = settings.slope(gy.to(z.dtype), z, 1)
    k = w * g
    grad_x = r * (k - settings.mean(k) - u * settings.mean(k * u))
    grads = _parameter_grad(g * u, weight, needs[1]), _parameter_grad(g, bias, needs[2])
    return _like(x, grad_x, needs[0]), *grads


def _grad_fake(gy, x, weight, bias, mean, var, *rest):
    wide = _check.accumulate_dtype(x.dtype)
    grads = (
        torch.empty_like(t) if need else x.new_empty(0, dtype=wide)
        for t, need in zip((weight, bias), rest[7:], strict=True)
    )
    return torch.empty_like(x) if rest[6] else x.new_empty(0), *grads


def _grad_setup(ctx, inputs, output) -> None:
    ctx.settings = _Settings(*inputs[6:12])
    ctx.save_for_backward(*inputs[:6])
    ctx.set_materialize_grads(False)


def _grad_backward(ctx, h: Tensor | None, h_weight: Tensor | None, h_bias: Tensor | None):
    needs = ctx.needs_input_grad[:4]
    if not any(needs) or all(t is None for t in (h, h_weight, h_bias)):
        return (None,) * 15
    grads = _grad_grad_op(h, h_weight, h_bias, *ctx.saved_tensors, *ctx.settings, *needs)
    return *_wanted(grads, needs), *[None] * 11


# ----------------------------------------------------------------------------------------------------------------------
# fastgan::norm_act_grad_grad: the gradients of gy, x, weight and bias of the inner product of norm_act_grad's results
# with h, h_weight and h_bias.


def _grad_grad_fallback(h, h_weight, h_bias, gy, x, weight, bias, mean, var, *rest):
    settings, needs = _Settings(*rest[:6]), rest[6:]
    average = settings.mean
    r, u, w, z = _normalised(x, weight, bias, mean, var, settings.eps)
    gy = gy.to(z.dtype)
    h = torch.zeros_like(z) if h is None else h.to(z.dtype)
    hw = _per_channel(h_weight, 0.0, z)
    slope = settings.slope(torch.ones_like(z), z, 1)
    g, h_u = gy * slope, average(h * u)
    k = w * g
    p = r * (h - average(h) - u * h_u)
    q = w * p + _per_channel(h_bias, 0.0, z) + hw * u
    e = settings.slope(gy * q, z, 2)
    cotangent = w * e + (hw - w * r * h_u) * g - r * average(k * u) * h
    grad_x = r * (cotangent - average(cotangent) - u * (average(cotangent * u) + average(k * p)))
    grads = _parameter_grad(e * u + g * p, weight, needs[2]), _parameter_grad(e, bias, needs[3])
    return _like(x, slope * q, needs[0]), _like(x, grad_x, needs[1]), *grads


def _grad_grad_fake(h, h_weight, h_bias, gy, x, weight, bias, mean, var, *rest):
    need_gy, *others = rest[6:]
    grads = _grad_fake(gy, x, weight, bias, mean, var, *rest[:6], *others)
    return torch.empty_like(x) if need_gy else x.new_empty(0), *grads


def _grad_grad_setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)


def _grad_grad_backward(ctx, *gradients):
    raise NotImplementedError(
        "norm_act_grad_grad: the third order has no kernel; backend='reference' differentiates without end"
    )


_grad_grad_op = define(
    "norm_act_grad_grad",
    "(Tensor? h, Tensor? h_weight, Tensor? h_bias, Tensor gy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean,"
    " Tensor var, bool batch, bool fixed, float eps, str act, float alpha, float gain, bool need_gy, bool need_x,"
    " bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    fallback=_grad_grad_fallback,
    fake=_grad_grad_fake,
    setup_context=_grad_grad_setup,
    backward=_grad_grad_backward,
    differentiable_results=4,
)


# ----------------------------------------------------------------------------------------------------------------------
# fastgan::norm_act and fastgan::norm_act_grad, once for each family of kernels.


def _define_twin(suffix: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The two ops under names of their own, so that a gradient stays with the kernels of its call. The gradient's own
    gradient is norm_act_grad_grad in both cases: a kernel on the CPU, plain torch elsewhere."""
    grad_op = define(
        f"norm_act_grad{suffix}",
        "(Tensor gy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, bool batch, bool fixed,"
        " float eps, str act, float alpha, float gain, bool need_x, bool need_weight, bool need_bias)"
        " -> (Tensor, Tensor, Tensor)",
        fallback=_grad_fallback,
        fake=_grad_fake,
        setup_context=_grad_setup,
        backward=_grad_backward,
        differentiable_results=3,
    )

    def backward(ctx, grad_y: Tensor):
        needs = ctx.needs_input_grad[:3]
        return *_wanted(grad_op(grad_y, *ctx.saved_tensors, *ctx.settings, *needs), needs), *[None] * 7

    return define(
        f"norm_act{suffix}",
        "(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, bool batch, float eps, str act,"
        " float alpha, float gain) -> (Tensor, Tensor, Tensor)",
        fallback=_fallback,
        fake=_fake,
        setup_context=_setup_context,
        backward=backward,
    )


_op, _cuda_op = _define_twin(""), _define_twin("_cuda")
