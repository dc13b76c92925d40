"""The layers that the GPU report counts: those of StyleGAN2-256, of Pix2Pix's U-Net-256 and of its patch critic.

Each has the fused call and the sequence that plain torch runs for the same layer, in evaluation: what a good
practitioner writes, with scaled activations instead of a weight per sample, Σ W² computed beforehand (as
:class:`fastgan.nn.ModulatedConv2d` keeps it; most code computes it each time), batch norm folded nowhere. Inputs are
made on fake CUDA tensors (:mod:`fastgan.profile.traffic`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan import ops

Inputs = Callable[[], list[Any]]
_FIR = (1 / 8, 3 / 8, 3 / 8, 1 / 8)
_CLAMP = 256.0
_DEVICE = "cuda"


@dataclass(frozen=True)
class Layer:
    """One layer at one size.

    Attributes:
        model, name: for people.
        up: the factor by which it upsamples (with a filter); 1 for the others.
        dtype, layout: of x and y.
        inputs: makes the arguments of both functions.
        fused: the fastgan call.
        eager: the same in plain torch.
        compulsory: bytes that any implementation moves: each activation in and out once, weights, Σ W² once, and what
            else is read, per channel or pixel.
    """

    model: str
    name: str
    up: int
    dtype: torch.dtype
    layout: str
    inputs: Inputs
    fused: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    compulsory: int


def _map(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=_DEVICE, memory_format=torch.channels_last)


def _vector(*shape: int) -> Tensor:
    return torch.empty(shape, device=_DEVICE)


# ----------------------------------------------------------------------------------------------------------------------
# StyleGAN2: Karras et al. 2020, section 2.2 and appendix B; geometry of the published up = 2 layer: transposed
# convolution of stride 2, then the filter with padding 1 and gain 4.


def _synthesis_fused(x: Tensor, weight: Tensor, style: Tensor, noise: Tensor, strength: Tensor, bias: Tensor,
                     fir: Tensor, energy: ops.WeightEnergy, *, up: int) -> Tensor:  # fmt: skip
    epilogue = ops.Epilogue(noise=noise, noise_strength=strength, bias=bias, act="lrelu", clamp=_CLAMP)
    options = {"up": up, "padding": 1, "resample_filter": fir, "weight_energy": energy}
    return ops.modulated_conv2d(x, weight, style, **options, epilogue=epilogue)


def _synthesis_eager(x: Tensor, weight: Tensor, style: Tensor, noise: Tensor, strength: Tensor, bias: Tensor,
                     fir: Tensor, energy: ops.WeightEnergy, *, up: int) -> Tensor:  # fmt: skip
    demodulation = torch.rsqrt(style.square() @ energy.energy.to(style.dtype).t() + 1e-8)
    y = x * style.to(x.dtype)[:, :, None, None]
    if up == 1:
        y = F.conv2d(y, weight, padding=1)
    else:
        y = F.conv_transpose2d(y, weight.transpose(0, 1), stride=2)
        taps = (4 * torch.outer(fir, fir)).to(x.dtype)
        channels = weight.shape[0]
        y = F.conv2d(y, taps.expand(channels, 1, *taps.shape), padding=1, groups=channels)
    y = y * demodulation.to(y.dtype)[:, :, None, None] + noise.to(y.dtype) * strength.to(y.dtype)
    y = F.leaky_relu(y + bias.to(y.dtype)[:, None, None], 0.2) * math.sqrt(2)
    return y.clamp(-_CLAMP, _CLAMP)


def _rgb_fused(x: Tensor, weight: Tensor, style: Tensor, bias: Tensor) -> Tensor:
    epilogue = ops.Epilogue(bias=bias, act="linear", clamp=_CLAMP)
    return ops.modulated_conv2d(x, weight, style, demodulate=False, epilogue=epilogue)


def _rgb_eager(x: Tensor, weight: Tensor, style: Tensor, bias: Tensor) -> Tensor:
    y = F.conv2d(x * style.to(x.dtype)[:, :, None, None], weight)
    return (y + bias.to(y.dtype)[:, None, None]).clamp(-_CLAMP, _CLAMP)


def _synthesis(resolution: int, c_in: int, c_out: int, up: int, batch: int, dtype: torch.dtype) -> Layer:
    size = resolution // up

    def inputs() -> list[Any]:
        x, weight = _map(dtype, batch, c_in, size, size), _map(dtype, c_out, c_in, 3, 3)
        fir = torch.tensor(_FIR, device=_DEVICE)
        small = (_vector(batch, c_in), _vector(resolution, resolution), _vector(), _vector(c_out))
        return [x, weight, *small, fir, ops.weight_energy(weight)]

    maps = batch * (c_in * size**2 + c_out * resolution**2) * dtype.itemsize
    weights = c_in * c_out * (9 * dtype.itemsize + 4)
    vectors = 4 * (batch * c_in + c_out + resolution**2)
    name = f"b{resolution}.conv{0 if up == 2 else 1} {c_in}→{c_out}" + (", up 2" if up == 2 else "")
    fused, eager = (partial(f, up=up) for f in (_synthesis_fused, _synthesis_eager))
    total = maps + weights + vectors
    return Layer("StyleGAN2-256", name, up, dtype, "channels_last", inputs, fused, eager, total)


def _rgb(resolution: int, c_in: int, batch: int, dtype: torch.dtype) -> Layer:
    def inputs() -> list[Any]:
        weight = _map(dtype, 3, c_in, 1, 1)
        return [_map(dtype, batch, c_in, resolution, resolution), weight, _vector(batch, c_in), _vector(3)]

    maps = batch * (c_in + 3) * resolution**2 * dtype.itemsize
    total = maps + 3 * c_in * dtype.itemsize + 4 * (batch * c_in + 3)
    name = f"b{resolution}.torgb {c_in}→3"
    return Layer("StyleGAN2-256", name, 1, dtype, "channels_last", inputs, _rgb_fused, _rgb_eager, total)


def stylegan2(resolution: int = 256, *, batch: int = 1, dtype: torch.dtype = torch.float16) -> list[Layer]:
    """The convolutions of StyleGAN2's synthesis network, channels min(32768 / size, 512)."""
    layers = []
    previous = 512
    for level in range(2, resolution.bit_length()):
        size = 2**level
        channels = min(32768 // size, 512)
        if size > 4:
            layers.append(_synthesis(size, previous, channels, 2, batch, dtype))
        layers += [_synthesis(size, channels, channels, 1, batch, dtype), _rgb(size, channels, batch, dtype)]
        previous = channels
    return layers


# ----------------------------------------------------------------------------------------------------------------------
# Pix2Pix: Isola et al. 2017, section 6.1; the critic with spectral norm (Miyato et al. 2018) and without other norms.

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "lrelu": partial(F.leaky_relu, negative_slope=0.2),
    "relu": F.relu,
    "tanh": torch.tanh,
    "linear": lambda x: x,
}


