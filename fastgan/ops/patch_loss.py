"""Adversarial losses over one or many patch maps: value, accuracy and gradient in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops import _check, _map_list, _patch_loss
from fastgan.reference import patch_loss as reference

MODES = ("vanilla", "lsgan", "wgan", "hinge")
SIDES = ("critic", "generator")


class PatchLoss(NamedTuple):
    """What :func:`patch_loss` returns.

    Attributes:
        loss: 0-dim, float32 (float64 for float64 maps).
        real_accuracy: [maps] float32, the fraction of real logits that the critic judges real; None where no real maps
            count.
        fake_accuracy: [maps] float32, the fraction of fake logits that the critic judges fake; None where no fake maps
            count.
    """

    loss: Tensor
    real_accuracy: Tensor | None
    fake_accuracy: Tensor | None


_CAN_RUN = {
    "cuda": _map_list.cuda_can_run,
    "triton": backends.triton_can_run,
    "cpp": backends.cpp_can_run,
    "reference": backends.always,
}

Maps = Tensor | Sequence[Tensor] | None


def patch_loss(
    real: Maps,
    fake: Maps,
    *,
    mode: str = "vanilla",
    side: str = "critic",
    over_maps: str = "mean",
    real_target: float = 1.0,
    fake_target: float = 0.0,
    sample_weight: Tensor | None = None,
    map_weight: Sequence[float] | Tensor | None = None,
    paired: bool = False,
    backend: str | None = None,
) -> PatchLoss:
    """Adversarial loss of patch logits, with the critic's accuracy; the gradient is computed in the same pass.

        loss = Σ_m v_m · ( mean_i w_n(i) · R(real_m[i])  +  mean_i w_n(i) · F(fake_m[i]) )        there is no factor ½
        v_m = map_weight_m, divided by the number of maps if over_maps is "mean";  w = sample_weight

    =========  ==========================================  =============================  =======================
    mode       critic: R(x), F(x)                          generator: F(x)                paired: R(d), no F
    =========  ==========================================  =============================  =======================
    vanilla    BCE(x, real_target), BCE(x, fake_target)    BCE(x, real_target)            BCE(d, real_target)
    lsgan      (x - real_target)², (x - fake_target)²      (x - real_target)²             (d - real_target)²
    wgan       -x, x                                       -x                             -d
    hinge      max(0, 1 - x), max(0, 1 + x)                -x                             max(0, 1 - d)
    =========  ==========================================  =============================  =======================

    BCE(x, t) = softplus(x) - t·x is binary cross entropy with logits. ``paired`` compares the samples of one index:
    d = real - fake for the critic, fake - real for the generator; with mode="vanilla" that is R3GAN's loss.
    Means divide by the number of elements, also where ``sample_weight`` is given. An element at hinge's corner has the
    gradient 0.

    Args:
        real, fake: logits, a tensor or a list of tensors (one per map: scales, or critics), each [N, ...] with at least
            one element per sample; float32, float64, bfloat16 or float16, all of one dtype and device. The critic takes
            either or both; the generator needs ``fake`` and ignores ``real`` unless ``paired``. Two lists have the same
            number of maps; paired maps have the same shapes. Contiguous and channels_last maps are read in place,
            others are copied first.
        mode: "vanilla", "lsgan", "wgan" or "hinge".
        side: "critic" or "generator".
        over_maps: "mean" or "sum". The common pix2pixHD-style code sums vanilla and lsgan, and averages hinge.
        real_target, fake_target: labels of vanilla (a probability, 0.9 smooths) and targets of lsgan; others ignore
            them.
        sample_weight: [N], a factor on each sample's terms, constant; for example w(t) of a critic over time.
        map_weight: [maps], a factor on each map's terms, constant; floats, or a tensor (reading one waits for its
            device).
        paired: compare real and fake by index (relativistic).
        backend: "cuda", "triton", "cpp" or "reference"; None chooses. "cuda" serves only where it is named; it takes
            float32, bfloat16 and float16, 37 maps per launch, and has gradients of both orders.

    Returns:
        :class:`PatchLoss`. Accuracies are the critic's on either side, and not differentiable: real is right above the
        threshold, fake is right at or below it. The threshold is 0, for lsgan midway between its targets (0.5). Of a
        pairing, right is real > fake, for both. A NaN is never right. An empty map (N = 0) has loss and accuracies 0.

    Raises:
        TypeError, ValueError: for arguments of another kind; names the argument, what it must be and what it is.

    Gradients: 1st and 2nd order for real and fake; a third order raises (``backend="reference"`` has all orders). Half
    types are computed in float32, and their gradients rounded once, after the loss's own gradient is multiplied in.

    Source: Goodfellow et al. 2014 (vanilla, non-saturating); Mao et al. 2017 eq. 2 (lsgan, without ½); Arjovsky et al.
    2017 (wgan); Lim and Ye 2017 (hinge); Jolicoeur-Martineau 2018 and Huang et al. 2024, R3GAN, eq. 2 (paired).
    """
    if type(real_target) is not float or type(fake_target) is not float:
        real_target, fake_target = _constant("real_target", real_target), _constant("fake_target", fake_target)
    reals = _as_maps("real", real) if side == "critic" or paired else ()
    fakes = _as_maps("fake", fake)
    weights = None if map_weight is None else _map_weights(map_weight)
    options = (mode, side, over_maps, real_target, fake_target, weights, paired, backend)
    plan = _find_plan(reals, fakes, sample_weight, options)
    if plan.reference is not None:
        maps = list(reals) or None, list(fakes) or None
        result = PatchLoss(*reference.patch_loss(*maps, sample_weight=sample_weight, **plan.reference))
    else:
        result = _run(reals, fakes, sample_weight, plan)
    if _check.DEBUG:
        _check.no_nan("patch_loss", result.loss)
    return result


class _Plan(NamedTuple):
    """What follows from a call's signature alone, and so is worked out once."""

    reference: dict[str, Any] | None  # the reference's keyword arguments; None for the op
    setting: tuple  # the op's arguments behind its tensors; for the reference ()
    copies: bool  # some map is neither contiguous nor channels_last, or a pair differs in memory order
    paired: bool
    compute: torch.dtype  # of a sample weight
    cuda: bool  # the op's twin on CUDA C++


