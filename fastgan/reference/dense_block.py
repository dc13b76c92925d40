"""The oracle of dense_block: plain torch, any dtype and device, differentiable without end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.reference._precision import compute_dtype, full_precision
from fastgan.reference.epilogue import Epilogue, apply_epilogue


def dense_block(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *, between: Epilogue, residual_scale: float
) -> Tensor:
    """x + residual_scale · conv(…): every convolution reads x and what ``between`` made of all those before it.

    Half types are computed in float32; every layer's result is rounded once.
    """
    features, compute = [x], compute_dtype(x)
    for i, weight in enumerate(weights):
        with full_precision(x):
            c = F.conv2d(torch.cat(features, 1).to(compute), weight.to(compute), padding=1)
        if biases:
            c = c + biases[i].to(compute)[:, None, None]
        if i + 1 == len(weights):
            return (x.to(compute) + residual_scale * c).to(x.dtype)
        features.append(apply_epilogue(c, between).to(x.dtype))
    raise AssertionError("checked: there is a convolution")
