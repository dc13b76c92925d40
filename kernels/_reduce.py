"""What kernels over lists of tensors share: one launch for all of them, and a reduction that ends inside that launch.

**Lists.** A list becomes a table of int64 on the device, one record per program, that says which tensor and which part
of it are the program's. Tables are kept by their contents' origin (:class:`Tables`), so that a training step copies
nothing to the device once it has seen its shapes.

**Reductions.** Every program leaves its partial sum in a buffer of its own and then counts itself in; the last one to
come adds the partial sums in the order of their numbers. So the result does not depend on who is last, no program ever
waits for another, and there is neither a second launch nor an atomic float.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
import triton
import triton.language as tl
from fastgan.kernels._launch import planning
from torch import Tensor

# torch's dtypes as the element types of pointers that a kernel takes from a table.
ELEMENT_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

# The widest global load and store, and with it the alignment that they need.
VECTOR_BYTES = 16

P = TypeVar("P")


@triton.jit
def arrive(counter_ptr, total):
    """Whether this program is the last of ``total`` that arrive at ``counter_ptr`` (int32, 0), which is 0 again then.

    What a program stored before arriving is visible to the last one. The barrier orders the stores of all threads
    before the one thread that does the atomic; release at the scope of the device publishes them, and the last
    arrival's acquire orders the loads that follow. Those loads must still bypass the L1 cache (``.cg``) where this
    program has read the same addresses before.
    """
    tl.debug_barrier()
    before = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    last = before == total - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def select_pointer(pointers, index, COUNT: tl.constexpr):
    """``pointers[index]`` of a tuple of pointers for an index that is known only at run time."""
    address = pointers[0].to(tl.int64)
    for i in tl.static_range(1, COUNT):
        address = tl.where(index == i, pointers[i].to(tl.int64), address)
    return address.to(pointers[0].dtype)


@triton.jit
def select_number(numbers, index, COUNT: tl.constexpr):
    """``numbers[index]`` of a tuple of floats."""
    number = tl.where(index == 0, numbers[0], 0.0)
    for i in tl.static_range(1, COUNT):
        number = tl.where(index == i, numbers[i], number)
    return number


@triton.jit
def wide(base_ptr, offset, VECTOR: tl.constexpr):
    """``base_ptr + offset`` [..., n], of which every VECTOR along the last axis are consecutive and begin at 16 bytes.

    The launcher has checked it; the compiler cannot see it through a table. The hint is put on the sum made here: one
    on a function's argument is lost when the function is inlined. VECTOR 1 claims nothing.
    """
    pointers = base_ptr + offset
    ALIGNMENT: tl.constexpr = 16 if VECTOR > 1 else 1
    if len(offset.shape) == 2:
        return tl.max_contiguous(tl.multiple_of(pointers, [1, ALIGNMENT]), [1, VECTOR])
    else:
        return tl.max_contiguous(tl.multiple_of(pointers, [ALIGNMENT]), [VECTOR])


@triton.jit
def both(first, second, VECTOR: tl.constexpr):
    """``first & second`` [..., n], equal for every VECTOR along the last axis."""
    mask = first & second
    if len(mask.shape) == 2:
        return tl.max_constancy(mask, [1, VECTOR])
    else:
        return tl.max_constancy(mask, [VECTOR])


@triton.jit
def below(index, limit, VECTOR: tl.constexpr):
    """``index < limit`` [n] for a limit that is a multiple of VECTOR."""
    return tl.max_constancy(index < limit, [VECTOR])


@triton.jit
def load_block(base_ptr, offset, end, VECTOR: tl.constexpr):
    """float32 at ``offset`` [n], 0 from ``end`` on. VECTOR as in :func:`wide`; it divides an ``end`` that is inside."""
    return tl.load(wide(base_ptr, offset, VECTOR), mask=below(offset, end, VECTOR), other=0.0).to(tl.float32)


@triton.jit
def store_block(base_ptr, offset, value, end, VECTOR: tl.constexpr):
    """As :func:`load_block`, in the dtype of the pointer."""
    tl.store(wide(base_ptr, offset, VECTOR), value, mask=below(offset, end, VECTOR))


@triton.jit
def sum_range(source_ptr, begin, end, BLOCK: tl.constexpr):
    """Σ source[begin:end] in an order that depends on nothing but the range; float32."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(source_ptr + i, mask=i < end, other=0.0, cache_modifier=".cg").to(tl.float32)
    return tl.sum(total, 0)


class Tables(Generic[P]):
    """The plans of one op, each with its table on the device, by what they were made from; the oldest are forgotten."""

    def __init__(self, limit: int = 128) -> None:
        self.limit = limit
        self._plans: OrderedDict[Hashable, P] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], P]) -> P:
        """The plan of ``key``; made, with one small copy to the device, where it is not known."""
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = make()
            if len(self._plans) > self.limit:
                self._plans.popitem(last=False)
        else:
            self._plans.move_to_end(key)
        return plan


def device_table(values: Sequence[int], device: torch.device) -> Tensor:
    """``values`` as int64 on ``device``: the only copy to the device that an op with a table makes."""
    if device.type == "meta":
        return torch.empty(len(values), dtype=torch.int64, device=device)
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)


_counters: dict[tuple[torch.device, int], Tensor] = {}


def counters(device: torch.device, count: int) -> Tensor:
    """``count`` int32 zeros for :func:`arrive`, which leaves them zero: made once per device and stream, then reused.

    Kernels of one stream run one after the other, those of two streams may not share a counter. While a CUDA graph is
    captured the zeros are the graph's own, written at each replay: a tensor of its memory pool must not outlive it
    here.
    """
    if device.type == "meta" or planning():
        return torch.empty(count, dtype=torch.int32, device=device)
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(count, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    kept = _counters.get((device, stream))
    if kept is None or kept.numel() < count:
        kept = _counters[device, stream] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return kept


def split(sizes: Sequence[int], block: int, programs: int) -> list[tuple[int, int, int]]:
    """(entry, start, stop) per program: ranges of 0 .. size of each entry, about ``programs`` in all, never empty.

    A range is a multiple of ``block`` long but for the last of an entry, and depends on the sizes alone. There is at
    least one program: a list of nothing but empty tensors has results too.
    """
    span = max(1, -(-sum(sizes) // (programs * block))) * block
    ranges = [(i, start, min(size, start + span)) for i, size in enumerate(sizes) for start in range(0, size, span)]
    return ranges or [(0, 0, 0)]


def aligned(*tensors: Tensor) -> bool:
    """Whether all begin at a multiple of :data:`VECTOR_BYTES`."""
    return all(address(x) % VECTOR_BYTES == 0 for x in tensors)


def address(x: Tensor) -> int:
    """Where ``x`` begins; where nothing has memory, behind a storage that begins at a multiple of everything."""
    return x.storage_offset() * x.element_size() if planning() else x.data_ptr()


def identity(x: Tensor) -> tuple[Any, ...]:
    """What a plan that holds an address of ``x`` depends on."""
    return address(x), x.shape, x.stride()
