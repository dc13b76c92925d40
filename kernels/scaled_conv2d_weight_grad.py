"""The gradient of the scaled convolution's weight: a matrix product over the pixels of a batch.

    dW[o, i, tap] = Σ_n g_scale[n, o] · in_scale[n, i] · Σ_p g[n, o, p] · x[n, i, p · stride − pad + tap · dilation]

Rows are g's channels, columns x's, one tap a program, and the depth runs over samples and pixels. The scales are
constant within a sample, so they multiply the float32 sums of a sample and never an operand: nothing is rounded to a
half type, and nothing can overflow in one.

Two launches at most, and bitwise the same result every time: where the weight alone gives too few programs to fill a
GPU, samples and pixels are split over programs, each writes its part, and a second launch adds the parts in order. One
launch would need float atomics, whose order is not fixed.

Source: Chetlur et al. 2014, "cuDNN: Efficient Primitives for Deep Learning", section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dot import convolution_precision, demanded_precision, dot, has_tensor_cores
from ._launch import Launch
from ._layers import shipped_layers
from ._sum_parts import sum_parts
from ._tiles import ceil_div, is_channels_last, needs_wide, pixel_tile, splits_to_fill, traffic

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def conv_weight_grad_kernel(
    x_ptr,  # [N, C_in, H, W]
    g_ptr,  # [N, C_out, H', W']
    in_scale_ptr,  # [N or 1, C_in or 1] float32, or None
    g_scale_ptr,  # [N or 1, C_out or 1] float32, or None
    out_ptr,  # [splits, C_out, C_in, KERNEL_H · KERNEL_W] float32 by its strides
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
    g_stride_n,
    g_stride_c,
    g_stride_h,
    g_stride_w,
    in_scale_stride_n,
    in_scale_stride_c,
    g_scale_stride_n,
    g_scale_stride_c,
    out_stride_split,
    out_stride_o,
    out_stride_i,
    out_stride_tap,
    pad_h,
    pad_w,
    tiles,  # pixel tiles of one sample
    tiles_w,
    tiles_per_split,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """One tile: BLOCK_O × BLOCK_I weights of one tap, summed over ``tiles_per_split`` tiles of BLOCK_H × BLOCK_W
    pixels, counted through the samples. Taps are the fastest part of the program's number: they read the same
    pixels."""
    SCALED: tl.constexpr = in_scale_ptr is not None or g_scale_ptr is not None
    pid = tl.program_id(0)
    tap = pid % (KERNEL_H * KERNEL_W)
    pid = pid // (KERNEL_H * KERNEL_W)
    tiles_i = tl.cdiv(c_in, BLOCK_I)
    i = pid % tiles_i * BLOCK_I + tl.arange(0, BLOCK_I)
    pid = pid // tiles_i
    tiles_o = tl.cdiv(c_out, BLOCK_O)
    o = pid % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    split = pid // tiles_o
    p = tl.arange(0, BLOCK_H * BLOCK_W)
    p_h, p_w = p // BLOCK_W, p % BLOCK_W
    if WIDE:
        i, o, p_h, p_w = i.to(tl.int64), o.to(tl.int64), p_h.to(tl.int64), p_w.to(tl.int64)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, n * tiles)
    shift_h = tap // KERNEL_W * DILATION_H - pad_h
    shift_w = tap % KERNEL_W * DILATION_W - pad_w

    total = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    acc = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for s in range(first // tiles, tl.cdiv(last, tiles)):
        sample = tl.cast(s, tl.int64)
        x_sample, g_sample = x_ptr + sample * x_stride_n, g_ptr + sample * g_stride_n
        if SCALED:
            acc = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
        for tile in range(tl.maximum(first - s * tiles, 0), tl.minimum(last - s * tiles, tiles)):
            oh = tile // tiles_w * BLOCK_H + p_h
            ow = tile % tiles_w * BLOCK_W + p_w
            in_map = (oh < out_h) & (ow < out_w)
            g = tl.load(
                g_sample + (o * g_stride_c)[:, None] + (oh * g_stride_h + ow * g_stride_w)[None, :],
                mask=(o < c_out)[:, None] & in_map[None, :],
                other=0.0,
            )
            h = oh * STRIDE_H + shift_h
            w = ow * STRIDE_W + shift_w
            inside = in_map & (h >= 0) & (h < in_h) & (w >= 0) & (w < in_w)
            x = tl.load(
                x_sample + (h * x_stride_h + w * x_stride_w)[:, None] + (i * x_stride_c)[None, :],
                mask=inside[:, None] & (i < c_in)[None, :],
                other=0.0,
            )
            acc = dot(g, x, acc, PRECISION)
        if SCALED:
            if g_scale_ptr is not None:
                at = sample * g_scale_stride_n + o * g_scale_stride_c
                acc *= tl.load(g_scale_ptr + at, mask=o < c_out, other=0.0)[:, None]
            if in_scale_ptr is not None:
                at = sample * in_scale_stride_n + i * in_scale_stride_c
                acc *= tl.load(in_scale_ptr + at, mask=i < c_in, other=0.0)[None, :]
            total += acc
    if not SCALED:
        total = acc
    out = out_ptr + split.to(tl.int64) * out_stride_split + tap * out_stride_tap
    at = o.to(tl.int64)[:, None] * out_stride_o + i.to(tl.int64)[None, :] * out_stride_i
    tl.store(out + at, total, mask=(o < c_out)[:, None] & (i < c_in)[None, :])


def plan(
    x: Tensor,
    g: Tensor,
    in_scale: Tensor | None,
    g_scale: Tensor | None,
    weight_size: tuple[int, int, int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    precision: str | None = None,
) -> tuple[Tensor, list[Launch]]:
    """The gradient [C_out, C_in, k_h, k_w] in float32 and the one or two launches that fill it; zeros and none for an
    empty batch. Works on meta tensors. ``precision`` None asks torch's settings."""
    c_out, c_in, *kernel_hw = weight_size
    n, out_hw, taps = x.shape[0], g.shape[2:], kernel_hw[0] * kernel_hw[1]
    if n == 0:
        return x.new_zeros(weight_size, dtype=torch.float32), []
    out = x.new_empty(weight_size, dtype=torch.float32)
    half = x.dtype != torch.float32 and has_tensor_cores(x.device)
    # In float32 32 rows: from 64 on, Hopper's TF32 product wants pixels contiguous, and NHWC has channels contiguous.
    block_o = min(128 if half else 32, max(16, triton.next_power_of_2(c_out)))
    # Scales keep a second sum per weight in registers.
    scaled = in_scale is not None or g_scale is not None
    block_i = min(64 if scaled or not half else 128, max(16, triton.next_power_of_2(c_in)))
    tile = pixel_tile(1, *out_hw, 64 if half else 16, width=16 if is_channels_last(x) else 32)
    tile = tile._replace(s=1, h=tile.h * tile.s)
    _, tiles_h, tiles_w = tile.count(1, *out_hw)
    tiles = tiles_h * tiles_w
    products = ceil_div(c_out, block_o) * ceil_div(c_in, block_i) * taps
    tiles_per_split = ceil_div(n * tiles, splits_to_fill(products, n * tiles))
    splits = ceil_div(n * tiles, tiles_per_split)
    parts = out if splits == 1 else x.new_empty((splits, taps, c_out, c_in), dtype=torch.float32)
    by_split = (0, c_in * taps, taps, 1) if splits == 1 else (out.numel(), c_in, 1, c_out * c_in)

    arguments = {"x_ptr": x, "g_ptr": g, "in_scale_ptr": in_scale, "g_scale_ptr": g_scale, "out_ptr": parts}
    arguments |= {"n": n, "c_in": c_in, "c_out": c_out, "in_h": x.shape[2], "in_w": x.shape[3]}
    arguments |= {"out_h": out_hw[0], "out_w": out_hw[1], "pad_h": padding[0], "pad_w": padding[1]}
    arguments |= {"tiles": tiles, "tiles_w": tiles_w, "tiles_per_split": tiles_per_split}
    for name, t, axes in (("x", x, "nchw"), ("g", g, "nchw"), ("in_scale", in_scale, "nc"), ("g_scale", g_scale, "nc")):
        for dim, axis in enumerate(axes):
            broadcast = t is None or (t.shape[dim] == 1 and len(axes) == 2)
            arguments[f"{name}_stride_{axis}"] = 0 if broadcast else t.stride(dim)
    arguments |= {f"out_stride_{a}": value for a, value in zip(("split", "o", "i", "tap"), by_split, strict=True)}
    constants = {"KERNEL_H": kernel_hw[0], "KERNEL_W": kernel_hw[1], "STRIDE_H": stride[0], "STRIDE_W": stride[1]}
    constants |= {
        "DILATION_H": dilation[0],
        "DILATION_W": dilation[1],
        "PRECISION": precision or convolution_precision(x),
    }
    constants |= {"BLOCK_H": tile.h, "BLOCK_W": tile.w, "BLOCK_O": block_o, "BLOCK_I": block_i}
    constants |= {"WIDE": needs_wide(x, g)}
    product = Launch(
        conv_weight_grad_kernel,
        (products * splits,),
        arguments,
        constants,
        num_warps=8 if block_o * block_i >= 128 * 64 else 4,
        num_stages=3 if half else 2,
        # NCHW pixels are read one by one and wait in registers: the assembler would spill some.
        max_registers=255 if half and x.stride(1) != 1 and block_o * block_i >= 128 * 64 else None,
        bytes=traffic(x, g, in_scale, g_scale, parts),
        flops=2 * n * out_hw[0] * out_hw[1] * c_in * c_out * taps,
    )
    return out, [product] if splits == 1 else [product, sum_parts(parts, out, c_out * c_in)]


