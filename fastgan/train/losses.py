"""Gradient penalties: terms of a loss that are made of gradients, so that training differentiates twice.

Each function takes logits or images that the caller computed (so that augmentation, labels and mixed precision stay the
caller's), asks autograd for the inner gradient with ``create_graph=True`` and returns a 0-dim loss. Through this
library's layers the inner gradient and its own backward run on fused ops. A compiled model must be called eagerly under
a penalty: torch refuses second order through a compiled function.

**Lazy regularisation** (Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", 2020, appendix B): a
penalty that is computed in every k-th step only is multiplied by k (``every=k`` does it), and the optimiser, which then
takes k + 1 steps where it took k, gets the settings of :func:`lazy_adam`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


def r1_penalty(logits: Tensor, images: Tensor, *, gamma: float = 10.0, every: int = 1) -> Tensor:
    """R1: the critic's gradient on real images, every · γ/2 · mean_n Σ (∂D(x_n)/∂x_n)².

    Args:
        logits: what the critic says of ``images``, any shape; no sample's logit may depend on another sample but
            through a statistic of the batch, which then counts too.
        images: [N, C, H, W], a leaf or result that requires a gradient.
        gamma: γ ≥ 0; StyleGAN2 takes 10 at 1024², less at smaller sizes.
        every: how many steps apart the penalty is computed.

    Returns:
        0-dim, float32 (float64 for float64).

    Raises:
        ValueError: images that no gradient reaches; ``every`` below 1.

    Source: Mescheder et al., "Which Training Methods for GANs do actually Converge?", 2018, equation 9.
    """
    return _zero_centred("r1_penalty", logits, images, gamma, every)


def r2_penalty(logits: Tensor, images: Tensor, *, gamma: float = 10.0, every: int = 1) -> Tensor:
    """R2: as :func:`r1_penalty`, on the generator's images (detached from the generator, or not, as the caller has
    them).

    Source: Mescheder et al., 2018, equation 10; together with R1: Huang et al., "The GAN is dead; long live the GAN! A
    Modern GAN Baseline", 2024.
    """
    return _zero_centred("r2_penalty", logits, images, gamma, every)


def wgan_gp(
    critic: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    *,
    weight: float = 10.0,
    target: float = 1.0,
    every: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """WGAN-GP: the critic's gradient norm between real and generated images, every · λ · mean_n (‖∂D(x̂)/∂x̂‖₂ − t)².

        x̂_n = real_n + α_n · (fake_n − real_n),    α_n ~ U(0, 1)

    Args:
        critic: image -> logits of any shape.
        real, fake: [N, ...], the same shape, dtype and device; taken as constants.
        weight: λ.
        target: t, the norm that is wanted.
        every: how many steps apart the penalty is computed.
        generator: draws α; None is torch's own.

    Returns:
        0-dim, float32 (float64 for float64). At a gradient of exactly zero its own gradient is zero.

    Raises:
        ValueError: shapes that differ; a critic that does not depend on its image; ``every`` below 1.

    Source: Gulrajani et al., "Improved Training of Wasserstein GANs", 2017, equation 3 and algorithm 1.
    """
    if real.shape != fake.shape:
        raise ValueError(f"wgan_gp: fake must be {list(real.shape)}, as real, got {list(fake.shape)}")
    shape = (len(real), *[1] * (real.ndim - 1))
    device = real.device if generator is None else generator.device
    # Drawn in float32 whatever the images are, so that the same seed mixes the same images.
    alpha = torch.rand(shape, generator=generator, device=device).to(real)
    mixed = torch.lerp(real.detach(), fake.detach(), alpha).requires_grad_()
    gradient = _inner("wgan_gp", critic(mixed).sum(), "critic's image", mixed, every)
    # vector_norm and not √Σ: at zero, the root's slope is infinite and its product with 0 a NaN.
    norms = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    return (norms - target).square().mean() * (weight * every)


class PathLength(NamedTuple):
    """What :func:`path_length_penalty` returns.

    Attributes:
        penalty: 0-dim, the term of the generator's loss.
        mean: 0-dim, the running mean of lengths for the next call, outside any graph.
        lengths: [N], this batch's, outside any graph.
    """

    penalty: Tensor
    mean: Tensor
    lengths: Tensor


def path_length_penalty(
    images: Tensor,
    ws: Tensor,
    mean: Tensor | float = 0.0,
    *,
    weight: float = 2.0,
    decay: float = 0.01,
    every: int = 1,
    noise: Tensor | None = None,
) -> PathLength:
    """Path length: a step in w should move the image as far anywhere, every · weight · mean_n (length_n − a)².

        length_n = √(mean over layers of Σ_j g_nlj²),    g = ∂(Σ images · noise)/∂ws,    noise ~ N(0, 1) / √(H·W)
        a = mean + decay · (mean_n length_n − mean)

    a, the running mean, is the value returned as ``mean`` and, as in the published training, takes part in the
    gradient with its share ``decay`` of this batch.

    Args:
        images: [N, C, H, W], from ``ws``.
        ws: [N, L, w_dim], in the graph of ``images``: what ``generator.mapping`` returned.
        mean: the running mean from the call before, 0 at first; keep it with the checkpoint.
        weight: StyleGAN2 takes 2, and half the batch.
        decay: share of the batch in the running mean, 0 … 1.
        every: how many steps apart the penalty is computed.
        noise: [N, C, H, W], drawn from N(0, 1), or None to draw it here.

    Returns:
        :class:`PathLength`, float32 (float64 for float64). At a length of exactly zero the gradient is zero.

    Raises:
        ValueError: ``ws`` that no gradient reaches, noise of another shape; ``every`` below 1.

    Source: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", 2020, section 3.2, equation 4.
    """
    if noise is None:
        noise = torch.randn_like(images)
    elif noise.shape != images.shape:
        raise ValueError(f"path_length_penalty: noise must be {list(images.shape)}, as images, got {list(noise.shape)}")
    if ws.ndim != 3:
        raise ValueError(f"path_length_penalty: ws must be [N, L, w_dim], got {list(ws.shape)}")
    pixels = images.shape[2] * images.shape[3]
    moved = (_wide(images) * _wide(noise)).sum() / pixels**0.5
    gradient = _inner("path_length_penalty", moved, "ws", ws, every)
    # √(mean over layers of sums) is the norm of a sample's gradient over √L; see wgan_gp for why not by a root.
    lengths = torch.linalg.vector_norm(gradient.flatten(1), dim=1) / ws.shape[1] ** 0.5
    mean = torch.as_tensor(mean, dtype=lengths.dtype, device=lengths.device)
    mean = mean + decay * (lengths.mean() - mean)
    penalty = (lengths - mean).square().mean() * (weight * every)
    return PathLength(penalty, mean.detach(), lengths.detach())


def lazy_adam(every: int, *, lr: float, betas: tuple[float, float]) -> dict[str, Any]:
    """Adam's settings where a penalty every k steps is a step of its own.

    With c = k / (k + 1), lr ← c · lr and β ← β^c keep the time over which it averages: k steps of the loss and one of
    the penalty count as much as k steps did. A penalty that is added to the loss of its step needs none of this.

    Args:
        every: k ≥ 1: 16 for R1 and 4 for the path length in StyleGAN2.
        lr, betas: what would be right without a penalty.

    Returns:
        {"lr": ..., "betas": ...}, for torch.optim.Adam.

    Raises:
        ValueError: ``every`` below 1.

    Source: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", 2020, appendix B.
    """
    if every < 1:
        raise ValueError(f"lazy_adam: every must be at least 1, got {every}")
    share = every / (every + 1)
    return {"lr": lr * share, "betas": (betas[0] ** share, betas[1] ** share)}


def _zero_centred(name: str, logits: Tensor, images: Tensor, gamma: float, every: int) -> Tensor:
    gradient = _inner(name, logits.sum(), "images", images, every)
    return gradient.square().flatten(1).sum(1).mean() * (gamma / 2 * every)


def _inner(name: str, total: Tensor, what: str, inputs: Tensor, every: int) -> Tensor:
    """∂total/∂inputs in at least float32, to be differentiated again."""
    if every < 1:
        raise ValueError(f"{name}: every must be at least 1, got {every}")
    gradient = None
    if inputs.requires_grad and total.requires_grad:
        # allow_unused, to answer in our own words.
        (gradient,) = torch.autograd.grad(total, (inputs,), create_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError(f"{name}: {what} must require a gradient and be used, got one that no gradient reaches")
    return _wide(gradient)


def _wide(x: Tensor) -> Tensor:
    """Half types in float32: a sum of squares over an image overflows float16 above 65504."""
    return x if x.dtype == torch.float64 else x.float()
