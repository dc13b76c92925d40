"""``fastgan::upfirdn2d`` on Triton: insert zeros, pad or crop, filter, keep every down-th pixel, and the epilogue, in
one launch.

Each result pixel sums over the taps that meet a pixel of the image and not an inserted zero; what neighbouring pixels
read in common comes from the cache, so device memory is read about once. The gradient is the same kernel with up and
down exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._activation import activate
from ._launch import Launch
from ._tail import Tail
from ._tiles import ceil_div, needs_wide, pixel_tile, traffic

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ELEMENTS = 1024
# Threads so many that each reads 16 bytes a tap, or a pixel's few channels: the loads of all taps wait in registers.
_THREAD_BYTES = 16
# Taps up to which the sum is written out: StyleGAN2's 4×4. Longer filters loop.
_UNROLLED = 16


@triton.jit
def first_tap(out, pad, UP: tl.constexpr, DOWN: tl.constexpr):
    """The first tap that meets a pixel from result coordinate ``out``; following ones are UP apart."""
    # Twice: the remainder of a negative number is negative.
    return ((pad - out * DOWN) % UP + UP) % UP


@triton.jit
def tap_factor(
    f_ptr,
    tap_h,
    tap_w,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    SEPARABLE: tl.constexpr,
    FLIP: tl.constexpr,
):
    """The filter at (tap_h, tap_w) of a correlation, scalars; 0 beyond its end."""
    inside = (tap_h < TAPS_H) & (tap_w < TAPS_W)
    if not FLIP:
        tap_h, tap_w = TAPS_H - 1 - tap_h, TAPS_W - 1 - tap_w
    if SEPARABLE:
        f = tl.load(f_ptr + tap_h, mask=inside, other=0.0) * tl.load(f_ptr + tap_w, mask=inside, other=0.0)
    else:
        f = tl.load(f_ptr + tap_h * TAPS_W + tap_w, mask=inside, other=0.0)
    return f


@triton.jit
def add_tap(
    acc,
    step,
    x_row,  # pointers [1, BLOCK_C]
    f_ptr,
    channels,  # mask [1, BLOCK_C]
    out_h,
    out_w,
    first_h,
    first_w,
    in_h,
    in_w,
    x_stride_h,
    x_stride_w,
    pad_h,
    pad_w,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    UP_H: tl.constexpr,
    UP_W: tl.constexpr,
    DOWN_H: tl.constexpr,
    DOWN_W: tl.constexpr,
    SEPARABLE: tl.constexpr,
    FLIP: tl.constexpr,
):
    """acc plus the filter's tap number ``step``, of those that meet pixels, times the pixels that it meets."""
    PER_ROW: tl.constexpr = (TAPS_W + UP_W - 1) // UP_W
    row, column = step // PER_ROW * UP_H, step % PER_ROW * UP_W
    tap_h, tap_w = row + first_h, column + first_w
    h, w = (out_h * DOWN_H + tap_h - pad_h) // UP_H, (out_w * DOWN_W + tap_w - pad_w) // UP_W
    inside = (h >= 0) & (h < in_h) & (w >= 0) & (w < in_w) & (tap_h < TAPS_H) & (tap_w < TAPS_W)
    at = (h * x_stride_h + w * x_stride_w)[:, None]
    x = tl.load(x_row + at, mask=inside[:, None] & channels, other=0.0).to(tl.float32)
    if f_ptr is None:
        return acc + x
    if UP_H == 1 and UP_W == 1:
        return acc + x * tap_factor(f_ptr, row, column, TAPS_H, TAPS_W, SEPARABLE, FLIP)
    # A choice between UP_H · UP_W scalars: cheaper than as many addresses as there are pixels.
    factor = tl.zeros(first_h.shape, tl.float32)
    for phase in tl.static_range(UP_H * UP_W):
        f = tap_factor(f_ptr, row + phase // UP_W, column + phase % UP_W, TAPS_H, TAPS_W, SEPARABLE, FLIP)
        factor = tl.where((first_h == phase // UP_W) & (first_w == phase % UP_W), f, factor)
    return acc + x * factor[:, None]


@triton.jit
def upfirdn2d_kernel(
    x_ptr,  # [N, C, H, W]
    f_ptr,  # [TAPS_H, TAPS_W] or, SEPARABLE, [TAPS_H] float32; None for one tap of 1
    noise_ptr,  # [N or 1, 1, H', W'] float32, dense, or None
    strength_ptr,  # [] float32, or None
    bias_ptr,  # [C] float32, or None
    residual_ptr,  # [N, C, H', W'], or None
    y_ptr,  # [N, C, H', W']
    c,
    in_h,
    in_w,
    height,
    width,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
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
    tiles_h,
    tiles_w,
    fir_gain,
    alpha,
    gain,
    clamp,
    residual_gain,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    UP_H: tl.constexpr,
    UP_W: tl.constexpr,
    DOWN_H: tl.constexpr,
    DOWN_W: tl.constexpr,
    SEPARABLE: tl.constexpr,
    FLIP: tl.constexpr,
    UNROLL: tl.constexpr,
    ACT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One tile: BLOCK_H × BLOCK_W pixels of one sample × BLOCK_C channels. Channel tiles are the fastest part of the
    program's number, then columns, rows, samples."""
    tiles_c = tl.cdiv(c, BLOCK_C)
    pid = tl.program_id(0)
    o = (pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    pid = pid // tiles_c
    p = tl.arange(0, BLOCK_H * BLOCK_W)
    out_w = pid % tiles_w * BLOCK_W + p % BLOCK_W
    pid = pid // tiles_w
    out_h = pid % tiles_h * BLOCK_H + p // BLOCK_W
    sample = (pid // tiles_h).to(tl.int64)
    if WIDE:
        o, out_h, out_w = o.to(tl.int64), out_h.to(tl.int64), out_w.to(tl.int64)

    first_h, first_w = first_tap(out_h, pad_h, UP_H, DOWN_H), first_tap(out_w, pad_w, UP_W, DOWN_W)
    x_row = x_ptr + sample * x_stride_n + o * x_stride_c
    acc = tl.zeros([BLOCK_H * BLOCK_W, BLOCK_C], tl.float32)
    STEPS: tl.constexpr = ((TAPS_H + UP_H - 1) // UP_H) * ((TAPS_W + UP_W - 1) // UP_W)
    if UNROLL:
        for step in tl.static_range(STEPS):
            acc = add_tap(
                acc, step, x_row, f_ptr, o < c, out_h, out_w, first_h, first_w, in_h, in_w, x_stride_h, x_stride_w,
                pad_h, pad_w, TAPS_H, TAPS_W, UP_H, UP_W, DOWN_H, DOWN_W, SEPARABLE, FLIP,
            )  # fmt: skip
    else:
        for step in range(STEPS):
            acc = add_tap(
                acc, step, x_row, f_ptr, o < c, out_h, out_w, first_h, first_w, in_h, in_w, x_stride_h, x_stride_w,
                pad_h, pad_w, TAPS_H, TAPS_W, UP_H, UP_W, DOWN_H, DOWN_W, SEPARABLE, FLIP,
            )  # fmt: skip
    acc *= fir_gain

    in_image = ((out_h < height) & (out_w < width))[:, None]
    valid = in_image & (o < c)
    if noise_ptr is not None:
        at = sample * noise_stride_n + (out_h * width + out_w)[:, None]
        noise = tl.load(noise_ptr + at, mask=in_image, other=0.0)
        if strength_ptr is not None:
            noise *= tl.load(strength_ptr)
        acc += noise
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o, mask=o < c, other=0.0)
    acc = activate(acc, ACT, alpha, gain, clamp)
    if residual_ptr is not None:
        at = sample * residual_stride_n + (out_h * residual_stride_h + out_w * residual_stride_w)[:, None]
        residual = tl.load(residual_ptr + at + o * residual_stride_c, mask=valid, other=0.0)
        acc += residual_gain * residual.to(tl.float32)
    y_at = sample * y_stride_n + (out_h * y_stride_h + out_w * y_stride_w)[:, None] + o * y_stride_c
    tl.store(y_ptr + y_at, acc.to(y_ptr.dtype.element_ty), mask=valid)


@dataclass(frozen=True)
class Resampling:
    """The linear part: pairs are (x, y), padding (x0, x1, y0, y1) in pixels of the upsampled image."""

    up: tuple[int, int] = (1, 1)
    down: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    flip: bool = False
    gain: float = 1.0

    def output_hw(self, input_hw: Sequence[int], taps: tuple[int, int]) -> tuple[int, int]:
        """(H', W') for a filter of ``taps`` (x, y)."""
        sizes = []
        for axis in (1, 0):
            padded = input_hw[1 - axis] * self.up[axis] + self.padding[2 * axis] + self.padding[2 * axis + 1]
            sizes.append((padded - taps[axis] + self.down[axis]) // self.down[axis])
        return sizes[0], sizes[1]


def plan(x: Tensor, f: Tensor | None, resampling: Resampling, tail: Tail) -> tuple[Tensor, Launch | None]:
    """The result, laid out as ``x``, and the launch that fills it; None if it is empty. Works on meta tensors."""
    taps = (1, 1) if f is None else (f.shape[-1], f.shape[0])
    height, width = resampling.output_hw(x.shape[2:], taps)
    nhwc = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    y = torch.empty((*x.shape[:2], height, width), dtype=x.dtype, device=x.device, memory_format=layout)
    if y.numel() == 0:
        return y, None
    c = x.shape[1]
    # NHWC: whole 128-byte lines of channels, and a pixel tile as square as there is room for, so that few of the pixels
    # read belong to another tile. NCHW: rows of 64 pixels.
    most = min(64, triton.next_power_of_2(c)) if nhwc else 1
    tile = pixel_tile(1, height, width, _ELEMENTS // most, least=1, width=8 if nhwc else 64)
    block_c = min(_ELEMENTS // tile.pixels, triton.next_power_of_2(c))
    thread_bytes = min(_THREAD_BYTES, block_c * x.element_size()) if nhwc else _THREAD_BYTES
    _, tiles_h, tiles_w = tile.count(1, height, width)
    (up_w, up_h), (down_w, down_h) = resampling.up, resampling.down
    steps = ceil_div(taps[0], up_w) * ceil_div(taps[1], up_h)
    noise, residual = tail.noise, tail.residual
    arguments = (
        {"x_ptr": x, "f_ptr": f, "noise_ptr": noise, "strength_ptr": tail.noise_strength, "bias_ptr": tail.bias}
        | {"residual_ptr": residual, "y_ptr": y, "c": c, "in_h": x.shape[2], "in_w": x.shape[3]}
        | {"height": height, "width": width}
        | {f"x_stride_{axis}": value for axis, value in zip("nchw", x.stride(), strict=True)}
        | {
            f"residual_stride_{axis}": value
            for axis, value in zip("nchw", (0, 0, 0, 0) if residual is None else residual.stride(), strict=True)
        }
        | {f"y_stride_{axis}": value for axis, value in zip("nchw", y.stride(), strict=True)}
        | {"pad_h": resampling.padding[2], "pad_w": resampling.padding[0], "tiles_h": tiles_h, "tiles_w": tiles_w}
        | {"fir_gain": resampling.gain, **tail.numbers()}
    )
    constants = (
        {"TAPS_H": taps[1], "TAPS_W": taps[0], "UP_H": up_h, "UP_W": up_w, "DOWN_H": down_h, "DOWN_W": down_w}
        | {"SEPARABLE": f is not None and f.ndim == 1, "FLIP": resampling.flip, "UNROLL": steps <= _UNROLLED}
        | {"ACT": tail.act, "WIDE": needs_wide(x, y, residual)}
        | {"BLOCK_H": tile.h, "BLOCK_W": tile.w, "BLOCK_C": block_c}
    )
    return y, Launch(
        upfirdn2d_kernel,
        (ceil_div(c, block_c) * tiles_w * tiles_h * x.shape[0],),
        arguments,
        constants,
        num_warps=ceil_div(tile.pixels * block_c * x.element_size(), 32 * thread_bytes),
        bytes=traffic(x, f, noise, tail.noise_strength, tail.bias, residual, y),
        flops=2 * steps * y.numel(),
    )


def upfirdn2d(x, f, noise, noise_strength, bias, residual, up, down, padding, flip_filter, fir_gain, *settings):
    """The op's arguments and result; one launch, none for an empty batch. NotImplemented for float64."""
    if x.dtype not in _DTYPES:
        return NotImplemented
    resampling = Resampling(tuple(up), tuple(down), tuple(padding), flip_filter, fir_gain)
    y, launch = plan(x, f, resampling, Tail(noise, noise_strength, bias, residual, *settings))
    if launch is not None:
        launch.run()
    return y


def shipped() -> Iterator[tuple[str, list[Launch]]]:
    """(label, launches): StyleGAN2 at 256 pixels, batch 8: behind each up = 2 layer, each skip of the images, before
    each stride-2 layer of the critic; NHWC in both precisions, and one layer in NCHW."""
    f = torch.empty(4, 4, device="meta")

    def image(dtype: torch.dtype, nhwc: bool, *shape: int) -> Tensor:
        layout = torch.channels_last if nhwc else torch.contiguous_format
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)

    variants = [("fp16 NHWC", torch.float16, True), ("fp32 NHWC", torch.float32, True)]
    for size in (2**level for level in range(3, 9)):
        c = min(32768 // size, 512)
        for name, dtype, nhwc in [*variants, ("fp16 NCHW", torch.float16, False)] if size == 64 else variants:
            wide = {"dtype": torch.float32, "device": "meta"}
            tail = Tail(
                torch.empty(1, 1, size, size, **wide),
                torch.empty((), **wide),
                torch.empty(c, **wide),
                act="lrelu",
                alpha=0.2,
                gain=2.0**0.5,
                clamp=256.0,
            )
            behind = Resampling(padding=(1, 1, 1, 1), gain=4.0)
            launch = plan(image(dtype, nhwc, 8, c, size + 1, size + 1), f, behind, tail)[1]
            yield f"StyleGAN2-256 b{size}.conv0 {name}", [launch]
            skip = Resampling(up=(2, 2), padding=(2, 1, 2, 1), gain=4.0)
            launch = plan(image(dtype, nhwc, 8, 3, size // 2, size // 2), f, skip, Tail())[1]
            yield f"StyleGAN2-256 b{size} image skip {name}", [launch]
            before = Resampling(padding=(2, 2, 2, 2))
            launch = plan(image(dtype, nhwc, 8, c, size, size), f, before, Tail())[1]
            yield f"StyleGAN2-256 critic b{size}.conv1 {name}", [launch]
            skip = Resampling(down=(2, 2), padding=(1, 1, 1, 1))
            launch = plan(image(dtype, nhwc, 8, c, size, size), f, skip, Tail())[1]
            yield f"StyleGAN2-256 critic b{size}.skip {name}", [launch]
