"""StyleGAN2's discriminator on fused layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgan import ops
from fastgan.models._stylegan2 import MappingNetwork, block_sizes, check_sizes, half_sizes, widths
from fastgan.nn import EqualizedConv2d, EqualizedLinear
from fastgan.nn.equalized import fir_filter


class StyleGAN2Discriminator(nn.Module):
    """From images to logits: residual blocks that halve the size, then the minibatch's standard deviation and two
    linear layers.

    Numbers and state dict (``b{R}.*``, ``mapping.*`` with labels) are those of the discriminator that NVlabs'
    StyleGAN2-ADA and StyleGAN3 repositories train (resnet architecture), so a published state dict loads with
    ``strict=True``. With labels the logit is the projection of the last features on the label's embedding.

    Args:
        resolution: side of the image, a power of two from 8 on.
        channels: of the image.
        c_dim: size of the label, 0 for none.
        channel_base, channel_max: a map of side R has min(channel_base / R, channel_max) channels.
        cmap_dim: size of the label's embedding; None is the number of channels at 4×4.
        mbstd_group_size, mbstd_num_channels: of :func:`fastgan.ops.minibatch_stddev`; a batch is a multiple of the
            group, or smaller.
        mapping_layers: of the label's embedding.
        num_fp16_res: how many of the highest sizes run in float16.
        conv_clamp: bound on the magnitude of every activation, as published (in float32 it hardly ever acts); None for
            none.

    Attributes:
        arguments: what rebuilds it, for :func:`fastgan.models.saved.describe`.

    Raises:
        ValueError: a resolution that is no power of two, a size below 1; in ``forward``, an image or label of the wrong
            shape.

    Gradients: every parameter, image and label, 1st and 2nd order.

    Source: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", 2020, section 4.1; projection:
    Miyato and Koyama, "cGANs with Projection Discriminator", 2018.
    """

    def __init__(
        self,
        resolution: int,
        channels: int = 3,
        c_dim: int = 0,
        channel_base: int = 32768,
        channel_max: int = 512,
        *,
        cmap_dim: int | None = None,
        mbstd_group_size: int = 4,
        mbstd_num_channels: int = 1,
        mapping_layers: int = 8,
        num_fp16_res: int = 0,
        conv_clamp: float | None = 256.0,
    ) -> None:
        super().__init__()
        sizes = {"channels": channels, "channel_base": channel_base, "channel_max": channel_max}
        sizes |= {"mbstd_group_size": mbstd_group_size, "mapping_layers": mapping_layers}
        check_sizes("StyleGAN2Discriminator", resolution, **sizes)
        self.arguments: dict[str, Any] = {
            "resolution": resolution,
            "channels": channels,
            "c_dim": c_dim,
            "channel_base": channel_base,
            "channel_max": channel_max,
            "cmap_dim": cmap_dim,
            "mbstd_group_size": mbstd_group_size,
            "mbstd_num_channels": mbstd_num_channels,
            "mapping_layers": mapping_layers,
            "num_fp16_res": num_fp16_res,
            "conv_clamp": conv_clamp,
        }
        self.resolution, self.channels, self.c_dim = resolution, channels, c_dim
        self.sizes = block_sizes(resolution)[:0:-1]
        width, half = widths(resolution, channel_base, channel_max), half_sizes(resolution, num_fp16_res)
        for size in self.sizes:
            block = DiscriminatorBlock(
                channels if size == resolution else 0,
                width[size],
                width[size // 2],
                half=size in half,
                conv_clamp=conv_clamp,
            )
            self.add_module(f"b{size}", block)
        cmap_dim = 0 if c_dim == 0 else width[4] if cmap_dim is None else cmap_dim
        if c_dim > 0:
            self.mapping = MappingNetwork(0, c_dim, cmap_dim, None, layers=mapping_layers, w_avg_beta=None)
        self.b4 = DiscriminatorEpilogue(
            width[4],
            cmap_dim,
            group_size=mbstd_group_size,
            num_channels=mbstd_num_channels,
            conv_clamp=conv_clamp,
        )

    def forward(self, image: Tensor, c: Tensor | None = None) -> Tensor:
        """Judge images.

        Args:
            image: [N, channels, resolution, resolution], floating point, usually −1 … 1.
            c: [N, c_dim] labels, or None if c_dim is 0.

        Returns:
            Logits [N, 1] in the parameters' dtype.
        """
        if list(image.shape[1:]) != [self.channels, self.resolution, self.resolution]:
            raise ValueError(
                f"StyleGAN2Discriminator: image must be [N, {self.channels}, {self.resolution}, {self.resolution}], "
                f"got {list(image.shape)}"
            )
        x = image
        for size in self.sizes:
            x = getattr(self, f"b{size}")(x)
        return self.b4(x, self.mapping(None, c) if self.c_dim > 0 else None)


class DiscriminatorBlock(nn.Module):
    """One size: y = √½ · (conv1(conv0(x)) + skip(x)), half as large. Keys ``fromrgb`` (first only), ``conv0``,
    ``conv1``, ``skip``.

    Args:
        image_channels: of the image that it takes; 0 where it takes maps.
        in_channels, out_channels: of the maps.
        half: whether it runs in float16.
        conv_clamp: as of the discriminator.
    """

    def __init__(
        self, image_channels: int, in_channels: int, out_channels: int, *, half: bool, conv_clamp: float | None
    ) -> None:
        super().__init__()
        self.half_precision, self.takes_image = half, image_channels > 0
        # Published state dicts have one here too, beside those of the layers.
        self.register_buffer("resample_filter", fir_filter((1, 3, 3, 1)))
        if self.takes_image:
            self.fromrgb = EqualizedConv2d(image_channels, in_channels, 1, act="lrelu", clamp=conv_clamp)
        self.conv0 = EqualizedConv2d(in_channels, in_channels, 3, act="lrelu", clamp=conv_clamp)
        self.conv1 = EqualizedConv2d(in_channels, out_channels, 3, act="lrelu", down=2, clamp=conv_clamp)
        self.skip = EqualizedConv2d(in_channels, out_channels, 1, bias=False, down=2, clamp=conv_clamp)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in or image_channels, R, R] -> [N, C_out, R/2, R/2]."""
        x = x.to(torch.float16 if self.half_precision else self.conv0.weight.dtype)
        if self.takes_image:
            x = self.fromrgb(x)
        # The sum rides on the skip and not on conv1, whose backward then works from its own result alone: behind a
        # residual, an activation's result is hidden and what was before it has to be kept.
        return self.skip(x, gain=0.5**0.5, residual=self.conv1(self.conv0(x), gain=0.5**0.5))


