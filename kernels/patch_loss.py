"""Launchers of patch_loss: all maps of both sides in one launch, forward, backward and second order each.

The addresses of the maps travel as arguments of the kernel; the table of what each program has depends on shapes alone
and is copied to the device once per set of shapes. Maps are read in the order of memory (contiguous or channels_last),
never copied; a cotangent of the second order that lies in another order than its map is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _reduce
from ._launch import Launch
from ._patch_loss import backward_kernel, forward_kernel, second_kernel
from ._reduce import ELEMENT_TYPES, VECTOR_BYTES

_BLOCK = 1024  # one 16-byte load for each thread: four warps of them for a half map, eight for a float32 one
_PROGRAMS = 1024  # some eight for each of 128 multiprocessors; the last one adds as many partial sums
_MOST_ENTRIES = 64  # of a kernel's arguments: all pointers of a call must fit 4 KiB
_MOST_PER_SAMPLE = 2**30  # elements of one sample are counted in 32 bits


@dataclass(frozen=True)
class Ranges:
    """The programs of one call, in a table on the device; how many slopes they store; whether any has a tail."""

    table: Tensor
    programs: int
    slopes: int
    tail: bool


_ranges: _reduce.Tables[Ranges] = _reduce.Tables()


def _plan(shapes: Sequence[tuple[int, ...]], slopes: Sequence[bool], vector: int, device: torch.device) -> Ranges:
    """Divide the entries among programs; ``slopes`` says of each whether its slopes are stored."""
    sizes = [_elements(shape) for shape in shapes]
    starts, total = [], 0
    for size, wanted in zip(sizes, slopes, strict=True):
        starts.append(total if wanted else -1)
        total += size if wanted else 0
    records: list[int] = []
    firsts: dict[int, int] = {}
    tail = False
    parts = _reduce.split(sizes, _BLOCK, _PROGRAMS)
    for program, (entry, start, stop) in enumerate(parts):
        firsts.setdefault(entry, program)
        # Slopes lie behind each other: those of a map begin wherever the ones before it end.
        if vector > 1 and max(starts[entry], 0) % 4 != 0:
            whole = start
        else:
            whole = stop if sizes[entry] % vector == 0 else max(start, stop // _BLOCK * _BLOCK)
        tail |= whole < stop
        per_sample = max(1, sizes[entry] // max(1, shapes[entry][0]))
        records += [entry, start, stop, whole, starts[entry], per_sample, *divmod(start, per_sample)]
    bounds = [len(parts)]
    for entry in reversed(range(len(sizes))):
        bounds.append(firsts.get(entry, bounds[-1]))
    return Ranges(_reduce.device_table(records + bounds[::-1] + sizes, device), len(parts), total, tail)


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count


def _planned(maps: Sequence[Tensor], slopes: Sequence[bool], vector: int) -> Ranges:
    device = maps[0].device
    shapes = tuple(tuple(x.shape) for x in maps)
    if device.type == "meta":
        return _plan(shapes, slopes, vector, device)
    key = (shapes, tuple(slopes), vector, device)
    return _ranges.get(key, lambda: _plan(shapes, slopes, vector, device))


def _can_run(maps: Sequence[Tensor]) -> bool:
    return (
        maps[0].dtype in ELEMENT_TYPES
        and len(maps) <= _MOST_ENTRIES
        and all(_dense(x) and x.numel() < _MOST_PER_SAMPLE * max(1, x.shape[0]) for x in maps)
    )


def _dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _vector(maps: Sequence[Tensor]) -> int:
    """Elements of a wide load; 1 where a map does not begin at a multiple of it."""
    return VECTOR_BYTES // maps[0].element_size() if _reduce.aligned(*maps) else 1


@dataclass(frozen=True)
class _Entries:
    """The maps that a call is about: x, what a pairing subtracts, and their factors, of those entries with slopes."""

    xs: list[Tensor]
    ys: list[Tensor] | None
    factors: tuple[float, ...]


def _entries(real: list[Tensor], fake: list[Tensor], scale: list[float], paired: bool, sides: str) -> _Entries:
    """``sides`` is which maps count: any of "r" and "f"; a pairing always has both."""
    if paired:
        xs, ys, scales = real, fake, scale
    else:
        xs = [*(real if "r" in sides else ()), *(fake if "f" in sides else ())]
        ys, scales = None, scale * (len(xs) // len(scale))
    return _Entries(xs, ys, tuple(s / max(1, x.numel()) for s, x in zip(scales, xs, strict=True)))


def _warps(x: Tensor) -> int:
    return _BLOCK * x.element_size() // (32 * 16)


def _wanted(real_slopes: bool, fake_slopes: bool) -> str:
    return ("r" if real_slopes else "") + ("f" if fake_slopes else "")


def plan_forward(
    real: list[Tensor], fake: list[Tensor], sample_weight: Tensor | None, scale: list[float], form: str,
    real_anchor: float, fake_anchor: float, cut: float, paired: bool, real_slopes: bool, fake_slopes: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Launch]:  # fmt: skip
    """(loss, accuracies of real and fake, slopes), still unwritten, and the launch that writes them."""
    entries = _entries(real, fake, scale, paired, "rf")
    maps = [*real, *fake]
    either = real_slopes or fake_slopes
    slopes = [either] * len(real) if paired else [real_slopes] * len(real) + [fake_slopes] * len(fake)
    vector = _vector(maps)
    ranges = _planned(entries.xs, slopes, vector)
    empty = maps[0].new_empty
    results = (
        empty((), dtype=torch.float32),
        empty(len(real), dtype=torch.float32),
        empty(len(fake), dtype=torch.float32),
        empty(ranges.slopes, dtype=torch.float32),
    )
    elements = sum(x.numel() for x in maps)
    launch = Launch(
        kernel=forward_kernel,
        grid=(ranges.programs,),
        arguments={
            "table_ptr": ranges.table,
            "x_ptrs": tuple(entries.xs),
            "y_ptrs": tuple(entries.ys) if paired else None,
            "weight_ptr": sample_weight,
            "factors": entries.factors,
            "real_anchor": float(real_anchor),
            "fake_anchor": float(fake_anchor),
            "cut": float(cut),
            "loss_ptr": results[0],
            "real_accuracy_ptr": results[1],
            "fake_accuracy_ptr": results[2],
            "slopes_ptr": results[3],
            "workspace_ptr": empty(2 * ranges.programs, dtype=torch.float32),
            "counter_ptr": _reduce.counters(maps[0].device, 1),
        },
        constants={
            "ENTRIES": len(entries.xs),
            # Of a pairing, everything is judged as real - fake.
            "REALS": len(real),
            "FORM": form,
            "PAIRED": paired,
            "BLOCK": _BLOCK,
            "VECTOR": vector,
            "SLOPE_VECTOR": 4 if vector > 1 else 1,
            "TAIL": ranges.tail,
        },
        num_warps=_warps(maps[0]),
        bytes=elements * maps[0].element_size() + 4 * (ranges.slopes + len(maps) + 1),
        flops=(30 if form == "bce" else 4) * elements,
    )
    return results, launch


def patch_loss(
    real: list[Tensor], fake: list[Tensor], sample_weight: Tensor | None, scale: list[float], form: str,
    real_anchor: float, fake_anchor: float, cut: float, paired: bool, real_slopes: bool, fake_slopes: bool,
) -> Any:  # fmt: skip
    """fastgan::patch_loss in one launch. NotImplemented for float64, strided maps and more than 64 of them."""
    if not _can_run([*real, *fake]):
        return NotImplemented
    results, launch = plan_forward(
        real, fake, sample_weight, scale, form, real_anchor, fake_anchor, cut, paired, real_slopes, fake_slopes
    )
    launch.run()
    return results


@dataclass(frozen=True)
class _Gradients:
    """What backward and second order share: the entries that want gradients, their targets and the arguments."""

    entries: _Entries
    ranges: Ranges
    all: list[Tensor]
    plus: tuple[Tensor, ...] | None
    minus: tuple[Tensor, ...] | None
    vector: int
    constants: dict[str, Any]


def _gradients(
    real: list[Tensor], fake: list[Tensor], scale: list[float], paired: bool, real_slopes: bool, fake_slopes: bool,
    also: Sequence[Tensor] = (),
) -> _Gradients:  # fmt: skip
    """``also`` are further tensors that wide loads touch."""
    entries = _entries(real, fake, scale, paired, _wanted(real_slopes, fake_slopes))
    targets = [torch.empty_like(x) for x in (*(real if real_slopes else ()), *(fake if fake_slopes else ()))]
    if paired:
        plus = tuple(targets[: len(real)]) if real_slopes else None
        minus = tuple(targets[-len(fake) :]) if fake_slopes else None
    else:
        plus, minus = tuple(targets), None
    vector = _vector([*real, *fake, *also])
    ranges = _planned(entries.xs, [True] * len(entries.xs), vector)
    constants = {
        "ENTRIES": len(entries.xs),
        "PLUS": plus is not None,
        "MINUS": minus is not None,
        "BLOCK": _BLOCK,
        "VECTOR": vector,
        "SLOPE_VECTOR": 4 if vector > 1 else 1,
        "TAIL": ranges.tail,
    }
    return _Gradients(entries, ranges, targets, plus, minus, vector, constants)


def plan_backward(
    grad_loss: Tensor, slopes: Tensor, real: list[Tensor], fake: list[Tensor], sample_weight: Tensor | None,
    scale: list[float], form: str, paired: bool, real_slopes: bool, fake_slopes: bool,
) -> tuple[list[Tensor], Launch]:  # fmt: skip
    """The gradients, still unwritten, and the launch that writes them."""
    found = _gradients(real, fake, scale, paired, real_slopes, fake_slopes, [slopes])
    elements = sum(x.numel() for x in found.all)
    launch = Launch(
        kernel=backward_kernel,
        grid=(found.ranges.programs,),
        arguments={
            "table_ptr": found.ranges.table,
            "slopes_ptr": slopes,
            "weight_ptr": sample_weight,
            "factors": found.entries.factors,
            "grad_loss_ptr": grad_loss,
            "plus_ptrs": found.plus,
            "minus_ptrs": found.minus,
        },
        constants=found.constants,
        num_warps=_warps(found.all[0]),
        bytes=elements * found.all[0].element_size() + 4 * (slopes.numel() + 1),
        flops=elements,
    )
    return found.all, launch


def patch_loss_bwd(
    grad_loss: Tensor, slopes: Tensor, real: list[Tensor], fake: list[Tensor], sample_weight: Tensor | None,
    scale: list[float], form: str, paired: bool, real_slopes: bool, fake_slopes: bool,
) -> Any:  # fmt: skip
    """fastgan::patch_loss_bwd in one launch; NotImplemented as patch_loss."""
    if not _can_run([*real, *fake]):
        return NotImplemented
    gradients, launch = plan_backward(
        grad_loss, slopes, real, fake, sample_weight, scale, form, paired, real_slopes, fake_slopes
    )
    launch.run()
    return gradients


def plan_second(
    cotangents: list[Tensor], grad_loss: Tensor, slopes: Tensor, real: list[Tensor], fake: list[Tensor],
    sample_weight: Tensor | None, scale: list[float], form: str, paired: bool, real_slopes: bool, fake_slopes: bool,
) -> tuple[list[Tensor], Launch]:  # fmt: skip
    """The gradient of grad_loss and those of the maps, still unwritten, and the launch that writes them."""
    wanted = [*(real if real_slopes else ()), *(fake if fake_slopes else ())]
    # An expanded cotangent, that of a sum, is no less in another order than a permuted one.
    inputs = [
        c if c.stride() == x.stride() else torch.empty_like(x).copy_(c) for c, x in zip(cotangents, wanted, strict=True)
    ]
    found = _gradients(real, fake, scale, paired, real_slopes, fake_slopes, [slopes, *inputs])
    plus_in = tuple(inputs[: len(found.plus)]) if found.plus else None
    minus_in = tuple(inputs[-len(found.minus) :]) if found.minus else None
    device = grad_loss.device
    grad_grad_loss = torch.empty_like(grad_loss)
    elements = sum(x.numel() for x in wanted)
    read = sum(x.numel() for x in (*found.entries.xs, *(found.entries.ys or ())))
    launch = Launch(
        kernel=second_kernel,
        grid=(found.ranges.programs,),
        arguments={
            "table_ptr": found.ranges.table,
            "x_ptrs": tuple(found.entries.xs),
            "y_ptrs": tuple(found.entries.ys) if paired else None,
            "plus_in_ptrs": plus_in,
            "minus_in_ptrs": minus_in,
            "slopes_ptr": slopes,
            "weight_ptr": sample_weight,
            "factors": found.entries.factors,
            "grad_loss_ptr": grad_loss,
            "plus_ptrs": found.plus,
            "minus_ptrs": found.minus,
            "grad_grad_loss_ptr": grad_grad_loss,
            "workspace_ptr": torch.empty(found.ranges.programs, dtype=torch.float32, device=device),
            "counter_ptr": _reduce.counters(device, 1),
        },
        constants={**found.constants, "FORM": form, "PAIRED": paired},
        num_warps=_warps(wanted[0]),
        bytes=(2 * elements + read) * wanted[0].element_size() + 4 * (slopes.numel() + 2),
        flops=(24 if form == "bce" else 6) * elements,
    )
    return [grad_grad_loss, *found.all], launch


def patch_loss_bwd_bwd(
    cotangents: list[Tensor], grad_loss: Tensor, slopes: Tensor, real: list[Tensor], fake: list[Tensor],
    sample_weight: Tensor | None, scale: list[float], form: str, paired: bool, real_slopes: bool, fake_slopes: bool,
) -> Any:  # fmt: skip
    """fastgan::patch_loss_bwd_bwd in one launch; NotImplemented as patch_loss."""
    if not _can_run([*real, *fake]):
        return NotImplemented
    results, launch = plan_second(
        cotangents, grad_loss, slopes, real, fake, sample_weight, scale, form, paired, real_slopes, fake_slopes
    )
    launch.run()
    return results


def shipped() -> Iterator[tuple[str, list[Launch]]]:
    """(label, launches) of the configurations that the GPU report compiles and counts; all tensors are on meta."""
    for dtype in (torch.float32, torch.float16):
        real, fake = ([torch.empty(16, 1, 30, 30, dtype=dtype, device="meta") for _ in range(3)] for _ in range(2))
        grad_loss = torch.empty((), device="meta")
        weight = torch.empty(16, device="meta")
        for label, form, anchors, paired, samples in (
            ("vanilla", "bce", (1.0, 0.0), False, None),
            ("hinge", "hinge", (-1.0, 1.0), False, None),
            ("relativistic, weighted", "bce", (1.0, 0.0), True, weight),
        ):
            name = f"3 x 30x30, batch 16, {str(dtype).removeprefix('torch.')}, {label}"
            scale = [1.0 / 3.0] * 3
            results, launch = plan_forward(real, fake, samples, scale, form, *anchors, 0.0, paired, True, True)
            yield f"{name}: forward", [launch]
            setting = (grad_loss, results[3], real, fake, samples, scale, form, paired, True, True)
            yield f"{name}: backward", [plan_backward(*setting)[1]]
            yield f"{name}: second order", [plan_second([*real, *fake], *setting)[1]]
