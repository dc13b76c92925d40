"""Device code of patch_loss; kernels/patch_loss.py plans its launches.

Every element contributes factor · w · f(x), with one of four functions f of a logit and a constant, its anchor, as in
fastgan/ops/_patch_loss.py:

    bce     softplus(x) - anchor · x     square  (x - anchor)²
    linear  anchor · x                   hinge   max(0, 1 + anchor · x)

An *entry* is a map of either side, or a pair of maps whose x is real - fake. A program has consecutive elements of one
entry, in wide loads; of a map whose length wide loads do not divide, whole blocks, and what is left one by one (TAIL).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._reduce import arrive, load_block, select_number, select_pointer, store_block, sum_range

# The table: per program entry, first element, end, end of what is read wide, where the slopes of its entry start (-1:
# nobody wants them), elements per sample, then the sample of the first element and its place there.
FIELDS = 8
_FIELDS = tl.constexpr(FIELDS)


@triton.jit
def _exp_nonpositive(x):
    """exp(x) for x ≤ 0 within 2 ulp, 0 where it is denormal: the hardware's own loses 2⁻²³ |x| of its value.

    Source: Cephes Math Library (S. L. Moshier), the single-precision polynomial.
    """
    clamped = tl.where(x < -87.33, -87.33, x)
    n = tl.floor(clamped * 1.44269504088896341 + 0.5)
    # ln 2 in two parts, so that n · ln 2 is exact enough for |n| ≤ 126.
    r = (clamped - n * 0.693359375) + n * 2.12194440e-4
    p = 1.9875691500e-4 * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    power = (tl.where(n == n, n, 0.0).to(tl.int32) + 127) << 23
    scaled = (p * r * r + r + 1.0) * power.to(tl.float32, bitcast=True)
    return tl.where(x < -87.33, 0.0, scaled)


@triton.jit
def _log1p_unit(x):
    """log1p(x) for x in [0, 1] within 2 ulp: 2 atanh(s), s = x / (2 + x), where nothing cancels.

    The polynomial is the Chebyshev fit of degree 4 to (atanh(s) / s - 1) / s² on s ≤ 1/3.
    """
    s = x / (2.0 + x)
    z = s * s
    p = 1.16195251e-1 * z + 1.08516575e-1
    p = p * z + 1.42962917e-1
    p = p * z + 1.99998507e-1
    p = p * z + 3.33333337e-1
    return 2.0 * s + 2.0 * s * (z * p)


@triton.jit
def _evaluate(x, anchor, FORM: tl.constexpr):
    """(f, f') at x. Comparisons with a NaN are false, and every false branch here passes it on."""
    if FORM == "bce":
        e = _exp_nonpositive(-tl.abs(x))
        high = 1.0 / (1.0 + e)
        low = e * high
        value = tl.where(x > 0.0, x, 0.0) - anchor * x + _log1p_unit(e)
        # sigmoid(x) - anchor would lose a confident, right answer's slope to cancellation.
        slope = (1.0 - anchor) * tl.where(x < 0.0, low, high) - anchor * tl.where(x < 0.0, high, low)
    elif FORM == "square":
        value = (x - anchor) * (x - anchor)
        slope = 2.0 * (x - anchor)
    elif FORM == "linear":
        value = anchor * x
        slope = anchor + 0.0 * tl.zeros_like(x)
    else:
        margin = 1.0 + anchor * x
        value = tl.where(margin < 0.0, 0.0, margin)
        slope = tl.where(margin <= 0.0, 0.0, anchor)
    return value, slope


@triton.jit
def _curvature(x, FORM: tl.constexpr):
    """f'' at x: 0 almost everywhere for linear and hinge."""
    if FORM == "bce":
        e = _exp_nonpositive(-tl.abs(x))
        high = 1.0 / (1.0 + e)
        return e * high * high
    elif FORM == "square":
        return tl.full(x.shape, 2.0, tl.float32)
    else:
        return tl.zeros_like(x)


@triton.jit
def _sample_weight(weight_ptr, record_ptr, base, i, mask):
    """The weights of the samples of elements base + ``i``. Counted from where the program begins: a division of 64 bits
    is a call, which costs registers."""
    place = (tl.load(record_ptr + 7) + base - tl.load(record_ptr + 1)).to(tl.int32) + i
    sample = tl.load(record_ptr + 6) + place // tl.load(record_ptr + 5).to(tl.int32)
    return tl.load(weight_ptr + sample, mask=mask, other=0.0)


@triton.jit
def _forward_block(
    x_ptr, y_ptr, weight_ptr, slopes_ptr, record_ptr, base, stop, slope_start, anchor, cut, is_fake,
    FORM: tl.constexpr, PAIRED: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, SLOPE_VECTOR: tl.constexpr,
):  # fmt: skip
    """(w · f, 1 where the critic is right) of one block; stores the slopes."""
    i = tl.arange(0, BLOCK)
    offset = base + i
    mask = offset < stop
    x = load_block(x_ptr, offset, stop, VECTOR)
    if PAIRED:
        x -= load_block(y_ptr, offset, stop, VECTOR)
    value, slope = _evaluate(x, anchor, FORM)
    if slope_start >= 0:
        store_block(slopes_ptr + slope_start, offset, slope, stop, SLOPE_VECTOR)
    if weight_ptr is not None:
        value *= _sample_weight(weight_ptr, record_ptr, base, i, mask)
    right = tl.where(is_fake, x <= cut, x > cut)
    return tl.where(mask, value, 0.0), (right & mask).to(tl.float32)


@triton.jit
def forward_kernel(
    table_ptr,  # int64 [programs, FIELDS], then the first program of each entry and the end, then their elements
    x_ptrs,  # tuple of ENTRIES maps: real ones, then fake ones
    y_ptrs,  # tuple of ENTRIES maps to subtract, or None
    weight_ptr,  # float32 [N] or None
    factors,  # tuple of ENTRIES floats: map_scale / elements
    real_anchor, fake_anchor, cut,
    loss_ptr,  # float32
    real_accuracy_ptr, fake_accuracy_ptr,  # float32 [maps]
    slopes_ptr,  # float32 [elements of the entries that want them]
    workspace_ptr,  # float32 [2, programs]
    counter_ptr,  # int32, 0 before and after
    ENTRIES: tl.constexpr, REALS: tl.constexpr, FORM: tl.constexpr, PAIRED: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr, SLOPE_VECTOR: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Loss, accuracies and slopes of all maps; program p has the range of its record, the last one adds up."""
    programs = tl.num_programs(0)
    record_ptr = table_ptr + tl.program_id(0) * _FIELDS
    entry = tl.load(record_ptr)
    start, stop, whole = tl.load(record_ptr + 1), tl.load(record_ptr + 2), tl.load(record_ptr + 3)
    slope_start = tl.load(record_ptr + 4)
    x_ptr = select_pointer(x_ptrs, entry, ENTRIES)
    y_ptr = select_pointer(y_ptrs, entry, ENTRIES) if PAIRED else x_ptr
    is_fake = entry >= REALS
    anchor = tl.where(is_fake, fake_anchor, real_anchor)
    total = tl.zeros([BLOCK], tl.float32)
    hits = tl.zeros([BLOCK], tl.float32)
    for tail in tl.static_range(1 + TAIL):
        for base in range(whole if tail else start, stop if tail else whole, BLOCK):
            value, right = _forward_block(
                x_ptr, y_ptr, weight_ptr, slopes_ptr, record_ptr, base, stop, slope_start, anchor, cut, is_fake,
                FORM, PAIRED, BLOCK, 1 if tail else VECTOR, 1 if tail else SLOPE_VECTOR,
            )  # fmt: skip
            total += value
            hits += right
    tl.store(workspace_ptr + tl.program_id(0), tl.sum(total, 0))
    tl.store(workspace_ptr + programs + tl.program_id(0), tl.sum(hits, 0))

    if arrive(counter_ptr, programs):
        first_ptr = table_ptr + programs * _FIELDS
        loss = 0.0
        for e in range(ENTRIES):
            first, end = tl.load(first_ptr + e).to(tl.int32), tl.load(first_ptr + e + 1).to(tl.int32)
            elements = tl.load(first_ptr + ENTRIES + 1 + e)
            loss += select_number(factors, e, ENTRIES) * sum_range(workspace_ptr, first, end, 128)
            # An empty map has no programs.
            accuracy = sum_range(workspace_ptr + programs, first, end, 128) / tl.maximum(elements, 1).to(tl.float32)
            if PAIRED:
                tl.store(real_accuracy_ptr + e, accuracy)
                tl.store(fake_accuracy_ptr + e, accuracy)
            elif e < REALS:
                tl.store(real_accuracy_ptr + e, accuracy)
            else:
                tl.store(fake_accuracy_ptr + e - REALS, accuracy)
        tl.store(loss_ptr, loss)


@triton.jit
def _backward_block(
    slopes_ptr, weight_ptr, plus_ptr, minus_ptr, record_ptr, base, stop, slope_start, factor,
    PLUS: tl.constexpr, MINUS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, SLOPE_VECTOR: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK)
    offset = base + i
    mask = offset < stop
    gradient = factor * load_block(slopes_ptr + slope_start, offset, stop, SLOPE_VECTOR)
    if weight_ptr is not None:
        gradient *= _sample_weight(weight_ptr, record_ptr, base, i, mask)
    if PLUS:
        store_block(plus_ptr, offset, gradient, stop, VECTOR)
    if MINUS:
        store_block(minus_ptr, offset, -gradient, stop, VECTOR)


@triton.jit
def backward_kernel(
    table_ptr,  # int64 [programs, FIELDS]
    slopes_ptr,
    weight_ptr,
    factors,
    grad_loss_ptr,
    plus_ptrs,  # tuple of ENTRIES gradients of x, or None
    minus_ptrs,  # those of what a pairing subtracts, or None
    ENTRIES: tl.constexpr, PLUS: tl.constexpr, MINUS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
    SLOPE_VECTOR: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """gradient = ± factor · w · grad_loss · slope of all maps that want one."""
    record_ptr = table_ptr + tl.program_id(0) * _FIELDS
    entry = tl.load(record_ptr)
    start, stop, whole = tl.load(record_ptr + 1), tl.load(record_ptr + 2), tl.load(record_ptr + 3)
    slope_start = tl.load(record_ptr + 4)
    plus_ptr = select_pointer(plus_ptrs, entry, ENTRIES) if PLUS else slopes_ptr
    minus_ptr = select_pointer(minus_ptrs, entry, ENTRIES) if MINUS else slopes_ptr
    factor = select_number(factors, entry, ENTRIES) * tl.load(grad_loss_ptr)
    for tail in tl.static_range(1 + TAIL):
        for base in range(whole if tail else start, stop if tail else whole, BLOCK):
            _backward_block(
                slopes_ptr, weight_ptr, plus_ptr, minus_ptr, record_ptr, base, stop, slope_start, factor,
                PLUS, MINUS, BLOCK, 1 if tail else VECTOR, 1 if tail else SLOPE_VECTOR,
            )  # fmt: skip


@triton.jit
def _second_block(
    x_ptr, y_ptr, plus_in_ptr, minus_in_ptr, slopes_ptr, weight_ptr, plus_ptr, minus_ptr, record_ptr, base, stop,
    slope_start, factor, grad_loss,
    FORM: tl.constexpr, PAIRED: tl.constexpr, PLUS: tl.constexpr, MINUS: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr, SLOPE_VECTOR: tl.constexpr,
):  # fmt: skip
    """factor · w · cotangent · f'; stores the gradients of one block."""
    i = tl.arange(0, BLOCK)
    offset = base + i
    mask = offset < stop
    x = load_block(x_ptr, offset, stop, VECTOR)
    if PAIRED:
        x -= load_block(y_ptr, offset, stop, VECTOR)
    seen = tl.zeros([BLOCK], tl.float32)
    if PLUS:
        seen += load_block(plus_in_ptr, offset, stop, VECTOR)
    if MINUS:
        seen -= load_block(minus_in_ptr, offset, stop, VECTOR)
    seen *= factor
    if weight_ptr is not None:
        seen *= _sample_weight(weight_ptr, record_ptr, base, i, mask)
    gradient = grad_loss * seen * _curvature(x, FORM)
    if PLUS:
        store_block(plus_ptr, offset, gradient, stop, VECTOR)
    if MINUS:
        store_block(minus_ptr, offset, -gradient, stop, VECTOR)
    return tl.where(mask, seen * load_block(slopes_ptr + slope_start, offset, stop, SLOPE_VECTOR), 0.0)


@triton.jit
def second_kernel(
    table_ptr,  # int64 [programs, FIELDS]
    x_ptrs, y_ptrs, plus_in_ptrs, minus_in_ptrs,  # tuples of ENTRIES: x, what is subtracted, the cotangents of both
    slopes_ptr,
    weight_ptr,
    factors,
    grad_loss_ptr,
    plus_ptrs, minus_ptrs,
    grad_grad_loss_ptr,  # float32
    workspace_ptr,  # float32 [programs]
    counter_ptr,
    ENTRIES: tl.constexpr, FORM: tl.constexpr, PAIRED: tl.constexpr, PLUS: tl.constexpr, MINUS: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr, SLOPE_VECTOR: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The gradient of backward_kernel: by its maps, factor · w · grad_loss · cotangent · f''; by grad_loss a sum."""
    record_ptr = table_ptr + tl.program_id(0) * _FIELDS
    entry = tl.load(record_ptr)
    start, stop, whole = tl.load(record_ptr + 1), tl.load(record_ptr + 2), tl.load(record_ptr + 3)
    slope_start = tl.load(record_ptr + 4)
    x_ptr = select_pointer(x_ptrs, entry, ENTRIES)
    y_ptr = select_pointer(y_ptrs, entry, ENTRIES) if PAIRED else x_ptr
    plus_in_ptr = select_pointer(plus_in_ptrs, entry, ENTRIES) if PLUS else x_ptr
    minus_in_ptr = select_pointer(minus_in_ptrs, entry, ENTRIES) if MINUS else x_ptr
    plus_ptr = select_pointer(plus_ptrs, entry, ENTRIES) if PLUS else x_ptr
    minus_ptr = select_pointer(minus_ptrs, entry, ENTRIES) if MINUS else x_ptr
    factor = select_number(factors, entry, ENTRIES)
    grad_loss = tl.load(grad_loss_ptr)
    total = tl.zeros([BLOCK], tl.float32)
    for tail in tl.static_range(1 + TAIL):
        for base in range(whole if tail else start, stop if tail else whole, BLOCK):
            total += _second_block(
                x_ptr, y_ptr, plus_in_ptr, minus_in_ptr, slopes_ptr, weight_ptr, plus_ptr, minus_ptr, record_ptr,
                base, stop, slope_start, factor, grad_loss, FORM, PAIRED, PLUS, MINUS, BLOCK, 1 if tail else VECTOR,
                1 if tail else SLOPE_VECTOR,
            )  # fmt: skip
    tl.store(workspace_ptr + tl.program_id(0), tl.sum(total, 0))
    if arrive(counter_ptr, tl.num_programs(0)):
        tl.store(grad_grad_loss_ptr, sum_range(workspace_ptr, 0, tl.num_programs(0), 128))
