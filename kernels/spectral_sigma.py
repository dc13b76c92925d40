"""Launchers of spectral_sigma: one launch and one read of every weight per power iteration of a whole network.

The device code and how an iteration works are in kernels/_spectral_sigma.py; here is what a program owns.

Where the spanned extent of a layer (its columns, or its rows in the hook's order) fits a tile, a program holds W in
*registers* between the two products: it is read once, from anywhere. A longer extent is read a second time in chunks,
which the L2 cache serves as long as it holds what all running programs own; the modelled bytes count W once in both
cases. They do not count the partial sums either, which go through L2: 4 bytes each way per spanned index and program,
beside the 64 KB … 256 KB of W that a program of a large network reads.

Copied is (a) a table of addresses and shapes, to the device, when a weight, u or v is at another address or has
another layout than in the calls before (a CUDA graph is therefore captured after a call with the same tensors), and
(b) a weight whose columns are more than two nested strides in memory: a permuted rank-4 weight, but not a contiguous,
channels_last or transposed one.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _reduce
from ._launch import Launch
from ._reduce import ELEMENT_TYPES, VECTOR_BYTES
from ._spectral_sigma import FIELDS, gradient_kernel, sigma_kernel

_TILE = 8192  # elements of W that a program holds at once: 16 registers of each of its 512 threads
_WARPS = 16
# Where owned indices are the neighbours in memory, they are read in runs of a tile's owned extent, which must not get
# shorter than 4096 / 512 = 8: 32 bytes of float32 is the smallest piece of memory that a GPU fetches.
_TILE_ACROSS = 4096
_LONGEST, _LONGEST_ACROSS = 8192, 512
_LONG_CHUNK, _LONG_CHUNK_ACROSS = 2048, 512
# Four programs for each of some 128 multiprocessors, but not less than two tiles each, nor so much that the last one
# runs alone for long.
_PROGRAMS, _LEAST_ELEMENTS, _MOST_ELEMENTS = 512, 2 * _TILE, 8 * _TILE
# Gradients are fresh tensors, so their addresses travel as arguments of the kernel.
_GRADIENTS_PER_LAUNCH = 32
_LARGEST = 2**31 - 1  # offsets inside one weight have 32 bits


@dataclass(frozen=True)
class _Matrix:
    """Where a weight's matrix [rows, columns] is in memory.

    Column number ``outer_index * outer_step + inner_index * inner_step`` of torch's flattening is
    ``outer_index * outer_stride + inner_index * inner_stride`` elements from the beginning of its row.
    """

    rows: int
    row_stride: int
    outer: int
    outer_stride: int
    outer_step: int
    inner: int
    inner_stride: int
    inner_step: int

    @property
    def shift(self) -> int:
        """Columns are numbered outer · 2^shift + inner."""
        return (self.inner - 1).bit_length()

    @property
    def columns(self) -> int:
        return self.outer * self.inner

    @property
    def padded_columns(self) -> int:
        return ((self.outer - 1) << self.shift) + self.inner


@functools.lru_cache(maxsize=1024)
def _matrix(shape: Sequence[int], strides: Sequence[int], dim: int) -> _Matrix | None:
    """The matrix of a weight, None if its columns need more than two strides."""
    axes, step = [], 1
    for axis in reversed(range(len(shape))):
        if axis != dim:
            axes.append((strides[axis], step, shape[axis]))
            step *= shape[axis]
    merged: list[tuple[int, int, int]] = []
    for stride, step, extent in sorted(axis for axis in axes if axis[2] > 1):
        if merged and (stride, step) == (merged[-1][0] * merged[-1][2], merged[-1][1] * merged[-1][2]):
            merged[-1] = (*merged[-1][:2], merged[-1][2] * extent)
        else:
            merged.append((stride, step, extent))
    if len(merged) > 2:
        return None
    inner, outer = (*merged, (0, 0, 1), (0, 0, 1))[:2]
    return _Matrix(shape[dim], strides[dim], outer[2], *outer[:2], inner[2], *inner[:2])


def _kind(matrix: _Matrix, hook: bool, vector: int, straight: bool) -> tuple[int, int, int, int, bool, bool]:
    """(S, C, FAST, VECTOR, STRAIGHT, long) of sigma_kernel: a tile's owned and spanned extent, its fast axis, and how
    wide loads may be of the weight and, where u and v are aligned (``straight``), of the vector beside it.
    """
    by_rows = matrix.columns == 1 or (matrix.rows > 1 and matrix.row_stride < matrix.inner_stride)
    # Axis 1 of a tile is the spanned one: columns, or rows in the hook's order.
    fast = 1 if by_rows == hook else 0
    spanned = matrix.rows if hook else matrix.padded_columns
    longest, chunk, tile = (
        (_LONGEST, _LONG_CHUNK, _TILE) if fast == 1 else (_LONGEST_ACROSS, _LONG_CHUNK_ACROSS, _TILE_ACROSS)
    )
    long = spanned > longest
    width = chunk if long else max(16, 1 << (spanned - 1).bit_length())
    if by_rows:
        run, stride, others = matrix.rows, matrix.row_stride, (matrix.outer_stride, matrix.inner_stride)
    else:
        run, stride, others = matrix.inner, matrix.inner_stride, (matrix.outer_stride, matrix.row_stride)
    wide = stride == 1 and run % vector == 0 and all(other % vector == 0 for other in others)
    in_order = hook or (matrix.outer == 1 and matrix.inner_step == 1)
    return tile // width, width, fast, vector if wide else 1, straight and in_order and spanned % 4 == 0, long


@dataclass(frozen=True)
class _Plan:
    """What of a launch does not change from call to call."""

    table: Tensor
    layers: int
    programs: int
    workspace: int  # float32 numbers
    counters: int
    kinds: tuple[tuple[int, int, int, int, bool, bool], ...]
    elements: int
    rows: int
    columns: int


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _plan(
    weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], matrices: Sequence[_Matrix], hook: bool,
    read: bool,
) -> _Plan:  # fmt: skip
    """Divide all layers among programs and write the table, on the device of the weights."""
    vector = VECTOR_BYTES // weights[0].element_size()
    elements = sum(w.numel() for w in weights)
    share = min(max(elements // _PROGRAMS, _LEAST_ELEMENTS), _MOST_ELEMENTS)
    kinds: list[tuple[int, int, int, int, bool, bool]] = []
    fields: list[dict[str, int]] = []
    programs = workspace = counters = u_start = v_start = 0
    for weight, u, v, matrix in zip(weights, us, vs, matrices, strict=True):
        straight = _reduce.aligned(u, v) and u_start % 4 == v_start % 4 == 0
        kind = _kind(matrix, hook, vector if _reduce.aligned(weight) else 1, straight)
        if kind not in kinds:
            kinds.append(kind)
        owned, spanned = matrix.padded_columns, matrix.rows
        if not hook:
            owned, spanned = spanned, owned
        span = _round_up(max(1, share // spanned), kind[0])
        # Rows of partial sums begin at multiples of 16 bytes.
        spanned = _round_up(spanned, 4)
        count = -(-owned // span)
        group = max(1, round(count**0.5))
        first_size = 0 if read else _round_up(owned, 4)
        fields.append(
            {
                **{name: _reduce.address(x) for name, x in (("weight", weight), ("u", u), ("v", v))},
                "rows": matrix.rows, "outer": matrix.outer, "inner": matrix.inner, "shift": matrix.shift,
                "row_stride": matrix.row_stride, "outer_stride": matrix.outer_stride,
                "inner_stride": matrix.inner_stride, "outer_step": matrix.outer_step, "inner_step": matrix.inner_step,
                "u_start": u_start, "v_start": v_start, "owned": owned, "spanned": spanned, "kind": kinds.index(kind),
                "first_program": programs, "span": span, "programs": count, "group": group, "counter": counters,
                "first": workspace, "partial": workspace + first_size,
            }
        )  # fmt: skip
        programs += count
        workspace += first_size + count * (1 if read else spanned)
        # A layer's counter, then those of its groups.
        workspace, counters = _round_up(workspace, 4), counters + 1 + -(-count // group)
        u_start, v_start = u_start + matrix.rows, v_start + matrix.columns
    owners = [layer for layer, row in enumerate(fields) for _ in range(row["programs"])]
    table = _reduce.device_table([row[name] for row in fields for name in FIELDS] + owners, weights[0].device)
    return _Plan(table, len(weights), programs, workspace, counters, tuple(kinds), elements, u_start, v_start)


_plans: _reduce.Tables[_Plan] = _reduce.Tables()


def plan_sigma(
    weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], n_iter: int, hook: bool, eps: float,
    dims: Sequence[int],
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:  # fmt: skip
    """The results (σ, u, v) of a call, still unwritten, and the launches that write them: one per iteration, at least
    one. The launches know the arguments by their addresses only: the caller keeps them alive until they have run.

    Args:
        weights: each with columns of at most two strides, see :func:`_matrix`.
        us, vs: contiguous.
    """
    read = n_iter == 0
    hook = hook and not read
    device = weights[0].device

    def make() -> _Plan:
        found = [_matrix(w.shape, w.stride(), dim) for w, dim in zip(weights, dims, strict=True)]
        return _plan(weights, us, vs, found, hook, read)

    key = (tuple(map(_reduce.identity, (*weights, *us, *vs))), tuple(dims), hook, read, weights[0].dtype, device)
    plan = make() if device.type == "meta" else _plans.get(key, make)
    empty = us[0].new_empty
    sigma, u, v = empty(plan.layers), empty(plan.rows), empty(plan.columns)
    arguments = {
        "table_ptr": plan.table,
        "layers": plan.layers,
        "sigma_ptr": sigma,
        "u_ptr": u,
        "v_ptr": v,
        "workspace_ptr": empty(plan.workspace),
        "counters_ptr": _reduce.counters(device, plan.counters),
        "eps": eps,
    }
    constants = {"KINDS": plan.kinds, "DTYPE": ELEMENT_TYPES[weights[0].dtype]}
    launches = [
        Launch(
            kernel=sigma_kernel,
            grid=(plan.programs,),
            arguments=arguments,
            constants={**constants, "HOOK": hook, "READ": read, "FROM_RESULT": i > 0},
            num_warps=_WARPS,
            num_stages=1,
            bytes=plan.elements * weights[0].element_size() + 8 * (plan.rows + plan.columns) + 4 * plan.layers,
            flops=(2 if read else 4) * plan.elements,
        )
        for i in range(max(n_iter, 1))
    ]
    return (sigma, u, v), launches


def spectral_sigma(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], n_iter: int, hook: bool, eps: float, dims: list[int]
) -> Any:
    """fastgan::spectral_sigma; one launch per iteration. NotImplemented for float64 and weights of 2³¹ elements."""
    spans = [sum(s * (n - 1) for s, n in zip(w.stride(), w.shape, strict=True)) for w in weights]
    if weights[0].dtype not in ELEMENT_TYPES or max(spans) > _LARGEST:
        return NotImplemented
    weights = [
        w if _matrix(w.shape, w.stride(), dim) is not None else w.contiguous()
        for w, dim in zip(weights, dims, strict=True)
    ]
    us, vs = [u.contiguous() for u in us], [v.contiguous() for v in vs]
    results, launches = plan_sigma(weights, us, vs, n_iter, hook, eps, dims)
    for launch in launches:
        launch.run()
    return results


@dataclass(frozen=True)
class _GradientPlan:
    table: Tensor
    programs: int
    kinds: tuple[tuple[int, int], ...]


_gradient_plans: _reduce.Tables[_GradientPlan] = _reduce.Tables()


def _plan_gradients(blocks: Sequence[int], needed: Sequence[int], vector: int, device: torch.device) -> _GradientPlan:
    """Divide the lines of the needed layers among programs of about a tile each, or more of a large network."""
    layers = list(zip(blocks[0::3], blocks[1::3], blocks[2::3], strict=True))
    u_starts = [0, *itertools.accumulate(rows for _, rows, _ in layers)]
    v_starts = [0, *itertools.accumulate(outer * inner for outer, _, inner in layers)]
    share = min(max(sum(math.prod(layers[i]) for i in needed) // _PROGRAMS, _TILE), _MOST_ELEMENTS)
    kinds: list[tuple[int, int]] = []
    records: list[int] = []
    for entry, layer in enumerate(needed):
        outer, rows, inner = layers[layer]
        width = min(1024, max(16, 1 << (inner - 1).bit_length()))
        # u and v are float32, and a line of v is read as the gradient's is written.
        wide = inner % vector == 0 and v_starts[layer] % 4 == 0
        kind = (width, vector if wide else 1)
        if kind not in kinds:
            kinds.append(kind)
        span = _round_up(max(1, share // inner), _TILE // width)
        for begin in range(0, outer * rows, span):
            place = (u_starts[layer], v_starts[layer], rows, inner)
            records += [entry, layer, *place, kinds.index(kind), begin, min(begin + span, outer * rows)]
    return _GradientPlan(_reduce.device_table(records, device), len(records) // 9, tuple(kinds))


def plan_gradients(
    grad_sigma: Tensor, u: Tensor, v: Tensor, blocks: Sequence[int], needed: Sequence[int], dtype: torch.dtype
) -> tuple[list[Tensor], list[Launch]]:
    """The gradients of the needed layers, still unwritten, and the launches that write them: one per 32 layers."""
    gradients = [u.new_empty(blocks[3 * i : 3 * i + 3], dtype=dtype) for i in needed]
    grad_sigma, u, v = grad_sigma.contiguous(), u.contiguous(), v.contiguous()
    launches = []
    for start in range(0, len(needed), _GRADIENTS_PER_LAUNCH):
        some, targets = needed[start : start + _GRADIENTS_PER_LAUNCH], gradients[start : start + _GRADIENTS_PER_LAUNCH]
        vector = VECTOR_BYTES // targets[0].element_size() if _reduce.aligned(*targets, v) else 1
        key = (tuple(blocks), tuple(some), vector, u.device)
        make = functools.partial(_plan_gradients, blocks, some, vector, u.device)
        plan = make() if u.device.type == "meta" else _gradient_plans.get(key, make)
        elements = sum(target.numel() for target in targets)
        vectors = sum(blocks[3 * i + 1] + blocks[3 * i] * blocks[3 * i + 2] for i in some)
        launches.append(
            Launch(
                kernel=gradient_kernel,
                grid=(plan.programs,),
                arguments={
                    "table_ptr": plan.table,
                    "gradient_ptrs": tuple(targets),
                    "grad_sigma_ptr": grad_sigma,
                    "u_ptr": u,
                    "v_ptr": v,
                },
                constants={"COUNT": len(targets), "KINDS": plan.kinds, "TILE": _TILE},
                num_warps=_WARPS,
                num_stages=1,
                bytes=elements * targets[0].element_size() + 4 * (vectors + len(some)),
                flops=elements,
            )
        )
    return gradients, launches


def spectral_sigma_bwd(
    grad_sigma: Tensor, u: Tensor, v: Tensor, blocks: list[int], needed: list[int], dtype: torch.dtype
) -> Any:
    """fastgan::spectral_sigma_bwd; one launch per 32 layers. NotImplemented for float64 and 2³¹ elements."""
    largest = max(math.prod(blocks[3 * i : 3 * i + 3]) for i in needed)
    if dtype not in ELEMENT_TYPES or largest > _LARGEST:
        return NotImplemented
    gradients, launches = plan_gradients(grad_sigma, u, v, blocks, needed, dtype)
    for launch in launches:
        launch.run()
    return gradients


_CRITIC = [(64, 6, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (1, 512, 4, 4)]
_SIZES = {"PatchGAN critic": _CRITIC, "12 x 512x512x3x3": [(512, 512, 3, 3)] * 12}


def shipped() -> Iterator[tuple[str, list[Launch]]]:
    """(label, launches) of the configurations that the GPU report compiles and counts; all tensors are on meta."""
    for name, shapes in _SIZES.items():
        for dtype in (torch.float32, torch.float16):
            weights = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
            us = [torch.empty(shape[0], device="meta") for shape in shapes]
            vs = [torch.empty(shape[1] * shape[2] * shape[3], device="meta") for shape in shapes]
            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            dims = [0] * len(shapes)
            for what, n_iter, hook in (("iteration", 1, False), ("hook", 1, True), ("read", 0, False)):
                (sigma, u, v), launches = plan_sigma(weights, us, vs, n_iter, hook, 1e-12, dims)
                yield f"{label}: {what}", launches
            blocks = [extent for shape in shapes for extent in (1, shape[0], shape[1] * shape[2] * shape[3])]
            yield f"{label}: gradient", plan_gradients(sigma, u, v, blocks, list(range(len(shapes))), dtype)[1]
