"""Feature matching: the distance between the features of generated and real images, in one read of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops import _check, _map_list
from fastgan.ops._library import define
from fastgan.reference.feature_matching_loss import feature_matching_loss as reference

_NAME = "feature_matching_loss"
_SIGN_BLOCK, _SIGN_WORDS = 256, 16  # csrc/cpu/feature_matching_loss.cpp packs the signs of 256 values in 16 words

Maps = Tensor | Sequence[Tensor]


_CAN_RUN = {
    "cuda": _map_list.cuda_can_run,
    "triton": backends.triton_can_run,
    "cpp": backends.cpp_can_run,
    "reference": backends.always,
}


def feature_matching_loss(
    fake: Maps,
    real: Maps,
    *,
    kind: str = "l1",
    map_weight: Sequence[float] | Tensor | None = None,
    mask: Maps | None = None,
    backend: str | None = None,
) -> Tensor:
    """Weighted sum over maps of the mean distance between features.

        loss = Σ_m map_weight_m · Σ_i mask_m[i] · ρ(fake_m[i] - real_m[i]) / Σ_i mask_m[i],   ρ(d) = |d| or d²

    Without a mask the mean is over all elements. The forward pass reads both sides once; for l1 it keeps the signs of
    the differences in two bits each, from which the backward pass writes the gradient without reading either side
    again.

    Args:
        fake, real: features, a tensor or a list of tensors [N, C, ...]; the same shapes on both sides, one dtype
            (float32, float64, bfloat16, float16) and device. ``real`` may be detached: nothing is computed for it then.
            Contiguous and channels_last maps are read in place, others (and two sides in different orders) copied.
        kind: "l1" (pix2pixHD) or "l2".
        map_weight: [maps], a factor per map, constant; floats, or a tensor (reading one waits for its device).
        mask: weights >= 0, constant, broadcastable to [N, 1, ...] of its map, any floating dtype or bool; a tensor for
            all maps of one size, or a list. A mask of zeros gives the loss 0 and zero gradients.
        backend: "cuda", "triton", "cpp" or "reference"; None chooses. "cuda" serves only where it is named; it takes
            float32, bfloat16 and float16, 36 maps per launch, and has gradients of both orders.

    Returns:
        0-dim, float32 (float64 for float64 maps). A NaN in a feature makes it NaN; an empty map (N = 0) contributes 0.

    Raises:
        TypeError, ValueError: for arguments of another kind; names the argument, what it must be and what it is.

    Gradients: 1st and 2nd order for fake and real (l1: the second is zero, and where both are equal so is the first); a
    third order raises (``backend="reference"`` has all orders). Sums accumulate in float32 per 512 elements, then in
    float64; results do not depend on the number of threads.

    Source: Salimans et al. 2016, section 3.1; Wang et al. 2018, pix2pixHD, eq. 4.
    """
    _check.one_of(_NAME, "kind", kind, ("l1", "l2"))
    fakes, reals = _as_maps("fake", fake), _as_maps("real", real)
    _check_maps(fakes, reals)
    weights = _map_weight(map_weight, len(fakes))
    masks = _as_masks(mask, fakes)
    first = fakes[0]
    chosen = backends.choose(_NAME, backend, _CAN_RUN, first.device, first.dtype, maps=fakes)
    if chosen == "reference":
        loss = reference(fakes, reals, kind=kind, map_weight=weights, masks=masks)
    else:
        _align(fakes, reals)
        record = torch.is_grad_enabled() and any(x.requires_grad for x in (*fakes, *reals))
        compute = _forward_cuda if chosen == "cuda" else _forward
        loss = compute(fakes, reals, _expanded(masks, fakes), weights, kind, record and kind == "l1")[0]
    _check.no_nan(_NAME, loss)
    return loss


def _as_maps(name: str, maps: Maps) -> list[Tensor]:
    if isinstance(maps, Tensor):
        return [maps]
    if not isinstance(maps, Sequence):
        raise TypeError(f"{_NAME}: {name} must be a Tensor or a list of Tensors, got {type(maps).__name__}")
    if not maps:
        raise ValueError(f"{_NAME}: {name} must hold at least one map, got an empty list")
    return list(maps)


def _check_maps(fake: list[Tensor], real: list[Tensor]) -> None:
    if len(fake) != len(real):
        raise ValueError(f"{_NAME}: real must have as many maps as fake = {len(fake)}, got {len(real)}")
    first = fake[0]
    for i, (f, r) in enumerate(zip(fake, real, strict=True)):
        for name, x in ((f"fake[{i}]", f), (f"real[{i}]", r)):
            _check.tensor(_NAME, name, x)
            _check.same_dtype(_NAME, **{"fake[0]": first, name: x})
            _check.same_device(_NAME, **{"fake[0]": first, name: x})
        if f.ndim < 2 or (f.shape[0] != 0 and f.numel() == 0):
            raise ValueError(
                f"{_NAME}: fake[{i}] must be [N, C, ...] with at least one element per sample, got {list(f.shape)}"
            )
        if f.shape != r.shape:
            raise ValueError(f"{_NAME}: real[{i}] must be like fake[{i}] = {list(f.shape)}, got {list(r.shape)}")


def _map_weight(map_weight: Sequence[float] | Tensor | None, count: int) -> list[float]:
    if map_weight is None:
        return [1.0] * count
    if isinstance(map_weight, Tensor):
        if map_weight.requires_grad:
            raise ValueError(f"{_NAME}: map_weight must be a constant, got a tensor that requires grad")
        map_weight = map_weight.tolist()
    if not isinstance(map_weight, Sequence) or len(map_weight) != count:
        got = len(map_weight) if isinstance(map_weight, Sequence) else type(map_weight).__name__
        raise ValueError(f"{_NAME}: map_weight must be [maps] = [{count}], got [{got}]")
    return [float(weight) for weight in map_weight]


def _as_masks(mask: Maps | None, maps: list[Tensor]) -> list[Tensor] | None:
    if mask is None:
        return None
    masks = [mask] * len(maps) if isinstance(mask, Tensor) else _as_maps("mask", mask)
    if len(masks) != len(maps):
        raise ValueError(f"{_NAME}: mask must be a tensor or have as many maps as fake = {len(maps)}, got {len(masks)}")
    for i, (m, x) in enumerate(zip(masks, maps, strict=True)):
        if not isinstance(m, Tensor):
            raise TypeError(f"{_NAME}: mask[{i}] must be a Tensor, got {type(m).__name__}")
        if m.requires_grad:
            raise ValueError(f"{_NAME}: mask[{i}] must be a constant, got a tensor that requires grad")
        if m.device != x.device:
            raise ValueError(f"{_NAME}: mask[{i}] must be on {x.device} like the maps, got {m.device}")
        want = [x.shape[0], 1, *x.shape[2:]]
        fits = m.ndim == x.ndim and all(have in (1, need) for have, need in zip(m.shape, want, strict=True))
        if not fits:
            raise ValueError(f"{_NAME}: mask[{i}] must be broadcastable to {want}, got {list(m.shape)}")
    return masks


def _expanded(masks: list[Tensor] | None, maps: list[Tensor]) -> list[Tensor]:
    """The masks as kernels take them: [N, 1, ...], contiguous, in the dtype of accumulation; none without."""
    if masks is None:
        return []
    dtype = _check.accumulate_dtype(maps[0].dtype)
    return [m.to(dtype).expand(x.shape[0], 1, *x.shape[2:]).contiguous() for m, x in zip(masks, maps, strict=True)]


def _align(fake: list[Tensor], real: list[Tensor]) -> None:
    """Bring both sides of each map to one dense memory order, in place of the lists' entries."""
    for i, (f, r) in enumerate(zip(fake, real, strict=True)):
        if f.is_contiguous() and r.is_contiguous():
            continue
        last = torch.channels_last
        if f.ndim == 4 and f.is_contiguous(memory_format=last):
            real[i] = r.contiguous(memory_format=last)
        else:
            fake[i], real[i] = f.contiguous(), r.contiguous()


