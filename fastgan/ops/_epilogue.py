"""What the ops with an epilogue share: its checks, its tensors as kernels take them, its part of the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastgan.ops import _check
from fastgan.ops.activation_grad import activation_grad
from fastgan.reference.activation import ACTIVATIONS
from fastgan.reference.epilogue import Epilogue


class Activated(NamedTuple):
    """The pointwise part of an epilogue, in the order of the ops' schemas."""

    act: str
    alpha: float
    gain: float
    clamp: float | None

    @property
    def identity(self) -> bool:
        return self.linear and self.gain == 1.0

    @property
    def linear(self) -> bool:
        """Whether the gradient is a factor, whatever the values."""
        return self.act == "linear" and self.clamp is None

    def known_from_output(self, has_residual: bool) -> bool:
        """Whether the backward can work from y alone: act' follows from act(z), which follows from y."""
        if self.linear:
            return True
        monotone = self.gain > 0 and self.alpha >= 0
        return ACTIVATIONS[self.act].invertible and monotone and not has_residual

    def cotangent(self, grad_y: Tensor, y: Tensor | None, before: Callable[[], Tensor]) -> Tensor:
        """The cotangent of what the activation is applied to.

        Args:
            grad_y: the cotangent of the result.
            y: the result, if the backward works from it.
            before: computes what the activation is applied to; called only if it is needed.
        """
        if self.linear:
            return grad_y if self.gain == 1.0 else grad_y * self.gain
        if y is not None:
            return activation_grad(grad_y, y, *self, True, 1)
        return activation_grad(grad_y, before(), *self, False, 1)


def check_epilogue(op: str, epilogue: Epilogue, x: Tensor, shape: tuple[int, int, int, int]) -> None:
    """The epilogue's options make sense, and its tensors fit a result of ``shape`` [N, C_out, H, W] on x's device."""
    n, c, *hw = shape
    e = epilogue
    _check.one_of(op, "epilogue.act", e.act, tuple(ACTIVATIONS))
    if e.clamp is not None and not e.clamp > 0:
        raise ValueError(f"{op}: epilogue.clamp must be positive or None, got {e.clamp}")
    if e.noise is None and e.noise_strength is not None:
        raise ValueError(f"{op}: epilogue.noise_strength must be None without noise, got {e.noise_strength}")
    tensors = {name: getattr(e, name) for name in ("noise", "bias", "residual")}
    tensors["noise_strength"] = e.noise_strength if isinstance(e.noise_strength, Tensor) else None
    for name, value in tensors.items():
        if value is not None:
            _check.tensor(op, f"epilogue.{name}", value)
            _check.same_device(op, x=x, **{f"epilogue.{name}": value})
    noise, bias, residual, strength = tensors.values()
    if noise is not None and list(noise.shape) not in (hw, [n, 1, *hw]):
        raise ValueError(
            f"{op}: epilogue.noise must be [H, W] = {hw} or [N, 1, H, W] = {[n, 1, *hw]}, got {list(noise.shape)}"
        )
    if strength is not None and strength.numel() != 1:
        raise ValueError(f"{op}: epilogue.noise_strength must have one element, got {list(strength.shape)}")
    if bias is not None and list(bias.shape) != [c]:
        raise ValueError(f"{op}: epilogue.bias must be [C_out] = {[c]}, got {list(bias.shape)}")
    if residual is not None and tuple(residual.shape) != tuple(shape):
        raise ValueError(
            f"{op}: epilogue.residual must be [N, C_out, H, W] = {list(shape)}, got {list(residual.shape)}"
        )


def epilogue_tensors(epilogue: Epilogue, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """The checked noise, noise_strength, bias and residual as kernels take them, for a result of ``dtype``.

    Noise is [N or 1, 1, H, W], its strength 0-dim, bias [C], all contiguous and in the accumulation dtype; the residual
    has ``dtype``.
    """
    e, wide = epilogue, _check.accumulate_dtype(dtype)
    return (
        None if e.noise is None else contiguous(e.noise if e.noise.ndim == 4 else _four(e.noise), wide),
        None if e.noise_strength is None else _noise_strength(e.noise_strength, e.noise, wide),
        None if e.bias is None else contiguous(e.bias, wide),
        e.residual if e.residual is None or e.residual.dtype == dtype else e.residual.to(dtype),
    )


def _four(noise: Tensor) -> Tensor:
    """[H, W] as [1, 1, H, W]; as one view where it can be, since indexing with None makes two."""
    return noise.view(1, 1, *noise.shape) if noise.is_contiguous() else noise[None, None]


def contiguous(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t`` in ``dtype``, contiguous; without a call into torch where it is both already."""
    t = t if t.dtype == dtype else t.to(dtype)
    return t if t.is_contiguous() else t.contiguous()


def _noise_strength(strength: float | Tensor, noise: Tensor, wide: torch.dtype) -> Tensor:
    if not isinstance(strength, Tensor):
        return torch.full((), float(strength), dtype=wide, device=noise.device)
    strength = strength if strength.dtype == wide else strength.to(wide)
    return strength if strength.ndim == 0 else strength.reshape(())


def epilogue_grads(
    needs: Sequence[bool],
    grad_y: Tensor,
    g: Tensor | None,
    noise: Tensor | None,
    strength: Tensor | None,
    bias: Tensor | None,
    residual_gain: float,
) -> list[Tensor | None]:
    """Gradients of noise, noise_strength, bias and residual, each only if ``needs`` says so.

    Args:
        grad_y: the result's cotangent.
        g: the cotangent of what the activation is applied to; None if nothing before the residual needs a gradient.
    """
    need_noise, need_strength, need_bias, need_residual = needs
    grad_noise = grad_strength = grad_bias = grad_residual = None
    if need_noise or need_strength:
        over_channels = g.sum(1, keepdim=True, dtype=noise.dtype)
        if need_noise:
            grad_noise = (over_channels if strength is None else over_channels * strength).sum_to_size(noise.shape)
        if need_strength:
            grad_strength = (over_channels * noise).sum()
    if need_bias:
        grad_bias = g.sum((0, 2, 3), dtype=bias.dtype)
    if need_residual:
        grad_residual = grad_y * residual_gain
    return [grad_noise, grad_strength, grad_bias, grad_residual]


def is_channels_last(x: Tensor) -> bool:
    """[N, C, H, W] laid out as [N, H, W, C] without gaps, and not contiguous at the same time."""
    if x.ndim != 4 or x.is_contiguous():
        return False
    _, c, h, w = x.shape
    return x.stride() == (h * w * c, 1, w * c, c)


def dense(x: Tensor) -> Tensor:
    """``x`` where it is contiguous or channels_last, else a contiguous copy: the two layouts that kernels walk."""
    return x if x.is_contiguous() or is_channels_last(x) else x.contiguous()
