"""Photographs into soft line drawings: the input side of the sketch -> photo task.

Two parts, as a person draws them: pencil lines where the picture is darker than its surround, and one grey wash over
what is dark altogether. Both are differences of Gaussians with a soft threshold, after Winnemöller, Kyprianidis and
Olsen, "XDoG: an eXtended difference-of-Gaussians compendium" (2012), eq. 5 and 7.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Rec. 601 luma, what scanners and greyscale conversions use.
LUMA = (0.299, 0.587, 0.114)

# In pixels of the drawing. A line about two pixels wide; the ratio 1.6² spans the two octaves in which outlines live.
LINE_SIGMA = 0.7
LINE_RATIO = 1.6 * 1.6
# Below this contrast (of square-root luma) is sensor noise, not a line; the gain makes an ordinary outline near black.
LINE_FLOOR = 0.004
LINE_GAIN = 8.0

# The wash: luma smoothed over a brush's width, darker than WASH_LEVEL turns to a quarter of grey.
WASH_SIGMA = 1.2
WASH_SHARPEN = 2.0
WASH_LEVEL = 0.45
WASH_GAIN = 8.0
WASH_DEPTH = 0.25


@cache
def _blur_matrix(size: int, sigma: float) -> Tensor:
    """[size, size] whose product with a column of pixels blurs it; what reaches past an end is reflected there."""
    radius = int(3 * sigma + 0.5)
    taps = torch.exp(-torch.arange(-radius, radius + 1).square() / (2 * sigma * sigma))
    taps = taps / taps.sum()
    source = (torch.arange(size)[:, None] + torch.arange(-radius, radius + 1)).abs()
    source = torch.where(source >= size, 2 * (size - 1) - source, source)
    return torch.zeros(size, size).scatter_add_(1, source, taps.expand(size, -1).contiguous())


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of ``x [N, 1, H, W]`` with reflected borders; ``sigma`` in pixels, H and W above 3·sigma + 1.

    As two products with a band matrix: for a crop that is several times faster than a convolution with one channel.
    """
    height, width = x.shape[-2:]
    return _blur_matrix(height, sigma) @ x @ _blur_matrix(width, sigma).T


def draw(photo: Tensor) -> Tensor:
    """A soft line drawing of each photograph.

        lines = 1 − tanh(gain · max(0, G_rσ(√Y) − G_σ(√Y) − floor))
        wash  = 1 + depth · tanh(gain · min(0, (1 + p) G_s(Y) − p G_1.6s(Y) − level))
        drawing = min(lines, wash)

    Args:
        photo: [N, 3, H, W] float, sRGB in [0, 1].

    Returns:
        [N, 1, H, W] in [0, 1]; 1 is paper.
    """
    luma = (photo * photo.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    # The square root evens out contrast between shadow and light, or shadows would hold no lines.
    tone = luma.clamp_min(0).sqrt()
    contrast = gaussian_blur(tone, LINE_SIGMA * LINE_RATIO) - gaussian_blur(tone, LINE_SIGMA)
    lines = 1 - torch.tanh(LINE_GAIN * F.relu(contrast - LINE_FLOOR))
    near, wide = gaussian_blur(luma, WASH_SIGMA), gaussian_blur(luma, 1.6 * WASH_SIGMA)
    dark = (1 + WASH_SHARPEN) * near - WASH_SHARPEN * wide - WASH_LEVEL
    wash = 1 + WASH_DEPTH * torch.tanh(WASH_GAIN * dark.clamp_max(0))
    return torch.minimum(lines, wash)
