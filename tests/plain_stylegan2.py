"""StyleGAN2 in plain torch, without fastgan: what the fused models are compared with, key by key.

Written from the papers in their own form: every sample has a modulated and demodulated weight of its own (Karras et
al., 2020, equations 1 and 3), equalised weights are multiplied out, and resampling inserts zeros, pads and filters.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SQRT2 = math.sqrt(2.0)


def resample(
    x: Tensor, taps: Tensor, *, up: int = 1, down: int = 1, sides: tuple[int, int], gain: float = 1.0
) -> Tensor:
    """Insert zeros, pad (the same on both axes), filter with the symmetric ``taps`` [t, t], keep every down-th."""
    n, c, h, w = x.shape
    if up > 1:
        spread = x.new_zeros(n, c, h, up, w, up)
        spread[:, :, :, 0, :, 0] = x
        x = spread.reshape(n, c, h * up, w * up)
    x = F.pad(x, (*sides, *sides))
    return F.conv2d(x, (taps * gain).to(x.dtype).expand(c, 1, *taps.shape), groups=c)[:, :, ::down, ::down]


def fir(dtype: torch.dtype = torch.float32) -> Tensor:
    row = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=dtype) / 8
    return torch.outer(row, row)


def modulated(x: Tensor, weight: Tensor, style: Tensor, *, demodulate: bool, transposed: bool = False) -> Tensor:
    """One convolution with as many groups as samples, each with its own weights."""
    n, i, h, w = x.shape
    o, k = weight.shape[0], weight.shape[2]
    own = weight[None] * style[:, None, :, None, None]
    if demodulate:
        own = own * torch.rsqrt(own.square().sum((2, 3, 4), keepdim=True) + 1e-8)
    x = x.reshape(1, n * i, h, w)
    if transposed:
        y = F.conv_transpose2d(x, own.transpose(1, 2).reshape(n * i, o, k, k), stride=2, groups=n)
    else:
        y = F.conv2d(x, own.reshape(n * o, i, k, k), padding=k // 2, groups=n)
    return y.reshape(n, o, *y.shape[2:])


def clamped(x: Tensor, bound: float | None) -> Tensor:
    return x if bound is None else x.clamp(-bound, bound)


class Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int, lr: float = 1.0) -> None:
        super().__init__()
        self.lr = lr
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * (self.lr / math.sqrt(self.weight.shape[1])), self.bias * self.lr)


class Layer(nn.Module):
    def __init__(self, inputs: int, outputs: int, w_dim: int, size: int, up: bool, clamp: float | None) -> None:
        super().__init__()
        self.up, self.clamp = up, clamp
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, 3, 3))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.affine = Linear(w_dim, inputs)
        self.register_buffer("noise_const", torch.zeros(size, size))
        self.register_buffer("resample_filter", fir())

    def forward(self, x: Tensor, w: Tensor, noise: str) -> Tensor:
        x = modulated(x, self.weight, self.affine(w), demodulate=True, transposed=self.up)
        if self.up:
            x = resample(x, self.resample_filter, sides=(1, 1), gain=4)
        if noise == "const":
            x = x + self.noise_const * self.noise_strength
        elif noise == "random":
            x = x + torch.randn(len(x), 1, *x.shape[2:], dtype=x.dtype) * self.noise_strength
        return clamped(F.leaky_relu(x + self.bias[:, None, None], 0.2) * SQRT2, self.clamp)


class Image(nn.Module):
    def __init__(self, inputs: int, channels: int, w_dim: int, clamp: float | None) -> None:
        super().__init__()
        self.clamp = clamp
        self.weight = nn.Parameter(torch.zeros(channels, inputs, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.affine = Linear(w_dim, inputs)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style = self.affine(w) / math.sqrt(x.shape[1])
        return clamped(modulated(x, self.weight, style, demodulate=False) + self.bias[:, None, None], self.clamp)


class Mapping(nn.Module):
    def __init__(self, z_dim: int, c_dim: int, w_dim: int, num_ws: int | None, layers: int, beta: float | None) -> None:
        super().__init__()
        self.num_ws, self.layers, self.beta = num_ws, layers, beta
        if c_dim:
            self.embed = Linear(c_dim, w_dim)
        for i in range(layers):
            inputs = w_dim if i else z_dim + (w_dim if c_dim else 0)
            self.add_module(f"fc{i}", Linear(inputs, w_dim, lr=0.01))
        if beta is not None:
            self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(self, z: Tensor | None, c: Tensor | None = None, truncation: float = 1.0) -> Tensor:
        inputs = [] if z is None else [z]
        inputs += [] if c is None else [self.embed(c)]
        x = torch.cat([v / (v.square().mean(1, keepdim=True) + 1e-8).sqrt() for v in inputs], 1)
        for i in range(self.layers):
            x = F.leaky_relu(getattr(self, f"fc{i}")(x), 0.2) * SQRT2
        if self.beta is not None and self.training:
            self.w_avg.copy_(x.detach().mean(0) * (1 - self.beta) + self.w_avg * self.beta)
        if self.num_ws is None:
            return x
        if truncation != 1:
            x = self.w_avg + truncation * (x - self.w_avg)
        return x[:, None].repeat(1, self.num_ws, 1)


class SynthesisBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, w_dim: int, size: int, channels: int, clamp: float | None) -> None:
        super().__init__()
        self.register_buffer("resample_filter", fir())
        if inputs:
            self.conv0 = Layer(inputs, outputs, w_dim, size, True, clamp)
        else:
            self.const = nn.Parameter(torch.zeros(outputs, size, size))
        self.conv1 = Layer(outputs, outputs, w_dim, size, False, clamp)
        self.torgb = Image(outputs, channels, w_dim, clamp)


class Synthesis(nn.Module):
    def __init__(self, w_dim: int, resolution: int, channels: int, base: int, most: int, clamp: float | None) -> None:
        super().__init__()
        self.sizes = [2**i for i in range(2, resolution.bit_length())]
        inputs = 0
        for size in self.sizes:
            outputs = min(base // size, most)
            self.add_module(f"b{size}", SynthesisBlock(inputs, outputs, w_dim, size, channels, clamp))
            inputs = outputs

    def forward(self, ws: Tensor, noise: str = "random") -> Tensor:
        layer, x, image = 0, None, None
        for size in self.sizes:
            block = getattr(self, f"b{size}")
            if size == 4:
                x = block.const[None].repeat(len(ws), 1, 1, 1)
            else:
                x = block.conv0(x, ws[:, layer], noise)
                layer += 1
            x = block.conv1(x, ws[:, layer], noise)
            layer += 1
            drawn = block.torgb(x, ws[:, layer])
            image = (
                drawn if image is None else drawn + resample(image, block.resample_filter, up=2, sides=(2, 1), gain=4)
            )
        return image


class PlainGenerator(nn.Module):
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
        conv_clamp: float | None = 256.0,
    ) -> None:
        super().__init__()
        num_ws = 2 * (resolution.bit_length() - 1) - 2
        self.synthesis = Synthesis(w_dim, resolution, channels, channel_base, channel_max, conv_clamp)
        self.mapping = Mapping(z_dim, c_dim, w_dim, num_ws, mapping_layers, 0.998)

    def forward(
        self, z: Tensor, c: Tensor | None = None, truncation: float = 1.0, noise_mode: str = "random"
    ) -> Tensor:
        return self.synthesis(self.mapping(z, c, truncation), noise_mode)


class Conv(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, *, bias: bool = True, down: bool = False) -> None:
        super().__init__()
        self.down = down
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, kernel, kernel))
        self.register_parameter("bias", nn.Parameter(torch.zeros(outputs)) if bias else None)
        self.register_buffer("resample_filter", fir())

    def forward(self, x: Tensor, act: bool, clamp: float | None, gain: float = 1.0) -> Tensor:
        kernel = self.weight.shape[2]
        weight, stride, padding = self.weight / math.sqrt(self.weight[0].numel()), 1, kernel // 2
        if self.down and kernel == 1:
            x = resample(x, self.resample_filter, down=2, sides=(1, 1))
        elif self.down:
            x, stride, padding = resample(x, self.resample_filter, sides=(2, 2)), 2, 0
        x = F.conv2d(x, weight, self.bias, stride, padding)
        x = F.leaky_relu(x, 0.2) * SQRT2 if act else x
        return clamped(x * gain, None if clamp is None else clamp * gain)


class DiscriminatorBlock(nn.Module):
    def __init__(self, image: int, inputs: int, outputs: int, clamp: float | None) -> None:
        super().__init__()
        self.image, self.clamp = image, clamp
        self.register_buffer("resample_filter", fir())
        if image:
            self.fromrgb = Conv(image, inputs, 1)
        self.conv0 = Conv(inputs, inputs, 3)
        self.conv1 = Conv(inputs, outputs, 3, down=True)
        self.skip = Conv(inputs, outputs, 1, bias=False, down=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fromrgb(x, True, self.clamp) if self.image else x
        skipped = self.skip(x, False, self.clamp, math.sqrt(0.5))
        return skipped + self.conv1(self.conv0(x, True, self.clamp), True, self.clamp, math.sqrt(0.5))


class Epilogue(nn.Module):
    def __init__(self, channels: int, cmap_dim: int, group: int, clamp: float | None) -> None:
        super().__init__()
        self.group, self.clamp = group, clamp
        self.conv = Conv(channels + 1, channels, 3)
        self.fc = Linear(channels * 16, channels)
        self.out = Linear(channels, max(cmap_dim, 1))

    def forward(self, x: Tensor, cmap: Tensor | None) -> Tensor:
        n, group = len(x), min(self.group, len(x))
        members = [x[m :: n // group] for m in range(n // group)]  # group m: every (n / group)-th sample from m on
        spread = torch.stack([(v.var(0, unbiased=False) + 1e-8).sqrt().mean() for v in members]).repeat(group)
        x = torch.cat([x, spread[:, None, None, None].expand(n, 1, *x.shape[2:])], 1)
        x = F.leaky_relu(self.fc(self.conv(x, True, self.clamp).flatten(1)), 0.2) * SQRT2
        x = self.out(x)
        return x if cmap is None else (x * cmap).sum(1, keepdim=True) / math.sqrt(cmap.shape[1])


class PlainDiscriminator(nn.Module):
    def __init__(
        self,
        resolution: int,
        channels: int = 3,
        c_dim: int = 0,
        channel_base: int = 32768,
        channel_max: int = 512,
        *,
        mapping_layers: int = 8,
        conv_clamp: float | None = 256.0,
    ) -> None:
        super().__init__()
        width = {size: min(channel_base // size, channel_max) for size in (2**i for i in range(2, 11))}
        self.sizes = [2**i for i in range(resolution.bit_length() - 1, 2, -1)]
        for size in self.sizes:
            image = channels if size == resolution else 0
            self.add_module(f"b{size}", DiscriminatorBlock(image, width[size], width[size // 2], conv_clamp))
        self.c_dim = c_dim
        if c_dim:
            self.mapping = Mapping(0, c_dim, width[4], None, mapping_layers, None)
        self.b4 = Epilogue(width[4], width[4] if c_dim else 0, 4, conv_clamp)

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        for size in self.sizes:
            x = getattr(self, f"b{size}")(x)
        return self.b4(x, self.mapping(None, c) if self.c_dim else None)
