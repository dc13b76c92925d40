"""Bias, activation, gain and clamp in one call."""

from __future__ import annotations

from torch import Tensor

from fastgan import backends
from fastgan.ops import _check
from fastgan.reference import bias_act as reference
from fastgan.reference.activation import ACTIVATIONS

_CAN_RUN = {"reference": backends.always}


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    *,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Add a bias, activate, scale, clamp: y = clamp(gain · act(x + b), ±clamp).

    Half types are computed in float32 and rounded once; autocast leaves ``x`` as it is. The result keeps ``x``'s memory
    format.

    Args:
        x: [..., C, ...], floating point, C at ``dim`` if there is a bias. Only dimension 0 may be empty.
        b: [C], any floating dtype; None for none.
        dim: the dimension of ``x`` that ``b`` runs along; may be negative.
        act: linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus or swish.
        alpha: slope of lrelu below zero; None means 0.2.
        gain: factor on the activation; None means √2 for relu, lrelu and swish, 1 for the others.
        clamp: bound on the magnitude after gain, > 0; None for none. The gradient is zero where it holds.
        backend: see :func:`fastgan.backend`.

    Returns:
        ``x``'s shape and dtype.

    Raises:
        ValueError: wrong shapes, an unknown activation, tensors on different devices, a backend that cannot run.
        TypeError: ``x`` or ``b`` is not a tensor.

    Gradients: any order, for ``x`` and ``b``.

    Source: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", 2020, section 2 (lrelu 0.2,
    gain √2).
    """
    op = "bias_act"
    _check.tensor(op, "x", x)
    if 0 in x.shape[1:]:
        raise ValueError(f"{op}: x must not be empty beyond dimension 0, got {list(x.shape)}")
    if b is not None:
        if not -x.ndim <= dim < x.ndim:
            raise ValueError(f"{op}: dim must be within {-x.ndim} .. {x.ndim - 1} for x {list(x.shape)}, got {dim}")
        dim %= x.ndim
        _check.tensor(op, "b", b)
        if list(b.shape) != [x.shape[dim]]:
            raise ValueError(f"{op}: b must be [C] = [{x.shape[dim]}], got {list(b.shape)}")
        _check.same_device(op, x=x, b=b)
    _check.one_of(op, "act", act, list(ACTIVATIONS))
    if clamp is not None and not clamp > 0:
        raise ValueError(f"{op}: clamp must be above 0 or None, got {clamp}")
    backends.choose(op, backend, _CAN_RUN, device=x.device, dtype=x.dtype)
    y = reference.bias_act(x, b, dim=dim, act=act, alpha=alpha, gain=gain, clamp=clamp)
    _check.no_nan(op, y)
    return y
