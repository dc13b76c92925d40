"""ESRGAN's residual dense block as one layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgan import ops


class ResidualDenseBlock(nn.Module):
    """y = x + 0.2 · conv5(x ‖ f_1 ‖ … ‖ f_4), f_l = lrelu(conv_l(x ‖ f_1 ‖ … ‖ f_{l−1})), slope 0.2.

    With its arguments and its state dict (``conv1`` … ``conv5``, each with weight [G, I, 3, 3] and bias [G]) it takes
    the place of the block of that name in the RRDBNet of ESRGAN and Real-ESRGAN; one call of
    :func:`fastgan.ops.dense_block`, which is fastest on CPU in NCHW, in float32, with channels in multiples of 16.

    Args:
        num_feat: channels of x and y.
        num_grow_ch: channels that each of the first four convolutions adds.

    Raises:
        ValueError: fewer than one channel; in ``forward``, what :func:`fastgan.ops.dense_block` raises.

    Weights start a tenth as large as Kaiming's, as the paper has them; biases at 0.

    Source: Wang et al., "ESRGAN", 2018, section 3.1 and figure 4.
    """

    def __init__(self, num_feat: int = 64, num_grow_ch: int = 32) -> None:
        super().__init__()
        if num_feat < 1 or num_grow_ch < 1:
            raise ValueError(
                f"ResidualDenseBlock: num_feat and num_grow_ch must be at least 1, got {num_feat} and {num_grow_ch}"
            )
        for i in range(5):
            outputs = num_feat if i == 4 else num_grow_ch
            convolution = nn.Conv2d(num_feat + i * num_grow_ch, outputs, 3, padding=1)
            nn.init.kaiming_normal_(convolution.weight)
            nn.init.zeros_(convolution.bias)
            with torch.no_grad():
                convolution.weight.mul_(0.1)
            self.add_module(f"conv{i + 1}", convolution)

    def forward(self, x: Tensor) -> Tensor:
        """[N, num_feat, H, W] -> the same shape and dtype."""
        layers = (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5)
        return ops.dense_block(x, [layer.weight for layer in layers], [layer.bias for layer in layers])