def _distance(difference: Tensor, kind: str) -> Tensor:
    return difference.abs() if kind == "l1" else difference.square()


def _wide(maps: list[Tensor]) -> list[Tensor]:
    dtype = _check.accumulate_dtype(maps[0].dtype)
    return [x.to(dtype) for x in maps]


def _pack(difference: Tensor) -> Tensor:
    """Signs as the kernel packs them: of 256 values, bits 2k and 2k + 1 of word j belong to value 16 k + j."""
    flat = difference.permute(0, 2, 3, 1).reshape(-1) if _last(difference) else difference.reshape(-1)
    code = (~(flat <= 0)).int() + 2 * (~(flat >= 0)).int()
    code = torch.nn.functional.pad(code, (0, -code.numel() % _SIGN_BLOCK)).view(-1, 16, _SIGN_WORDS)
    shifts = 2 * torch.arange(16, dtype=torch.int32, device=code.device)
    return torch.bitwise_left_shift(code, shifts[:, None]).sum(1).to(torch.int32).reshape(-1)


def _unpack(words: Tensor, like: Tensor) -> Tensor:
    """The signs in ``words`` as -1, 0, 1 or NaN, in the shape of ``like``; the inverse of _pack."""
    shifts = 2 * torch.arange(16, dtype=torch.int32, device=words.device)
    code = (torch.bitwise_right_shift(words.view(-1, 1, _SIGN_WORDS), shifts[:, None]) & 3).reshape(-1)[: like.numel()]
    sign = torch.tensor([0.0, 1.0, -1.0, float("nan")], device=words.device)[code.long()]
    if not _last(like):
        return sign.view(like.shape)
    n, c, h, w = like.shape
    return sign.view(n, h, w, c).permute(0, 3, 1, 2)