# A critic asks the same few questions in every step, and checking one costs more than a small map's loss. Cleared when
# shapes that keep changing have filled it.
_plans: dict[tuple, _Plan] = {}
_PLANS_MOST = 4096


def _find_plan(real: Sequence[Tensor], fake: Sequence[Tensor], sample_weight: Tensor | None, options: tuple) -> _Plan:
    """The plan of a call; raises for one that is wrong."""
    if torch.compiler.is_compiling():
        return _make_plan(real, fake, sample_weight, *options)
    signature = (
        options,
        torch.is_grad_enabled(),
        backends.override(),
        len(real),
        # Not strides alone: making them is the dearest part, and of a contiguous map they say nothing new.
        *[
            (x.shape, x.is_contiguous() or x.stride(), x.dtype, x.device, x.requires_grad)
            if isinstance(x, Tensor)
            else type(x)
            for x in (*real, *fake, sample_weight)
        ],
    )
    try:
        plan = _plans.get(signature)
    except TypeError:  # an option that cannot be hashed: the checks say what is wrong with it
        return _make_plan(real, fake, sample_weight, *options)
    if plan is None:
        plan = _make_plan(real, fake, sample_weight, *options)
        if len(_plans) >= _PLANS_MOST:
            _plans.clear()
        _plans[signature] = plan
    return plan


