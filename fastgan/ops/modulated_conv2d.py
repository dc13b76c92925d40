"""StyleGAN's modulated convolution: two scale matrices around one convolution, resampling and an epilogue behind it."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops import _check
from fastgan.ops._epilogue import check_epilogue, is_channels_last
from fastgan.ops._plans import epilogue_parts, find_plan
from fastgan.ops._tensor_core_conv import ConvFacts, tensor_core_can_run
from fastgan.ops.demodulated_conv2d import demodulated_conv2d
from fastgan.ops.demodulation import WeightEnergy, demodulation
from fastgan.ops.scaled_conv2d import explain_algorithm, scaled_conv2d
from fastgan.ops.upfirdn2d import check_filter, filter_size, upfirdn2d
from fastgan.reference import modulated_conv2d as reference
from fastgan.reference.epilogue import Epilogue

_PRENORMALIZE = ("auto", "none", "stylegan2_fp16", "stylegan3")
_NOTHING = Epilogue()
_BACKENDS = {
    "cuda": tensor_core_can_run,
    "triton": backends.triton_can_run,
    "cpp": backends.cpp_can_run,
    "reference": backends.always,
}


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    *,
    demodulate: bool = True,
    up: int = 1,
    down: int = 1,
    padding: int | tuple[int, int] | tuple[int, int, int, int] = 0,
    resample_filter: Tensor | None = None,
    eps: float = 1e-8,
    input_gain: float | Tensor | None = None,
    prenormalize: str = "auto",
    flip_weight: bool | None = None,
    epilogue: Epilogue | None = None,
    backend: str | None = None,
    weight_energy: WeightEnergy | None = None,
) -> Tensor:
    """Convolve each sample with the weight scaled by its style, normalised to unit gain, resampling before or after.

        y[n, o] = epilogue(d[n, o] · Σ_i weight[o, i] ∗ (style[n, i] · input_gain[n, i] · x[n, i]))
        d[n, o] = rsqrt(Σ_i style[n, i]² · Σ_kk weight[o, i]² + eps)            if demodulate, else 1

    The style scales the input and d the output of one ordinary convolution, so weights per sample are never formed. up
    runs as a transposed convolution and then the filter with gain up²; down filters and then convolves with stride
    ``down``; a 1×1 kernel convolves at the smaller size. Half types accumulate in float32; d is computed in float32
    from ``weight`` as it is given. Autocast casts ``x`` and ``weight`` only; a ``weight`` of another dtype than ``x``'s
    is cast to it.

    Args:
        x: [N, C_in, H, W], floating point; N may be 0.
        weight: [C_out, C_in, k_h, k_w], any floating dtype.
        style: [N, C_in], any floating dtype. A row of zeros gives zeros before the epilogue, never NaN.
        demodulate: whether to normalise by d.
        up, down: factors ≥ 1, not both above 1.
        padding: pixels ≥ 0 of the image that the kernel runs over (the upsampled one; before the downsampling): an int,
            (h, w) or (left, right, top, bottom). What centres the resampling filter is added to it.
        resample_filter: [fh, fw] or separable [taps], summing to 1, for up and down; None is one tap of 1.
        eps: > 0, added under d's root.
        input_gain: a further factor on the input that d does not see (StyleGAN3's magnitude_ema): a number, 0-dim,
            [C_in] or [N, C_in].
        prenormalize: how weight and style are normalised before demodulation, which changes only how eps acts.
            "none": not at all. "stylegan2_fp16": weight by √(C_in·k²) · max|weight[o]|, style by max|style[n]|.
            "stylegan3": weight by the root mean square of weight[o], style by that of all of style.
            "auto": stylegan2_fp16 if x (after autocast) is float16, else none, as StyleGAN2 does.
        flip_weight: True correlates (as torch.nn.functional.conv2d), False convolves; None is what StyleGAN2 trains:
            (up == 1).
        epilogue: what follows, at the output's size: noise, bias [C_out], activation, clamp, residual.
        backend: see :func:`fastgan.backend`. "cuda" computes 3×3 layers without resampling on the tensor cores, as
            :func:`fastgan.ops.scaled_conv2d` says; the scales and all gradients are the other GPU backend's.
        weight_energy: of ``weight`` as it is now, from :func:`fastgan.ops.weight_energy`. Where no gradient is
            recorded, demodulation then costs a product with style² and no read of the weight, and on Triton no launch;
            everywhere else, and on the reference and cuda, it is ignored.

    Returns:
        [N, C_out, out_h, out_w], ``x``'s dtype (autocast's, under autocast).

    Raises:
        ValueError: wrong shapes or factors, an output without pixels, a backend that cannot run.
        TypeError: an argument that must be a tensor is not.

    Gradients: 1st and 2nd order for x, weight, style, input_gain and the epilogue's tensors; any order on the
    reference. On a compiled backend the scales are one kernel (:mod:`fastgan.ops.demodulation`), the convolution one,
    and resampling one more, which then has the epilogue. With ``weight_energy`` and no gradient to record, the scales
    are part of the convolution's launch on Triton: one launch in all for up = down = 1, two otherwise (a tensor
    ``input_gain`` is one small kernel more).

    Source: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", 2020, equations 1 and 3;
    "Alias-Free Generative Adversarial Networks", 2021, section 3.2 (input_gain, stylegan3).
    """
    if isinstance(x, Tensor):
        (x,) = _check.autocast(x)
    tensors, settings = epilogue_parts(_NOTHING if epilogue is None else epilogue)
    options = (demodulate, up, down, padding, eps, prenormalize, flip_weight, *settings, backend)
    energy = (None, None) if weight_energy is None else weight_energy
    operands = (x, weight, style, input_gain, resample_filter, *energy, *tensors)
    plan = find_plan("modulated_conv2d", _make_plan, operands, options)
    known = demodulate and weight_energy is not None and plan.backend not in ("reference", "cuda")
    if known and not _records_gradient(operands):
        factors = {"prenormalize": plan.prenormalize, "eps": eps, "input_gain": input_gain}
        convolve = partial(demodulated_conv2d, style=style, energy=weight_energy, **factors)
    else:
        in_scale, out_scale = _scales(weight, style, input_gain, plan, demodulate, float(eps))
        convolve = partial(scaled_conv2d, in_scale=in_scale, out_scale=out_scale, backend=backend)
    weight = weight if weight.dtype == x.dtype else weight.to(x.dtype)
    weight = weight.flip((2, 3)) if plan.flip else weight
    weight = weight.transpose(0, 1) if plan.transposed else weight
    if up > 1:
        y = convolve(x, weight, **plan.conv)
        return upfirdn2d(y, resample_filter, **plan.fir, epilogue=epilogue, backend=backend)
    if down > 1:
        x = upfirdn2d(x, resample_filter, **plan.fir, backend=backend)
    return convolve(x, weight, **plan.conv, epilogue=epilogue)


@backends.explains_algorithm("modulated_conv2d")
def _explain_algorithm(*args: Any, **kwargs: Any) -> tuple[str, dict[str, str]]:
    """The CPU library's choice for the convolution within this call of :func:`modulated_conv2d`, which the scales have
    no part in: the algorithm, and the verdict on each."""
    call = inspect.signature(modulated_conv2d).bind(*args, **kwargs)
    call.apply_defaults()
    a = call.arguments
    (x,), weight = _check.autocast(a["x"]), a["weight"]
    tensors, settings = epilogue_parts(_NOTHING if a["epilogue"] is None else a["epilogue"])
    names = ("demodulate", "up", "down", "padding", "eps", "prenormalize", "flip_weight")
    options = (*(a[name] for name in names), *settings, a["backend"])
    energy = (None, None) if a["weight_energy"] is None else a["weight_energy"]
    operands = (x, weight, a["style"], a["input_gain"], a["resample_filter"], *energy, *tensors)
    plan = find_plan("modulated_conv2d", _make_plan, operands, options)
    # What the call would compute first, without its values.
    if plan.flip or weight.dtype != x.dtype:
        weight = torch.empty_like(weight, dtype=x.dtype)
    weight = weight.transpose(0, 1) if plan.transposed else weight
    if a["down"] > 1:
        taps = None if a["resample_filter"] is None else a["resample_filter"].to("meta")
        filtered = upfirdn2d(x.to("meta"), taps, **plan.fir)
        layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
        x = torch.empty(filtered.shape, dtype=x.dtype, memory_format=layout)
    return explain_algorithm(x, weight, **plan.conv)


class _Plan(NamedTuple):
    """What follows from a call's signature."""

    backend: str
    prenormalize: str
    flip: bool  # the weight is turned around
    transposed: bool
    conv: dict[str, Any]  # the options of the convolution
    fir: dict[str, Any]  # the options of the upfirdn2d before or behind it


