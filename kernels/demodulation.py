"""``fastgan::demodulation`` on Triton: both scale matrices of a modulated convolution in one launch.

    in_scale[n, i] = style[n, i] / √l[n]
    d[n, o] = 1 / √(Σ_i energy[o, i] · style[n, i]² / l[n] + eps · c[o]),      energy[o, i] = Σ_kk weight[o, i]²

A program reads the weight of a few output channels once, keeps their energies in registers, and then goes through the
samples; the styles, read by all, stay in the cache. With at most 8192 input channels no energy is read back.

Where no gradient is recorded and the energies are known, there is no launch: :func:`demodulation_factor` runs inside
that of the convolution.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Launch
from ._tiles import ceil_div, traffic

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_CHANNELS = 8192
_ELEMENTS = 2048


@triton.jit
def one_for_zero(value):
    """A row of zeros has nothing to normalise: its level is that of a row of ones."""
    return tl.where(value == 0.0, 1.0, value)


@triton.jit
def demodulation_kernel(
    weight_ptr,  # [C_out, C_in, TAPS]
    style_ptr,  # [N, C_in] float32
    in_scale_ptr,  # [N, C_in] float32
    d_ptr,  # [N, C_out] float32
    energy_ptr,  # [C_out, C_in] float32, or None
    weight_level_ptr,  # [C_out] float32
    style_level_ptr,  # [N] float32
    n,
    c_out,
    c_in,
    weight_stride_o,
    weight_stride_i,
    weight_stride_k,
    eps,
    TAPS: tl.constexpr,
    PRENORMALIZE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """One program: BLOCK_O output channels, all input channels, all samples; the first also writes what depends on
    the styles alone."""
    pid = tl.program_id(0)
    o = pid * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.arange(0, BLOCK_I)
    mask = (o < c_out)[:, None] & (i < c_in)[None, :]
    at = (o.to(tl.int64) * weight_stride_o)[:, None] + (i * weight_stride_i)[None, :]
    energy = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    most = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for k in range(TAPS):
        w = tl.load(weight_ptr + at + k * weight_stride_k, mask=mask, other=0.0).to(tl.float32)
        energy += w * w
        if PRENORMALIZE == "stylegan2_fp16":
            most = tl.maximum(most, tl.abs(w))
    if energy_ptr is not None:
        tl.store(energy_ptr + o.to(tl.int64)[:, None] * c_in + i[None, :], energy, mask=mask)
    level = tl.full([BLOCK_O], 1.0, tl.float32)
    if PRENORMALIZE == "stylegan2_fp16":
        peak = one_for_zero(tl.max(most, axis=1))
        level = peak * peak * (c_in * TAPS)
    elif PRENORMALIZE == "stylegan3":
        level = one_for_zero(tl.sum(energy, axis=1) / (c_in * TAPS))
    tl.store(weight_level_ptr + o, level, mask=o < c_out)

    shared = 1.0
    if PRENORMALIZE == "stylegan3":
        total = tl.zeros([BLOCK_I], tl.float32)
        for sample in range(n):
            s = tl.load(style_ptr + sample * c_in + i, mask=i < c_in, other=0.0)
            total += s * s
        shared = one_for_zero(tl.sum(total, axis=0) / tl.maximum(n * c_in, 1))
    for sample in range(n):
        s = tl.load(style_ptr + sample * c_in + i, mask=i < c_in, other=0.0)
        style_level = shared
        if PRENORMALIZE == "stylegan2_fp16":
            peak_style = one_for_zero(tl.max(tl.abs(s), axis=0))
            style_level = peak_style * peak_style
        if PRENORMALIZE != "none":
            s = s / tl.sqrt(style_level)
        power = tl.sum(energy * (s * s)[None, :], axis=1)
        tl.store(d_ptr + sample * c_out + o, 1.0 / tl.sqrt(power + eps * level), mask=o < c_out)
        if pid == 0:
            tl.store(in_scale_ptr + sample * c_in + i, s, mask=i < c_in)
            tl.store(style_level_ptr + sample, style_level)


@triton.jit
def style_unit(style_ptr, sample, n, c_in, PRENORMALIZE: tl.constexpr, BLOCK: tl.constexpr):
    """What ``prenormalize`` divides the styles of one sample by, √l; a scalar."""
    k = tl.arange(0, BLOCK)
    if PRENORMALIZE == "stylegan2_fp16":
        most = tl.zeros([BLOCK], tl.float32)
        for start in range(0, c_in, BLOCK):
            i = start + k
            s = tl.load(style_ptr + sample * c_in + i, mask=(sample < n) & (i < c_in), other=0.0)
            most = tl.maximum(most, tl.abs(s))
        return one_for_zero(tl.max(most, axis=0))
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n * c_in, BLOCK):
        s = tl.load(style_ptr + start + k, mask=start + k < n * c_in, other=0.0)
        total += s * s
    return tl.sqrt(one_for_zero(tl.sum(total, axis=0) / (n * c_in)))


@triton.jit
def demodulation_factor(
    style_ptr,  # [N, C_in] float32, contiguous
    energy_ptr,  # [C_out, C_in] float32, contiguous
    peak_ptr,  # [C_out] float32: C_in · TAPS · max |weight[o]|²; read for stylegan2_fp16 only
    sample,  # scalar int64
    o,  # [BLOCK_O]
    n, c_in, c_out, TAPS: tl.constexpr, eps, PRENORMALIZE: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """d[sample, o] / √l[sample], [BLOCK_O] float32: what a convolution of style · x is to be multiplied by.

    The style itself, not the normalised one, scales the input then, and √l is made up for here. Any value beyond N and
    C_out.
    """
    # 64 input channels are 256 bytes of a row of energies, and few enough sums to keep beside a tile of products.
    BLOCK_I: tl.constexpr = 64
    unit = 1.0
    if PRENORMALIZE != "none":
        unit = style_unit(style_ptr, sample, n, c_in, PRENORMALIZE, 1024)
    k = tl.arange(0, BLOCK_I)
    energy_row = energy_ptr + (o.to(tl.int64) * c_in)[:, None]
    power = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    mass = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for start in range(0, c_in, BLOCK_I):
        i = start + k
        s = tl.load(style_ptr + sample * c_in + i, mask=(sample < n) & (i < c_in), other=0.0) / unit
        energy = tl.load(energy_row + i[None, :], mask=(o < c_out)[:, None] & (i < c_in)[None, :], other=0.0)
        power += energy * (s * s)[None, :]
        if PRENORMALIZE == "stylegan3":
            mass += energy
    level = tl.full([BLOCK_O], 1.0, tl.float32)
    if PRENORMALIZE == "stylegan2_fp16":
        level = tl.load(peak_ptr + o, mask=o < c_out, other=1.0)
    elif PRENORMALIZE == "stylegan3":
        level = one_for_zero(tl.sum(mass, axis=1) / (c_in * TAPS))
    return 1.0 / (unit * tl.sqrt(tl.sum(power, axis=1) + eps * level))


def plan(
    weight: Tensor, style: Tensor, prenormalize: str, eps: float, save_energy: bool
) -> tuple[tuple[Tensor, ...], Launch]:
    """The five results and the launch that fills them. Works on meta tensors; ``weight``'s rows and columns of taps
    lie at one distance."""
    (c_out, c_in, rows, columns), n = weight.shape, style.shape[0]
    shapes = ((n, c_in), (n, c_out), (c_out, c_in) if save_energy else (0,), (c_out,), (n,))
    in_scale, d, energy, weight_level, style_level = results = tuple(style.new_empty(shape) for shape in shapes)
    block_i = triton.next_power_of_2(c_in)
    block_o = min(max(1, _ELEMENTS // block_i), triton.next_power_of_2(c_out))
    arguments = (
        {"weight_ptr": weight, "style_ptr": style, "in_scale_ptr": in_scale, "d_ptr": d}
        | {"energy_ptr": energy if save_energy else None, "weight_level_ptr": weight_level}
        | {"style_level_ptr": style_level, "n": n, "c_out": c_out, "c_in": c_in, "eps": eps}
        | {"weight_stride_o": weight.stride(0), "weight_stride_i": weight.stride(1)}
        | {"weight_stride_k": weight.stride(3) if columns > 1 else weight.stride(2)}
    )
    constants = {"TAPS": rows * columns, "PRENORMALIZE": prenormalize, "BLOCK_O": block_o, "BLOCK_I": block_i}
    return results, Launch(
        demodulation_kernel,
        (ceil_div(c_out, block_o),),
        arguments,
        constants,
        bytes=traffic(weight, style, *results),
        flops=2 * weight.numel() + 2 * n * c_out * c_in,
    )


def demodulation(weight, style, prenormalize, eps, save_energy):
    """The op's arguments and results; NotImplemented for float64 and beyond 8192 input channels."""
    if weight.dtype not in _DTYPES or style.dtype != torch.float32 or weight.shape[1] > _MOST_CHANNELS:
        return NotImplemented
    rows, columns = weight.shape[2:]
    one_distance = rows == 1 or columns == 1 or weight.stride(2) == columns * weight.stride(3)
    results, launch = plan(
        weight if one_distance else weight.contiguous(), style.contiguous(), prenormalize, eps, save_energy
    )
    launch.run()
    return results


def shipped() -> Iterator[tuple[str, list[Launch]]]:
    """(label, launches): the 3×3 layers of StyleGAN2 at 256 pixels, batch 8, weights in float32 in both layouts; one
    also as training runs it."""
    for size in (2**level for level in range(2, 9)):
        c_out, c_in = min(32768 // size, 512), min(65536 // size, 512)
        style = torch.empty(8, c_in, device="meta")
        weight = torch.empty(c_out, c_in, 3, 3, device="meta")
        for layout, format in (("OIHW", torch.contiguous_format), ("OHWI", torch.channels_last)):
            for kind in ("none", "stylegan2_fp16"):
                launch = plan(weight.to(memory_format=format), style, kind, 1e-8, False)[1]
                yield f"StyleGAN2-256 b{size}.conv0 {layout} {kind}", [launch]
        if size == 64:
            yield f"StyleGAN2-256 b{size}.conv0 with energies", [plan(weight, style, "none", 1e-8, True)[1]]
