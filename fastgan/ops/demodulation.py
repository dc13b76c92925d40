"""``fastgan::demodulation``: a modulated convolution's two scale matrices, in one read of the weight.

    in_scale[n, i] = style[n, i] / √l[n]
    d[n, o] = rsqrt(Σ_i energy[o, i] · style[n, i]² / l[n] + eps · c[o]),      energy[o, i] = Σ_kk weight[o, i]²

The levels c [C_out] and l [N] are what ``prenormalize`` divides the weight and the style by, squared: dividing the
weight by √c and the resulting d again is the same as eps · c, so no normalised weight is ever formed.

    none              c = l = 1
    stylegan2_fp16    c[o] = C_in·k² · max|weight[o]|²      l[n] = max|style[n]|²
    stylegan3         c[o] = mean weight[o]²                l = mean style² over the whole batch

A row of zeros has nothing to normalise: the maximum or mean of what it is made of counts as 1.

Where no gradient is recorded, the weight need not be read for each call: energy and what c needs are kept as a
:class:`WeightEnergy`, and ``fastgan::demodulation_factor`` makes of them d / √l, which belongs around a convolution of
style ⊙ x itself.

Source: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", 2020, equation 3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops import _check
from fastgan.ops._library import define
from fastgan.reference._precision import full_precision
from fastgan.reference.modulated_conv2d import one_for_zero

_BACKENDS = {"triton": backends.triton_can_run, "cpp": backends.cpp_can_run, "reference": backends.always}


class WeightEnergy(NamedTuple):
    """All that demodulation needs to know of a weight [C_out, C_in, k_h, k_w], for any ``prenormalize``.

    Attributes:
        energy: Σ_kk weight², [C_out, C_in], float32 (float64 for a float64 weight).
        peak: C_in·k² · max|weight[o]|², [C_out], the same dtype; a row of zeros counts as ones.
    """

    energy: Tensor
    peak: Tensor


def weight_energy(weight: Tensor, *, backend: str | None = None) -> WeightEnergy:
    """What :func:`fastgan.ops.modulated_conv2d` takes as ``weight_energy``, in one read of the weight.

    Σ_kk weight² and the largest magnitude of each output channel: a network that only samples makes them once and its
    forward passes read the weight for the convolution alone. They do not follow the weight: after a change to it,
    make them anew (:class:`fastgan.nn.ModulatedConv2d` does).

    Args:
        weight: [C_out, C_in, k_h, k_w], any floating dtype, no size 0.
        backend: see :func:`fastgan.backend`.

    Returns:
        A :class:`WeightEnergy`; no gradient flows through it.

    Raises:
        ValueError: a weight of another shape, a backend that cannot run.
        TypeError: a weight that is no tensor.

    Source: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", 2020, equation 3.
    """
    op = "weight_energy"
    _check.tensor(op, "weight", weight)
    if weight.ndim != 4 or 0 in weight.shape:
        raise ValueError(f"{op}: weight must be [C_out, C_in, k_h, k_w], each at least 1, got {list(weight.shape)}")
    chosen = backends.choose(op, backend, _BACKENDS, weight.device, weight.dtype)
    weight = weight.detach()
    # Of no styles: only what depends on the weight is left.
    style = weight.new_empty((0, weight.shape[1]), dtype=_check.accumulate_dtype(weight.dtype))
    run = _fallback if chosen == "reference" else _op
    _, _, energy, peak, _ = run(weight, style, "stylegan2_fp16", 1.0, True)
    return WeightEnergy(energy, peak)


def demodulation(weight: Tensor, style: Tensor, *, prenormalize: str, eps: float) -> tuple[Tensor, Tensor]:
    """The scales around the convolution; arguments as :func:`fastgan.ops.modulated_conv2d` has checked them.

    Args:
        weight: [C_out, C_in, k_h, k_w], any floating dtype.
        style: [N, C_in], any floating dtype.
        prenormalize: none, stylegan2_fp16 or stylegan3.
        eps: > 0.

    Returns:
        in_scale [N, C_in] and d [N, C_out], float64 if either argument is, else float32.

    Gradients: any order, for both. Saved for backward: both arguments, d, the energies (1/k² of the weight) and levels.
    """
    wide = torch.float64 if torch.float64 in (weight.dtype, style.dtype) else torch.float32
    weight = weight.to(wide) if _check.accumulate_dtype(weight.dtype) != wide else weight
    graphed = torch.is_grad_enabled() and (weight.requires_grad or style.requires_grad)
    in_scale, d, *_ = _op(weight, style.to(wide), prenormalize, float(eps), graphed)
    return in_scale, d


def _weight_level(weight: Tensor, energy: Tensor, prenormalize: str) -> Tensor:
    if prenormalize == "stylegan2_fp16":
        return one_for_zero(weight.abs().amax((1, 2, 3))).square() * weight[0].numel()
    if prenormalize == "stylegan3":
        return one_for_zero(energy.sum(1) / weight[0].numel())
    return energy.new_ones(len(weight))


def _style_level(style: Tensor, prenormalize: str) -> Tensor:
    if prenormalize == "stylegan2_fp16":
        return one_for_zero(style.abs().amax(1)).square()
    if prenormalize == "stylegan3" and len(style) > 0:
        return one_for_zero(style.square().mean()).repeat(len(style))
    return style.new_ones(len(style))


def _fallback(weight: Tensor, style: Tensor, prenormalize: str, eps: float, save_energy: bool):
    weight = weight.to(style.dtype)
    energy = weight.square().sum((2, 3))
    weight_level, style_level = _weight_level(weight, energy, prenormalize), _style_level(style, prenormalize)
    in_scale = style * style_level.rsqrt()[:, None]
    with full_precision(style):
        d = torch.rsqrt(in_scale.square() @ energy.t() + eps * weight_level)
    return in_scale, d, energy if save_energy else energy.new_empty(0), weight_level, style_level


def _fake(weight: Tensor, style: Tensor, prenormalize: str, eps: float, save_energy: bool):
    (outputs, channels), n = weight.shape[:2], style.shape[0]
    energy = (outputs, channels) if save_energy else (0,)
    return tuple(style.new_empty(shape) for shape in ((n, channels), (n, outputs), energy, (outputs,), (n,)))


def _setup_context(ctx, inputs, output) -> None:
    weight, style, ctx.prenormalize, ctx.eps, _ = inputs
    _, d, energy, _, style_level = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weight, style, d, energy, style_level)


def _add(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


def _backward(ctx, grad_in, grad_d, grad_energy, grad_weight_level, grad_style_level):
    weight, style, d, energy, style_level = ctx.saved_tensors
    need_weight, need_style = ctx.needs_input_grad[:2]
    grad_style = None
    # Under autocast the matrix products below would run in half precision.
    with full_precision(style):
        if grad_d is not None:
            grad_power = -0.5 * d.pow(3) * grad_d  # of 1/d² = power + eps · c
            grad_product = grad_power / style_level[:, None]  # of style² @ energyᵀ
            grad_style = 2 * style * (grad_product @ energy)
            if need_weight:
                grad_energy = _add(grad_energy, grad_product.t() @ style.square())
            if ctx.prenormalize != "none":
                product = style.square() @ energy.t()
                grad_weight_level = _add(grad_weight_level, ctx.eps * grad_power.sum(0))
                grad_style_level = _add(grad_style_level, -(grad_product * product).sum(1) / style_level)
        if grad_in is not None:
            grad_style = _add(grad_style, grad_in * style_level.rsqrt()[:, None])
            if ctx.prenormalize != "none":
                along = (grad_in * style).sum(1)
                grad_style_level = _add(grad_style_level, -0.5 * style_level.pow(-1.5) * along)
    if need_style and ctx.prenormalize != "none" and grad_style_level is not None:
        grad_style = _add(grad_style, _style_level_grad(style, grad_style_level, ctx.prenormalize))
    grad_weight = None
    if need_weight:
        grad_weight = _weight_grad(weight.to(style.dtype), grad_energy, grad_weight_level, ctx.prenormalize)
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
    return grad_weight, grad_style if need_style else None, None, None, None


def _style_level_grad(style: Tensor, grad: Tensor, prenormalize: str) -> Tensor:
    if prenormalize == "stylegan3":
        return grad.sum() * (2 / max(style.numel(), 1)) * style
    return grad[:, None] * 2 * style * _largest_share(style, 1)


def _weight_grad(weight: Tensor, grad_energy: Tensor | None, grad_level: Tensor | None, kind: str) -> Tensor | None:
    fan_in, grad = weight[0].numel(), None
    if kind == "stylegan3" and grad_level is not None:
        grad_energy = _add(grad_energy, (grad_level / fan_in)[:, None].expand(weight.shape[:2]))
    if grad_energy is not None:
        grad = 2 * weight * grad_energy[:, :, None, None]
    if kind == "stylegan2_fp16" and grad_level is not None:
        share = _largest_share(weight, (1, 2, 3))
        grad = _add(grad, grad_level[:, None, None, None] * (2 * fan_in) * weight * share)
    return grad


def _largest_share(x: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """d max|x| / d |x|: 1 for the largest magnitude over ``dims``, shared where several are; 0 where all are 0."""
    magnitude = x.detach().abs()
    most = magnitude.amax(dims, keepdim=True)
    largest = ((magnitude == most) & (most > 0)).to(x.dtype)
    return largest / largest.sum(dims, keepdim=True).clamp_min(1)


_op = define(
    "demodulation",
    "(Tensor weight, Tensor style, str prenormalize, float eps, bool save_energy)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fallback=_fallback,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    differentiable_results=5,
    triton="demodulation.demodulation",
)


# ----------------------------------------------------------------------------------------------------------------------
# fastgan::demodulation_factor: d / √l from energies. For calls that record no gradient.


def _factor_fallback(style: Tensor, energy: Tensor, peak: Tensor, taps: int, prenormalize: str, eps: float) -> Tensor:
    unit = _style_level(style, prenormalize).sqrt()[:, None]
    level = energy.new_ones(()) if prenormalize == "none" else peak
    if prenormalize == "stylegan3":
        level = one_for_zero(energy.sum(1) / (energy.shape[1] * taps))
    with full_precision(style):
        return torch.rsqrt((style / unit).square() @ energy.t() + eps * level) / unit


def _factor_fake(style: Tensor, energy: Tensor, peak: Tensor, taps: int, prenormalize: str, eps: float) -> Tensor:
    return style.new_empty((style.shape[0], energy.shape[0]))


def _factor_setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)


def _factor_backward(ctx, grad):
    raise NotImplementedError(
        "demodulation_factor: it has no derivative; calls that record a gradient run demodulation"
    )


demodulation_factor = define(
    "demodulation_factor",
    "(Tensor style, Tensor energy, Tensor peak, int taps, str prenormalize, float eps) -> Tensor",
    fallback=_factor_fallback,
    fake=_factor_fake,
    setup_context=_factor_setup,
    backward=_factor_backward,
)
