"""Conditional image-to-image training (Isola et al. 2017): a U-Net against a patch critic, plus λ·L1, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.train.data import Pairs

Adversarial = Callable[[Tensor | None, Tensor, str], Tensor]


@dataclass(frozen=True)
class Pix2PixConfig:
    """Everything that decides the weights at step k, besides the photographs.

    Learning rates follow the two time-scale rule (Heusel et al. 2017): the critic learns four times as fast.
    """

    size: int = 128  # pixels
    width: int = 24  # the generator's channels at full resolution
    critic_width: int = 24
    critic_layers: int = 3
    norm: str = "batch"
    batch: int = 4
    seed: int = 0
    lr_generator: float = 1e-4
    lr_critic: float = 4e-4
    betas: tuple[float, float] = (0.5, 0.999)
    l1_weight: float = 100.0
    loss: str = "vanilla"
    ema_decay: float = 0.998

    def generator_arguments(self) -> dict[str, Any]:
        """The keyword arguments of models.UNetGenerator: a drawing in, a photograph out."""
        return {"in_channels": 1, "out_channels": 3, "width": self.width, "size": self.size, "norm": self.norm}

    def critic_arguments(self) -> dict[str, Any]:
        """The keyword arguments of models.PatchGAN: it sees the drawing beside the photograph."""
        return {"in_channels": 4, "width": self.critic_width, "layers": self.critic_layers, "norm": "instance"}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a checkpoint stores them."""
        return {**asdict(self), "betas": list(self.betas)}


@dataclass
class StepLosses:
    """The losses of one step, as 0-dim tensors without a graph."""

    critic: Tensor
    adversarial: Tensor
    l1: Tensor


def initialise(model: nn.Module) -> None:
    """Convolutions ~ N(0, 0.02), norm gains ~ N(1, 0.02), biases 0: pix2pix's start (section 6.2)."""
    for module in model.modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if not isinstance(weight, Tensor):
            continue
        with torch.no_grad():
            if weight.dim() == 4:
                # A spectral-normalised weight is scaled by its own σ, so its start does not matter to the output.
                parameter = getattr(getattr(module, "parametrizations", None), "weight", None)
                nn.init.normal_(parameter.original if parameter is not None else weight, 0.0, 0.02)
            elif weight.dim() == 1:
                nn.init.normal_(weight, 1.0, 0.02)
            if isinstance(bias, Tensor):
                nn.init.zeros_(bias)


class Pix2Pix:
    """The two networks, their optimizers and one training step; whether the layers are fused is the caller's choice."""

    def __init__(
        self, generator: nn.Module, critic: nn.Module, adversarial: Adversarial, config: Pix2PixConfig
    ) -> None:
        """``adversarial(real, fake, side)`` gives a scalar loss from logits, real + fake terms without the ½."""
        self.generator, self.critic, self.adversarial, self.config = generator, critic, adversarial, config
        self.generator_optimizer = self._adam(generator, config.lr_generator)
        self.critic_optimizer = self._adam(critic, config.lr_critic)

    def _adam(self, model: nn.Module, lr: float) -> torch.optim.Adam:
        return torch.optim.Adam(model.parameters(), lr=lr, betas=self.config.betas, fused=True)

    def step(self, pairs: Pairs) -> StepLosses:
        """One critic update, then one generator update, on the same pairs."""
        sketch, photo = pairs.sketch, pairs.photo
        generated = self.generator(sketch)

        self.critic.requires_grad_(True)
        both = torch.cat([torch.cat([sketch, photo], 1), torch.cat([sketch, generated.detach()], 1)])
        real, fake = self.critic(both).chunk(2)
        critic_loss = 0.5 * self.adversarial(real, fake, "critic")
        self.critic_optimizer.zero_grad(set_to_none=True)
        critic_loss.backward()
        self.critic_optimizer.step()

        # Frozen weights: the generator's pass needs only the gradient that reaches the picture.
        self.critic.requires_grad_(False)
        adversarial = self.adversarial(None, self.critic(torch.cat([sketch, generated], 1)), "generator")
        l1 = F.l1_loss(generated, photo)
        self.generator_optimizer.zero_grad(set_to_none=True)
        (adversarial + self.config.l1_weight * l1).backward()
        self.generator_optimizer.step()
        return StepLosses(critic_loss.detach(), adversarial.detach(), l1.detach())


class Ema:
    """An exponential moving average of a model: weights averaged, buffers (running statistics, σ vectors) copied."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards ``model`` after ``step`` updates; the decay grows from 0.1, or the random start would linger."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        for ours, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)


@torch.no_grad()
def recalibrate(model: nn.Module, sketches: Iterable[Tensor]) -> None:
    """Replace the running statistics of batch norms by exact averages over ``sketches``, with dropout off.

    Averaged weights never saw the activations that they make, and running statistics of small batches follow the last
    few of them: both make evaluation worse than the weights are. The model's mode is restored.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    training, momenta = model.training, [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        # None is torch's cumulative average: every batch counts the same.
        norm.momentum = None
        norm.train()
    for sketch in sketches:
        model(sketch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(training)
