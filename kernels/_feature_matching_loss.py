"""Device code of feature_matching_loss; kernels/feature_matching_loss.py plans its launches.

The gradient of l1 needs only the sign of every difference, which the forward pass keeps in two bits: of 256 values,
bits 2k and 2k + 1 of word j belong to value 16 k + j; 1 above zero, 2 below, 0 equal, 3 NaN. A program has consecutive
elements of one map in the order of memory, in wide loads; of a map whose length wide loads do not divide, whole blocks,
and what is left one by one (TAIL).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._reduce import arrive, below, load_block, select_number, select_pointer, store_block, sum_range, wide

# The table: per program map, first element, end, end of what is read wide, where the map's signs start; then how
# element e finds its mask: (e // a) · b + (e % a) % c. That is a sample's elements, its pixels and its pixels again for
# a contiguous map, and the channels, 1 and 1 for a channels_last one. Last e // a and e % a of the first element.
FIELDS = 10
_FIELDS = tl.constexpr(FIELDS)


@triton.jit
def _mask_values(mask_ptr, record_ptr, base, i, inside):
    """The mask at elements base + ``i``. Counted from where the program begins: a division of 64 bits is a call, which
    costs registers."""
    a, b, c = tl.load(record_ptr + 5).to(tl.int32), tl.load(record_ptr + 6), tl.load(record_ptr + 7).to(tl.int32)
    rest = (tl.load(record_ptr + 9) + base - tl.load(record_ptr + 1)).to(tl.int32) + i
    number = rest // a
    offset = (tl.load(record_ptr + 8) + number) * b + (rest - number * a) % c
    return tl.load(mask_ptr + offset, mask=inside, other=0.0)


@triton.jit
def _store_signs(signs_ptr, difference, base, stop, BLOCK: tl.constexpr):
    """Pack the signs of ``difference`` [BLOCK], 0 outside of the map."""
    i = tl.arange(0, BLOCK)
    positive = tl.where(difference <= 0.0, 0, 1)
    negative = tl.where(difference >= 0.0, 0, 2)
    code = (positive + negative) << (2 * (i // 16 % 16))
    # Every value has bits of its own, so the sum is an or.
    words = tl.reshape(tl.sum(tl.reshape(code, [BLOCK // 256, 16, 16]), 1), [BLOCK // 16])
    j = base // 16 + tl.arange(0, BLOCK // 16)
    tl.store(wide(signs_ptr, j, 4), words, mask=below(j, tl.cdiv(stop, 256) * 16, 4))


@triton.jit
def _sign(signs_ptr, offset, stop):
    """-1, 0, 1 or NaN at elements ``offset`` of a map."""
    j = offset // 256 * 16 + offset % 16
    # Words are read in fours whatever the maps are: their blocks are whole and aligned.
    word = tl.load(wide(signs_ptr, j, 4), mask=below(j, tl.cdiv(stop, 256) * 16, 4), other=0)
    code = (word >> (2 * (offset % 256 // 16)).to(tl.int32)) & 3
    return tl.where(code == 3, float("nan"), ((code & 1) - (code >> 1)).to(tl.float32))


@triton.jit
def _forward_block(
    fake_ptr, real_ptr, mask_ptr, signs_ptr, record_ptr, base, stop,
    KIND: tl.constexpr, MASKED: tl.constexpr, SIGNS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """(mask · ρ, mask) of one block; stores its signs."""
    i = tl.arange(0, BLOCK)
    offset = base + i
    inside = offset < stop
    difference = load_block(fake_ptr, offset, stop, VECTOR) - load_block(real_ptr, offset, stop, VECTOR)
    if SIGNS:
        _store_signs(signs_ptr, difference, base, stop, BLOCK)
    distance = tl.abs(difference) if KIND == "l1" else difference * difference
    if MASKED:
        values = _mask_values(mask_ptr, record_ptr, base, i, inside)
        return distance * values, values
    else:
        return distance, tl.zeros_like(distance)


@triton.jit
def forward_kernel(
    table_ptr,  # int64 [programs, FIELDS], then the first program of each map and the end
    fake_ptrs, real_ptrs,  # tuples of MAPS
    mask_ptrs,  # tuple of MAPS float32 [N, 1, ...], contiguous, or None
    weights,  # tuple of MAPS floats: map_weight, divided by the elements where there is no mask
    loss_ptr,  # float32
    factors_ptr,  # float32 [MAPS]
    signs_ptr,  # int32
    workspace_ptr,  # float32 [2, programs]
    counter_ptr,  # int32, 0 before and after
    MAPS: tl.constexpr, KIND: tl.constexpr, MASKED: tl.constexpr, SIGNS: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Loss, factors and signs of all maps; program p has the range of its record, the last one adds up."""
    programs = tl.num_programs(0)
    record_ptr = table_ptr + tl.program_id(0) * _FIELDS
    number = tl.load(record_ptr)
    start, stop, whole = tl.load(record_ptr + 1), tl.load(record_ptr + 2), tl.load(record_ptr + 3)
    fake_ptr, real_ptr = select_pointer(fake_ptrs, number, MAPS), select_pointer(real_ptrs, number, MAPS)
    mask_ptr = select_pointer(mask_ptrs, number, MAPS) if MASKED else loss_ptr
    sign_ptr = signs_ptr + tl.load(record_ptr + 4)
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for tail in tl.static_range(1 + TAIL):
        for base in range(whole if tail else start, stop if tail else whole, BLOCK):
            distance, values = _forward_block(
                fake_ptr, real_ptr, mask_ptr, sign_ptr, record_ptr, base, stop,
                KIND, MASKED, SIGNS, BLOCK, 1 if tail else VECTOR,
            )  # fmt: skip
            total += distance
            count += values
    tl.store(workspace_ptr + tl.program_id(0), tl.sum(total, 0))
    if MASKED:
        tl.store(workspace_ptr + programs + tl.program_id(0), tl.sum(count, 0))

    if arrive(counter_ptr, programs):
        first_ptr = table_ptr + programs * _FIELDS
        loss = 0.0
        for e in range(MAPS):
            first, end = tl.load(first_ptr + e).to(tl.int32), tl.load(first_ptr + e + 1).to(tl.int32)
            factor = select_number(weights, e, MAPS)
            if MASKED:
                mass = sum_range(workspace_ptr + programs, first, end, 128)
                # A mask of zeros averages nothing.
                factor = tl.where(mass == 0.0, 0.0, factor / tl.where(mass == 0.0, 1.0, mass))
            tl.store(factors_ptr + e, factor)
            loss += factor * sum_range(workspace_ptr, first, end, 128)
        tl.store(loss_ptr, loss)


