"""PatchGANLoss: the adversarial loss of a critic that judges patches, at one scale or many."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastgan import ops
from fastgan.ops.patch_loss import MODES, PatchLoss

Logits = Tensor | Sequence[Tensor] | Sequence[Sequence[Tensor]] | None


class PatchGANLoss(nn.Module):
    """The adversarial loss between a critic and a generator; :func:`fastgan.ops.patch_loss` has the formulas.

    It has no parameters and no state, and takes the place of pix2pix's and pix2pixHD's GANLoss: one call scores real
    and fake together, and there is no factor ½ (their trainers multiply the critic's loss by 0.5 themselves).

    Args:
        mode: "vanilla", "lsgan", "wgan" or "hinge".
        over_maps: "mean" or "sum" over the maps of a multi-scale critic; None is what the common pix2pixHD-style code
            does: "mean" for hinge, "sum" for the others.
        real_target, fake_target: labels of vanilla, targets of lsgan.
        map_weight: one float per map, or None for ones.
        paired: relativistic pairing by index.
        backend: as in :func:`fastgan.ops.patch_loss`.

    Raises:
        ValueError: for another mode or over_maps.

    Example:
        >>> loss = PatchGANLoss("hinge")
        >>> loss(critic(real), critic(fake.detach())).loss.backward()
        >>> loss(None, critic(fake), side="generator").loss.backward()
    """

    def __init__(
        self,
        mode: str = "vanilla",
        *,
        over_maps: str | None = None,
        real_target: float = 1.0,
        fake_target: float = 0.0,
        map_weight: Sequence[float] | None = None,
        paired: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"PatchGANLoss: mode must be one of {', '.join(MODES)}, got {mode!r}")
        if over_maps not in (None, "mean", "sum"):
            raise ValueError(f"PatchGANLoss: over_maps must be mean, sum or None, got {over_maps!r}")
        self.mode = mode
        self.over_maps = over_maps or ("mean" if mode == "hinge" else "sum")
        self.real_target = real_target
        self.fake_target = fake_target
        self.map_weight = None if map_weight is None else [float(weight) for weight in map_weight]
        self.paired = paired
        self.backend = backend

    def forward(
        self,
        real_logits: Logits,
        fake_logits: Logits,
        *,
        side: str = "critic",
        sample_weight: Tensor | None = None,
    ) -> PatchLoss:
        """Score a critic's answers.

        Args:
            real_logits, fake_logits: a map [N, ...], a list of maps, or what a critic with intermediate features
                returns: a list (scales) of lists (layers), of which the last of each is the logits. None as in the op.
            side: "critic" or "generator".
            sample_weight: [N], a factor on each sample's terms, constant.

        Returns:
            :class:`fastgan.ops.PatchLoss`: loss, real_accuracy and fake_accuracy. 1st and 2nd order gradients.
        """
        return ops.patch_loss(
            last_maps(real_logits),
            last_maps(fake_logits),
            mode=self.mode,
            side=side,
            over_maps=self.over_maps,
            real_target=self.real_target,
            fake_target=self.fake_target,
            sample_weight=sample_weight,
            map_weight=self.map_weight,
            paired=self.paired,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, over_maps={self.over_maps!r}, paired={self.paired}"


def last_maps(logits: Logits) -> Tensor | list[Tensor] | None:
    """The logits among a critic's outputs: of each scale that is a list of layers, the last."""
    if logits is None or isinstance(logits, Tensor):
        return logits
    return [scale[-1] if isinstance(scale, (list, tuple)) and scale else scale for scale in logits]
