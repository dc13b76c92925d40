"""The oracle of minibatch_stddev: plain torch, any dtype and device, differentiable without end."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.reference._precision import compute_dtype


def minibatch_stddev(x: Tensor, *, group_size: int, num_channels: int, eps: float) -> Tensor:
    """[N, C, H, W] -> [N, C + num_channels, H, W]: behind ``x`` the mean standard deviation within each sample's group.

    Group m of the N / group_size holds the samples m, m + N/group_size, m + 2·N/group_size, …
    """
    n, c, h, w = x.shape
    if n == 0:
        return F.pad(x, (0, 0, 0, 0, 0, num_channels))
    groups = x.to(compute_dtype(x)).reshape(group_size, n // group_size, num_channels, c // num_channels, h, w)
    deviation = (groups - groups.mean(0)).square().mean(0).add(eps).sqrt()
    statistic = deviation.mean((2, 3, 4)).to(x.dtype)
    return torch.cat([x, statistic.repeat(group_size, 1)[:, :, None, None].expand(-1, -1, h, w)], 1)
