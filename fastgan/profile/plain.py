"""Plain PyTorch twins of the models: torch.nn layers, torch's spectral norm and losses, and the same state-dict keys.

What a measurement calls "plain PyTorch" is this file. It is written as a good practitioner would write it today, not
to lose: in-place activations, no bias before a norm that removes it, one batch of real and fake per critic pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

NORMS = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d}


class _Skip(nn.Module):
    """One level of the U-Net: x ↦ [x, up(inner(down(x)))], channels concatenated."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.model(x)], 1)


class _Outer(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class UNet(nn.Module):
    """The pix2pix U-Net (Isola et al. 2017, section 6.1.1); same arguments and keys as models.UNetGenerator."""

    def __init__(
        self, in_channels: int = 3, out_channels: int = 3, width: int = 64, size: int = 256, norm: str = "batch"
    ) -> None:
        super().__init__()
        levels = size.bit_length() - 1
        make_norm, bias = NORMS[norm], norm == "instance"
        widths = [width * min(2**level, 8) for level in range(levels)]

        def down(i: int, o: int, bias: bool) -> nn.Module:
            return nn.Conv2d(i, o, 4, stride=2, padding=1, bias=bias)

        def up(i: int, o: int, bias: bool) -> nn.Module:
            return nn.ConvTranspose2d(i, o, 4, stride=2, padding=1, bias=bias)

        outer, inner = widths[-2:]
        block: nn.Module = _Skip(
            nn.LeakyReLU(0.2, True), down(outer, inner, bias), nn.ReLU(True), up(inner, outer, bias), make_norm(outer)
        )
        for level in range(levels - 2, 0, -1):
            outer, inner = widths[level - 1], widths[level]
            layers = [nn.LeakyReLU(0.2, True), down(outer, inner, bias), make_norm(inner), block, nn.ReLU(True)]
            layers += [up(2 * inner, outer, bias), make_norm(outer)]
            if outer == inner == 8 * width:
                layers.append(nn.Dropout(0.5))
            block = _Skip(*layers)
        self.model = _Outer(
            down(in_channels, width, bias), block, nn.ReLU(True), up(2 * width, out_channels, True), nn.Tanh()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class PatchCritic(nn.Module):
    """The n-layer patch critic of pix2pix, torch's own spectral norm; same arguments and keys as models.PatchGAN."""

    def __init__(
        self, in_channels: int, width: int = 64, layers: int = 3, norm: str = "instance", spectral: bool = True
    ) -> None:
        super().__init__()
        make_norm, bias = NORMS[norm], norm == "instance"

        def conv(i: int, o: int, stride: int, bias: bool) -> nn.Module:
            layer = nn.Conv2d(i, o, 4, stride=stride, padding=1, bias=bias)
            return spectral_norm(layer) if spectral else layer

        modules: list[nn.Module] = [conv(in_channels, width, 2, True), nn.LeakyReLU(0.2, True)]
        previous = width
        for level in range(1, layers + 1):
            current = width * min(2**level, 8)
            modules += [
                conv(previous, current, 2 if level < layers else 1, bias),
                make_norm(current),
                nn.LeakyReLU(0.2, True),
            ]
            previous = current
        modules.append(conv(previous, 1, 1, True))
        self.model = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def bce_adversarial(real: Tensor | None, fake: Tensor, side: str) -> Tensor:
    """The vanilla GAN loss from torch's own binary cross-entropy, as ops.patch_loss has it: real + fake terms, no ½.

    Args:
        real, fake: logits of any shape; ``real`` is None on the generator's side.
        side: "critic" or "generator".
    """
    if side == "generator":
        return F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake))
    return F.binary_cross_entropy_with_logits(real, torch.ones_like(real)) + F.binary_cross_entropy_with_logits(
        fake, torch.zeros_like(fake)
    )