@triton.jit
def _slope(
    fake_ptr, real_ptr, mask_ptr, signs_ptr, record_ptr, base, offset, i, stop,
    KIND: tl.constexpr, MASKED: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """(mask · ρ', mask) at one block: for l1 from the signs, which are 1/16 of one side."""
    if KIND == "l1":
        slope = _sign(signs_ptr, offset, stop)
    else:
        fake, real = load_block(fake_ptr, offset, stop, VECTOR), load_block(real_ptr, offset, stop, VECTOR)
        slope = 2.0 * (fake - real)
    if MASKED:
        values = _mask_values(mask_ptr, record_ptr, base, i, offset < stop)
        return slope * values, values
    else:
        return slope, tl.full(slope.shape, 1.0, tl.float32)


@triton.jit
def _backward_block(
    fake_ptr, real_ptr, mask_ptr, signs_ptr, fake_out_ptr, real_out_ptr, record_ptr, base, stop, factor,
    KIND: tl.constexpr, MASKED: tl.constexpr, FAKE: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK)
    offset = base + i
    slope, _ = _slope(fake_ptr, real_ptr, mask_ptr, signs_ptr, record_ptr, base, offset, i, stop, KIND, MASKED, VECTOR)
    if FAKE:
        store_block(fake_out_ptr, offset, factor * slope, stop, VECTOR)
    if REAL:
        store_block(real_out_ptr, offset, -factor * slope, stop, VECTOR)


@triton.jit
def backward_kernel(
    table_ptr,  # int64 [programs, FIELDS]
    fake_ptrs, real_ptrs, mask_ptrs,  # tuples of MAPS; the maps None for l1, which does not read them
    grad_loss_ptr, signs_ptr, factors_ptr,
    fake_out_ptrs, real_out_ptrs,  # tuples of MAPS gradients, or None
    MAPS: tl.constexpr, KIND: tl.constexpr, MASKED: tl.constexpr, FAKE: tl.constexpr, REAL: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """± grad_loss · factor · mask · ρ' of all maps."""
    record_ptr = table_ptr + tl.program_id(0) * _FIELDS
    number = tl.load(record_ptr)
    start, stop, whole = tl.load(record_ptr + 1), tl.load(record_ptr + 2), tl.load(record_ptr + 3)
    fake_ptr = select_pointer(fake_ptrs, number, MAPS) if KIND == "l2" else factors_ptr
    real_ptr = select_pointer(real_ptrs, number, MAPS) if KIND == "l2" else factors_ptr
    mask_ptr = select_pointer(mask_ptrs, number, MAPS) if MASKED else factors_ptr
    fake_out_ptr = select_pointer(fake_out_ptrs, number, MAPS) if FAKE else factors_ptr
    real_out_ptr = select_pointer(real_out_ptrs, number, MAPS) if REAL else factors_ptr
    sign_ptr = signs_ptr + tl.load(record_ptr + 4)
    factor = tl.load(factors_ptr + number) * tl.load(grad_loss_ptr)
    for tail in tl.static_range(1 + TAIL):
        for base in range(whole if tail else start, stop if tail else whole, BLOCK):
            _backward_block(
                fake_ptr, real_ptr, mask_ptr, sign_ptr, fake_out_ptr, real_out_ptr, record_ptr, base, stop, factor,
                KIND, MASKED, FAKE, REAL, BLOCK, 1 if tail else VECTOR,
            )  # fmt: skip


@triton.jit
def _second_block(
    fake_ptr, real_ptr, mask_ptr, fake_in_ptr, real_in_ptr, signs_ptr, fake_out_ptr, real_out_ptr, record_ptr, base,
    stop, factor, grad_loss,
    KIND: tl.constexpr, MASKED: tl.constexpr, FAKE: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """cotangent · factor · mask · ρ'; stores the gradients of one block."""
    i = tl.arange(0, BLOCK)
    offset = base + i
    seen = tl.zeros([BLOCK], tl.float32)
    if FAKE:
        seen += load_block(fake_in_ptr, offset, stop, VECTOR)
    if REAL:
        seen -= load_block(real_in_ptr, offset, stop, VECTOR)
    slope, values = _slope(
        fake_ptr, real_ptr, mask_ptr, signs_ptr, record_ptr, base, offset, i, stop, KIND, MASKED, VECTOR
    )
    # ρ'' is 2 for the square and 0 almost everywhere for the modulus.
    CURVATURE: tl.constexpr = 2.0 if KIND == "l2" else 0.0
    second = seen * (CURVATURE * factor * grad_loss) * values
    if FAKE:
        store_block(fake_out_ptr, offset, second, stop, VECTOR)
    if REAL:
        store_block(real_out_ptr, offset, -second, stop, VECTOR)
    return tl.where(offset < stop, seen * (factor * slope), 0.0)


@triton.jit
def second_kernel(
    table_ptr,  # int64 [programs, FIELDS]
    fake_ptrs, real_ptrs, mask_ptrs,
    fake_in_ptrs, real_in_ptrs,  # tuples of MAPS cotangents of the gradients, or None
    grad_loss_ptr, signs_ptr, factors_ptr,
    fake_out_ptrs, real_out_ptrs,
    grad_grad_loss_ptr,  # float32
    workspace_ptr,  # float32 [programs]
    counter_ptr,
    MAPS: tl.constexpr, KIND: tl.constexpr, MASKED: tl.constexpr, FAKE: tl.constexpr, REAL: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Gradient of backward_kernel: cotangent · grad_loss · factor · mask · ρ'' for the maps, a sum for grad_loss."""
    record_ptr = table_ptr + tl.program_id(0) * _FIELDS
    number = tl.load(record_ptr)
    start, stop, whole = tl.load(record_ptr + 1), tl.load(record_ptr + 2), tl.load(record_ptr + 3)
    fake_ptr = select_pointer(fake_ptrs, number, MAPS) if KIND == "l2" else factors_ptr
    real_ptr = select_pointer(real_ptrs, number, MAPS) if KIND == "l2" else factors_ptr
    mask_ptr = select_pointer(mask_ptrs, number, MAPS) if MASKED else factors_ptr
    fake_in_ptr = select_pointer(fake_in_ptrs, number, MAPS) if FAKE else factors_ptr
    real_in_ptr = select_pointer(real_in_ptrs, number, MAPS) if REAL else factors_ptr
    fake_out_ptr = select_pointer(fake_out_ptrs, number, MAPS) if FAKE else factors_ptr
    real_out_ptr = select_pointer(real_out_ptrs, number, MAPS) if REAL else factors_ptr
    sign_ptr = signs_ptr + tl.load(record_ptr + 4)
    factor, grad_loss = tl.load(factors_ptr + number), tl.load(grad_loss_ptr)
    total = tl.zeros([BLOCK], tl.float32)
    for tail in tl.static_range(1 + TAIL):
        for base in range(whole if tail else start, stop if tail else whole, BLOCK):
            total += _second_block(
                fake_ptr, real_ptr, mask_ptr, fake_in_ptr, real_in_ptr, sign_ptr, fake_out_ptr, real_out_ptr,
                record_ptr, base, stop, factor, grad_loss, KIND, MASKED, FAKE, REAL, BLOCK, 1 if tail else VECTOR,
            )  # fmt: skip
    tl.store(workspace_ptr + tl.program_id(0), tl.sum(total, 0))
    if arrive(counter_ptr, tl.num_programs(0)):
        tl.store(grad_grad_loss_ptr, sum_range(workspace_ptr, 0, tl.num_programs(0), 128))