def _make_plan(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    input_gain: float | Tensor | None,
    resample_filter: Tensor | None,
    energy: Tensor | None,
    peak: Tensor | None,
    noise: Tensor | None,
    noise_strength: float | Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    demodulate: bool,
    up: int,
    down: int,
    padding: int | tuple[int, ...],
    eps: float,
    prenormalize: str,
    flip_weight: bool | None,
    *options,
) -> _Plan:
    """``options``: the epilogue's act, alpha, gain, clamp, residual_gain; the backend asked for."""
    op = "modulated_conv2d"
    *settings, residual_gain, backend = options
    sides = _check_options(op, up, down, padding, eps, prenormalize)
    _check_operands(op, x, weight, style, input_gain, None if energy is None else WeightEnergy(energy, peak))
    check_filter(op, "resample_filter", resample_filter, x)
    kernel, taps = (weight.shape[3], weight.shape[2]), filter_size(resample_filter)
    height, width = _output_size(op, x, kernel, taps, up, down, sides)
    epilogue = Epilogue(noise, noise_strength, bias, *settings, residual, residual_gain)
    check_epilogue(op, epilogue, x, (x.shape[0], weight.shape[0], height, width))
    if prenormalize == "auto":
        prenormalize = "stylegan2_fp16" if x.dtype == torch.float16 else "none"
    plain = up == down == 1
    facts = ConvFacts(tuple(weight.shape), plain, sides, epilogue.act, epilogue.residual is not None)
    chosen = backends.choose(op, backend, _BACKENDS, x.device, x.dtype, conv=facts)
    correlates = up == 1 if flip_weight is None else flip_weight
    pointwise = kernel == (1, 1)
    transposed, conv, fir = up > 1 and not pointwise, {}, {}
    if plain:
        conv = {"padding": sides}
    elif down > 1:
        before, stride = (down, 1) if pointwise else (1, down)
        conv = {"stride": stride}
        fir = {"down": before, "padding": reference.downsampling_padding(sides, taps, down)}
    elif transposed:
        conv = {"stride": up, "transposed": True}
        fir = {"padding": reference.transposed_filter_padding(sides, kernel, taps, up), "gain": up * up}
    elif up > 1:
        fir = {"up": up, "padding": reference.upsampling_padding(sides, taps, up), "gain": up * up}
    # A transposed convolution spreads its weight as it is, which is a convolution with it, not a correlation.
    flip = not pointwise and correlates == transposed
    return _Plan(chosen, prenormalize, flip, transposed, conv, fir)


