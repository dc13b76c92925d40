"""The layers that the convolution kernels are compiled and counted for where there is no GPU: StyleGAN2 at 256 pixels
and the U-Net of Pix2Pix at 256, as meta tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# float32 comes in both of its precisions: exact, and TF32 as torch allows its convolutions by default.
PRECISIONS = {"fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
_STYLEGAN2_BATCH, _UNET_BATCH = 8, 1


@dataclass(frozen=True)
class Layer:
    """One convolution of a model; sizes in pixels of its input."""

    name: str
    batch: int
    c_in: int
    c_out: int
    size: int
    kernel: int
    stride: int
    padding: int
    transposed: bool
    act: str
    gain: float = 1.0
    clamp: float | None = None
    modulated: bool = False  # by in_scale
    demodulated: bool = False  # by out_scale
    noise: bool = False
    bias: bool = True

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        pair = (self.c_in, self.c_out) if self.transposed else (self.c_out, self.c_in)
        return (*pair, self.kernel, self.kernel)


@dataclass(frozen=True)
class Variant:
    """A precision and a layout; the weight has the layout of the model's tensors, as ``model.to(memory_format=...)``
    gives it."""

    name: str
    dtype: torch.dtype
    precision: str
    channels_last: bool

    def image(self, *shape: int) -> Tensor:
        """An uninitialised meta tensor [N, C, H, W], or a weight."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return torch.empty(shape, dtype=self.dtype, device="meta", memory_format=layout)

    @staticmethod
    def wide(*shape: int) -> Tensor:
        """An uninitialised meta tensor of what stays in float32: scales, noise, bias."""
        return torch.empty(shape, dtype=torch.float32, device="meta")


def stylegan2_256() -> Iterator[Layer]:
    """Karras et al. 2020, channels min(32768 / resolution, 512): per block the 3×3 layers and ToRGB.

    An up = 2 layer's first step is a transposed convolution without epilogue, which follows its filter.
    """
    modulated = {"modulated": True, "batch": _STYLEGAN2_BATCH}
    epilogue = {"act": "lrelu", "gain": 2.0**0.5, "clamp": 256.0, "demodulated": True, "noise": True}
    for level in range(2, 9):
        size = 2**level
        c_out = min(32768 // size, 512)
        if level > 2:
            c_in = min(32768 // (size // 2), 512)
            geometry = {"size": size // 2, "kernel": 3, "stride": 2, "padding": 0, "transposed": True}
            plain = {"act": "linear", "demodulated": True, "bias": False}
            yield Layer(f"b{size}.conv0", c_in=c_in, c_out=c_out, **geometry, **plain, **modulated)
        geometry = {"size": size, "kernel": 3, "stride": 1, "padding": 1, "transposed": False}
        yield Layer(f"b{size}.conv1", c_in=c_out, c_out=c_out, **geometry, **epilogue, **modulated)
        geometry = {"size": size, "kernel": 1, "stride": 1, "padding": 0, "transposed": False}
        yield Layer(f"b{size}.torgb", c_in=c_out, c_out=3, **geometry, act="linear", clamp=256.0, **modulated)


def unet_256() -> Iterator[Layer]:
    """Isola et al. 2017: eight 4×4 stride-2 layers down, eight transposed ones up; batch norm folded into the
    scale and the bias of its convolution."""
    widths = [3, 64, 128, 256, 512, 512, 512, 512, 512]
    geometry = {"kernel": 4, "stride": 2, "padding": 1, "batch": _UNET_BATCH}
    for level in range(8):
        size, folded = 256 >> level, 0 < level < 7
        act = "relu" if level == 7 else "lrelu"
        channels = {"c_in": widths[level], "c_out": widths[level + 1]}
        yield Layer(f"down{level}", **channels, size=size, transposed=False, act=act, demodulated=folded, **geometry)
    for level in reversed(range(8)):
        size = 128 >> level
        act = "relu" if level > 0 else "tanh"
        channels = {"c_in": widths[level + 1] * (1 if level == 7 else 2), "c_out": widths[level]}
        yield Layer(f"up{level}", **channels, size=size, transposed=True, act=act, demodulated=level > 0, **geometry)


def shipped_layers() -> Iterator[tuple[str, Layer, Variant]]:
    """(label, layer, variant): all layers in NHWC at each precision, and one of each model in NCHW."""
    for model, layers in (("StyleGAN2-256", stylegan2_256()), ("U-Net-256", unet_256())):
        for layer in layers:
            for name, dtype in PRECISIONS.items():
                variant = Variant(f"{name} NHWC", dtype, "tf32" if name == "tf32" else "ieee", True)
                yield f"{model} {layer.name} {variant.name}", layer, variant
            if layer.name in ("b64.conv1", "down2"):
                variant = Variant("fp16 NCHW", torch.float16, "ieee", False)
                yield f"{model} {layer.name} {variant.name}", layer, variant
