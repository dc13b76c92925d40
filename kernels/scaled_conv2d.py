"""The scaled convolution as an implicit matrix product: one launch for a whole layer.

    y = clamp(gain · act(out_scale ⊙ conv(in_scale ⊙ x, weight) + noise · strength + bias)) + residual_gain · residual

Rows are pixels of the result, columns its channels, and the depth runs over taps and input channels; the matrix of
input pixels is never stored, its elements are read where they lie. A transposed convolution of stride s splits its
result into s² phases by the remainders of the pixel's coordinates: within a phase the taps that meet an input pixel
are the same everywhere, so each phase is an ordinary convolution with its part of the weight, and the phase is part of
the program's number. The same kernel is the data gradient: the adjoint of a convolution is the transposed one.

Source: implicit GEMM of Chetlur et al. 2014, "cuDNN: Efficient Primitives for Deep Learning", section 3.1; the phases
are the sub-pixel convolution of Shi et al. 2016, arXiv 1609.07009.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._activation import activate
from ._dot import convolution_precision, dot
from ._launch import Launch
from ._layers import shipped_layers
from ._tiles import (
    ceil_div,
    empty_result,
    forward_block,
    is_channels_last,
    needs_wide,
    pixel_tile,
    traffic,
)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def taps_of_phase(
    phase, pad, KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """Along one axis: the first tap that meets a pixel of this phase, and the input coordinate that it meets there
    from result coordinate 0. Following taps are STRIDE apart, the coordinates they meet one less each."""
    if TRANSPOSED:
        # coordinate = (phase + pad - tap · DILATION) / STRIDE must be whole; DILATION is 1 where STRIDE is not.
        first = (phase + pad) % STRIDE
        return first, (phase + pad - first) // STRIDE
    return 0, -pad


@triton.jit
def scale_peak(scale, stride_c, c_in, keep, BLOCK_K: tl.constexpr):
    """max |scale| over C_in per row of ``scale`` (pointers [M, 1]), 1 where that is 0."""
    k = tl.arange(0, BLOCK_K)
    peak = tl.max(tl.zeros_like(keep).to(tl.float32) + tl.zeros([1, BLOCK_K], tl.float32), axis=1, keep_dims=True)
    for start in range(0, c_in, BLOCK_K):
        c = start + k[None, :]
        s = tl.load(scale + c * stride_c, mask=keep & (c < c_in), other=0.0)
        peak = tl.maximum(peak, tl.max(tl.abs(s), axis=1, keep_dims=True))
    return tl.where(peak == 0.0, 1.0, peak)


@triton.jit
def conv_fwd_kernel(
    x_ptr,  # [N, C_in, H, W]
    w_ptr,  # [C_out, C_in, KERNEL_H, KERNEL_W] by its strides, also for a transposed convolution
    in_scale_ptr,  # [N or 1, C_in or 1] float32, or None
    out_scale_ptr,  # [N or 1, C_out or 1] float32, or None
    noise_ptr,  # [N or 1, 1, H', W'] float32, dense, or None
    strength_ptr,  # [] float32, or None
    bias_ptr,  # [C_out] float32, or None
    residual_ptr,  # [N, C_out, H', W'], or None
    y_ptr,  # [N, C_out, H', W']
    c_ptr,  # like y, float32: the product before out_scale, or None
    n,
    c_in,
    c_out,
    in_h,
    in_w,
    out_h,
    out_w,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    w_stride_o,
    w_stride_i,
    w_stride_h,
    w_stride_w,
    in_scale_stride_n,
    in_scale_stride_c,
    out_scale_stride_n,
    out_scale_stride_c,
    noise_stride_n,
    residual_stride_n,
    residual_stride_c,
    residual_stride_h,
    residual_stride_w,
    y_stride_n,
    y_stride_c,
    y_stride_h,
    y_stride_w,
    pad_h,
    pad_w,
    alpha,
    gain,
    clamp,
    residual_gain,
    tiles_h,
    tiles_w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile: BLOCK_S samples × BLOCK_H × BLOCK_W pixels of one phase × BLOCK_N channels of the result.

    Channel tiles are the fastest part of the program's number, then phases, then columns, rows, samples: what runs at
    the same time reads the same input pixels. In float16, in_scale is divided by its largest magnitude per sample
    before it multiplies x and the sums are multiplied by that again: x · in_scale in half may overflow where the
    layer's result does not.
    """
    BLOCK_M: tl.constexpr = BLOCK_S * BLOCK_H * BLOCK_W
    PHASES_W: tl.constexpr = STRIDE_W if TRANSPOSED else 1
    PHASES: tl.constexpr = STRIDE_H * STRIDE_W if TRANSPOSED else 1
    tiles_c = tl.cdiv(c_out, BLOCK_N)
    pid = tl.program_id(0)
    o = pid % tiles_c * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // tiles_c
    phase_h, phase_w = pid % PHASES // PHASES_W, pid % PHASES_W
    pid = pid // PHASES
    m = tl.arange(0, BLOCK_M)
    q_w = pid % tiles_w * BLOCK_W + m % BLOCK_W
    pid = pid // tiles_w
    q_h = pid % tiles_h * BLOCK_H + m // BLOCK_W % BLOCK_H
    # A scalar where a tile is within one sample: then a scale is one vector of channels instead of a matrix.
    sample = (pid // tiles_h).to(tl.int64)
    if BLOCK_S > 1:
        sample = sample * BLOCK_S + (m // (BLOCK_W * BLOCK_H))[:, None]
    else:
        sample = sample + tl.zeros([1, 1], tl.int64)
    k = tl.arange(0, BLOCK_K)
    if WIDE:
        q_h, q_w, o, k = q_h.to(tl.int64), q_w.to(tl.int64), o.to(tl.int64), k.to(tl.int64)

    first_h, base_h = taps_of_phase(phase_h, pad_h, KERNEL_H, STRIDE_H, DILATION_H, TRANSPOSED)
    first_w, base_w = taps_of_phase(phase_w, pad_w, KERNEL_W, STRIDE_W, DILATION_W, TRANSPOSED)
    TAP_H: tl.constexpr = STRIDE_H if TRANSPOSED else 1
    TAP_W: tl.constexpr = STRIDE_W if TRANSPOSED else 1
    if KERNEL_H % TAP_H == 0 and KERNEL_W % TAP_W == 0:
        taps_w: tl.constexpr = KERNEL_W // TAP_W
        taps: tl.constexpr = KERNEL_H // TAP_H * taps_w
    else:
        taps_w = tl.cdiv(KERNEL_W - first_w, TAP_W)
        taps = tl.cdiv(KERNEL_H - first_h, TAP_H) * taps_w
    STEP_H: tl.constexpr = -DILATION_H if TRANSPOSED else DILATION_H
    STEP_W: tl.constexpr = -DILATION_W if TRANSPOSED else DILATION_W
    from_h = q_h * (1 if TRANSPOSED else STRIDE_H) + base_h
    from_w = q_w * (1 if TRANSPOSED else STRIDE_W) + base_w

    in_batch = sample < n
    x_row = x_ptr + sample * x_stride_n
    if in_scale_ptr is not None:
        in_scale_row = in_scale_ptr + sample * in_scale_stride_n
        if x_ptr.dtype.element_ty == tl.float16:
            peak = scale_peak(in_scale_row, in_scale_stride_c, c_in, in_batch, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(taps * tl.cdiv(c_in, BLOCK_K)):
        # Taps are the fast index: the pixels that neighbouring taps share are still in the cache.
        tap = step % taps
        tap_h, tap_w = tap // taps_w, tap % taps_w
        i = step // taps * BLOCK_K + k
        h = from_h + tap_h * STEP_H
        w = from_w + tap_w * STEP_W
        inside = (h >= 0) & (h < in_h) & (w >= 0) & (w < in_w)
        a = tl.load(
            x_row + (h * x_stride_h + w * x_stride_w)[:, None] + (i * x_stride_c)[None, :],
            mask=inside[:, None] & in_batch & (i < c_in)[None, :],
            other=0.0,
        )
        w_tap = w_ptr + (first_h + tap_h * TAP_H) * w_stride_h + (first_w + tap_w * TAP_W) * w_stride_w
        b = tl.load(
            w_tap + (i * w_stride_i)[:, None] + (o * w_stride_o)[None, :],
            mask=(i < c_in)[:, None] & (o < c_out)[None, :],
            other=0.0,
        )
        if in_scale_ptr is not None:
            scale = tl.load(
                in_scale_row + (i * in_scale_stride_c)[None, :], mask=in_batch & (i < c_in)[None, :], other=0.0
            )
            if x_ptr.dtype.element_ty == tl.float16:
                scale = scale / peak
            a = (a.to(tl.float32) * scale).to(a.dtype)
        acc = dot(a, b, acc, PRECISION)

    oh = q_h * (STRIDE_H if TRANSPOSED else 1) + phase_h
    ow = q_w * (STRIDE_W if TRANSPOSED else 1) + phase_w
    valid_row = ((oh < out_h) & (ow < out_w))[:, None] & in_batch
    valid = valid_row & (o < c_out)[None, :]
    if in_scale_ptr is not None and x_ptr.dtype.element_ty == tl.float16:
        acc *= peak
    y_at = sample * y_stride_n + (oh * y_stride_h + ow * y_stride_w)[:, None] + (o * y_stride_c)[None, :]
    if c_ptr is not None:
        tl.store(c_ptr + y_at, acc, mask=valid)
    if out_scale_ptr is not None:
        at = sample * out_scale_stride_n + (o * out_scale_stride_c)[None, :]
        acc *= tl.load(out_scale_ptr + at, mask=in_batch & (o < c_out)[None, :], other=0.0)
    if noise_ptr is not None:
        noise = tl.load(noise_ptr + sample * noise_stride_n + (oh * out_w + ow)[:, None], mask=valid_row, other=0.0)
        if strength_ptr is not None:
            noise *= tl.load(strength_ptr)
        acc += noise
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o, mask=o < c_out, other=0.0)[None, :]
    acc = activate(acc, ACT, alpha, gain, clamp)
    if residual_ptr is not None:
        at = sample * residual_stride_n + (oh * residual_stride_h + ow * residual_stride_w)[:, None]
        residual = tl.load(residual_ptr + at + (o * residual_stride_c)[None, :], mask=valid, other=0.0)
        acc += residual_gain * residual.to(tl.float32)
    tl.store(y_ptr + y_at, acc.to(y_ptr.dtype.element_ty), mask=valid)


@dataclass(frozen=True)
class Convolution:
    """The linear part's geometry: pairs are (h, w); padding in pixels, of a transposed convolution what is cut off."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    output_padding: tuple[int, int]
    dilation: tuple[int, int]
    transposed: bool

    def output_hw(self, input_hw: tuple[int, int], kernel_hw: tuple[int, int]) -> tuple[int, int]:
        """(H', W') in pixels."""
        sizes = []
        for i in (0, 1):
            span = self.dilation[i] * (kernel_hw[i] - 1) + 1
            if self.transposed:
                whole = (input_hw[i] - 1) * self.stride[i] + span
                sizes.append(whole - 2 * self.padding[i] + self.output_padding[i])
            else:
                sizes.append((input_hw[i] + 2 * self.padding[i] - span) // self.stride[i] + 1)
        return sizes[0], sizes[1]

    def phase_hw(self, output_hw: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the largest phase; all of the result where there is one phase."""
        steps = self.stride if self.transposed else (1, 1)
        return ceil_div(output_hw[0], steps[0]), ceil_div(output_hw[1], steps[1])

    @property
    def phases(self) -> int:
        return self.stride[0] * self.stride[1] if self.transposed else 1


@dataclass(frozen=True)
class Tail:
    """What follows the product, in the order of the op's schema; tensors as the op's ``kernel_tensors`` gives them."""

    out_scale: Tensor | None = None
    noise: Tensor | None = None
    noise_strength: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    act: str = "linear"
    alpha: float = 0.0
    gain: float = 1.0
    clamp: float | None = None
    residual_gain: float = 1.0


def plan(
    x: Tensor,
    weight: Tensor,
    in_scale: Tensor | None,
    tail: Tail,
    conv: Convolution,
    save_conv: bool,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Launch | None]:
    """The result, the saved product (empty without ``save_conv``) and the one launch that fills them; None for an empty
    batch. Works on meta tensors. ``precision`` None asks torch's settings."""
    kernel_hw = (weight.shape[2], weight.shape[3])
    c_out, c_in = (weight.shape[1], weight.shape[0]) if conv.transposed else (weight.shape[0], weight.shape[1])
    out_hw = conv.output_hw((x.shape[2], x.shape[3]), kernel_hw)
    shape = (x.shape[0], c_out, *out_hw)
    y = empty_result(x, weight, shape, x.dtype)
    c = empty_result(x, weight, shape, torch.float32) if save_conv else x.new_empty(0, dtype=torch.float32)
    if y.numel() == 0:
        return y, c, None

    precision = precision or convolution_precision(x.dtype)
    phase_hw = conv.phase_hw(out_hw)
    pixels = x.shape[0] * phase_hw[0] * phase_hw[1]
    block = forward_block(x, precision, pixels * conv.phases, c_in, c_out)
    width, joint_cost = 16 if is_channels_last(y) else 32, 1.0 if in_scale is None else 1.5
    tile = pixel_tile(x.shape[0], *phase_hw, block.pixels, width=width, joint_cost=joint_cost)
    tiles = tile.count(x.shape[0], *phase_hw)
    arguments = (
        {"x_ptr": x, "w_ptr": weight, "in_scale_ptr": in_scale, "out_scale_ptr": tail.out_scale}
        | {"noise_ptr": tail.noise, "strength_ptr": tail.noise_strength, "bias_ptr": tail.bias}
        | {"residual_ptr": tail.residual, "y_ptr": y, "c_ptr": c if save_conv else None}
        | {"n": x.shape[0], "c_in": c_in, "c_out": c_out, "in_h": x.shape[2], "in_w": x.shape[3]}
        | {"out_h": out_hw[0], "out_w": out_hw[1], "pad_h": conv.padding[0], "pad_w": conv.padding[1]}
        | _strides(x, weight, in_scale, tail, y, conv.transposed)
        | {"alpha": tail.alpha, "gain": tail.gain, "clamp": tail.clamp, "residual_gain": tail.residual_gain}
        | {"tiles_h": tiles[1], "tiles_w": tiles[2]}
    )
    constants = (
        {"KERNEL_H": kernel_hw[0], "KERNEL_W": kernel_hw[1], "STRIDE_H": conv.stride[0], "STRIDE_W": conv.stride[1]}
        | {"DILATION_H": conv.dilation[0], "DILATION_W": conv.dilation[1], "TRANSPOSED": conv.transposed}
        | {"ACT": tail.act, "PRECISION": precision, "WIDE": needs_wide(x, y, tail.residual)}
        | {"BLOCK_S": tile.s, "BLOCK_H": tile.h, "BLOCK_W": tile.w, "BLOCK_N": block.columns, "BLOCK_K": block.depth}
    )
    programs = tiles[0] * tiles[1] * tiles[2] * conv.phases * ceil_div(c_out, block.columns)
    read = (x, weight, in_scale, tail.out_scale, tail.noise, tail.noise_strength, tail.bias, tail.residual)
    # Every tap meets every pixel of the convolution's small side once; padding is counted as pixels.
    small_hw = x.shape[2] * x.shape[3] if conv.transposed else out_hw[0] * out_hw[1]
    launch = Launch(
        conv_fwd_kernel,
        (programs,),
        arguments,
        constants,
        num_warps=block.warps,
        num_stages=block.stages,
        bytes=traffic(*read, y, c),
        flops=2 * x.shape[0] * small_hw * c_in * c_out * kernel_hw[0] * kernel_hw[1],
    )
    return y, c, launch


def _strides(
    x: Tensor, weight: Tensor, in_scale: Tensor | None, tail: Tail, y: Tensor, transposed: bool
) -> dict[str, int]:
    """All strides in elements; 0 where a tensor is None or is broadcast."""
    strides: dict[str, int] = {}
    for name, t in (("x", x), ("y", y), ("residual", tail.residual)):
        values = (0, 0, 0, 0) if t is None else t.stride()
        strides |= {f"{name}_stride_{axis}": value for axis, value in zip("nchw", values, strict=True)}
    for axis, value in zip("iohw" if transposed else "oihw", weight.stride(), strict=True):
        strides[f"w_stride_{axis}"] = value
    for name, t in (("in_scale", in_scale), ("out_scale", tail.out_scale)):
        for dim, axis in enumerate("nc"):
            strides[f"{name}_stride_{axis}"] = 0 if t is None or t.shape[dim] == 1 else t.stride(dim)
    noise = tail.noise
    strides["noise_stride_n"] = 0 if noise is None or noise.shape[0] == 1 else noise.stride(0)
    return strides


def shipped() -> Iterator[tuple[str, list[Launch]]]:
    """(label, launches) of every layer in :mod:`fastgan.kernels._layers`: its forward as inference runs it, and in
    float16 also as training does, which saves the product."""
    for label, layer, variant in shipped_layers():
        conv = Convolution((layer.stride,) * 2, (layer.padding,) * 2, (0, 0), (1, 1), layer.transposed)
        x = variant.image(layer.batch, layer.c_in, layer.size, layer.size)
        weight = variant.image(*layer.weight_shape)
        out_hw = conv.output_hw((layer.size, layer.size), (layer.kernel, layer.kernel))
        in_scale = variant.wide(layer.batch, layer.c_in) if layer.modulated else None
        tail = Tail(
            out_scale=variant.wide(layer.batch if layer.modulated else 1, layer.c_out) if layer.demodulated else None,
            noise=variant.wide(1, 1, *out_hw) if layer.noise else None,
            noise_strength=variant.wide() if layer.noise else None,
            bias=variant.wide(layer.c_out) if layer.bias else None,
            act=layer.act,
            alpha=0.2 if layer.act == "lrelu" else 0.0,
            gain=layer.gain,
            clamp=layer.clamp,
        )
        for save_conv in (False, True) if layer.demodulated and variant.dtype == torch.float16 else (False,):
            launch = plan(x, weight, in_scale, tail, conv, save_conv, variant.precision)[2]
            yield f"{label}{' saving the product' if save_conv else ''}", [launch]


def scaled_conv2d(x, weight, in_scale, out_scale, noise, noise_strength, bias, residual, *settings):
    """``fastgan::scaled_conv2d`` on Triton: the op's arguments and results; one launch, none for an empty batch.

    NotImplemented for float64, for groups, and for a transposed convolution with both stride and dilation.
    """
    stride, padding, output_padding, dilation, transposed, groups, *pointwise, residual_gain, save_conv = settings
    dilated_phases = transposed and max(stride) > 1 and max(dilation) > 1
    if x.dtype not in _DTYPES or groups != 1 or dilated_phases:
        return NotImplemented
    conv = Convolution(tuple(stride), tuple(padding), tuple(output_padding), tuple(dilation), transposed)
    tail = Tail(out_scale, noise, noise_strength, bias, residual, *pointwise, residual_gain)
    y, c, launch = plan(x, weight, in_scale, tail, conv, save_conv)
    if launch is not None:
        launch.run()
    return y, c
