"""scaled_conv2d: the one convolution under every layer, with scales around it and an epilogue behind it.

Its linear part c = out_scale ⊙ conv(in_scale ⊙ x, W) is multilinear in (x, W, in_scale, out_scale). Each derivative is
again a scaled convolution, its transpose, a scaled weight gradient or a sum over pixels, so a handful of registered ops
is closed under differentiation: ``scaled_conv2d``, ``scaled_conv2d_weight_grad``, ``pixel_dot`` and
``activation_grad``. A derivative runs only if its input needs a gradient.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from fastgan import _native, backends
from fastgan.ops import _check
from fastgan.ops._conv_arguments import ConvArguments, Geometry, check_call, kernel_tensors
from fastgan.ops._conv_arguments import resolve as resolve_arguments
from fastgan.ops._epilogue import Activated, epilogue_grads
from fastgan.ops._kept_weights import keep
from fastgan.ops._library import define
from fastgan.ops._plans import epilogue_parts, find_plan
from fastgan.ops._tensor_core_conv import ConvFacts, tensor_core_can_run
from fastgan.ops.epilogue_grad import epilogue_grad
from fastgan.ops.pixel_dot import pixel_dot
from fastgan.reference.activation import resolve
from fastgan.reference.epilogue import Epilogue, apply_epilogue
from fastgan.reference.scaled_conv2d import pad_input
from fastgan.reference.scaled_conv2d import scaled_conv2d as reference_scaled_conv2d

_NAME = "scaled_conv2d"
_NOTHING = Epilogue()
_BACKENDS = {
    "cuda": tensor_core_can_run,
    "triton": backends.triton_can_run,
    "cpp": backends.cpp_can_run,
    "reference": backends.always,
}


def scaled_conv2d(
    x: Tensor,
    weight: Tensor,
    in_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | tuple[int, int, int, int] = 0,
    output_padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    padding_mode: str = "zeros",
    transposed: bool = False,
    groups: int = 1,
    epilogue: Epilogue | None = None,
    backend: str | None = None,
) -> Tensor:
    """Convolve with scales around the product and everything behind it in one pass.

        c = out_scale ⊙ conv(in_scale ⊙ x, weight)
        y = clamp(gain · act(c + noise · noise_strength + bias)) + residual_gain · residual

    StyleGAN2's modulated convolution is in_scale = style, out_scale = demodulation; a spectral-normalised one is
    out_scale = 1/σ; equalised learning rate is a constant out_scale.

    Args:
        x: [N, C_in, H, W], float32, float64, bfloat16 or float16; N may be 0, H and W may not. NCHW or channels_last;
            the result has the layout that torch's convolution gives. On CPU, x is copied once if in_scale is given or x
            is a half type, and once more if it is padded asymmetrically or not with zeros.
        weight: [C_out, C_in/groups, k_h, k_w], or [C_in, C_out/groups, k_h, k_w] if transposed; x's dtype.
        in_scale: [N, C_in], [1, C_in], [C_in], [1, 1] or 0-dim: a factor on x's channels; None means 1.
        out_scale: likewise over C_out.
        stride, dilation: factors, int or (h, w).
        padding: pixels; int, (h, w) or (left, right, top, bottom). Transposed: what is cut from the full result,
            symmetric.
        output_padding: transposed only: rows and columns added at the bottom and right, below stride.
        padding_mode: "zeros", "reflect" or "replicate"; only zeros if transposed.
        transposed: transposed convolution (the adjoint of the convolution with the same weight).
        groups: as in torch.
        epilogue: what follows; None means nothing.
        backend: "reference", "cpp", "triton" or "cuda"; None chooses. "cuda" serves only where it is named. It takes
            float16 and bfloat16, a 3×3 kernel at stride 1 and padding 1, channels that are multiples of 8, linear, relu
            or lrelu and no residual, on GPUs of compute capability 8.0 or later; an x that is not channels_last is
            copied. Its gradients are those of the other GPU backend.

    Returns:
        [N, C_out, H', W'] in x's dtype. Products accumulate in float32 (float64 for float64), as exactly as
        :func:`fastgan.precision` says; half types are rounded once. A NaN stays within its sample (in the weight or a
        shared scale it reaches every sample); with FASTGAN_DEBUG=1 it raises.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit; a backend that cannot run.
        TypeError: an argument that is no tensor.

    Autocast casts x and weight; scales, noise and bias stay in float32.

    Gradients: 1st and 2nd order for x, weight, both scales, noise, noise_strength, bias and residual; the reference
    differentiates without end. Saved for backward: the inputs and the result, and the convolution before its epilogue
    only if out_scale needs a gradient, the activation cannot be inverted, or a residual hides its result.

    Source: Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN", section 2.2 and equation 3;
        Miyato et al. 2018
    for 1/σ; the factoring into scales around one product is this library's.
    """
    for name, value in (("x", x), ("weight", weight)):
        if not isinstance(value, Tensor):
            _check.tensor(_NAME, name, value)
    x, weight = _check.autocast(x, weight)
    options = (stride, padding, output_padding, dilation, padding_mode, transposed, groups)
    epilogue = _NOTHING if epilogue is None else epilogue
    plan = _find_plan(x, weight, in_scale, out_scale, options, epilogue, backend)
    others = kernel_tensors(x, in_scale, out_scale, epilogue)
    if plan.backend == "reference":
        y = reference_scaled_conv2d(x, weight, *others[:2], **plan.args.as_kwargs(), epilogue=epilogue)
    else:
        y = _run_op(x, weight, others, plan)
    if _check.DEBUG:
        _check.no_nan(_NAME, y)
    return y


@dataclass(frozen=True)
class _Plan:
    """What follows from a call's signature alone, and so is worked out once."""

    backend: str
    args: ConvArguments
    geometry: Geometry
    settings: tuple  # the op's arguments behind its tensors and its geometry, without save_conv
    explicit_padding: bool  # pad x first: torch's convolution pads with zeros and symmetrically only
    from_output: bool  # the backward can work from y alone


