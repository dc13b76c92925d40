"""Instance, batch or adaptive normalisation with the activation that follows it."""

from __future__ import annotations

from torch import Tensor

from fastgan import backends
from fastgan.ops import _check
from fastgan.reference import norm_act as reference
from fastgan.reference.activation import ACTIVATIONS

Running = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, float]

_CAN_RUN = {"reference": backends.always}


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

    ``var`` is the biased variance. Half types are computed in float32 and rounded once; autocast leaves ``x`` as it is.
    The result has ``x``'s memory format for kind "batch"; kind "instance" copies a channels_last ``x`` to NCHW.

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
        backend: see :func:`fastgan.backend`.

    Returns:
        [N, C, H, W], ``x``'s dtype.

    Raises:
        ValueError: wrong shapes, an unknown kind or activation, ``running`` with kind "instance", statistics of a
            single value, tensors on different devices, a backend that cannot run.
        TypeError: an argument that must be a tensor is not.

    Gradients: any order, for ``x``, ``weight`` and ``bias``; none for ``running``.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015, algorithm 1; Ulyanov et al., "Instance Normalization", 2016,
    equation 5; adaptive: Huang and Belongie, "Arbitrary Style Transfer in Real-time", 2017, equation 8.
    """
    op = "norm_act"
    _check.tensor(op, "x", x, ndim=4)
    n, channels, height, width = x.shape
    if 0 in (channels, height, width):
        raise ValueError(f"{op}: x must have C, H and W of at least 1, got {list(x.shape)}")
    _check.one_of(op, "kind", kind, ("instance", "batch"))
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        _check.tensor(op, name, value)
        if list(value.shape) not in ([channels], [n, channels]):
            raise ValueError(
                f"{op}: {name} must be [C] = [{channels}] or [N, C] = [{n}, {channels}], got {list(value.shape)}"
            )
    _check.same_device(op, x=x, weight=weight, bias=bias)
    _check.one_of(op, "act", act, list(ACTIVATIONS))
    _check_running(op, kind, running, x)
    values = height * width * (n if kind == "batch" else 1)
    if values == 1 and (running is None or len(running) == 3):
        raise ValueError(f"{op}: x must have more than 1 value per channel to take its variance, got {list(x.shape)}")
    backends.choose(op, backend, _CAN_RUN, device=x.device, dtype=x.dtype)
    y = reference.norm_act(
        x, kind=kind, weight=weight, bias=bias, running=running, eps=eps, act=act, alpha=alpha, gain=gain
    )
    _check.no_nan(op, y)
    return y


def _check_running(op: str, kind: str, running: Running | None, x: Tensor) -> None:
    if running is None:
        return
    if kind != "batch":
        raise ValueError(f"{op}: running must be None for kind 'instance', got {type(running).__name__}")
    if not isinstance(running, tuple) or len(running) not in (2, 3):
        raise ValueError(f"{op}: running must be (mean, var) or (mean, var, momentum), got {running!r}")
    for name, value in zip(("running mean", "running var"), running[:2], strict=True):
        _check.tensor(op, name, value)
        if list(value.shape) != [x.shape[1]]:
            raise ValueError(f"{op}: {name} must be [C] = [{x.shape[1]}], got {list(value.shape)}")
        _check.same_device(op, x=x, **{name: value})
    if len(running) == 3 and not 0 <= running[2] <= 1:
        raise ValueError(f"{op}: running momentum must be within 0 .. 1, got {running[2]}")