@dataclass(frozen=True)
class _Conv:
    c_in: int
    c_out: int
    size: int  # of the input
    stride: int
    transposed: bool
    act: str
    norm: bool  # a batch norm follows

    @property
    def out_size(self) -> int:
        return self.size * self.stride if self.transposed else (self.size - 2) // self.stride + 1


def _conv_fused(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor, *, conv: _Conv) -> Tensor:
    epilogue = ops.Epilogue(bias=bias, act=conv.act, gain=1.0)
    return ops.scaled_conv2d(
        x, weight, None, scale, stride=conv.stride, padding=1, transposed=conv.transposed, epilogue=epilogue
    )


def _conv_eager(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor, *, conv: _Conv) -> Tensor:
    if scale is not None and not conv.norm:
        weight = weight * scale.to(weight.dtype)
    convolve = F.conv_transpose2d if conv.transposed else F.conv2d
    y = convolve(x, weight, None if conv.norm else bias.to(x.dtype), conv.stride, 1)
    if conv.norm:
        statistics = [torch.empty(conv.c_out, device=x.device) for _ in range(4)]
        y = F.batch_norm(y, *statistics)
    return _ACTIVATIONS[conv.act](y)


def _conv_layer(model: str, conv: _Conv, batch: int, dtype: torch.dtype, scale_shape: tuple[int, ...] | None) -> Layer:
    def inputs() -> list[Any]:
        shape = (conv.c_in, conv.c_out) if conv.transposed else (conv.c_out, conv.c_in)
        scale = None if scale_shape is None else _vector(*scale_shape)
        x = _map(dtype, batch, conv.c_in, conv.size, conv.size)
        return [x, _map(dtype, *shape, 4, 4), scale, _vector(conv.c_out)]

    maps = batch * (conv.c_in * conv.size**2 + conv.c_out * conv.out_size**2)
    scale_bytes = 0 if scale_shape is None else 4 * math.prod(scale_shape)
    total = (maps + 16 * conv.c_in * conv.c_out) * dtype.itemsize + 4 * conv.c_out + scale_bytes
    kind = "transposed" if conv.transposed else f"stride {conv.stride}"
    name = f"{conv.c_in}→{conv.c_out} at {conv.size}², 4×4 {kind}"
    fused, eager = partial(_conv_fused, conv=conv), partial(_conv_eager, conv=conv)
    return Layer(model, name, 1, dtype, "channels_last", inputs, fused, eager, total)


def unet(size: int = 256, width: int = 64, *, batch: int = 1, dtype: torch.dtype = torch.float16) -> list[Layer]:
    """The U-Net in evaluation; fused, a batch norm is a scale and a bias of its convolution."""
    levels = size.bit_length() - 1
    widths = [width * min(2**level, 8) for level in range(levels)]
    convs = [_Conv(3, width, size, 2, False, "lrelu", False)]
    convs += [_Conv(widths[i - 1], widths[i], size >> i, 2, False, "lrelu", i < levels - 1) for i in range(1, levels)]
    convs.append(_Conv(widths[-1], widths[-2], 1, 2, True, "relu", True))
    convs += [_Conv(2 * widths[i], widths[i - 1], size >> (i + 1), 2, True, "relu", True)
              for i in range(levels - 2, 0, -1)]  # fmt: skip
    convs.append(_Conv(2 * width, 3, size // 2, 2, True, "tanh", False))
    return [_conv_layer("U-Net-256", c, batch, dtype, (c.c_out,) if c.norm else None) for c in convs]


def patch_critic(*, batch: int = 1, dtype: torch.dtype = torch.float16) -> list[Layer]:
    """The 70×70 patch critic on image pairs; σ is given, since spectral_sigma computes it once for all layers."""
    widths = [(6, 64, 256, 2), (64, 128, 128, 2), (128, 256, 64, 2), (256, 512, 32, 1), (512, 1, 31, 1)]
    convs = [_Conv(i, o, size, stride, False, "lrelu" if o > 1 else "linear", False) for i, o, size, stride in widths]
    return [_conv_layer("patch critic", conv, batch, dtype, ()) for conv in convs]


def report_layers(*, batch: int = 1, dtype: torch.dtype = torch.float16) -> list[Layer]:
    """Every layer of the report."""
    return [
        *stylegan2(batch=batch, dtype=dtype),
        *unet(batch=batch, dtype=dtype),
        *patch_critic(batch=batch, dtype=dtype),
    ]