def _find_plan(x, weight, in_scale, out_scale, options: tuple, epilogue: Epilogue, backend: str | None) -> _Plan:
    """The plan of a call; raises for one that is wrong."""
    tensors, settings = epilogue_parts(epilogue)
    options = tuple([tuple(option) if isinstance(option, list) else option for option in options])
    return find_plan(_NAME, _make_plan, (x, weight, in_scale, out_scale, *tensors), (options, settings, backend))


def _make_plan(
    x,
    weight,
    in_scale,
    out_scale,
    noise,
    noise_strength,
    bias,
    residual,
    options: tuple,
    settings: tuple,
    backend: str | None,
) -> _Plan:
    *pointwise, residual_gain = settings
    epilogue = Epilogue(noise, noise_strength, bias, *pointwise, residual, residual_gain)
    args = resolve_arguments(*options)
    check_call(x, weight, in_scale, out_scale, args, epilogue)
    facts = _facts(weight, args, epilogue)
    chosen = backends.choose(_NAME, backend, _BACKENDS, x.device, x.dtype, conv=facts)
    left, right, top, bottom = args.padding
    explicit_padding = args.padding_mode != "zeros" or left != right or top != bottom
    padding = (0, 0) if explicit_padding else (top, left)
    act = Activated(epilogue.act, *resolve(epilogue.act, epilogue.alpha, epilogue.gain), epilogue.clamp)
    options = (args.stride, padding, args.output_padding, args.dilation, args.transposed, args.groups)
    geometry = Geometry(*options, backends.precision_in_force())
    settings = (*act, float(epilogue.residual_gain))
    from_output = act.known_from_output(epilogue.residual is not None)
    return _Plan(chosen, args, geometry, settings, explicit_padding, from_output)


def _facts(weight: Tensor, args: ConvArguments, epilogue: Epilogue) -> ConvFacts:
    plain = args.stride == args.dilation == (1, 1) and not args.transposed and args.groups == 1
    padding = args.padding if args.padding_mode == "zeros" else (0, 0, 0, 0)
    return ConvFacts(tuple(weight.shape), plain, padding, epilogue.act, epilogue.residual is not None)


