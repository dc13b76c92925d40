"""Minibatch standard deviation: how much the samples of a group differ, as further channels."""

from __future__ import annotations

from torch import Tensor

from fastgan.ops import _check
from fastgan.reference import minibatch_stddev as reference


def minibatch_stddev(x: Tensor, *, group_size: int = 4, num_channels: int = 1, eps: float = 1e-8) -> Tensor:
    """Append to each sample √(variance within its group + eps), averaged over a share of the channels and all pixels.

    Args:
        x: [N, C, H, W], floating point; N a multiple of min(group_size, N), C of num_channels.
        group_size: samples in a group, ≥ 1; a smaller batch is one group. Group m holds the samples m, m + M, m + 2M, …
            of a batch with M groups.
        num_channels: statistics per group, each over C / num_channels channels.
        eps: > 0, under the root.

    Returns:
        [N, C + num_channels, H, W], ``x``'s dtype.

    Raises:
        ValueError: sizes that do not divide; eps not above 0.
        TypeError: ``x`` is not a tensor.

    Gradients: any order.

    Source: Karras et al., "Progressive Growing of GANs", 2018, section 3.
    """
    op = "minibatch_stddev"
    _check.tensor(op, "x", x, ndim=4)
    n, channels = x.shape[:2]
    if group_size < 1 or n % min(group_size, max(n, 1)):
        raise ValueError(f"{op}: group_size must be at least 1 and divide N = {n}, got {group_size}")
    if num_channels < 1 or channels % num_channels:
        raise ValueError(f"{op}: num_channels must be at least 1 and divide C = {channels}, got {num_channels}")
    if not eps > 0:
        raise ValueError(f"{op}: eps must be above 0, got {eps}")
    return reference.minibatch_stddev(x, group_size=min(group_size, max(n, 1)), num_channels=num_channels, eps=eps)