def _scales(
    weight: Tensor,
    style: Tensor,
    input_gain: float | Tensor | None,
    plan: _Plan,
    demodulate: bool,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """in_scale [N, C_in] and out_scale [N, C_out], which is None unless ``demodulate``."""
    if plan.backend == "reference":
        return reference.modulation_scales(
            weight, style, demodulate=demodulate, eps=eps, prenormalize=plan.prenormalize, input_gain=input_gain
        )
    if demodulate:
        in_scale, out_scale = demodulation(weight, style, prenormalize=plan.prenormalize, eps=eps)
    else:
        wide = torch.float64 if torch.float64 in (weight.dtype, style.dtype) else torch.float32
        in_scale, out_scale = style if style.dtype == wide else style.to(wide), None
    if input_gain is not None:
        in_scale = in_scale * (input_gain.to(in_scale.dtype) if isinstance(input_gain, Tensor) else input_gain)
    return in_scale, out_scale


def _records_gradient(operands: tuple[Any, ...]) -> bool:
    """Whether autograd, or a transform of torch.func, looks at this call."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return True
    return torch.is_grad_enabled() and any([isinstance(t, Tensor) and t.requires_grad for t in operands])


def _check_options(
    op: str, up: int, down: int, padding: int | tuple[int, ...], eps: float, prenormalize: str
) -> reference.Sides:
    """The options make sense by themselves; returns the padding as (left, right, top, bottom)."""
    for name, factor in (("up", up), ("down", down)):
        if not isinstance(factor, int) or factor < 1:
            raise ValueError(f"{op}: {name} must be an int >= 1, got {factor}")
    if up > 1 and down > 1:
        raise ValueError(f"{op}: up or down must be 1, got {up} and {down}")
    if not eps > 0:
        raise ValueError(f"{op}: eps must be above 0, got {eps}")
    _check.one_of(op, "prenormalize", prenormalize, _PRENORMALIZE)
    sides = (padding,) * 4 if isinstance(padding, int) else tuple(padding)
    if len(sides) == 2:
        sides = (sides[1], sides[1], sides[0], sides[0])
    if len(sides) != 4 or not all(isinstance(v, int) and v >= 0 for v in sides):
        raise ValueError(
            f"{op}: padding must be an int, (h, w) or (left, right, top, bottom), each at least 0, got {padding}"
        )
    return sides


def _check_operands(
    op: str,
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    input_gain: float | Tensor | None,
    energy: WeightEnergy | None,
) -> None:
    """The tensors fit each other."""
    _check.tensor(op, "x", x, ndim=4)
    _check.tensor(op, "weight", weight, ndim=4)
    _check.tensor(op, "style", style)
    n, channels = x.shape[:2]
    if 0 in x.shape[1:]:
        raise ValueError(f"{op}: x must have C_in, H and W of at least 1, got {list(x.shape)}")
    if weight.shape[1] != channels or 0 in weight.shape:
        raise ValueError(f"{op}: weight must be [C_out, C_in = {channels}, k_h, k_w], got {list(weight.shape)}")
    if list(style.shape) != [n, channels]:
        raise ValueError(f"{op}: style must be [N, C_in] = [{n}, {channels}], got {list(style.shape)}")
    gain = input_gain if isinstance(input_gain, Tensor) else None
    if gain is not None:
        _check.tensor(op, "input_gain", gain)
        if list(gain.shape) not in ([], [channels], [n, channels]):
            raise ValueError(
                f"{op}: input_gain must be a number, 0-dim, [C_in] = [{channels}] or [N, C_in] = [{n}, {channels}], "
                f"got {list(gain.shape)}"
            )
    _check.same_device(op, x=x, weight=weight, style=style, input_gain=gain)
    if energy is None:
        return
    for name, value, shape in zip(energy._fields, energy, (weight.shape[:2], weight.shape[:1]), strict=True):
        _check.tensor(op, f"weight_energy.{name}", value)
        if value.shape != shape:
            raise ValueError(f"{op}: weight_energy.{name} must be {list(shape)}, got {list(value.shape)}")
        _check.same_device(op, **{"x": x, f"weight_energy.{name}": value})


def _output_size(
    op: str, x: Tensor, kernel: tuple[int, int], taps: tuple[int, int], up: int, down: int, padding: reference.Sides
) -> tuple[int, int]:
    """(height, width) of the result, at least one pixel each; ``kernel`` and ``taps`` are (x, y)."""
    centred = padding
    if up > 1:
        centred = reference.upsampling_padding(padding, taps, up)
    elif down > 1:
        centred = reference.downsampling_padding(padding, taps, down)
    reach = taps if up > 1 or down > 1 else (1, 1)
    sizes = []
    for axis, sides in ((1, centred[2:]), (0, centred[:2])):
        covered = x.shape[3 - axis] * up + sum(sides) - (reach[axis] - 1) - (kernel[axis] - 1)
        sizes.append((covered - 1) // down + 1)
    if min(sizes) < 1:
        raise ValueError(
            f"{op}: x must be large enough for a result of at least 1x1, got {list(x.shape)} with kernel "
            f"{[kernel[1], kernel[0]]}, up {up}, down {down} and padding {list(padding)}, which gives "
            f"{sizes[0]}x{sizes[1]}"
        )
    return sizes[0], sizes[1]
