"""What StyleGAN2's generator and discriminator share: widths, the precision of each size, the mapping network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgan import ops
from fastgan.nn import EqualizedLinear


def check_sizes(name: str, resolution: int, **least_one: int) -> None:
    """The resolution is a power of two from 8 on, the others are at least 1."""
    if resolution < 8 or resolution & (resolution - 1):
        raise ValueError(f"{name}: resolution must be a power of two from 8 on, got {resolution}")
    for argument, value in least_one.items():
        if value < 1:
            raise ValueError(f"{name}: {argument} must be at least 1, got {value}")


def block_sizes(resolution: int) -> list[int]:
    """4, 8, … resolution."""
    return [2**level for level in range(2, resolution.bit_length())]


def widths(resolution: int, channel_base: int, channel_max: int) -> dict[int, int]:
    """Size -> channels: channel_base / size, at most channel_max, at least 1."""
    return {size: max(min(channel_base // size, channel_max), 1) for size in block_sizes(resolution)}


def half_sizes(resolution: int, count: int) -> set[int]:
    """The ``count`` highest sizes, which run in float16; 4 never does."""
    return {size for size in block_sizes(resolution)[-count:] if size > 4} if count > 0 else set()


class MappingNetwork(nn.Module):
    """From latent z and label c to ws: normalise both, ``layers`` equalised layers with leaky ReLU, repeat.

        w = fc_{L-1}(… fc_0([pixel_norm(z), pixel_norm(embed(c))])),    ws = w̄ + truncation · (w − w̄)

    In training, ``w_avg`` (w̄ above) follows the mean of each batch: w̄ ← β w̄ + (1 − β) mean_n w. State dict:
    ``embed.*`` if there are labels, ``fc0.*``, …, and the buffer ``w_avg`` [w_dim] if there is a β.

    Args:
        z_dim, c_dim: sizes of z and c; either may be 0, but not both.
        w_dim: size of w and of the layers between.
        num_ws: how often w is repeated; None returns it once, as [N, w_dim].
        layers: how many there are.
        lr_multiplier: of the layers but for ``embed``.
        w_avg_beta: β, or None for no w̄ and no truncation.

    Source: Karras et al., "A Style-Based Generator Architecture for Generative Adversarial Networks", 2019, section 2
    and appendix B (truncation); labels: "Training Generative Adversarial Networks with Limited Data", 2020.
    """

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        num_ws: int | None,
        *,
        layers: int = 8,
        lr_multiplier: float = 0.01,
        w_avg_beta: float | None = 0.998,
    ) -> None:
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim, self.num_ws, self.layers = z_dim, c_dim, w_dim, num_ws, layers
        self.w_avg_beta = w_avg_beta
        embedded = w_dim if c_dim > 0 else 0
        if c_dim > 0:
            self.embed = EqualizedLinear(c_dim, embedded)
        for i in range(layers):
            fan_in = z_dim + embedded if i == 0 else w_dim
            self.add_module(f"fc{i}", EqualizedLinear(fan_in, w_dim, act="lrelu", lr_multiplier=lr_multiplier))
        if w_avg_beta is not None:
            self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(
        self,
        z: Tensor | None,
        c: Tensor | None = None,
        truncation: float = 1.0,
        *,
        truncation_cutoff: int | None = None,
        update_average: bool = True,
    ) -> Tensor:
        """Map latents to styles.

        Args:
            z: [N, z_dim], drawn from N(0, 1); None if z_dim is 0.
            c: [N, c_dim], one-hot as a rule; None if c_dim is 0.
            truncation: how far from w̄ to stay: 1 changes nothing, 0 gives w̄.
            truncation_cutoff: truncate the first so many of the ws only; None means all.
            update_average: whether a forward in training moves w̄.

        Returns:
            [N, num_ws, w_dim], or [N, w_dim] without num_ws, in the parameters' dtype.

        Raises:
            ValueError: z or c of the wrong shape, or missing; truncation without w̄.
        """
        x = self._normalised(z, c)
        for i in range(self.layers):
            x = getattr(self, f"fc{i}")(x)
        # Under autocast the layers answer in half precision.
        x = x.to(self.fc0.weight.dtype)
        if self.w_avg_beta is not None and self.training and update_average and len(x) > 0:
            with torch.no_grad():
                self.w_avg.lerp_(x.detach().mean(0), 1 - self.w_avg_beta)
        if truncation != 1 and (self.w_avg_beta is None or self.num_ws is None):
            raise ValueError(f"mapping: truncation must be 1 without an average of w, got {truncation}")
        if self.num_ws is None:
            return x
        ws = x.unsqueeze(1).expand(-1, self.num_ws, -1)
        if truncation == 1:
            return ws
        near = torch.lerp(self.w_avg.expand_as(x), x, truncation).unsqueeze(1)
        if truncation_cutoff is None or truncation_cutoff >= self.num_ws:
            return near.expand_as(ws)
        if truncation_cutoff < 0:
            raise ValueError(f"mapping: truncation_cutoff must be at least 0 or None, got {truncation_cutoff}")
        return torch.cat([near.expand(-1, truncation_cutoff, -1), ws[:, truncation_cutoff:]], 1)

    def _normalised(self, z: Tensor | None, c: Tensor | None) -> Tensor:
        """[N, z_dim + embedded]: the inputs that there are, each with a mean square of 1."""
        parts = []
        for name, value, size in (("z", z, self.z_dim), ("c", c, self.c_dim)):
            if size == 0:
                continue
            if value is None or value.ndim != 2 or value.shape[1] != size:
                got = None if value is None else list(value.shape)
                raise ValueError(f"mapping: {name} must be [N, {name}_dim] = [N, {size}], got {got}")
            value = value.to(self.fc0.weight.dtype)
            parts.append(ops.pixel_norm(self.embed(value) if name == "c" else value))
        if len(parts) == 2 and len(parts[0]) != len(parts[1]):
            raise ValueError(f"mapping: c must have as many rows as z, {len(parts[0])}, got {len(parts[1])}")
        return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0].dtype) for part in parts], 1)
