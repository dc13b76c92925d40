"""The parts of the convolution kernel (scaled_conv2d.py): which pixels a program has, their product with the weight,
and what follows it."""

from __future__ import annotations

import triton
import triton.language as tl

from ._activation import activate
from ._dot import dot


@triton.jit
def tile_pixels(
    pid,
    tiles_h,
    tiles_w,
    PHASES_H: tl.constexpr,
    PHASES_W: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """The pixels of tile number ``pid``: phase_h, phase_w, rows q_h [M] and columns q_w [M] within the phase, the
    tile's first sample (int64) and that of each pixel: [M, 1], or [1, 1] where a tile is within one sample, so that a
    scale is one vector of channels instead of a matrix."""
    phase = pid % (PHASES_H * PHASES_W)
    pid = pid // (PHASES_H * PHASES_W)
    m = tl.arange(0, BLOCK_S * BLOCK_H * BLOCK_W)
    q_w = pid % tiles_w * BLOCK_W + m % BLOCK_W
    pid = pid // tiles_w
    q_h = pid % tiles_h * BLOCK_H + m // BLOCK_W % BLOCK_H
    first_sample = (pid // tiles_h).to(tl.int64) * BLOCK_S
    sample = first_sample + tl.zeros([1, 1], tl.int64)
    if BLOCK_S > 1:
        sample = first_sample + (m // (BLOCK_W * BLOCK_H))[:, None]
    return phase // PHASES_W, phase % PHASES_W, q_h, q_w, first_sample, sample


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
def conv_product(
    x_ptr, w_ptr, in_scale_ptr,
    sample, in_batch,  # [M, 1] or [1, 1]
    q_h, q_w, phase_h, phase_w,
    o,  # [BLOCK_N]
    c_in, c_out, in_h, in_w, x_strides, w_strides, in_scale_strides, pad_h, pad_w,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """conv(in_scale ⊙ x, weight) of one tile, [BLOCK_M, BLOCK_N] float32.

    In float16, in_scale is divided by its largest magnitude per sample before it multiplies x and the sums are
    multiplied by that again: x · in_scale in half may overflow where the layer's result does not.
    """
    k = tl.arange(0, BLOCK_K).to(q_h.dtype)
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

    x_row = x_ptr + sample * x_strides[0]
    if in_scale_ptr is not None:
        in_scale_row = in_scale_ptr + sample * in_scale_strides[0]
        if x_ptr.dtype.element_ty == tl.float16:
            peak = scale_peak(in_scale_row, in_scale_strides[1], c_in, in_batch, BLOCK_K)
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
            x_row + (h * x_strides[2] + w * x_strides[3])[:, None] + (i * x_strides[1])[None, :],
            mask=inside[:, None] & in_batch & (i < c_in)[None, :],
            other=0.0,
        )
        w_tap = w_ptr + (first_h + tap_h * TAP_H) * w_strides[2] + (first_w + tap_w * TAP_W) * w_strides[3]
        b = tl.load(
            w_tap + (i * w_strides[1])[:, None] + (o * w_strides[0])[None, :],
            mask=(i < c_in)[:, None] & (o < c_out)[None, :],
            other=0.0,
        )
        if in_scale_ptr is not None:
            scale = tl.load(
                in_scale_row + (i * in_scale_strides[1])[None, :], mask=in_batch & (i < c_in)[None, :], other=0.0
            )
            if x_ptr.dtype.element_ty == tl.float16:
                scale = scale / peak
            a = (a.to(tl.float32) * scale).to(a.dtype)
        acc = dot(a, b, acc, PRECISION)
    if in_scale_ptr is not None and x_ptr.dtype.element_ty == tl.float16:
        acc *= peak
    return acc


@triton.jit
def finish(
    acc,  # [M, BLOCK_N] float32
    sample, row, column, o,  # of each pixel and channel: [M, 1] or [1, 1], [M], [M], [BLOCK_N]
    valid_row, valid, c_out, out_w, noise_ptr, strength_ptr, bias_ptr, residual_ptr, noise_stride_n, residual_strides,
    alpha, gain, clamp, residual_gain, ACT: tl.constexpr,
):  # fmt: skip
    """clamp(gain · act(acc + noise · strength + bias)) + residual_gain · residual."""
    if noise_ptr is not None:
        at = sample * noise_stride_n + (row * out_w + column)[:, None]
        noise = tl.load(noise_ptr + at, mask=valid_row, other=0.0)
        if strength_ptr is not None:
            noise *= tl.load(strength_ptr)
        acc += noise
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o, mask=o < c_out, other=0.0)[None, :]
    acc = activate(acc, ACT, alpha, gain, clamp)
    if residual_ptr is not None:
        pixel = (row * residual_strides[2] + column * residual_strides[3])[:, None]
        at = sample * residual_strides[0] + pixel + (o * residual_strides[1])[None, :]
        residual = tl.load(residual_ptr + at, mask=valid, other=0.0)
        acc += residual_gain * residual.to(tl.float32)
    return acc