def _run_op(x: Tensor, weight: Tensor, others: tuple[Tensor | None, ...], plan: _Plan) -> Tensor:
    if plan.explicit_padding:
        x = pad_input(x, plan.args.padding, plan.args.padding_mode)
    save_conv, op = False, _conv_op
    if plan.backend == "cpp":
        keep(weight)
    elif plan.backend == "cuda":
        op = _conv_cuda_op
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    if torch.is_grad_enabled():
        save_conv = _needs_grad(others[1]) or (
            not plan.from_output and any(_needs_grad(t) for t in (x, weight, *others))
        )
    return op(x, weight, *others, *plan.geometry.as_args(), *plan.settings, save_conv)[0]


@backends.explains_algorithm(_NAME)
def explain_algorithm(*args: Any, **kwargs: Any) -> tuple[str, dict[str, str]]:
    """The CPU library's choice for this call of :func:`scaled_conv2d`: the algorithm, and the verdict on each."""
    call = inspect.signature(scaled_conv2d).bind(*args, **kwargs)
    call.apply_defaults()
    x, weight, in_scale, out_scale, *options, epilogue, backend = call.arguments.values()
    x, weight = _check.autocast(x, weight)
    epilogue = _NOTHING if epilogue is None else epilogue
    plan = _find_plan(x, weight, in_scale, out_scale, tuple(options), epilogue, backend)
    if plan.explicit_padding:
        # Only its shape and layout; of the layout, padding on the meta device knows less than on the CPU.
        padded = pad_input(x.to("meta"), plan.args.padding, plan.args.padding_mode)
        x = torch.empty(padded.shape, dtype=x.dtype, memory_format=suggest_memory_format(x))
    # As the call does: whether a weight's transforms are kept is part of what they cost.
    keep(weight)
    return _native.explain_convolution(x, weight, *plan.geometry.as_args())


def _needs_grad(t: Tensor | None) -> bool:
    return t is not None and t.requires_grad


def _linear(
    x: Tensor, weight: Tensor, in_scale: Tensor | None, out_scale: Tensor | None, geometry: Geometry, save_conv: bool
) -> tuple[Tensor, Tensor]:
    """(out_scale ⊙ conv(in_scale ⊙ x), and with ``save_conv`` the convolution before out_scale); no epilogue."""
    save_conv = save_conv or (torch.is_grad_enabled() and _needs_grad(out_scale))
    tensors = (x, weight, in_scale, out_scale, None, None, None, None)
    return _conv_op(*tensors, *geometry.as_args(), "linear", 0.0, 1.0, None, 1.0, save_conv)


