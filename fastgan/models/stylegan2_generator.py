"""StyleGAN2's generator on fused layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgan.models._stylegan2 import MappingNetwork, block_sizes, check_sizes, half_sizes, widths
from fastgan.nn import ModulatedConv2d, ToRGB
from fastgan.nn.equalized import fir_filter
from fastgan.nn.modulated_conv2d import upsample_image

_FILTER = (1.0, 3.0, 3.0, 1.0)
NOISE_MODES = ("const", "random", "none")


class StyleGAN2Generator(nn.Module):
    """From latents to images: a mapping network to styles, a synthesis network of modulated convolutions from 4×4 up.

    Numbers and state dict (``mapping.*``, ``synthesis.b{R}.*``) are those of the generator that NVlabs' StyleGAN2-ADA
    and StyleGAN3 repositories train as StyleGAN2 (skip architecture), so a published state dict loads with
    ``strict=True``. A layer is one modulated convolution with its noise, bias and activation behind it; the image so
    far is added where the next one is made. In evaluation with gradients disabled, a layer keeps what demodulation
    needs of its weight (:class:`fastgan.nn.ModulatedConv2d` says until when).

    Args:
        z_dim, c_dim, w_dim: sizes of latent, label (0 for none) and style.
        resolution: side of the image, a power of two from 8 on (16 … 1024 as a rule).
        channels: of the image.
        channel_base, channel_max: a map of side R has min(channel_base / R, channel_max) channels.
        mapping_layers, lr_multiplier, w_avg_beta: of :class:`fastgan.models._stylegan2.MappingNetwork`.
        num_fp16_res: how many of the highest sizes run in float16; images are summed in float32.
        conv_clamp: bound on the magnitude of every activation, as published (in float32 it hardly ever acts); None for
            none.

    Attributes:
        mapping: (z, c=None, truncation=1.0, *, truncation_cutoff=None, update_average=True) -> ws [N, num_ws, w_dim].
        synthesis: (ws, noise_mode="random") -> image [N, channels, resolution, resolution].
        num_ws: L, the number of styles that the synthesis takes: 2·log2(resolution) − 2.
        arguments: what rebuilds it, for :func:`fastgan.models.saved.describe`.

    Raises:
        ValueError: a resolution that is no power of two, a size below 1.

    Gradients: every parameter, z, c and ws, 1st and 2nd order.

    Source: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", 2020; num_fp16_res and conv_clamp:
    "Training Generative Adversarial Networks with Limited Data", 2020, appendix.

    Example:
        >>> generator = StyleGAN2Generator(512, 0, 512, 256).eval()
        >>> image = generator(torch.randn(1, 512), truncation=0.7, noise_mode="const")
    """

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        resolution: int,
        channels: int = 3,
        channel_base: int = 32768,
        channel_max: int = 512,
        *,
        mapping_layers: int = 8,
        lr_multiplier: float = 0.01,
        w_avg_beta: float = 0.998,
        num_fp16_res: int = 0,
        conv_clamp: float | None = 256.0,
    ) -> None:
        super().__init__()
        sizes = {"z_dim": z_dim, "w_dim": w_dim, "channels": channels, "mapping_layers": mapping_layers}
        check_sizes("StyleGAN2Generator", resolution, **sizes, channel_base=channel_base, channel_max=channel_max)
        self.arguments: dict[str, Any] = {
            "z_dim": z_dim,
            "c_dim": c_dim,
            "w_dim": w_dim,
            "resolution": resolution,
            "channels": channels,
            "channel_base": channel_base,
            "channel_max": channel_max,
            "mapping_layers": mapping_layers,
            "lr_multiplier": lr_multiplier,
            "w_avg_beta": w_avg_beta,
            "num_fp16_res": num_fp16_res,
            "conv_clamp": conv_clamp,
        }
        self.z_dim, self.c_dim, self.w_dim, self.resolution = z_dim, c_dim, w_dim, resolution
        self.num_ws = 2 * (resolution.bit_length() - 1) - 2
        self.synthesis = SynthesisNetwork(
            w_dim,
            resolution,
            channels,
            widths(resolution, channel_base, channel_max),
            half=half_sizes(resolution, num_fp16_res),
            conv_clamp=conv_clamp,
        )
        self.mapping = MappingNetwork(
            z_dim,
            c_dim,
            w_dim,
            self.num_ws,
            layers=mapping_layers,
            lr_multiplier=lr_multiplier,
            w_avg_beta=w_avg_beta,
        )

    def forward(
        self,
        z: Tensor,
        c: Tensor | None = None,
        truncation: float = 1.0,
        noise_mode: str = "random",
        *,
        truncation_cutoff: int | None = None,
        update_average: bool = True,
    ) -> Tensor:
        """Make images.

        Args:
            z: [N, z_dim], drawn from N(0, 1).
            c: [N, c_dim] labels, or None if c_dim is 0.
            truncation, truncation_cutoff, update_average: as in the mapping network.
            noise_mode: "random" (new for each image), "const" (the same each time, part of the weights) or "none".

        Returns:
            [N, channels, resolution, resolution], about −1 … 1, in the parameters' dtype.
        """
        ws = self.mapping(z, c, truncation, truncation_cutoff=truncation_cutoff, update_average=update_average)
        return self.synthesis(ws, noise_mode)

    @staticmethod
    def mix_styles(ws: Tensor, other: Tensor, cutoff: int | Tensor) -> Tensor:
        """Style mixing: coarse styles of one latent, fine ones of another.

        Args:
            ws, other: [N, L, w_dim], from :attr:`mapping`.
            cutoff: the first layer that takes its style from ``other``, 0 … L; or one for each sample, [N].

        Returns:
            [N, L, w_dim]: ``ws`` before the cutoff, ``other`` from it on. For mixing regularisation draw the cutoff
            anew in each step.

        Raises:
            ValueError: shapes that differ.

        Source: Karras et al., "A Style-Based Generator Architecture for Generative Adversarial Networks", 2019, section
        3.1.
        """
        if ws.ndim != 3 or other.shape != ws.shape:
            raise ValueError(f"mix_styles: other must be [N, L, w_dim] = {list(ws.shape)}, got {list(other.shape)}")
        layers = torch.arange(ws.shape[1], device=ws.device)
        if isinstance(cutoff, Tensor) and cutoff.ndim > 0:
            if list(cutoff.shape) != [len(ws)]:
                raise ValueError(f"mix_styles: cutoff must be an int or [N] = [{len(ws)}], got {list(cutoff.shape)}")
            cutoff = cutoff[:, None]
        return torch.where((layers < cutoff).expand(len(ws), -1)[:, :, None], ws, other)


class SynthesisNetwork(nn.Module):
    """From styles to images: a learned constant of 4×4, then for each size two layers and an image added up.

    Block R takes the styles from 2·log2(R) − 5 on: up-convolution, convolution, image; the style of an image is also
    that of the next block's first layer.

    Args:
        w_dim, resolution, channels: as of the generator.
        width: size -> channels.
        half: the sizes that run in float16.
        conv_clamp: as of the generator.
    """

    def __init__(
        self,
        w_dim: int,
        resolution: int,
        channels: int,
        width: dict[int, int],
        *,
        half: set[int],
        conv_clamp: float | None,
    ) -> None:
        super().__init__()
        self.w_dim, self.sizes = w_dim, block_sizes(resolution)
        self.num_ws = 2 * len(self.sizes)
        for size in self.sizes:
            block = SynthesisBlock(
                width.get(size // 2, 0), width[size], w_dim, size, channels, half=size in half, conv_clamp=conv_clamp
            )
            self.add_module(f"b{size}", block)

    def forward(self, ws: Tensor, noise_mode: str = "random") -> Tensor:
        """Make images.

        Args:
            ws: [N, L, w_dim].
            noise_mode: "random", "const" or "none".

        Returns:
            [N, channels, resolution, resolution] in the parameters' dtype.
        """
        if list(ws.shape[1:]) != [self.num_ws, self.w_dim]:
            raise ValueError(
                f"synthesis: ws must be [N, L, w_dim] = [N, {self.num_ws}, {self.w_dim}], got {list(ws.shape)}"
            )
        if noise_mode not in NOISE_MODES:
            raise ValueError(f"synthesis: noise_mode must be one of {', '.join(NOISE_MODES)}, got {noise_mode!r}")
        # Taken apart once, at the end of the graph for every layer: slices would each be padded with zeros in backward.
        styles = ws.to(self.b4.const.dtype).unbind(1)
        x, image = None, None
        for i, size in enumerate(self.sizes):
            first = max(2 * i - 1, 0)
            x, image = getattr(self, f"b{size}")(x, image, styles[first : 2 * i + 2], noise_mode)
        return image


class SynthesisBlock(nn.Module):
    """One size of the synthesis network. Keys ``const`` (4×4 only), ``conv0`` (all others), ``conv1``, ``torgb``.

    Args:
        in_channels: of the maps from below; 0 for the first block.
        out_channels: of its own.
        w_dim, channels, conv_clamp: as of the generator.
        resolution: its size.
        half: whether it runs in float16.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        channels: int,
        *,
        half: bool,
        conv_clamp: float | None,
    ) -> None:
        super().__init__()
        self.half_precision = half
        self.register_buffer("resample_filter", fir_filter(_FILTER))
        shared = {"style_dim": w_dim, "clamp": conv_clamp}
        if in_channels == 0:
            self.const = nn.Parameter(torch.randn(out_channels, resolution, resolution))
        else:
            self.conv0 = ModulatedConv2d(
                in_channels, out_channels, up=2, resolution=resolution, resample_filter=_FILTER, **shared
            )
        self.conv1 = ModulatedConv2d(
            out_channels, out_channels, resolution=resolution, resample_filter=_FILTER, **shared
        )
        self.torgb = ToRGB(out_channels, channels, **shared)

    def forward(
        self, x: Tensor | None, image: Tensor | None, styles: tuple[Tensor, ...], noise_mode: str
    ) -> tuple[Tensor, Tensor]:
        """(x [N, C_in, R/2, R/2], image [N, channels, R/2, R/2]) -> (x [N, C_out, R, R], image [N, channels, R, R])."""
        dtype = torch.float16 if self.half_precision else self.conv1.weight.dtype
        if x is None:
            x = self.const.to(dtype).expand(len(styles[0]), -1, -1, -1)
        else:
            x = self.conv0(x.to(dtype), styles[0], noise_mode)
            image = upsample_image(image, self.resample_filter)
        x = self.conv1(x, styles[-2], noise_mode)
        image = self.torgb(x, styles[-1], image)
        return x, image.to(self.conv1.weight.dtype)
