"""``fastgan::epilogue_grad`` on Triton: the activation's backward and all sums over pixels that follow from it.

    g = grad_y ⊙ d clamp(gain · act(z), ±clamp) / dz
    out_scale: Σ_p g ⊙ product [N, C]      bias: Σ_{n, p} g [C]      noise strength: Σ g ⊙ noise []

Two launches, of which the mathematics needs both: the first reads each pixel once, writes g and one part of each sum
per program; the second adds the parts in order, so that the result is bitwise the same every time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Launch
from ._layers import shipped_layers
from ._tiles import ceil_div, needs_wide, splits_to_fill, traffic
from .activation_grad import activation_factor, clamp_in

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_BLOCK_PARTS = 16


@triton.jit
def epilogue_grad_kernel(
    grad_ptr,  # [N, C, H, W]
    ref_ptr,  # [N, C, H, W]: the activation's result or its argument; None for a linear one without clamp
    product_ptr,  # [N, C, H, W], or None
    noise_ptr,  # [N or 1, 1, H, W] float32, dense, or None
    g_ptr,  # [N, C, H, W], or None where g is grad_y
    parts_ptr,  # [3, splits, N, C] float32: of out_scale, bias, noise strength
    n,
    c,
    pixels,
    width,
    grad_stride_n,
    grad_stride_c,
    grad_stride_h,
    grad_stride_w,
    ref_stride_n,
    ref_stride_c,
    ref_stride_h,
    ref_stride_w,
    product_stride_n,
    product_stride_c,
    product_stride_h,
    product_stride_w,
    g_stride_n,
    g_stride_c,
    g_stride_h,
    g_stride_w,
    noise_stride_n,
    alpha,
    gain,
    clamp,
    splits,
    pixels_per_split,
    ACT: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    WANT_BIAS: tl.constexpr,
    FLAT: tl.constexpr,  # rows follow each other at the distance of pixels, in every tensor
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: BLOCK_C channels of one sample over one split's pixels, BLOCK_P at a time."""
    pid = tl.program_id(0)
    tiles_c = tl.cdiv(c, BLOCK_C)
    k = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    pid = pid // tiles_c
    sample = (pid % n).to(tl.int64)
    split = pid // n
    offset = tl.arange(0, BLOCK_P)
    if WIDE:
        k, offset = k.to(tl.int64), offset.to(tl.int64)
    last = tl.minimum((split + 1) * pixels_per_split, pixels)
    with_product = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    alone = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    with_noise = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(split * pixels_per_split, last, BLOCK_P):
        p = first + offset
        h, w = p // width, p % width
        if FLAT:
            h, w = tl.zeros_like(p), p
        mask = (p < last)[:, None] & (k < c)[None, :]
        at = sample * grad_stride_n + (h * grad_stride_h + w * grad_stride_w)[:, None] + (k * grad_stride_c)[None, :]
        g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if ref_ptr is None:
            g *= gain
        else:
            at = sample * ref_stride_n + (h * ref_stride_h + w * ref_stride_w)[:, None] + (k * ref_stride_c)[None, :]
            ref = tl.load(ref_ptr + at, mask=mask, other=0.0).to(tl.float32)
            limit = clamp_in(clamp, ref_ptr.dtype.element_ty) if FROM_OUTPUT else clamp
            factor = activation_factor(ref, ACT, alpha, gain, limit, FROM_OUTPUT, 1)
            g = tl.where(factor == 0.0, 0.0, g * factor) if clamp is not None else g * factor
        if g_ptr is not None:
            at = sample * g_stride_n + (h * g_stride_h + w * g_stride_w)[:, None] + (k * g_stride_c)[None, :]
            tl.store(g_ptr + at, g.to(g_ptr.dtype.element_ty), mask=mask)
        # What lies beyond the map must not count, though act' is not 0 there; grad_y has been read as 0.
        if product_ptr is not None:
            at = (h * product_stride_h + w * product_stride_w)[:, None] + (k * product_stride_c)[None, :]
            product = tl.load(product_ptr + sample * product_stride_n + at, mask=mask, other=0.0)
            with_product += g * product.to(tl.float32)
        if WANT_BIAS:
            alone += g
        if noise_ptr is not None:
            noise = tl.load(noise_ptr + sample * noise_stride_n + p, mask=p < last, other=0.0)
            with_noise += g * noise[:, None]
    size = (tl.zeros([], tl.int64) + n) * c * splits
    at = (split * n + sample) * c + k
    if product_ptr is not None:
        tl.store(parts_ptr + at, tl.sum(with_product, axis=0), mask=k < c)
    if WANT_BIAS:
        tl.store(parts_ptr + size + at, tl.sum(alone, axis=0), mask=k < c)
    if noise_ptr is not None:
        tl.store(parts_ptr + 2 * size + at, tl.sum(with_noise, axis=0), mask=k < c)


