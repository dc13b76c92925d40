"""``fastgan::demodulated_conv2d``: a modulated convolution that works out its demodulation itself, from energies.

    y = epilogue(d_gain · d[n, o] / √l[n] · Σ_i weight[o, i] ∗ (in_scale[n, i] · x[n, i]))

d and l are those of :mod:`fastgan.ops.demodulation`. One launch on Triton; elsewhere ``demodulation_factor`` and
``scaled_conv2d``, of which no one reads the weight for the factors. For calls that record no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops import _check
from fastgan.ops._conv_arguments import kernel_tensors
from fastgan.ops._epilogue import contiguous
from fastgan.ops._kept_weights import keep
from fastgan.ops._library import define
from fastgan.ops.demodulation import WeightEnergy, demodulation_factor
from fastgan.reference.activation import resolve
from fastgan.reference.epilogue import Epilogue
from fastgan.reference.scaled_conv2d import pad_input

_NOTHING = Epilogue()


def demodulated_conv2d(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    energy: WeightEnergy,
    *,
    prenormalize: str,
    eps: float,
    input_gain: float | Tensor | None,
    stride: int = 1,
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    transposed: bool = False,
    epilogue: Epilogue | None = None,
) -> Tensor:
    """The convolution within :func:`fastgan.ops.modulated_conv2d`, whose arguments these are, checked.

    Args:
        weight: as :func:`fastgan.ops.scaled_conv2d` takes it, x's dtype.
        energy: of that weight as it was before the cast.
        prenormalize: none, stylegan2_fp16 or stylegan3.
        input_gain: a number costs nothing; a tensor is multiplied with the style, one small kernel more.
        padding: (left, right, top, bottom), zeros; 0 if transposed.

    Returns:
        [N, C_out, H', W'] in x's dtype.
    """
    wide = _check.accumulate_dtype(x.dtype)
    style, in_scale, d_gain = contiguous(style, wide), None, 1.0
    if isinstance(input_gain, Tensor):
        in_scale = contiguous(style * input_gain.to(wide), wide)
    elif input_gain is not None:
        d_gain = float(input_gain)
    left, right, top, bottom = padding
    if left != right or top != bottom:
        x, left, top = pad_input(x, padding, "zeros"), 0, 0
    e = _NOTHING if epilogue is None else epilogue
    pointwise = (e.act, *resolve(e.act, e.alpha, e.gain), e.clamp, float(e.residual_gain))
    tensors = kernel_tensors(x, None, None, e)[2:]
    scales = (style, in_scale, contiguous(energy.energy, wide), contiguous(energy.peak, wide))
    if x.device.type == "cpu":
        keep(weight)
    y = _op(
        x, weight, *scales, prenormalize, float(eps), d_gain, *tensors, (stride, stride), (top, left), transposed,
        backends.precision_in_force(), *pointwise,
    )  # fmt: skip
    if _check.DEBUG:
        _check.no_nan("modulated_conv2d", y)
    return y


def _convolve(x: Tensor, weight: Tensor, scales: tuple[Tensor | None, Tensor | None], rest: tuple) -> Tensor:
    """``fastgan::scaled_conv2d`` with the arguments behind d_gain."""
    *tensors, stride, padding, transposed, precision, act, alpha, gain, clamp, residual_gain = rest
    geometry = (stride, padding, (0, 0), (1, 1), transposed, 1, precision)
    settings = (act, alpha, gain, clamp, residual_gain, False)
    return torch.ops.fastgan.scaled_conv2d.default(x, weight, *scales, *tensors, *geometry, *settings)[0]


def _fallback(x, weight, style, in_scale, energy, peak, prenormalize, eps, d_gain, *rest):
    taps = weight.shape[2] * weight.shape[3]
    factor = demodulation_factor(style, energy, peak, taps, prenormalize, eps)
    factor = factor if d_gain == 1.0 else factor * d_gain
    return _convolve(x, weight, (style if in_scale is None else in_scale, factor), rest)


def _fake(x, weight, style, in_scale, energy, peak, prenormalize, eps, d_gain, *rest):
    return _convolve(x, weight, (None, None), rest)


def _setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)


def _backward(ctx, grad):
    raise NotImplementedError(
        "demodulated_conv2d: it has no derivative; calls that record a gradient run demodulation and scaled_conv2d"
    )


_op = define(
    "demodulated_conv2d",
    "(Tensor x, Tensor weight, Tensor style, Tensor? in_scale, Tensor energy, Tensor peak, str prenormalize, float eps,"
    " float d_gain, Tensor? noise, Tensor? noise_strength, Tensor? bias, Tensor? residual, int[2] stride,"
    " int[2] padding, bool transposed, str precision, str act, float alpha, float gain, float? clamp,"
    " float residual_gain) -> Tensor",
    fallback=_fallback,
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    triton="scaled_conv2d.demodulated_conv2d",
)
