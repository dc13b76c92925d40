"""The scaled convolution as an implicit matrix product: one launch for a whole layer.

    y = clamp(gain · act(out_scale ⊙ conv(in_scale ⊙ x, weight) + noise · strength + bias)) + residual_gain · residual

Rows are pixels of the result, columns its channels, and the depth runs over taps and input channels; the matrix of
input pixels is never stored, its elements are read where they lie. A transposed convolution of stride s splits its
result into s² phases by the remainders of the pixel's coordinates: within a phase the taps that meet an input pixel
are the same everywhere, so each phase is an ordinary convolution with its part of the weight, and the phase is part of
the program's number. The same kernel is the data gradient: the adjoint of a convolution is the transposed one.

Forward: one launch, also with demodulation from energies that are known (:class:`Demodulation`). First-order backward:
at most six, in three pairs. A pair's first launch does all the work and leaves one part of each sum per program, its
second adds the parts in a fixed order, so that every result is bitwise the same every time; where there is one part
there is no second launch. The pairs are the epilogue's (g, out_scale, bias, noise strength: epilogue_grad.py), the
data's (x and in_scale: here, summed while it convolves) and the weight's (scaled_conv2d_weight_grad.py). They depend on
each other's results, but for the second launches, which belong to different ops. The noise map's own gradient, which
only projection into a latent space asks for, is torch's sum.

Source: implicit GEMM of Chetlur et al. 2014, "cuDNN: Efficient Primitives for Deep Learning", section 3.1; the phases
are the sub-pixel convolution of Shi et al. 2016, arXiv 1609.07009.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._conv_tile import conv_product, finish, tile_pixels
from ._dot import convolution_precision, demanded_precision
from ._launch import Launch
from ._layers import Layer, Variant, shipped_layers
from ._sum_parts import sum_parts
from ._tail import Tail
from ._tiles import (
    ceil_div,
    empty_result,
    forward_block,
    is_channels_last,
    needs_wide,
    pixel_tile,
    traffic,
)
from .demodulation import demodulation_factor

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def conv_fwd_kernel(
    x_ptr,  # [N, C_in, H, W]
    w_ptr,  # [C_out, C_in, KERNEL_H, KERNEL_W] by its strides, also for a transposed convolution
    in_scale_ptr,  # [N or 1, C_in or 1] float32, or None
    out_scale_ptr,  # [N or 1, C_out or 1] float32, or None
    style_ptr, energy_ptr, peak_ptr,  # in place of out_scale: what demodulation_factor takes, or None
    noise_ptr,  # [N or 1, 1, H', W'] float32, dense, or None
    strength_ptr,  # [] float32, or None
    bias_ptr,  # [C_out] float32, or None
    residual_ptr,  # [N, C_out, H', W'], or None
    y_ptr,  # [N, C_out, H', W']
    c_ptr,  # like y, float32: the product before out_scale, or None
    dot_ptr,  # like y by its own strides: to multiply the product with and sum over pixels, or None
    parts_ptr,  # [phases · tiles of a sample, N, C_out] float32: those sums per tile
    n, c_in, c_out, in_h, in_w, out_h, out_w,
    x_strides, w_strides, residual_strides, y_strides, dot_strides,  # four each: (N, C, H, W), w's (O, I, H, W)
    in_scale_strides, out_scale_strides,  # (N, C)
    noise_stride_n, pad_h, pad_w, eps, d_gain, alpha, gain, clamp, residual_gain, tiles_h, tiles_w,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, TRANSPOSED: tl.constexpr, ACT: tl.constexpr,
    PRENORMALIZE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile: BLOCK_S samples × BLOCK_H × BLOCK_W pixels of one phase × BLOCK_N channels of the result.

    Channel tiles are the fastest part of the program's number, then phases, then columns, rows, samples: what runs at
    the same time reads the same input pixels. With ``energy_ptr``, every program works out the factors of its own
    channels and samples: C_in multiplications for each, where a pixel takes C_in · KERNEL_H · KERNEL_W.
    """
    BLOCK_M: tl.constexpr = BLOCK_S * BLOCK_H * BLOCK_W
    PHASES_H: tl.constexpr = STRIDE_H if TRANSPOSED else 1
    PHASES_W: tl.constexpr = STRIDE_W if TRANSPOSED else 1
    tiles_c = tl.cdiv(c_out, BLOCK_N)
    o = tl.program_id(0) % tiles_c * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = tl.program_id(0) // tiles_c
    part = pid % (PHASES_H * PHASES_W * tiles_w * tiles_h)
    phase_h, phase_w, q_h, q_w, first_sample, sample = tile_pixels(
        pid, tiles_h, tiles_w, PHASES_H, PHASES_W, BLOCK_S, BLOCK_H, BLOCK_W
    )
    if WIDE:
        q_h, q_w, o = q_h.to(tl.int64), q_w.to(tl.int64), o.to(tl.int64)
    in_batch = sample < n
    acc = conv_product(
        x_ptr, w_ptr, in_scale_ptr, sample, in_batch, q_h, q_w, phase_h, phase_w, o, c_in, c_out, in_h, in_w, x_strides,
        w_strides, in_scale_strides, pad_h, pad_w, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, DILATION_H, DILATION_W,
        TRANSPOSED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    row, column = q_h * PHASES_H + phase_h, q_w * PHASES_W + phase_w
    valid_row = ((row < out_h) & (column < out_w))[:, None] & in_batch
    valid = valid_row & (o < c_out)[None, :]
    y_at = sample * y_strides[0] + (row * y_strides[2] + column * y_strides[3])[:, None] + (o * y_strides[1])[None, :]
    if c_ptr is not None:
        tl.store(c_ptr + y_at, acc, mask=valid)
    if dot_ptr is not None:
        pixel = (row * dot_strides[2] + column * dot_strides[3])[:, None]
        at = sample * dot_strides[0] + pixel + (o * dot_strides[1])[None, :]
        dotted = tl.where(valid, acc * tl.load(dot_ptr + at, mask=valid, other=0.0).to(tl.float32), 0.0)
        dotted = tl.sum(tl.reshape(dotted, [BLOCK_S, BLOCK_H * BLOCK_W, BLOCK_N]), axis=1)
        s = (first_sample + tl.arange(0, BLOCK_S))[:, None]
        at = (part.to(tl.int64) * n + s) * c_out + o[None, :]
        tl.store(parts_ptr + at, dotted, mask=(s < n) & (o < c_out)[None, :])
    if out_scale_ptr is not None:
        at = sample * out_scale_strides[0] + (o * out_scale_strides[1])[None, :]
        acc *= tl.load(out_scale_ptr + at, mask=in_batch & (o < c_out)[None, :], other=0.0)
    if energy_ptr is not None:
        # A tile of few pixels joins samples: one after the other, so that no factor is ever held for each pixel.
        for s in range(BLOCK_S):
            d = demodulation_factor(
                style_ptr, energy_ptr, peak_ptr, first_sample + s, o, n, c_in, c_out, KERNEL_H * KERNEL_W, eps,
                PRENORMALIZE, BLOCK_N,
            )  # fmt: skip
            acc = tl.where(sample == first_sample + s, acc * (d * d_gain)[None, :], acc)
    acc = finish(
        acc, sample, row, column, o, valid_row, valid, c_out, out_w, noise_ptr, strength_ptr, bias_ptr, residual_ptr,
        noise_stride_n, residual_strides, alpha, gain, clamp, residual_gain, ACT,
    )  # fmt: skip
    tl.store(y_ptr + y_at, acc.to(y_ptr.dtype.element_ty), mask=valid)


@dataclass(frozen=True)
class Convolution:
    """The linear part's geometry: pairs are (h, w); padding in pixels, of a transposed convolution what is cut off."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    output_padding: tuple[int, int]
    dilation: tuple[int, int]
    transposed: bool

    def output_hw(self, input_hw: Sequence[int], kernel_hw: Sequence[int]) -> tuple[int, int]:
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

    def products(self, input_hw: Sequence[int], output_hw: Sequence[int], kernel_hw: Sequence[int]) -> int:
        """Multiplications of a pair of channels in one sample: every tap meets every pixel of the convolution's small
        side once; padding is counted as pixels."""
        small = input_hw if self.transposed else output_hw
        return kernel_hw[0] * kernel_hw[1] * small[0] * small[1]

    def adjoint(self, input_hw: tuple[int, int], kernel_hw: tuple[int, int]) -> Convolution:
        """The convolution that maps cotangents of the result back to an input of ``input_hw``, with the same weight."""
        if self.transposed:
            return replace(self, output_padding=(0, 0), transposed=False)
        back = replace(self, transposed=True)
        reached = back.output_hw(self.output_hw(input_hw, kernel_hw), kernel_hw)
        return replace(back, output_padding=(input_hw[0] - reached[0], input_hw[1] - reached[1]))

    def pads(self) -> dict[str, int]:
        """The kernel's run-time numbers."""
        return {"pad_h": self.padding[0], "pad_w": self.padding[1]}

    def constants(self) -> dict[str, int | bool]:
        """The kernel's constants."""
        (stride_h, stride_w), (dilation_h, dilation_w) = self.stride, self.dilation
        strides = {"STRIDE_H": stride_h, "STRIDE_W": stride_w, "TRANSPOSED": self.transposed}
        return strides | {"DILATION_H": dilation_h, "DILATION_W": dilation_w}

    @property
    def phases(self) -> int:
        return self.stride[0] * self.stride[1] if self.transposed else 1


class Demodulation(NamedTuple):
    """An out_scale that the convolution's launch works out itself: gain · d / unit, as :func:`demodulation_factor`
    says."""

    style: Tensor  # [N, C_in] float32, contiguous
    energy: Tensor  # [C_out, C_in] float32, contiguous
    peak: Tensor  # [C_out] float32, contiguous
    prenormalize: str
    eps: float
    gain: float = 1.0

    def pointers(self) -> dict[str, Tensor | None]:
        """The kernel's tensors."""
        peak = self.peak if self.prenormalize == "stylegan2_fp16" else None
        return {"style": self.style, "energy": self.energy, "peak": peak}


class Planned(NamedTuple):
    """Results, and the launches that fill them: one, none for an empty batch, two where sums are asked for and a sample
    has several tiles."""

    y: Tensor
    c: Tensor  # the product before out_scale; empty where not asked for
    sums: Tensor  # [N, C_out] of it times ``dot_with``; empty where not asked for
    launches: list[Launch]


def plan(
    x: Tensor,
    weight: Tensor,
    in_scale: Tensor | None,
    out_scale: Tensor | Demodulation | None,
    tail: Tail,
    conv: Convolution,
    *,
    save_conv: bool = False,
    dot_with: Tensor | None = None,
    precision: str | None = None,
) -> Planned:
    """Decide the launch. Works on meta tensors.

    Args:
        save_conv: write the product before out_scale, too, in float32.
        dot_with: [N, C_out, H', W']: sum over pixels of its product with the product before out_scale, too.
        precision: None asks torch's settings.
    """
    oihw = weight.transpose(0, 1) if conv.transposed else weight
    c_out, c_in, *kernel_hw = oihw.shape
    out_hw = conv.output_hw(x.shape[2:], kernel_hw)
    shape = (x.shape[0], c_out, *out_hw)
    y = empty_result(x, weight, shape, x.dtype)
    c = empty_result(x, weight, shape, torch.float32) if save_conv else x.new_empty(0, dtype=torch.float32)
    sums = x.new_empty(shape[:2] if dot_with is not None else (0,), dtype=torch.float32)
    if y.numel() == 0:
        return Planned(y, c, sums, [])
    precision = precision or convolution_precision(x)
    phase_hw = conv.phase_hw(out_hw)
    pixels = x.shape[0] * phase_hw[0] * phase_hw[1] * conv.phases
    block = forward_block(x, precision, pixels, c_in, c_out, conv.transposed)
    costs = {"width": 16 if is_channels_last(y) else 32, "joint_cost": 1.0 if in_scale is None else 1.5}
    tile = pixel_tile(x.shape[0], *phase_hw, block.pixels, **costs)
    tiles = tile.count(x.shape[0], *phase_hw)
    count = conv.phases * tiles[1] * tiles[2]
    parts = None if dot_with is None else sums if count == 1 else sums.new_empty((count, *sums.shape))
    images = {"x": x, "y": y, "residual": tail.residual, "dot": dot_with}
    pointers = {"w": weight, "noise": tail.noise, "strength": tail.noise_strength, "bias": tail.bias}
    pointers |= {"c": c if save_conv else None, "parts": parts, **images}
    scales, numbers, prenormalize = _scales(in_scale, out_scale)
    numbers |= {"n": x.shape[0], "c_in": c_in, "c_out": c_out, "in_h": x.shape[2], "in_w": x.shape[3], **conv.pads()}
    numbers |= {"out_h": out_hw[0], "out_w": out_hw[1], "tiles_h": tiles[1], "tiles_w": tiles[2], **tail.numbers()}
    numbers |= {f"{k}_strides": (0,) * 4 if t is None else t.stride() for k, t in (images | {"w": oihw}).items()}
    constants = {"KERNEL_H": kernel_hw[0], "KERNEL_W": kernel_hw[1], **conv.constants(), "ACT": tail.act}
    constants |= {"PRENORMALIZE": prenormalize, "PRECISION": precision, "WIDE": needs_wide(*images.values())}
    constants |= {"BLOCK_S": tile.s, "BLOCK_H": tile.h, "BLOCK_W": tile.w}
    products = conv.products(x.shape[2:], out_hw, kernel_hw) + isinstance(out_scale, Demodulation)
    launch = Launch(
        conv_fwd_kernel,
        (tiles[0] * tiles[1] * tiles[2] * conv.phases * ceil_div(c_out, block.columns),),
        {f"{name}_ptr": t for name, t in (pointers | scales).items()} | numbers,
        constants | {"BLOCK_N": block.columns, "BLOCK_K": block.depth},
        num_warps=block.warps,
        num_stages=block.stages,
        max_registers=block.registers,
        bytes=traffic(*pointers.values(), *{id(t): t for t in scales.values()}.values()),
        flops=2 * x.shape[0] * c_in * c_out * products,
    )
    many = dot_with is not None and count > 1
    return Planned(y, c, sums, [launch, sum_parts(parts, sums, sums.numel())] if many else [launch])


def _scales(
    in_scale: Tensor | None, out_scale: Tensor | Demodulation | None
) -> tuple[dict[str, Tensor | None], dict[str, Any], str]:
    """The kernel's tensors and numbers of the scales, strides being 0 where a scale is broadcast; PRENORMALIZE."""
    inside = out_scale if isinstance(out_scale, Demodulation) else None
    given = None if isinstance(out_scale, Demodulation) else out_scale
    pointers: dict[str, Tensor | None] = {"in_scale": in_scale, "out_scale": given}
    numbers: dict[str, Any] = {
        f"{name}_strides": (0, 0) if t is None else tuple(0 if t.shape[d] == 1 else t.stride(d) for d in (0, 1))
        for name, t in pointers.items()
    }
    if inside is None:
        nothing = {"style": None, "energy": None, "peak": None}
        return pointers | nothing, numbers | {"eps": 0.0, "d_gain": 1.0}, "none"
    return pointers | inside.pointers(), numbers | {"eps": inside.eps, "d_gain": inside.gain}, inside.prenormalize


def shipped() -> Iterator[tuple[str, list[Launch]]]:
    """(label, launches) of every layer in :mod:`fastgan.kernels._layers`: its forward as inference runs it, a modulated
    layer's with demodulation inside; in float16 also as training does, which saves the product, and its data gradient
    with that of in_scale."""
    for label, layer, variant in shipped_layers():
        conv = Convolution((layer.stride,) * 2, (layer.padding,) * 2, (0, 0), (1, 1), layer.transposed)
        x = variant.image(layer.batch, layer.c_in, layer.size, layer.size)
        weight = variant.image(*layer.weight_shape)
        out_hw = conv.output_hw((layer.size, layer.size), (layer.kernel, layer.kernel))
        in_scale = variant.wide(layer.batch, layer.c_in) if layer.modulated else None
        inference, training = _shipped_scales(layer, variant, in_scale)
        tail = Tail(
            noise=variant.wide(1, 1, *out_hw) if layer.noise else None,
            noise_strength=variant.wide() if layer.noise else None,
            bias=variant.wide(layer.c_out) if layer.bias else None,
            act=layer.act,
            alpha=0.2 if layer.act == "lrelu" else 0.0,
            gain=layer.gain,
            clamp=layer.clamp,
        )
        planned = plan(x, weight, in_scale, inference, tail, conv, precision=variant.precision)
        yield label, planned.launches
        if variant.dtype == torch.float16:
            if layer.demodulated:
                saving = plan(x, weight, in_scale, training, tail, conv, save_conv=True, precision=variant.precision)
                yield f"{label} saving the product", saving.launches
            back = conv.adjoint((layer.size, layer.size), (layer.kernel, layer.kernel))
            options = {"dot_with": x if layer.modulated else None, "precision": variant.precision}
            gradient = plan(planned.y, weight, training, in_scale, Tail(), back, **options)
            yield f"{label} data gradient", gradient.launches


def _shipped_scales(
    layer: Layer, variant: Variant, in_scale: Tensor | None
) -> tuple[Tensor | Demodulation | None, Tensor | None]:
    """out_scale in inference and in training."""
    if not layer.demodulated:
        return None, None
    training = variant.wide(layer.batch if layer.modulated else 1, layer.c_out)
    if in_scale is None:
        return training, training
    kind = "stylegan2_fp16" if variant.dtype == torch.float16 else "none"
    energy, peak = variant.wide(layer.c_out, layer.c_in), variant.wide(layer.c_out)
    return Demodulation(in_scale, energy, peak, kind, 1e-8), training


def _knows(x: Tensor, stride: Sequence[int], dilation: Sequence[int], transposed: bool, groups: int) -> bool:
    """Whether there is a kernel: not for float64, groups, or a transposed convolution with both stride and dilation."""
    dilated_phases = transposed and max(stride) > 1 and max(dilation) > 1
    return x.dtype in _DTYPES and groups == 1 and not dilated_phases


def scaled_conv2d(x, weight, in_scale, out_scale, noise, noise_strength, bias, residual, *settings):
    """``fastgan::scaled_conv2d`` on Triton: the op's arguments and results; one launch, none for an empty batch.
    NotImplemented where :func:`_knows` says so."""
    stride, padding, output_padding, dilation, transposed, groups, precision, *pointwise, save_conv = settings
    if not _knows(x, stride, dilation, transposed, groups):
        return NotImplemented
    conv = Convolution(tuple(stride), tuple(padding), tuple(output_padding), tuple(dilation), transposed)
    tail = Tail(noise, noise_strength, bias, residual, *pointwise)
    demanded = demanded_precision(precision)
    planned = plan(x, weight, in_scale, out_scale, tail, conv, save_conv=save_conv, precision=demanded)
    for launch in planned.launches:
        launch.run()
    return planned.y, planned.c


def scaled_conv2d_dot(
    x, weight, in_scale, out_scale, dot_with, stride, padding, output_padding, dilation, transposed, groups, precision
):
    """``fastgan::scaled_conv2d_dot`` on Triton: the op's arguments and results; two launches, one where a sample is one
    tile. NotImplemented where :func:`_knows` says so."""
    if not _knows(x, stride, dilation, transposed, groups):
        return NotImplemented
    conv = Convolution(tuple(stride), tuple(padding), tuple(output_padding), tuple(dilation), transposed)
    demanded = demanded_precision(precision)
    planned = plan(x, weight, in_scale, out_scale, Tail(), conv, dot_with=dot_with, precision=demanded)
    for launch in planned.launches:
        launch.run()
    return planned.y, planned.sums


def demodulated_conv2d(x, weight, style, in_scale, energy, peak, prenormalize, eps, d_gain, *rest):
    """``fastgan::demodulated_conv2d`` on Triton: the op's arguments and result; one launch, none for an empty batch.
    NotImplemented for float64."""
    *tensors, stride, padding, transposed, precision, act, alpha, gain, clamp, residual_gain = rest
    if not _knows(x, stride, (1, 1), transposed, 1):
        return NotImplemented
    conv = Convolution(tuple(stride), tuple(padding), (0, 0), (1, 1), transposed)
    scale = Demodulation(style, energy, peak, prenormalize, eps, d_gain)
    tail = Tail(*tensors, act, alpha, gain, clamp, residual_gain)
    in_scale = style if in_scale is None else in_scale
    planned = plan(x, weight, in_scale, scale, tail, conv, precision=demanded_precision(precision))
    for launch in planned.launches:
        launch.run()
    return planned.y
