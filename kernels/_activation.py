"""The nine activations of fastgan.reference.activation inside Triton kernels, with their first two derivatives.

All take and return float32. NaN goes through: where a comparison selects, a NaN takes the branch that keeps it.
"""

from __future__ import annotations

import triton
import triton.language as tl

_SELU_SCALE = tl.constexpr(1.0507009873554805)
_SELU_ALPHA = tl.constexpr(1.6732632423543772)


@triton.jit
def expm1(x):
    """exp(x) - 1 without cancellation.

    Near zero exp(x) - 1 keeps only the rounding error of exp(x), so |x| < 1/2 takes the Taylor series: its first term
    left out is x^10/10! < 3e-10, relative to x below float32's rounding of 6e-8.
    """
    series = 1.0 + x * (1.0 / 9.0)
    series = 1.0 + x * (1.0 / 8.0) * series
    series = 1.0 + x * (1.0 / 7.0) * series
    series = 1.0 + x * (1.0 / 6.0) * series
    series = 1.0 + x * (1.0 / 5.0) * series
    series = 1.0 + x * (1.0 / 4.0) * series
    series = 1.0 + x * (1.0 / 3.0) * series
    series = 1.0 + x * 0.5 * series
    return tl.where(tl.abs(x) < 0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0 without the rounding of 1 + x: x / (w - 1) makes up for what w = 1 + x has lost."""
    w = 1.0 + x
    exact = w - 1.0
    return tl.where(exact == 0.0, x, tl.log(w) * (x / tl.where(exact == 0.0, 1.0, exact)))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); exp overflows to infinity below -88.7, which gives the right 0."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """-e / (e + 2) with e = expm1(-2|x|), which neither overflows nor cancels; the sign put back."""
    e = expm1(-2.0 * tl.abs(x))
    magnitude = -e / (e + 2.0)
    return tl.where(x < 0.0, -magnitude, magnitude)


@triton.jit
def act(x, ACT: tl.constexpr, alpha):
    """act(x) for the activation named ``ACT``; ``alpha`` is lrelu's slope below zero."""
    if ACT == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    elif ACT == "lrelu":
        x = tl.where(x < 0.0, x * alpha, x)
    elif ACT == "tanh":
        x = tanh(x)
    elif ACT == "sigmoid":
        x = sigmoid(x)
    elif ACT == "elu":
        x = tl.where(x > 0.0, x, expm1(x))
    elif ACT == "selu":
        x = _SELU_SCALE * tl.where(x > 0.0, x, _SELU_ALPHA * expm1(x))
    elif ACT == "softplus":
        # exp(x) overflows float32 above 88.7, so max(x, 0) + log1p(exp(-|x|)).
        x = tl.where(x < 0.0, 0.0, x) + log1p(tl.exp(-tl.abs(x)))
    elif ACT == "swish":
        x = x * sigmoid(x)
    return x


@triton.jit
def activate(x, ACT: tl.constexpr, alpha, gain, clamp):
    """clamp(gain · act(x), ±clamp); ``clamp`` None for none."""
    y = act(x, ACT, alpha) * gain
    if clamp is not None:
        y = tl.where(y > clamp, clamp, tl.where(y < -clamp, -clamp, y))
    return y


@triton.jit
def slope(t, x, ACT: tl.constexpr, alpha):
    """act'(x) from t = act(x); only swish looks at x."""
    result = tl.full(t.shape, 1.0, tl.float32)
    if ACT == "relu":
        result = tl.where(t > 0.0, 1.0, 0.0)
    elif ACT == "lrelu":
        result = tl.where(t > 0.0, 1.0, alpha)
    elif ACT == "tanh":
        result = 1.0 - t * t
    elif ACT == "sigmoid":
        result = t * (1.0 - t)
    elif ACT == "elu":
        result = tl.where(t > 0.0, 1.0, t + 1.0)
    elif ACT == "selu":
        result = tl.where(t > 0.0, _SELU_SCALE, t + _SELU_SCALE * _SELU_ALPHA)
    elif ACT == "softplus":
        result = -expm1(-t)
    elif ACT == "swish":
        s = sigmoid(x)
        result = s + x * s * (1.0 - s)
    return result


@triton.jit
def bend(t, x, ACT: tl.constexpr):
    """d act'/dt from t = act(x); for swish act''(x)."""
    result = tl.full(t.shape, 0.0, tl.float32)
    if ACT == "tanh":
        result = -2.0 * t
    elif ACT == "sigmoid":
        result = 1.0 - 2.0 * t
    elif ACT == "elu" or ACT == "selu":
        result = tl.where(t <= 0.0, 1.0, 0.0)
    elif ACT == "softplus":
        result = tl.exp(-t)
    elif ACT == "swish":
        s = sigmoid(x)
        result = s * (1.0 - s) * (2.0 + x * (1.0 - 2.0 * s))
    return result