class DiscriminatorEpilogue(nn.Module):
    """4×4 maps to logits. Keys ``conv``, ``fc``, ``out``.

    Args:
        in_channels: of the maps.
        cmap_dim: size of the label's embedding; 0 for none.
        group_size, num_channels: of :func:`fastgan.ops.minibatch_stddev`; no such channels for 0.
        conv_clamp: as of the discriminator.
    """

    def __init__(
        self, in_channels: int, cmap_dim: int, *, group_size: int, num_channels: int, conv_clamp: float | None
    ) -> None:
        super().__init__()
        self.cmap_dim, self.group_size, self.num_channels = cmap_dim, group_size, num_channels
        self.conv = EqualizedConv2d(in_channels + num_channels, in_channels, 3, act="lrelu", clamp=conv_clamp)
        self.fc = EqualizedLinear(in_channels * 16, in_channels, act="lrelu")
        self.out = EqualizedLinear(in_channels, max(cmap_dim, 1))

    def forward(self, x: Tensor, cmap: Tensor | None) -> Tensor:
        """(x [N, C, 4, 4], cmap [N, cmap_dim] or None) -> logits [N, 1]."""
        x = x.to(self.conv.weight.dtype)
        if self.num_channels > 0:
            x = ops.minibatch_stddev(x, group_size=self.group_size, num_channels=self.num_channels)
        x = self.out(self.fc(self.conv(x).flatten(1))).to(self.out.weight.dtype)
        if cmap is None:
            return x
        return (x * cmap).sum(1, keepdim=True) * self.cmap_dim**-0.5