@triton.jit
def add_over_splits(parts, n_c, splits, k, mask, BLOCK_PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Σ over splits of parts[split, k], n_c apart, for BLOCK channels k."""
    acc = tl.zeros([BLOCK_PARTS, BLOCK], tl.float32)
    for first in range(0, splits, BLOCK_PARTS):
        split = (first + tl.arange(0, BLOCK_PARTS)).to(tl.int64)
        acc += tl.load(
            parts + split[:, None] * n_c + k[None, :], mask=(split < splits)[:, None] & mask[None, :], other=0.0
        )
    return tl.sum(acc, axis=0)


@triton.jit
def epilogue_sums_kernel(
    parts_ptr,  # [3, splits, N, C] float32
    scale_ptr,  # [N, C] float32, or None
    bias_ptr,  # [C] float32, or None
    strength_ptr,  # [] float32, or None
    n,
    c,
    splits,
    tiles_c,
    BLOCK_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums of the parts. One program computes BLOCK channels of out_scale's and bias's gradient for all samples;
    one more, the last, all of the noise strength's."""
    pid = tl.program_id(0)
    n_c = (tl.zeros([], tl.int64) + n) * c
    size = n_c * splits
    if pid < tiles_c:
        k = pid * BLOCK + tl.arange(0, BLOCK)
        mask = k < c
        bias = tl.zeros([BLOCK], tl.float32)
        for sample in range(n):
            at = tl.cast(sample, tl.int64) * c
            if scale_ptr is not None:
                scale = add_over_splits(parts_ptr + at, n_c, splits, k, mask, BLOCK_PARTS, BLOCK)
                tl.store(scale_ptr + at + k, scale, mask=mask)
            if bias_ptr is not None:
                bias += add_over_splits(parts_ptr + size + at, n_c, splits, k, mask, BLOCK_PARTS, BLOCK)
        if bias_ptr is not None:
            tl.store(bias_ptr + k, bias, mask=mask)
    elif strength_ptr is not None:
        total = tl.zeros([BLOCK_PARTS * BLOCK], tl.float32)
        for first in range(0, size, BLOCK_PARTS * BLOCK):
            e = first + tl.arange(0, BLOCK_PARTS * BLOCK)
            total += tl.load(parts_ptr + 2 * size + e, mask=e < size, other=0.0)
        tl.store(strength_ptr, tl.sum(total, axis=0))


def plan(
    grad_y: Tensor,
    ref: Tensor | None,
    product: Tensor | None,
    noise: Tensor | None,
    settings: tuple[str, float, float, float | None, bool],
    want_bias: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], list[Launch]]:
    """The op's results (empty where not asked for) and the two launches that fill them; zeros and none for an empty
    batch. ``settings``: act, alpha, gain, clamp, from_output. Works on meta tensors."""
    act, alpha, gain, clamp, from_output = settings
    n, c, height, width = grad_y.shape
    like = grad_y if ref is None else ref
    g = grad_y.new_empty(0) if ref is None and gain == 1.0 else torch.empty_like(like, dtype=grad_y.dtype)
    make = grad_y.new_zeros if n == 0 else grad_y.new_empty
    wanted = (product is not None, want_bias, noise is not None)
    shapes = ((n, c), (c,), ())
    sums = [make(shape if asked else (0,), dtype=torch.float32) for shape, asked in zip(shapes, wanted, strict=True)]
    if n == 0:
        return (g, *sums), []
    pixels = height * width
    if like.stride(1) == 1 and c > 1:
        block_c = min(64, max(8, triton.next_power_of_2(c)))
        block_p = 2048 // block_c
    else:
        block_p = min(1024, max(16, triton.next_power_of_2(pixels)))
        block_c = min(2048 // block_p, triton.next_power_of_2(c))
    programs = n * ceil_div(c, block_c)
    splits = splits_to_fill(programs, ceil_div(pixels, 2 * block_p))
    pixels_per_split = ceil_div(ceil_div(pixels, splits), block_p) * block_p
    splits = ceil_div(pixels, pixels_per_split)
    parts = grad_y.new_empty((3, splits, n, c), dtype=torch.float32)
    images = {"grad": grad_y, "ref": ref, "product": product, "g": g if g.numel() else None}
    arguments = {f"{name}_ptr": t for name, t in images.items()} | {"noise_ptr": noise, "parts_ptr": parts}
    arguments |= {"n": n, "c": c, "pixels": pixels, "width": width, "alpha": alpha, "gain": gain, "clamp": clamp}
    arguments |= {"noise_stride_n": 0 if noise is None or noise.shape[0] == 1 else noise.stride(0)}
    arguments |= {"splits": splits, "pixels_per_split": pixels_per_split}
    for name, t in images.items():
        values = (0, 0, 0, 0) if t is None else t.stride()
        arguments |= {f"{name}_stride_{axis}": value for axis, value in zip("nchw", values, strict=True)}
    given = [t for t in images.values() if t is not None]
    flat = all(t.stride(2) == width * t.stride(3) or height == 1 for t in given)
    constants = {"ACT": act, "FROM_OUTPUT": from_output, "WANT_BIAS": want_bias, "FLAT": flat}
    constants |= {"WIDE": needs_wide(*given), "BLOCK_P": block_p, "BLOCK_C": block_c}
    written = parts.numel() // 3 * sum(wanted) * 4
    first = Launch(
        epilogue_grad_kernel, (programs * splits,), arguments, constants, bytes=traffic(*given, noise) + written
    )
    arguments = {"parts_ptr": parts, "n": n, "c": c, "splits": splits, "tiles_c": ceil_div(c, 64)}
    for name, t, asked in zip(("scale", "bias", "strength"), sums, wanted, strict=True):
        arguments[f"{name}_ptr"] = t if asked else None
    second = Launch(
        epilogue_sums_kernel,
        (ceil_div(c, 64) + (noise is not None),),
        arguments,
        {"BLOCK_PARTS": _BLOCK_PARTS, "BLOCK": 64},
        num_warps=8,
        bytes=written + traffic(*sums),
    )
    return (g, *sums), [first, second]


def shipped() -> Iterator[tuple[str, list[Launch]]]:
    """(label, launches) for every layer with an epilogue in :mod:`fastgan.kernels._layers`."""
    for label, layer, variant in shipped_layers():
        if layer.demodulated and not layer.transposed:
            size = (layer.size + 2 * layer.padding - layer.kernel) // layer.stride + 1
            grad = variant.image(layer.batch, layer.c_out, size, size)
            product = torch.empty_like(grad, dtype=torch.float32)
            noise = variant.wide(1, 1, size, size) if layer.noise else None
            settings = (layer.act, 0.2, layer.gain, layer.clamp, True)
            yield label, plan(grad, grad, product, noise, settings, True)[1]


def epilogue_grad(grad_y, ref, product, noise, act, alpha, gain, clamp, from_output, want_bias):
    """The op's arguments and results; NotImplemented for float64."""
    if any(t is not None and t.dtype not in _DTYPES for t in (grad_y, ref, product, noise)):
        return NotImplemented
    results, launches = plan(grad_y, ref, product, noise, (act, alpha, gain, clamp, from_output), want_bias)
    for launch in launches:
        launch.run()
    return results