def shipped() -> Iterator[tuple[str, list[Launch]]]:
    """(label, launches) of the weight gradient of every layer in :mod:`fastgan.kernels._layers`."""
    for label, layer, variant in shipped_layers():
        x = variant.image(layer.batch, layer.c_in, layer.size, layer.size)
        if layer.transposed:
            size = (layer.size - 1) * layer.stride + layer.kernel - 2 * layer.padding
        else:
            size = (layer.size + 2 * layer.padding - layer.kernel) // layer.stride + 1
        g = variant.image(layer.batch, layer.c_out, size, size)
        in_scale = variant.wide(layer.batch, layer.c_in) if layer.modulated else None
        g_scale = variant.wide(layer.batch if layer.modulated else 1, layer.c_out) if layer.demodulated else None
        # A transposed convolution's is the same with the roles of x and g swapped.
        operands = (g, x, g_scale, in_scale) if layer.transposed else (x, g, in_scale, g_scale)
        geometry = ((layer.stride,) * 2, (layer.padding,) * 2, (1, 1))
        yield label, plan(*operands, layer.weight_shape, *geometry, variant.precision)[1]


def scaled_conv2d_weight_grad(x, g, in_scale, g_scale, weight_size, stride, padding, dilation, groups, precision):
    """``fastgan::scaled_conv2d_weight_grad`` on Triton: the op's arguments and result; NotImplemented for float64 and
    for groups."""
    if x.dtype not in _DTYPES or g.dtype != x.dtype or groups != 1:
        return NotImplemented
    geometry = (tuple(weight_size), tuple(stride), tuple(padding), tuple(dilation))
    out, launches = plan(x, g, in_scale, g_scale, *geometry, demanded_precision(precision))
    for launch in launches:
        launch.run()
    return out
