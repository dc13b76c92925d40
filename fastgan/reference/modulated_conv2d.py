"""Modulation and demodulation as two small scale matrices, and where up- and downsampling pad; plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan.reference._precision import full_precision

Sides = tuple[int, int, int, int]


def modulation_scales(
    weight: Tensor,
    style: Tensor,
    *,
    demodulate: bool,
    eps: float,
    prenormalize: str,
    input_gain: float | Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The scales around the convolution that modulate, and demodulate, it; no weight per sample is ever formed.

        in_scale = style · input_gain
        out_scale[n, o] = d = rsqrt(Σ_i style[n, i]² · Σ_kk weight[o, i]² + eps)

    Normalising the weight by a_o and the style by b_n beforehand leaves style · d unchanged but for eps: in_scale gets
    b, out_scale gets a, and d is that of the normalised two.

    Args:
        weight: [C_out, C_in, k_h, k_w].
        style: [N, C_in].
        prenormalize: none, stylegan2_fp16 or stylegan3; without effect unless ``demodulate``.

    Returns:
        in_scale [N, C_in] and out_scale [N, C_out] (None unless ``demodulate``), float64 if either input is, else
        float32.
    """
    wide = torch.float64 if torch.float64 in (weight.dtype, style.dtype) else torch.float32
    in_scale, out_scale = style.to(wide), None
    # Under autocast the matrix product below would run in half precision.
    with full_precision(style):
        if demodulate:
            weight = weight.to(wide)
            weight_scale, style_scale = prenormalization(weight, in_scale, prenormalize)
            in_scale = in_scale * style_scale
            energy = weight.square().sum((2, 3)) * weight_scale.square()
            out_scale = torch.rsqrt(in_scale.square() @ energy.t() + eps) * weight_scale.t()
        if input_gain is not None:
            in_scale = in_scale * (input_gain.to(wide) if isinstance(input_gain, Tensor) else input_gain)
    return in_scale, out_scale


def prenormalization(weight: Tensor, style: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Factors a ([C_out, 1] or [1, 1]) on the weight and b ([N, 1] or [1, 1]) on the style, before demodulation.

    A row of zeros has nothing to normalise: its factor is that of a row whose largest, or mean square, value is 1.
    """
    if kind == "none":
        one = weight.new_ones(1, 1)
        return one, one
    if kind == "stylegan2_fp16":
        fan_in = weight[0].numel()
        largest = one_for_zero(weight.abs().amax((1, 2, 3)))[:, None]
        return 1 / (largest * fan_in**0.5), 1 / one_for_zero(style.abs().amax(1, keepdim=True))
    mean_weight = one_for_zero(weight.square().mean((1, 2, 3)))[:, None]
    mean_style = one_for_zero(style.square().mean().reshape(1, 1))
    return mean_weight.rsqrt(), mean_style.rsqrt()


def one_for_zero(x: Tensor) -> Tensor:
    """``x`` with 1 in place of 0, where 1/x → inf and 0 · inf → NaN otherwise, in the value and in every gradient."""
    return torch.where(x == 0, torch.ones_like(x), x)


def transposed_filter_padding(padding: Sides, kernel: tuple[int, int], taps: tuple[int, int], up: int) -> Sides:
    """The filter's padding (left, right, top, bottom) behind a transposed convolution of stride ``up`` without padding.

    The whole is: insert zeros, pad by ``padding`` plus what centres the filter, filter, convolve with ``kernel``
    pixels. The transposed convolution already spreads each pixel over the kernel (kernel − 1 on either side) and leaves
    out the up − 1 zeros after the last pixel. Negative where it spreads further than wanted: then it crops.

    Args:
        kernel, taps: the convolution's and the filter's size, (x, y).
    """
    left, right, top, bottom = upsampling_padding(padding, taps, up)
    (kernel_x, kernel_y), after = kernel, up - 1
    return (
        left - (kernel_x - 1),
        right - (kernel_x - 1) + after,
        top - (kernel_y - 1),
        bottom - (kernel_y - 1) + after,
    )


def upsampling_padding(padding: Sides, taps: tuple[int, int], up: int) -> Sides:
    """``padding`` plus what keeps an image upsampled by ``up`` at up times its size, with the filter centred."""
    (taps_x, taps_y), (left, right, top, bottom) = taps, padding
    return (
        left + (taps_x + up - 1) // 2,
        right + (taps_x - up) // 2,
        top + (taps_y + up - 1) // 2,
        bottom + (taps_y - up) // 2,
    )


def downsampling_padding(padding: Sides, taps: tuple[int, int], down: int) -> Sides:
    """``padding`` plus what keeps an image downsampled by ``down`` at 1/down of its size, with the filter centred."""
    (taps_x, taps_y), (left, right, top, bottom) = taps, padding
    return (
        left + (taps_x - down + 1) // 2,
        right + (taps_x - down) // 2,
        top + (taps_y - down + 1) // 2,
        bottom + (taps_y - down) // 2,
    )