def _make_plan(
    real: Sequence[Tensor],
    fake: Sequence[Tensor],
    sample_weight: Tensor | None,
    mode: str,
    side: str,
    over_maps: str,
    real_target: float,
    fake_target: float,
    weights: tuple[float, ...] | None,
    paired: bool,
    backend: str | None,
) -> _Plan:
    _check.one_of("patch_loss", "mode", mode, MODES)
    _check.one_of("patch_loss", "side", side, SIDES)
    _check.one_of("patch_loss", "over_maps", over_maps, ("mean", "sum"))
    first = _check_sides(real, fake, side, paired)
    if sample_weight is not None:
        _check_sample_weight(sample_weight, first, real, fake)
    count = len(real or fake)
    share = 1.0 / count if over_maps == "mean" else 1.0
    if weights is not None and len(weights) != count:
        raise ValueError(f"patch_loss: map_weight must be [maps] = [{count}], got [{len(weights)}]")
    scale = [share * weight for weight in weights or [1.0] * count]
    compute = _check.accumulate_dtype(first.dtype)
    chosen = backends.choose("patch_loss", backend, _CAN_RUN, first.device, first.dtype, maps=(*real, *fake))
    if chosen == "reference":
        keywords = {"mode": mode, "side": side, "real_target": real_target, "fake_target": fake_target}
        return _Plan({**keywords, "map_scale": scale, "paired": paired}, (), False, paired, compute, False)
    form, anchors = _form(mode, side, real_target, fake_target, paired)
    cut = reference.threshold(mode, real_target, fake_target) if not paired else 0.0
    record = torch.is_grad_enabled()
    slopes = [record and any([x.requires_grad for x in maps]) for maps in (real, fake)]
    copies = not all([_is_dense(x) for x in (*real, *fake)])
    copies = copies or (paired and any([r.stride() != f.stride() for r, f in zip(real, fake, strict=True)]))
    return _Plan(None, (scale, form, *anchors, cut, paired, *slopes), copies, paired, compute, chosen == "cuda")


def _run(real: Sequence[Tensor], fake: Sequence[Tensor], sample_weight: Tensor | None, plan: _Plan) -> PatchLoss:
    if plan.copies:
        real, fake = _dense(real), _dense(fake)
        if plan.paired:
            _align(real, fake)
    if sample_weight is not None:
        sample_weight = sample_weight.to(plan.compute).contiguous()
    forward = _patch_loss.forward_cuda if plan.cuda else _patch_loss.forward
    loss, real_accuracy, fake_accuracy, _ = forward(real, fake, sample_weight, *plan.setting)
    return PatchLoss(loss, real_accuracy if real else None, fake_accuracy if fake else None)


def _form(
    mode: str, side: str, real_target: float, fake_target: float, paired: bool
) -> tuple[str, tuple[float, float]]:
    """The kernel's function and its constant for each side (csrc/cpu/patch_loss.cpp).

    A pairing's kernel always works on d = real - fake, so the generator's f(-d) is rewritten as a function of d:
    softplus(-d) - t·(-d) = softplus(d) - (1 - t)·d, and (-d - t)² = (d + t)².
    """
    generator = side == "generator"
    if mode == "vanilla":
        if paired:
            return "bce", (1.0 - real_target if generator else real_target, 0.0)
        return "bce", (real_target, real_target if generator else fake_target)
    if mode == "lsgan":
        if paired:
            return "square", (-real_target if generator else real_target, 0.0)
        return "square", (real_target, real_target if generator else fake_target)
    if paired:
        return "hinge" if mode == "hinge" else "linear", (1.0 if generator else -1.0, 0.0)
    if mode == "wgan" or generator:
        return "linear", (-1.0, -1.0 if generator else 1.0)
    return "hinge", (-1.0, 1.0)


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _dense(maps: Sequence[Tensor]) -> list[Tensor]:
    """The maps, with a copy in place of one that is neither contiguous nor channels_last."""
    return [x if _is_dense(x) else x.contiguous() for x in maps]


def _align(real: list[Tensor], fake: list[Tensor]) -> None:
    """Bring pairs of one contiguous and one channels_last map to one memory order, in place of the list's entries."""
    for i, (r, f) in enumerate(zip(real, fake, strict=True)):
        if r.stride() != f.stride():
            real[i], fake[i] = r.contiguous(), f.contiguous()