def _last(x: Tensor) -> bool:
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _forward_plain(
    fake: list[Tensor], real: list[Tensor], masks: list[Tensor], weight: list[float], kind: str, keep_signs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    sums, counts, signs = [], [], []
    for i, (f, r) in enumerate(zip(_wide(fake), _wide(real), strict=True)):
        distance = _distance(f - r, kind)
        sums.append((distance * masks[i] if masks else distance).sum())
        counts.append(masks[i].sum() * f.shape[1] if masks else sums[-1].new_tensor(float(f.numel())))
        if keep_signs and kind == "l1":
            signs.append(_pack(f - r))
    count = torch.stack(counts)
    factors = count.new_tensor(weight) / torch.where(count == 0, 1.0, count) * (count != 0)
    empty = torch.empty(0, dtype=torch.int32, device=count.device)
    return (factors * torch.stack(sums)).sum(), torch.cat(signs) if signs else empty, factors


def _forward_fake(
    fake: list[Tensor], real: list[Tensor], masks: list[Tensor], weight: list[float], kind: str, keep_signs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    first = fake[0]
    compute = _check.accumulate_dtype(first.dtype)
    words = sum(-(-x.numel() // _SIGN_BLOCK) * _SIGN_WORDS for x in fake) if keep_signs and kind == "l1" else 0
    return (
        first.new_empty((), dtype=compute),
        first.new_empty(words, dtype=torch.int32),
        first.new_empty(len(fake), dtype=compute),
    )


def _slopes(
    signs: Tensor, factors: Tensor, fake: list[Tensor], real: list[Tensor], masks: list[Tensor], kind: str
) -> list[Tensor]:
    """Per map, the derivative of the loss by fake."""
    slopes, start = [], 0
    for i, (f, r) in enumerate(zip(_wide(fake), _wide(real), strict=True)):
        words = -(-f.numel() // _SIGN_BLOCK) * _SIGN_WORDS
        slope = _unpack(signs[start : start + words], fake[i]).to(f) if kind == "l1" else 2.0 * (f - r)
        start += words
        slopes.append(slope * factors[i] * masks[i] if masks else slope * factors[i])
    return slopes


def _bwd_plain(
    grad_loss: Tensor,
    signs: Tensor,
    factors: Tensor,
    fake: list[Tensor],
    real: list[Tensor],
    masks: list[Tensor],
    kind: str,
    want_fake: bool,
    want_real: bool,
) -> list[Tensor]:
    slopes = _slopes(signs, factors, fake, real, masks, kind)
    sides = [(x, s, 1.0) for x, s in zip(fake, slopes, strict=True)] if want_fake else []
    sides += [(x, s, -1.0) for x, s in zip(real, slopes, strict=True)] if want_real else []
    return [torch.empty_like(x).copy_(s * (sign * grad_loss)) for x, s, sign in sides]


def _bwd_fake(
    grad_loss: Tensor,
    signs: Tensor,
    factors: Tensor,
    fake: list[Tensor],
    real: list[Tensor],
    masks: list[Tensor],
    kind: str,
    want_fake: bool,
    want_real: bool,
) -> list[Tensor]:
    return [torch.empty_like(x) for x in (*(fake if want_fake else ()), *(real if want_real else ()))]


def _bwd_bwd_plain(
    cotangents: list[Tensor], grad_loss: Tensor, signs: Tensor, factors: Tensor, *rest: Any
) -> list[Tensor]:
    fake, real, masks, kind, want_fake, want_real = rest
    fakes = cotangents[: len(fake)] if want_fake else [0.0] * len(fake)
    reals = cotangents[-len(real) :] if want_real else [0.0] * len(real)
    u = [a - b for a, b in zip(fakes, reals, strict=True)]
    slopes = _slopes(signs, factors, fake, real, masks, kind)
    grad_grad_loss = torch.stack([(a * s).sum() for a, s in zip(u, slopes, strict=True)]).sum()
    curvature = 0.0 if kind == "l1" else 2.0
    second = [a * (curvature * factors[i] * grad_loss) * (masks[i] if masks else 1.0) for i, a in enumerate(u)]
    sides = [(x, s, 1.0) for x, s in zip(fake, second, strict=True)] if want_fake else []
    sides += [(x, s, -1.0) for x, s in zip(real, second, strict=True)] if want_real else []
    return [grad_grad_loss.to(grad_loss.dtype), *[torch.empty_like(x).copy_(sign * s) for x, s, sign in sides]]


def _bwd_bwd_fake(cotangents: list[Tensor], grad_loss: Tensor, *rest: Any) -> list[Tensor]:
    return [torch.empty_like(grad_loss), *_bwd_fake(grad_loss, *rest)]


def _setup_forward(ctx: Any, inputs: tuple, output: tuple) -> None:
    fake, real, masks, _, kind, _ = inputs
    _, signs, factors = output
    ctx.save_for_backward(signs, factors, *fake, *real, *masks)
    ctx.kind, ctx.maps = kind, len(fake)


def _setup_bwd(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    grad_loss, signs, factors, fake, real, masks, *setting = inputs
    ctx.save_for_backward(grad_loss, signs, factors, *fake, *real, *masks)
    ctx.setting, ctx.maps = setting, len(fake)


def _setup_bwd_bwd(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    """Nothing is saved: there is no third order."""


def _no_third_order(ctx: Any, cotangents: list[Tensor]) -> tuple:
    raise NotImplementedError(
        f"{_NAME}: the fused op has gradients of first and second order; for higher ones call it with "
        "backend='reference' (fastgan.reference.feature_matching_loss)"
    )


_SETTING = (
    "Tensor grad_loss, Tensor signs, Tensor factors, Tensor[] fake, Tensor[] real, Tensor[] masks, str kind, "
    "bool want_fake, bool want_real"
)


class _Family:
    """The three ops on one set of kernels, and their autograd: a loss's gradients are computed where it was.

    Attributes:
        forward, bwd, bwd_bwd: functions that call the registered ops through autograd.
    """

    def __init__(self, suffix: str, *, triton: bool) -> None:
        def kernel(name: str) -> str | None:
            return f"feature_matching_loss.{name}" if triton else None

        self.forward = define(
            f"{_NAME}{suffix}",
            "(Tensor[] fake, Tensor[] real, Tensor[] masks, float[] weight, str kind, bool keep_signs)"
            " -> (Tensor, Tensor, Tensor)",
            fallback=_forward_plain,
            fake=_forward_fake,
            setup_context=_setup_forward,
            backward=self._backward,
            triton=kernel(_NAME),
        )
        self.bwd = define(
            f"{_NAME}_bwd{suffix}",
            f"({_SETTING}) -> Tensor[]",
            fallback=_bwd_plain,
            fake=_bwd_fake,
            setup_context=_setup_bwd,
            backward=self._bwd_backward,
            triton=kernel(f"{_NAME}_bwd"),
        )
        self.bwd_bwd = define(
            f"{_NAME}_bwd_bwd{suffix}",
            f"(Tensor[] cotangents, {_SETTING}) -> Tensor[]",
            fallback=_bwd_bwd_plain,
            fake=_bwd_bwd_fake,
            setup_context=_setup_bwd_bwd,
            backward=_no_third_order,
            triton=kernel(f"{_NAME}_bwd_bwd"),
        )

    def _backward(self, ctx: Any, grad_loss: Tensor) -> tuple:
        fake_needs, real_needs = ctx.needs_input_grad[:2]
        want_fake, want_real = any(fake_needs), any(real_needs)
        if not (want_fake or want_real):
            return (None,) * 6
        signs, factors, *tensors = ctx.saved_tensors
        n = ctx.maps
        found = self.bwd(
            grad_loss, signs, factors, tensors[:n], tensors[n : 2 * n], tensors[2 * n :], ctx.kind, want_fake, want_real
        )
        return (found[:n] if want_fake else None, found[-n:] if want_real else None, None, None, None, None)

    def _bwd_backward(self, ctx: Any, cotangents: list[Tensor]) -> tuple:
        grad_loss, signs, factors, *tensors = ctx.saved_tensors
        n = ctx.maps
        first, *found = self.bwd_bwd(
            cotangents, grad_loss, signs, factors, tensors[:n], tensors[n : 2 * n], tensors[2 * n :], *ctx.setting
        )
        _, want_fake, want_real = ctx.setting
        return (first, None, None, found[:n] if want_fake else None, found[-n:] if want_real else None, *[None] * 4)


_forward = _Family("", triton=True).forward
# The same ops on CUDA C++: Triton's kernels have the others' place on the GPU.
_forward_cuda = _Family("_cuda", triton=False).forward
