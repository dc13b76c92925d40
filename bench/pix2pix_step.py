"""A Pix2Pix training step with spectral norm and feature matching, in plain torch and in fastgan.

256² pixels, batch 4, the widths of Isola et al. 2017. The critic is updated on real and generated pictures in one
batch; the generator then on the adversarial loss, L1, and L1 between the critic's features of both (Wang et al. 2018,
pix2pixHD, equation 4). Both sides are the same computation with the same optimizer (Adam, fused): every critic forward
advances the power iteration, as torch's spectral norm does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.bench_scaled_conv2d import CRITIC, unet_layers, work
from fastgan import ops
from fastgan.models import PatchGAN, UNetGenerator
from fastgan.nn import group_spectral_norm
from fastgan.profile import plain

SIZE, BATCH = 256, 4
L1_WEIGHT, FEATURE_WEIGHT = 100.0, 10.0

Adversarial = Callable[[Tensor | None, Tensor, str], Tensor]
FeatureMatching = Callable[[list[Tensor], list[Tensor]], Tensor]
Features = Callable[[Tensor], list[Tensor]]


def step_flops() -> float:
    """The convolutions' operations: forward, data gradient and weight gradient are one product each.

    The generator runs all three; the critic all three on a batch of twice the size, then forward alone on the real
    pictures, forward and data gradient on the generated ones.
    """
    generator = sum(work(layer, BATCH)["fwd"].flops for layer, _ in unet_layers(64, SIZE))
    critic = sum(work(layer, BATCH)["fwd"].flops for layer, _ in CRITIC)
    return 3 * generator + 2 * 3 * critic + critic + 2 * critic


def make_step(
    generator: nn.Module,
    critic: nn.Module,
    features: Features,
    adversarial: Adversarial,
    feature_matching: FeatureMatching,
    layout: torch.memory_format,
) -> Callable[[], Tensor]:
    """One step on fixed pictures; ``features`` gives the critic's activated maps, and its logits last."""
    sketch, photo = (torch.randn(BATCH, 3, SIZE, SIZE).contiguous(memory_format=layout) for _ in range(2))
    optimizers = [
        torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999), fused=True)
        for network in (generator, critic)
    ]

    def update(network: int, loss: Tensor) -> None:
        optimizers[network].zero_grad(set_to_none=True)
        loss.backward()
        optimizers[network].step()

    def run() -> Tensor:
        generated = generator(sketch)
        real_pair, fake_pair = torch.cat([sketch, photo], 1), torch.cat([sketch, generated], 1)
        critic.requires_grad_(True)
        real, fake = features(torch.cat([real_pair, fake_pair.detach()]))[-1].chunk(2)
        update(1, 0.5 * adversarial(real, fake, "critic"))

        critic.requires_grad_(False)
        with torch.no_grad():
            *real_maps, _ = features(real_pair)
        *fake_maps, logits = features(fake_pair)
        loss = adversarial(None, logits, "generator") + L1_WEIGHT * F.l1_loss(generated, photo)
        loss = loss + FEATURE_WEIGHT * feature_matching(fake_maps, real_maps)
        update(0, loss)
        return loss.detach()

    return run


def plain_step(layout: torch.memory_format) -> Callable[[], Tensor]:
    """Plain torch with networks, weights and pictures in ``layout``."""
    generator, critic = plain.UNet(), plain.PatchCritic(6)
    generator, critic = (network.to(memory_format=layout) for network in (generator, critic))

    def features(pair: Tensor) -> list[Tensor]:
        maps, x = [], pair
        for layer in critic.model:
            x = layer(x)
            if isinstance(layer, nn.LeakyReLU):
                maps.append(x)
        return [*maps, x]

    def matching(fake: list[Tensor], real: list[Tensor]) -> Tensor:
        return torch.stack([F.l1_loss(f, r) for f, r in zip(fake, real, strict=True)]).sum()

    return make_step(generator, critic, features, plain.bce_adversarial, matching, layout)


def step() -> Callable[[], Tensor]:
    """fastgan's networks and losses."""
    critic = PatchGAN(6)
    group_spectral_norm(critic)

    def adversarial(real: Tensor | None, fake: Tensor, side: str) -> Tensor:
        return ops.patch_loss(real, fake, mode="vanilla", side=side).loss

    return make_step(
        UNetGenerator(),
        critic,
        lambda pair: critic(pair, features=True),
        adversarial,
        ops.feature_matching_loss,
        torch.contiguous_format,
    )
