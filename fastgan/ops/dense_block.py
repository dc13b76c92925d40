"""dense_block: convolutions each of which reads the image and the results of all before it, and a residual."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops import _check
from fastgan.ops._epilogue import contiguous
from fastgan.ops._kept_weights import keep
from fastgan.ops._library import define
from fastgan.ops._plans import find_plan
from fastgan.ops.scaled_conv2d import scaled_conv2d
from fastgan.reference.activation import resolve
from fastgan.reference.dense_block import dense_block as reference
from fastgan.reference.epilogue import Epilogue

_NAME = "dense_block"
_BACKENDS = {"triton": backends.triton_can_run, "cpp": backends.cpp_can_run, "reference": backends.always}


def dense_block(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    act: str = "lrelu",
    alpha: float | None = None,
    gain: float | None = 1.0,
    residual_scale: float = 0.2,
    backend: str | None = None,
) -> Tensor:
    """The residual dense block of ESRGAN, of L convolutions of 3×3.

        f_0 = x,   f_l = gain · act(conv(f_0 ‖ … ‖ f_{l−1}, w_l) + b_l),   y = x + residual_scale · (conv(…, w_L) + b_L)

    Where no gradient is recorded, Winograd's filtering on the CPU transforms the tiles of each f_l once for all
    convolutions that read it, and nothing is concatenated; that takes float32, NCHW, channels in multiples of 16 and up
    to 256 MB for the tiles. Any other call is one :func:`fastgan.ops.scaled_conv2d` after the other over concatenated
    maps.

    Args:
        x: [N, C, H, W], floating point.
        weights: L ≥ 1 kernels [G_l, C + G_1 + … + G_{l−1}, 3, 3], the last with G_L = C; x's dtype.
        biases: L vectors [G_l], x's dtype or wider; None means none.
        act, alpha, gain: what follows all convolutions but the last, as in :func:`fastgan.ops.bias_act`; gain None is
            the activation's own.
        residual_scale: β of the paper.
        backend: see :func:`fastgan.backend`.

    Returns:
        [N, C, H, W], ``x``'s dtype; autocast's, under autocast.

    Raises:
        ValueError: shapes that do not fit one another, a backend that cannot run.
        TypeError: an argument that must be a tensor is not.

    Gradients: those of :func:`fastgan.ops.scaled_conv2d`, 1st and 2nd order for x, weights and biases; any order on the
    reference.

    Source: Wang et al., "ESRGAN", 2018, section 3.1 and figure 4.
    """
    for i, tensor in enumerate((x, *weights)):
        _check.tensor(_NAME, f"weights[{i - 1}]" if i else "x", tensor, ndim=4)
    x, *weights = _check.autocast(x, *weights)
    biases = [] if biases is None else list(biases)
    options = (len(weights), act, alpha, gain, residual_scale, backend)
    chosen, settings = find_plan(_NAME, _make_plan, (x, *weights, *biases), options)
    if chosen == "reference":
        between = Epilogue(act=act, alpha=alpha, gain=gain)
        y = reference(x, weights, biases, between=between, residual_scale=residual_scale)
    elif chosen == "cpp" and _shares_tiles(x, weights, biases):
        y = _op(x, weights, [contiguous(b, x.dtype) for b in biases], *settings, backends.precision_in_force())
    else:
        y = _one_by_one(x, weights, biases, Epilogue(act=act, alpha=alpha, gain=gain), residual_scale, chosen)
    if _check.DEBUG:
        _check.no_nan(_NAME, y)
    return y


def _make_plan(x: Tensor, *others: Any) -> tuple[str, tuple]:
    """(backend, the registered op's act, alpha, gain and residual_scale)."""
    *tensors, count, act, alpha, gain, residual_scale, backend = others
    weights, biases = tensors[:count], tensors[count:]
    if not weights:
        raise ValueError(f"{_NAME}: weights must have at least one kernel, got none")
    if biases and len(biases) != count:
        raise ValueError(f"{_NAME}: biases must be {count}, one for each weight, got {len(biases)}")
    channels = x.shape[1]
    for i, weight in enumerate(weights):
        outputs = x.shape[1] if i + 1 == count else weight.shape[0]
        if tuple(weight.shape) != (outputs, channels, 3, 3):
            raise ValueError(f"{_NAME}: weights[{i}] must be {[outputs, channels, 3, 3]}, got {list(weight.shape)}")
        channels += outputs
    for i, bias in enumerate(biases):
        _check.tensor(_NAME, f"biases[{i}]", bias)
        if tuple(bias.shape) != (weights[i].shape[0],):
            raise ValueError(f"{_NAME}: biases[{i}] must be {[weights[i].shape[0]]}, got {list(bias.shape)}")
    named = {f"weights[{i}]": weight for i, weight in enumerate(weights)}
    _check.same_dtype(_NAME, x=x, **named)
    _check.same_device(_NAME, x=x, **named, **{f"biases[{i}]": bias for i, bias in enumerate(biases)})
    chosen = backends.choose(_NAME, backend, _BACKENDS, x.device, x.dtype)
    return chosen, (act, *resolve(act, alpha, gain), float(residual_scale))


def _shares_tiles(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> bool:
    """Whether the CPU's one op serves this call, and faster than one convolution after the other."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    if torch.is_grad_enabled() and any([t.requires_grad for t in (x, *weights, *biases)]):
        return False
    if not torch.ops.fastgan._dense_block_tile.default(x, list(weights), backends.precision_in_force()):
        return False
    for weight in weights:
        keep(weight)
    return True


def _one_by_one(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    between: Epilogue,
    residual_scale: float,
    backend: str,
) -> Tensor:
    last = Epilogue(act="linear", gain=residual_scale, residual=x)
    features = [x]
    for i, weight in enumerate(weights):
        epilogue = last if i + 1 == len(weights) else between
        epilogue = replace(epilogue, bias=biases[i]) if biases else epilogue
        image = features[0] if i == 0 else torch.cat(features, 1)
        features.append(scaled_conv2d(image, weight, padding=1, epilogue=epilogue, backend=backend))
    return features[-1]


# ----------------------------------------------------------------------------------------------------------------------
# fastgan::dense_block: the whole block where tiles are shared


def _fallback(x, weights, biases, act, alpha, gain, residual_scale, precision):
    between = Epilogue(act=act, alpha=alpha, gain=gain)
    return reference(x, weights, biases, between=between, residual_scale=residual_scale)


def _fake(x, weights, biases, act, alpha, gain, residual_scale, precision):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)


def _backward(ctx, grad):
    raise NotImplementedError(f"{_NAME}: this op has no derivative; calls that record a gradient run scaled_conv2d")


_op = define(
    _NAME,
    "(Tensor x, Tensor[] weights, Tensor[] biases, str act, float alpha, float gain, float residual_scale,"
    " str precision) -> Tensor",
    fallback=_fallback,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