def _linear_and_scale_grad(
    x: Tensor,
    weight: Tensor,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    geometry: Geometry,
    dot_with: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The scaled convolution, and the gradient of its out_scale against the cotangent ``dot_with`` (None: not
    wanted)."""
    # Triton sums while it convolves and never writes the product, which only a second order needs.
    if dot_with is not None and not torch.is_grad_enabled() and backends.triton_can_run(x.device, x.dtype) is None:
        y, dot = _dot_op(x, weight, in_scale, out_scale, dot_with, *geometry.as_args())
        return y, dot.sum_to_size(out_scale.shape)
    y, c = _linear(x, weight, in_scale, out_scale, geometry, save_conv=dot_with is not None)
    return y, None if dot_with is None else pixel_dot(dot_with, c).sum_to_size(out_scale.shape)


# ----------------------------------------------------------------------------------------------------------------------
# fastgan::scaled_conv2d


def _conv_fallback(x, weight, in_scale, out_scale, noise, noise_strength, bias, residual, *settings):
    stride, padding, output_padding, dilation, transposed, groups, _, *pointwise, residual_gain, save_conv = settings
    wide = _check.accumulate_dtype(x.dtype)
    (top, left), args = padding, (tuple(stride), (0, 0, 0, 0), tuple(output_padding), tuple(dilation))
    args = ConvArguments(args[0], (left, left, top, top), args[2], args[3], "zeros", transposed, groups)
    c = reference_scaled_conv2d(x.to(wide), weight.to(wide), in_scale, None, **args.as_kwargs(), epilogue=Epilogue())
    epilogue = Epilogue(noise, noise_strength, bias, *pointwise, residual, residual_gain)
    scaled = c if out_scale is None else c * out_scale[:, :, None, None]
    y = apply_epilogue(scaled, epilogue).to(x.dtype)
    y = y.clone(memory_format=torch.preserve_format) if y is c else y
    return y, c if save_conv else c.new_empty(0)


def _conv_fake(x, weight, in_scale, out_scale, noise, noise_strength, bias, residual, *settings):
    stride, padding, output_padding, dilation, transposed, groups, *_, save_conv = settings
    wide = _check.accumulate_dtype(x.dtype)
    c = torch.ops.aten.convolution(
        x.to(wide), weight.to(wide), None, stride, padding, dilation, transposed, output_padding, groups
    )
    return torch.empty_like(c, dtype=x.dtype), torch.empty_like(c) if save_conv else c.new_empty(0)


def _conv_setup(ctx, inputs, output) -> None:
    x, weight, in_scale, out_scale, noise, strength, bias, residual, *settings = inputs
    ctx.geometry, ctx.act = Geometry(*settings[:7]), Activated(*settings[7:11])
    ctx.residual_gain, ctx.save_conv, ctx.has_residual = settings[11], settings[12], residual is not None
    y, c = output
    if not ctx.save_conv:
        ctx.mark_non_differentiable(c)
    ctx.set_materialize_grads(False)
    saved_y = None if ctx.act.linear else y
    if not ctx.act.known_from_output(ctx.has_residual):
        saved_y = None
    ctx.save_for_backward(x, weight, in_scale, out_scale, noise, strength, bias, saved_y, c if ctx.save_conv else None)


def _activation_argument(ctx) -> Tensor:
    """What the activation was applied to, computed again."""
    out_scale, noise, strength, bias = ctx.saved_tensors[3:7]
    z = _product(ctx)
    z = z if out_scale is None else z * out_scale[:, :, None, None]
    return apply_epilogue(z, Epilogue(noise=noise, noise_strength=strength, bias=bias))


def _product(ctx) -> Tensor:
    """conv(in_scale ⊙ x, weight): saved by the forward where the public function asked for it, else computed again."""
    x, weight, in_scale, *_, c = ctx.saved_tensors
    return c if c is not None else _linear(x, weight, in_scale, None, ctx.geometry, save_conv=True)[1]


def _conv_backward(ctx, grad_y: Tensor | None, grad_c: Tensor | None):
    x, weight, in_scale, out_scale = ctx.saved_tensors[:4]
    need_x, need_w, need_in = ctx.needs_input_grad[:3]
    grads: list[Tensor | None] = [None] * 8
    g, g_scale = None, None  # the cotangent of conv(in_scale ⊙ x, weight) is g_scale ⊙ g
    if grad_y is not None:
        g_scale = out_scale
        g, grads[3:8] = _epilogue_backward(ctx, grad_y)
    if grad_c is not None:
        scaled = 0 if g is None else (g if out_scale is None else g * out_scale[:, :, None, None])
        g, g_scale = (grad_c + scaled).to(x.dtype), None
    if g is None:
        return (*grads, *[None] * 13)

    if need_x or need_in:
        adjoint = ctx.geometry.adjoint(x.shape[2:], g.shape[2:], weight.shape[2:])
        grads[0], grads[2] = _linear_and_scale_grad(g, weight, g_scale, in_scale, adjoint, x if need_in else None)
    if need_w:
        big, big_scale, small, small_scale = (x, in_scale, g, g_scale)
        if ctx.geometry.transposed:
            big, big_scale, small, small_scale = (g, g_scale, x, in_scale)
        grads[1] = weight_grad(big, small, big_scale, small_scale, weight.shape, *_weight_geometry(ctx.geometry))
    return (*grads, *[None] * 13)


def _epilogue_backward(ctx, grad_y: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
    """The cotangent g of what the activation is applied to (None if nothing needs it), and the gradients of out_scale,
    noise, noise_strength, bias and residual.

    On Triton the sums over pixels are one op's, which reads the pixels once.
    """
    out_scale, noise, strength, bias, y = ctx.saved_tensors[3:8]
    need_out, need_noise, need_strength, need_bias, need_residual = ctx.needs_input_grad[3:8]
    others = (noise, strength, bias, ctx.residual_gain)
    if not any(ctx.needs_input_grad[:7]):
        return None, [None, *epilogue_grads(ctx.needs_input_grad[4:8], grad_y, None, *others)]
    summed = need_out or need_strength or need_bias
    if not summed or backends.triton_can_run(grad_y.device, grad_y.dtype) is not None:
        g = ctx.act.cotangent(grad_y, y, lambda: _activation_argument(ctx))
        grad_scale = pixel_dot(g, _product(ctx)).sum_to_size(out_scale.shape) if need_out else None
        return g, [grad_scale, *epilogue_grads(ctx.needs_input_grad[4:8], grad_y, g, *others)]
    from_output = y is not None or ctx.act.linear
    ref = y if from_output else _activation_argument(ctx)
    g, over_pixels, over_all, with_noise = epilogue_grad(
        grad_y,
        ref,
        _product(ctx) if need_out else None,
        noise if need_strength else None,
        *ctx.act,
        from_output,
        need_bias,
    )
    g = grad_y if ctx.act.identity else g
    grads = epilogue_grads((need_noise, False, False, need_residual), grad_y, g, *others)
    grads[1:3] = with_noise if need_strength else None, over_all if need_bias else None
    return g, [over_pixels.sum_to_size(out_scale.shape) if need_out else None, *grads]


def _conv_cuda_fake(x, weight, in_scale, out_scale, noise, noise_strength, bias, residual, *settings):
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    y = x.new_empty(shape).contiguous(memory_format=torch.channels_last)
    return y, torch.empty_like(y, dtype=torch.float32) if settings[-1] else y.new_empty(0, dtype=torch.float32)


_CONV_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? in_scale, Tensor? out_scale, Tensor? noise, Tensor? noise_strength,"
    " Tensor? bias, Tensor? residual, int[2] stride, int[2] padding, SymInt[2] output_padding, int[2] dilation,"
    " bool transposed, int groups, str precision, str act, float alpha, float gain, float? clamp, float residual_gain,"
    " bool save_conv) -> (Tensor, Tensor)"
)
_conv_op = define(
    _NAME,
    _CONV_SCHEMA,
    fallback=_conv_fallback,
    fake=_conv_fake,
    setup_context=_conv_setup,
    backward=_conv_backward,
    differentiable_results=2,
    triton="scaled_conv2d.scaled_conv2d",
)
# The same op on CUDA C++, for calls that tensor_core_can_run and channels_last tensors: Triton's kernel has the other
# one's place on the GPU. There is a forward pass alone: gradients, and what they compute again, are the op's above.
_conv_cuda_op = define(
    "scaled_conv2d_cuda",
    _CONV_SCHEMA,
    fallback=_conv_fallback,
    fake=_conv_cuda_fake,
    setup_context=_conv_setup,
    backward=_conv_backward,
    differentiable_results=2,
)


# ----------------------------------------------------------------------------------------------------------------------
# fastgan::scaled_conv2d_dot: the linear part, and Σ over pixels of its product before out_scale with another tensor:
# the gradients of x and of in_scale in one pass. First order only; a second order needs the product itself.


def _dot_fallback(x, weight, in_scale, out_scale, dot_with, *geometry):
    tail = ("linear", 0.0, 1.0, None, 1.0, True)
    y, c = _conv_fallback(x, weight, in_scale, out_scale, None, None, None, None, *geometry, *tail)
    return y, pixel_dot(dot_with, c)


def _dot_fake(x, weight, in_scale, out_scale, dot_with, *geometry):
    tail = ("linear", 0.0, 1.0, None, 1.0, False)
    y, _ = _conv_fake(x, weight, in_scale, out_scale, None, None, None, None, *geometry, *tail)
    return y, x.new_empty(y.shape[:2], dtype=_check.accumulate_dtype(x.dtype))


def _dot_setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)


def _dot_backward(ctx, *gradients):
    raise NotImplementedError(
        "scaled_conv2d_dot: it has no derivative; backward passes that will be differentiated run scaled_conv2d"
    )


_dot_op = define(
    "scaled_conv2d_dot",
    "(Tensor x, Tensor weight, Tensor? in_scale, Tensor? out_scale, Tensor dot_with, int[2] stride, int[2] padding,"
    " SymInt[2] output_padding, int[2] dilation, bool transposed, int groups, str precision) -> (Tensor, Tensor)",
    fallback=_dot_fallback,
    fake=_dot_fake,
    setup_context=_dot_setup,
    backward=_dot_backward,
    differentiable_results=2,
    triton="scaled_conv2d.scaled_conv2d_dot",
)


# ----------------------------------------------------------------------------------------------------------------------
# fastgan::scaled_conv2d_weight_grad: the gradient of the weight of conv(in_scale ⊙ x, w) against g_scale ⊙ g, bilinear
# in (x, g) and in the scales. A transposed convolution's is the same with the roles of x and g swapped.


def _weight_geometry(geometry: Geometry) -> tuple:
    return geometry.stride, geometry.padding, geometry.dilation, geometry.groups, geometry.precision


def _weight_fallback(x, g, in_scale, g_scale, weight_size, stride, padding, dilation, groups, precision):
    wide = _check.accumulate_dtype(x.dtype)
    x, g = x.to(wide), g.to(wide)
    x = x if in_scale is None else x * in_scale[:, :, None, None]
    g = g if g_scale is None else g * g_scale[:, :, None, None]
    weight = x.new_empty(weight_size)
    return torch.ops.aten.convolution_backward(
        g, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [False, True, False]
    )[1]


def _weight_fake(x, g, in_scale, g_scale, weight_size, *geometry):
    return x.new_empty(weight_size, dtype=_check.accumulate_dtype(x.dtype))


def _weight_setup(ctx, inputs, output) -> None:
    x, g, in_scale, g_scale, _, *ctx.geometry = inputs
    ctx.save_for_backward(x, g, in_scale, g_scale)


def _weight_backward(ctx, grad: Tensor):
    x, g, in_scale, g_scale = ctx.saved_tensors
    need_x, need_g, need_in, need_g_scale = ctx.needs_input_grad[:4]
    stride, padding, dilation, groups, precision = ctx.geometry
    forward = Geometry(tuple(stride), tuple(padding), (0, 0), tuple(dilation), False, groups, precision)
    weight = grad.to(x.dtype)
    grad_x = grad_g = grad_in = grad_g_scale = None
    if need_x or need_in:
        adjoint = forward.adjoint(x.shape[2:], g.shape[2:], weight.shape[2:])
        grad_x, grad_in = _linear_and_scale_grad(g, weight, g_scale, in_scale, adjoint, x if need_in else None)
    if need_g or need_g_scale:
        grad_g, grad_g_scale = _linear_and_scale_grad(
            x, weight, in_scale, g_scale, forward, g if need_g_scale else None
        )
    return grad_x, grad_g, grad_in, grad_g_scale, *[None] * 6


_weight_grad_op = define(
    "scaled_conv2d_weight_grad",
    "(Tensor x, Tensor g, Tensor? in_scale, Tensor? g_scale, SymInt[] weight_size, int[2] stride, int[2] padding,"
    " int[2] dilation, int groups, str precision) -> Tensor",
    fallback=_weight_fallback,
    fake=_weight_fake,
    setup_context=_weight_setup,
    backward=_weight_backward,
    triton="scaled_conv2d_weight_grad.scaled_conv2d_weight_grad",
)


def weight_grad(x, g, in_scale, g_scale, weight_size, *geometry) -> Tensor:
    """The weight's gradient in x's dtype, rounded once from the float32 that the op gives."""
    return _weight_grad_op(x, g, in_scale, g_scale, weight_size, *geometry).to(x.dtype)
