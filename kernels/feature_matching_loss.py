"""Launchers of feature_matching_loss: all maps in one launch, forward, backward and second order each.

The addresses of the maps travel as arguments of the kernel; the table of what each program has depends on shapes and
layouts alone and is copied to the device once per set of them. Maps are read in the order of memory (contiguous or
channels_last, both sides alike), never copied; a cotangent of the second order in another order than its map is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _reduce
from ._feature_matching_loss import backward_kernel, forward_kernel, second_kernel
from ._launch import Launch
from ._reduce import ELEMENT_TYPES, VECTOR_BYTES

_BLOCK = 2048  # sixteen elements for each of 128 threads, eight blocks of 256 signs
_PROGRAMS = 2048  # some sixteen for each of 128 multiprocessors; the last one adds as many partial sums
_MOST_MAPS = 64  # all pointers of a call, up to seven per map, must fit the 4 KiB of a kernel's arguments
_SIGN_BLOCK, _SIGN_WORDS = 256, 16
_MOST_PER_SAMPLE = 2**30  # elements of one sample are counted in 32 bits


@dataclass(frozen=True)
class _Ranges:
    """The programs of one call, in a table on the device; how many words all signs take; whether any has a tail."""

    table: Tensor
    programs: int
    words: int
    tail: bool


_ranges: _reduce.Tables[_Ranges] = _reduce.Tables()


def _plan(maps: Sequence[Tensor], vector: int) -> _Ranges:
    """Divide the maps among programs."""
    parts = _reduce.split([x.numel() for x in maps], _BLOCK, _PROGRAMS)
    starts, words = [], 0
    for x in maps:
        starts.append(words)
        words += -(-x.numel() // _SIGN_BLOCK) * _SIGN_WORDS
    records: list[int] = []
    firsts: dict[int, int] = {}
    tail = False
    for program, (number, start, stop) in enumerate(parts):
        firsts.setdefault(number, program)
        x = maps[number]
        pixels = max(1, math.prod(x.shape[2:]))
        mask = (x.shape[1] * pixels, pixels, pixels) if x.is_contiguous() else (x.shape[1], 1, 1)
        whole = stop if x.numel() % vector == 0 else max(start, stop // _BLOCK * _BLOCK)
        tail |= whole < stop
        records += [number, start, stop, whole, starts[number], *mask, *divmod(start, mask[0])]
    bounds = [len(parts)]
    for number in reversed(range(len(maps))):
        bounds.append(firsts.get(number, bounds[-1]))
    return _Ranges(_reduce.device_table(records + bounds[::-1], maps[0].device), len(parts), words, tail)


def _planned(maps: Sequence[Tensor], vector: int) -> _Ranges:
    device = maps[0].device
    if device.type == "meta":
        return _plan(maps, vector)
    key = (tuple((x.shape, x.is_contiguous()) for x in maps), vector, device)
    return _ranges.get(key, lambda: _plan(maps, vector))


def _can_run(fake: Sequence[Tensor], real: Sequence[Tensor]) -> bool:
    return (
        fake[0].dtype in ELEMENT_TYPES
        and len(fake) <= _MOST_MAPS
        and all(x.numel() < _MOST_PER_SAMPLE * max(1, x.shape[0]) for x in fake)
        and all(_dense(f) and f.stride() == r.stride() for f, r in zip(fake, real, strict=True) if f.numel())
    )


def _dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _vector(*tensors: Tensor) -> int:
    """Elements of a wide load; 1 where a tensor does not begin at a multiple of it."""
    return VECTOR_BYTES // tensors[0].element_size() if _reduce.aligned(*tensors) else 1


def plan_forward(
    fake: list[Tensor], real: list[Tensor], masks: list[Tensor], weight: list[float], kind: str, keep_signs: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], Launch]:
    """(loss, signs, factors), still unwritten, and the launch that writes them."""
    vector = _vector(*fake, *real)
    ranges = _planned(fake, vector)
    signs = keep_signs and kind == "l1"
    empty = fake[0].new_empty
    results = (
        empty((), dtype=torch.float32),
        empty(ranges.words if signs else 0, dtype=torch.int32),
        empty(len(fake), dtype=torch.float32),
    )
    elements = sum(x.numel() for x in fake)
    if not masks:
        weight = [w / max(1, x.numel()) for w, x in zip(weight, fake, strict=True)]
    launch = Launch(
        kernel=forward_kernel,
        grid=(ranges.programs,),
        arguments={
            "table_ptr": ranges.table,
            "fake_ptrs": tuple(fake),
            "real_ptrs": tuple(real),
            "mask_ptrs": tuple(masks) or None,
            "weights": tuple(weight),
            "loss_ptr": results[0],
            "factors_ptr": results[2],
            "signs_ptr": results[1],
            "workspace_ptr": empty(2 * ranges.programs, dtype=torch.float32),
            "counter_ptr": _reduce.counters(fake[0].device, 1),
        },
        constants={
            "MAPS": len(fake),
            "KIND": kind,
            "MASKED": bool(masks),
            "SIGNS": signs,
            "BLOCK": _BLOCK,
            "VECTOR": vector,
            "TAIL": ranges.tail,
        },
        bytes=2 * elements * fake[0].element_size() + _bytes(*masks, *results),
        flops=(4 if masks else 3) * elements,
    )
    return results, launch


def _bytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def feature_matching_loss(
    fake: list[Tensor], real: list[Tensor], masks: list[Tensor], weight: list[float], kind: str, keep_signs: bool
) -> Any:
    """fastgan::feature_matching_loss in one launch. NotImplemented for float64, more than 64 maps, and maps that are
    not dense in one memory order on both sides.
    """
    if not _can_run(fake, real):
        return NotImplemented
    results, launch = plan_forward(fake, real, masks, weight, kind, keep_signs)
    launch.run()
    return results


@dataclass(frozen=True)
class _Gradients:
    """What backward and second order share."""

    all: list[Tensor]
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]


def _gradients(
    grad_loss: Tensor, signs: Tensor, factors: Tensor, fake: list[Tensor], real: list[Tensor], masks: list[Tensor],
    kind: str, want_fake: bool, want_real: bool, also: Sequence[Tensor] = (),
) -> _Gradients:  # fmt: skip
    """``also`` are further tensors that wide loads touch."""
    targets = [torch.empty_like(x) for x in (*(fake if want_fake else ()), *(real if want_real else ()))]
    vector = _vector(*fake, *real, *also)
    ranges = _planned(fake, vector)
    square = kind == "l2"
    arguments = {
        "table_ptr": ranges.table,
        "fake_ptrs": tuple(fake) if square else None,
        "real_ptrs": tuple(real) if square else None,
        "mask_ptrs": tuple(masks) or None,
        "grad_loss_ptr": grad_loss,
        "signs_ptr": signs,
        "factors_ptr": factors,
        "fake_out_ptrs": tuple(targets[: len(fake)]) if want_fake else None,
        "real_out_ptrs": tuple(targets[-len(real) :]) if want_real else None,
    }
    constants = {
        "MAPS": len(fake),
        "KIND": kind,
        "MASKED": bool(masks),
        "FAKE": want_fake,
        "REAL": want_real,
        "BLOCK": _BLOCK,
        "VECTOR": vector,
        "TAIL": ranges.tail,
    }
    return _Gradients(targets, ranges.programs, arguments, constants)


def plan_backward(
    grad_loss: Tensor, signs: Tensor, factors: Tensor, fake: list[Tensor], real: list[Tensor], masks: list[Tensor],
    kind: str, want_fake: bool, want_real: bool,
) -> tuple[list[Tensor], Launch]:  # fmt: skip
    """The gradients, still unwritten, and the launch that writes them."""
    found = _gradients(grad_loss, signs, factors, fake, real, masks, kind, want_fake, want_real)
    launch = Launch(
        kernel=backward_kernel,
        grid=(found.programs,),
        arguments=found.arguments,
        constants=found.constants,
        bytes=_bytes(*found.all, *masks, *([signs] if kind == "l1" else [*fake, *real]), factors, grad_loss),
        flops=sum(x.numel() for x in found.all) * (3 if masks else 2),
    )
    return found.all, launch


def feature_matching_loss_bwd(
    grad_loss: Tensor, signs: Tensor, factors: Tensor, fake: list[Tensor], real: list[Tensor], masks: list[Tensor],
    kind: str, want_fake: bool, want_real: bool,
) -> Any:  # fmt: skip
    """fastgan::feature_matching_loss_bwd in one launch; NotImplemented as feature_matching_loss."""
    if not _can_run(fake, real):
        return NotImplemented
    gradients, launch = plan_backward(grad_loss, signs, factors, fake, real, masks, kind, want_fake, want_real)
    launch.run()
    return gradients


def plan_second(
    cotangents: list[Tensor], grad_loss: Tensor, signs: Tensor, factors: Tensor, fake: list[Tensor],
    real: list[Tensor], masks: list[Tensor], kind: str, want_fake: bool, want_real: bool,
) -> tuple[list[Tensor], Launch]:  # fmt: skip
    """The gradient of grad_loss and those of the maps, still unwritten, and the launch that writes them."""
    wanted = [*(fake if want_fake else ()), *(real if want_real else ())]
    inputs = [
        c if c.stride() == x.stride() else torch.empty_like(x).copy_(c) for c, x in zip(cotangents, wanted, strict=True)
    ]
    found = _gradients(grad_loss, signs, factors, fake, real, masks, kind, want_fake, want_real, inputs)
    grad_grad_loss = torch.empty_like(grad_loss)
    arguments = {
        **found.arguments,
        "fake_in_ptrs": tuple(inputs[: len(fake)]) if want_fake else None,
        "real_in_ptrs": tuple(inputs[-len(real) :]) if want_real else None,
        "grad_grad_loss_ptr": grad_grad_loss,
        "workspace_ptr": torch.empty(found.programs, dtype=torch.float32, device=grad_loss.device),
        "counter_ptr": _reduce.counters(grad_loss.device, 1),
    }
    read = [signs] if kind == "l1" else [*fake, *real]
    launch = Launch(
        kernel=second_kernel,
        grid=(found.programs,),
        arguments=arguments,
        constants=found.constants,
        bytes=_bytes(*inputs, *found.all, *masks, *read, factors, grad_loss, grad_grad_loss),
        flops=6 * sum(x.numel() for x in wanted),
    )
    return [grad_grad_loss, *found.all], launch


def feature_matching_loss_bwd_bwd(
    cotangents: list[Tensor], grad_loss: Tensor, signs: Tensor, factors: Tensor, fake: list[Tensor],
    real: list[Tensor], masks: list[Tensor], kind: str, want_fake: bool, want_real: bool,
) -> Any:  # fmt: skip
    """fastgan::feature_matching_loss_bwd_bwd in one launch; NotImplemented as feature_matching_loss."""
    if not _can_run(fake, real):
        return NotImplemented
    results, launch = plan_second(cotangents, grad_loss, signs, factors, fake, real, masks, kind, want_fake, want_real)
    launch.run()
    return results


def shipped() -> Iterator[tuple[str, list[Launch]]]:
    """(label, launches) of the configurations that the GPU report compiles and counts; all tensors are on meta."""
    shapes = [(16, 64, 128, 128), (16, 128, 64, 64), (16, 256, 32, 32), (16, 512, 31, 31)]
    for dtype in (torch.float32, torch.float16):
        fake, real = ([torch.empty(shape, dtype=dtype, device="meta") for shape in shapes] for _ in range(2))
        masks = [torch.empty((n, 1, h, w), device="meta") for n, _, h, w in shapes]
        grad_loss = torch.empty((), device="meta")
        for kind, weights in (("l1", []), ("l2", []), ("l1", masks)):
            name = f"4 maps, {str(dtype).removeprefix('torch.')}, {kind}{', masked' if weights else ''}"
            (_, signs, factors), launch = plan_forward(fake, real, weights, [1.0] * 4, kind, True)
            yield f"{name}: forward", [launch]
            setting = (grad_loss, signs, factors, fake, real, weights, kind)
            yield f"{name}: backward", [plan_backward(*setting, True, False)[1]]
            yield f"{name}: second order", [plan_second(fake, *setting, True, False)[1]]