def _constant(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"patch_loss: {name} must be a constant, got a tensor that requires grad")
    return float(value)


def _as_maps(name: str, maps: Maps) -> Sequence[Tensor]:
    """The maps of one side; none for None."""
    if type(maps) is list and maps:
        return maps
    if maps is None:
        return ()
    if isinstance(maps, Tensor):
        return [maps]
    if not isinstance(maps, Sequence):
        raise TypeError(f"patch_loss: {name} must be a Tensor, a list of Tensors or None, got {type(maps).__name__}")
    if not maps:
        raise ValueError(f"patch_loss: {name} must hold at least one map, got an empty list")
    return list(maps)


def _check_sides(real: Sequence[Tensor], fake: Sequence[Tensor], side: str, paired: bool) -> Tensor:
    """Check all maps; the first of them."""
    if not real or not fake:
        _check_missing(real, fake, side, paired)
    elif len(real) != len(fake):
        raise ValueError(f"patch_loss: fake must have as many maps as real = {len(real)}, got {len(fake)}")
    first = (real or fake)[0]
    _check.tensor("patch_loss", "real[0]" if real else "fake[0]", first)
    for name, maps in (("real", real), ("fake", fake)):
        for i, x in enumerate(maps):
            _check_map(f"{name}[{i}]", x, first)
    if paired:
        for i, (r, f) in enumerate(zip(real, fake, strict=True)):
            if r.shape != f.shape:
                raise ValueError(f"patch_loss: fake[{i}] must be like real[{i}] = {list(r.shape)}, got {list(f.shape)}")
    return first


def _check_missing(real: Sequence[Tensor], fake: Sequence[Tensor], side: str, paired: bool) -> None:
    if paired:
        name, other = ("real", "fake") if not real else ("fake", "real")
        raise ValueError(f"patch_loss: {name} must be a map or maps, since paired compares it with {other}, got None")
    if not fake and side == "generator":
        raise ValueError("patch_loss: fake must be a map or maps for side='generator', got None")
    if not fake and not real:
        raise ValueError("patch_loss: real or fake must be a map or maps, got None for both")


def _check_map(name: str, x: object, first: Tensor) -> None:
    _check.tensor("patch_loss", name, x)
    if x.dtype != first.dtype:
        raise ValueError(f"patch_loss: {name} must be {first.dtype} like the first map, got {x.dtype}")
    if x.device != first.device:
        raise ValueError(f"patch_loss: {name} must be on {first.device} like the first map, got {x.device}")
    if x.ndim == 0 or (x.shape[0] != 0 and x.numel() == 0):
        raise ValueError(
            f"patch_loss: {name} must be [N, ...] with at least one element per sample, got {list(x.shape)}"
        )


def _map_weights(map_weight: Any) -> tuple[float, ...]:
    if isinstance(map_weight, Tensor):
        if map_weight.requires_grad:
            raise ValueError("patch_loss: map_weight must be a constant, got a tensor that requires grad")
        map_weight = map_weight.tolist()
    if not isinstance(map_weight, Sequence):
        raise TypeError(
            f"patch_loss: map_weight must be a list of floats, a Tensor or None, got {type(map_weight).__name__}"
        )
    return tuple([float(weight) for weight in map_weight])


def _check_sample_weight(weight: Tensor, first: Tensor, real: Sequence[Tensor], fake: Sequence[Tensor]) -> None:
    _check.tensor("patch_loss", "sample_weight", weight, ndim=1)
    if weight.requires_grad:
        raise ValueError("patch_loss: sample_weight must be a constant, got a tensor that requires grad")
    if weight.device != first.device:
        raise ValueError(f"patch_loss: sample_weight must be on {first.device} like the maps, got {weight.device}")
    for name, maps in (("real", real), ("fake", fake)):
        for i, x in enumerate(maps):
            if x.shape[0] != weight.shape[0]:
                raise ValueError(
                    f"patch_loss: sample_weight must be [N] of {name}[{i}] = [{x.shape[0]}], got {list(weight.shape)}"
                )
