"""Device code of spectral_sigma: a power iteration of all layers in one launch; kernels/spectral_sigma.py plans it.

    u ← n(W v),  v ← n(Wᵀ u),  σ = uᵀ W v,   n(x) = x / max(‖x‖, eps)          the hook's order: v first

One of the two products, the *first*, has one number per *owned* index (a row, or a column in the hook's order); the
second one has one per *spanned* index. A program owns some consecutive indices of one layer and sees all of W that
belongs to them: ``first[a] = Σ_b W[a, b] x[b]`` is final before ``first[a] · W[a, :]`` is added to its partial sum of
the second product, so one read serves both. Nothing is normalised before the end: both products are linear, so the
norms are divided out afterwards, and σ = ‖second‖² / max(‖second‖, eps) needs no third product.

The partial sums [programs, spanned] of a layer are added in two levels by the last program to arrive (_reduce.arrive):
the last of each group of √programs adds its group, the last of the groups adds those.

Source: Miyato et al., Spectral Normalization for GANs (2018), algorithm 1 and equation 11.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._reduce import arrive, below, both, select_pointer, sum_range, wide

# The table: one row of int64 per layer, then the layer of each program.
FIELDS = (
    "weight", "u", "v", "rows", "outer", "inner", "shift", "row_stride", "outer_stride", "inner_stride", "outer_step",
    "inner_step", "u_start", "v_start", "owned", "spanned", "kind", "first_program", "span", "programs", "group",
    "counter", "first", "partial",
)  # fmt: skip
(
    _WEIGHT, _U, _V, _ROWS, _OUTER, _INNER, _SHIFT, _ROW_STRIDE, _OUTER_STRIDE, _INNER_STRIDE, _OUTER_STEP,
    _INNER_STEP, _U_START, _V_START, _OWNED, _SPANNED, _KIND, _FIRST_PROGRAM, _SPAN, _PROGRAM_COUNT, _GROUP, _COUNTER,
    _FIRST, _PARTIAL,
) = map(tl.constexpr, range(len(FIELDS)))  # fmt: skip
_FIELDS = tl.constexpr(len(FIELDS))
_BLOCK = tl.constexpr(1024)  # of the loops over vectors


@triton.jit
def _field(layer_ptr, index: tl.constexpr):
    """A number of a layer's row; all but addresses fit 32 bits."""
    return tl.load(layer_ptr + index).to(tl.int32)


@triton.jit
def _vector_ptr(layer_ptr, flat_ptr, index: tl.constexpr, start: tl.constexpr, FROM_RESULT: tl.constexpr):
    """The layer's u or v to read: the caller's, or from the second iteration on the one that the first one wrote."""
    if FROM_RESULT:
        return flat_ptr + tl.load(layer_ptr + start)
    return tl.load(layer_ptr + index).to(tl.pointer_type(tl.float32))


@triton.jit
def _place(layer_ptr, c, COLUMNS: tl.constexpr):
    """(where in u or v the padded index ``c`` is, whether it is there at all).

    Columns are numbered in the order of memory as outer · 2^shift + inner, so that no index is ever divided.
    """
    if COLUMNS:
        shift = _field(layer_ptr, _SHIFT)
        outer, inner = c >> shift, c & ((1 << shift) - 1)
        position = outer * _field(layer_ptr, _OUTER_STEP) + inner * _field(layer_ptr, _INNER_STEP)
        return position, (outer < _field(layer_ptr, _OUTER)) & (inner < _field(layer_ptr, _INNER))
    return c, c < _field(layer_ptr, _ROWS)


@triton.jit
def _load_x(layer_ptr, x_ptr, b, COLUMNS: tl.constexpr, STRAIGHT: tl.constexpr):
    """The vector that the first product multiplies, at spanned indices ``b``. STRAIGHT: x[b] is x_ptr[b], aligned."""
    if STRAIGHT:
        extent = _field(layer_ptr, _INNER if COLUMNS else _ROWS)
        return tl.load(wide(x_ptr, b, 4), mask=below(b, extent, 4), other=0.0)
    else:
        position, there = _place(layer_ptr, b, COLUMNS)
        return tl.load(x_ptr + position, mask=there, other=0.0)


@triton.jit
def _load_tile(layer_ptr, a, b, DTYPE: tl.constexpr, HOOK: tl.constexpr, FAST: tl.constexpr, VECTOR: tl.constexpr):
    """W at owned indices ``a`` [S] and spanned indices ``b`` [C]: float32 [S, C], 0 outside.

    FAST is the axis of the tile along which memory runs and VECTOR how many elements are together, aligned, in one
    load: the launcher has checked it, the compiler cannot see it through a stride from a table.
    """
    if HOOK:
        r, c = b[None, :], a[:, None]
    else:
        r, c = a[:, None], b[None, :]
    shift = _field(layer_ptr, _SHIFT)
    outer, inner = c >> shift, c & ((1 << shift) - 1)
    offset = (
        r * _field(layer_ptr, _ROW_STRIDE)
        + outer * _field(layer_ptr, _OUTER_STRIDE)
        + inner * _field(layer_ptr, _INNER_STRIDE)
    )
    mask = (r < _field(layer_ptr, _ROWS)) & (outer < _field(layer_ptr, _OUTER)) & (inner < _field(layer_ptr, _INNER))
    pointers = tl.load(layer_ptr + _WEIGHT).to(tl.pointer_type(DTYPE)) + offset
    # Without a vector a run of two elements is still claimed, unaligned: no load gets wider by it, but the compiler
    # learns along which axis to place neighbouring threads.
    RUN: tl.constexpr = max(VECTOR, 2)
    ALIGNMENT: tl.constexpr = 16 if VECTOR > 1 else 1
    if FAST == 1:
        pointers = tl.max_contiguous(tl.multiple_of(pointers, [1, ALIGNMENT]), [1, RUN])
        mask = tl.max_constancy(mask, [1, VECTOR])
    else:
        pointers = tl.max_contiguous(tl.multiple_of(pointers, [ALIGNMENT, 1]), [RUN, 1])
        mask = tl.max_constancy(mask, [VECTOR, 1])
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_partial(partial_ptr, b, value, spanned):
    """Partial sums lie in rows of ``spanned`` numbers, a multiple of four, the last of which are 0."""
    tl.store(wide(partial_ptr, b, 4), value, mask=below(b, spanned, 4))


@triton.jit
def _sweep(
    layer_ptr, x_ptr, own_ptr, first_ptr, partial_ptr, begin, end,
    S: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr, VECTOR: tl.constexpr, STRAIGHT: tl.constexpr,
    DTYPE: tl.constexpr, HOOK: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    """Owned indices begin … end, whose whole spanned extent fits C: every element of W is read once.

    Writes first[begin:end] and the partial second product, or with READ the one number Σ own[a] first[a].
    """
    b = tl.arange(0, C)
    x = _load_x(layer_ptr, x_ptr, b, not HOOK, STRAIGHT)
    second = tl.zeros([S, C], tl.float32)
    sigma = tl.zeros([S], tl.float32)
    for start in range(begin, end, S):
        a = start + tl.arange(0, S)
        tile = _load_tile(layer_ptr, a, b, DTYPE, HOOK, FAST, VECTOR)
        first = tl.sum(tile * x[None, :], 1)
        if READ:
            place, exists = _place(layer_ptr, a, HOOK)
            sigma += first * tl.load(own_ptr + place, mask=exists, other=0.0)
        else:
            tl.store(first_ptr + a, first, mask=a < end)
            second += first[:, None] * tile
    if READ:
        tl.store(partial_ptr, tl.sum(sigma, 0))
    else:
        _store_partial(partial_ptr, b, tl.sum(second, 0), _field(layer_ptr, _SPANNED))


@triton.jit
def _sweep_long(
    layer_ptr, x_ptr, own_ptr, first_ptr, partial_ptr, begin, end,
    S: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr, VECTOR: tl.constexpr, STRAIGHT: tl.constexpr,
    DTYPE: tl.constexpr, HOOK: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    """As :func:`_sweep` for any spanned extent, in chunks of C: the second product reads W again, from L2 at best."""
    spanned = _field(layer_ptr, _SPANNED)
    sigma = tl.zeros([S], tl.float32)
    for start in range(begin, end, S):
        a = start + tl.arange(0, S)
        products = tl.zeros([S, C], tl.float32)
        for c in range(0, spanned, C):
            b = c + tl.arange(0, C)
            x = _load_x(layer_ptr, x_ptr, b, not HOOK, STRAIGHT)
            products += _load_tile(layer_ptr, a, b, DTYPE, HOOK, FAST, VECTOR) * x[None, :]
        first = tl.sum(products, 1)
        if READ:
            place, exists = _place(layer_ptr, a, HOOK)
            sigma += first * tl.load(own_ptr + place, mask=exists, other=0.0)
        else:
            tl.store(first_ptr + a, first, mask=a < end)
            for c in range(0, spanned, C):
                b = c + tl.arange(0, C)
                tile = _load_tile(layer_ptr, a, b, DTYPE, HOOK, FAST, VECTOR)
                mask = both(b < spanned, start > begin, 4)
                added = tl.load(wide(partial_ptr, b, 4), mask=mask, other=0.0)
                _store_partial(partial_ptr, b, added + tl.sum(first[:, None] * tile, 0), spanned)
            # The next owned indices read back what other threads of this program may have written.
            tl.debug_barrier()
    if READ:
        tl.store(partial_ptr, tl.sum(sigma, 0))


@triton.jit
def _add_partials(partial_ptr, stride, count, b, spanned):
    """Σ over ``count`` partial sums at indices ``b`` [C], eight at a time: [C]."""
    total = tl.zeros([8, b.shape[0]], tl.float32)
    for k in range(0, count, 8):
        row = k + tl.arange(0, 8)
        offset = row[:, None] * stride + b[None, :]
        mask = both((row < count)[:, None], (b < spanned)[None, :], 4)
        total += tl.load(wide(partial_ptr, offset, 4), mask=mask, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def _load_first(first_ptr, a, owned):
    """first[a], 0 from ``owned`` on: there is room up to the next multiple of four, but nobody writes there."""
    first = tl.load(wide(first_ptr, a, 4), mask=below(a, tl.cdiv(owned, 4) * 4, 4), other=0.0, cache_modifier=".cg")
    return tl.where(a < owned, first, 0.0)


@triton.jit
def _norm(squares, eps):
    """max(√squares, eps), written so that a NaN stays one."""
    norm = tl.sqrt(squares)
    return tl.where(norm < eps, eps, norm)


@triton.jit
def _finish(layer_ptr, sigma_ptr, u_ptr, v_ptr, first_ptr, partial_ptr, stride, count, eps, HOOK: tl.constexpr):
    """Add the partial second products, normalise both vectors, write u, v and σ: the layer's last program."""
    owned, spanned = _field(layer_ptr, _OWNED), _field(layer_ptr, _SPANNED)
    u_out, v_out = u_ptr + tl.load(layer_ptr + _U_START), v_ptr + tl.load(layer_ptr + _V_START)
    own_ptr, other_ptr = (v_out, u_out) if HOOK else (u_out, v_out)
    squares = tl.zeros([_BLOCK], tl.float32)
    for start in range(0, owned, _BLOCK):
        a = start + tl.arange(0, _BLOCK)
        first = _load_first(first_ptr, a, owned)
        squares += first * first
    # Multiplied, not divided: a division of full precision is a call, and costs every program registers.
    first_factor = 1.0 / _norm(tl.sum(squares, 0), eps)
    for start in range(0, owned, _BLOCK):
        a = start + tl.arange(0, _BLOCK)
        first = _load_first(first_ptr, a, owned)
        place, exists = _place(layer_ptr, a, HOOK)
        tl.store(own_ptr + place, first * first_factor, mask=exists)
    squares = tl.zeros([_BLOCK], tl.float32)
    for start in range(0, spanned, _BLOCK):
        b = start + tl.arange(0, _BLOCK)
        # Normalised before it is squared: the first product alone may be as large as σ² ‖v‖.
        second = _add_partials(partial_ptr, stride, count, b, spanned) * first_factor
        squares += second * second
        _store_partial(partial_ptr, b, second, spanned)
    total = tl.sum(squares, 0)
    factor = 1.0 / _norm(total, eps)
    tl.debug_barrier()
    for start in range(0, spanned, _BLOCK):
        b = start + tl.arange(0, _BLOCK)
        mask = below(b, spanned, 4)
        second = tl.load(wide(partial_ptr, b, 4), mask=mask, other=0.0, cache_modifier=".cg")
        place, exists = _place(layer_ptr, b, not HOOK)
        tl.store(other_ptr + place, second * factor, mask=exists)
    tl.store(sigma_ptr, total * factor)


@triton.jit
def _copy(source_ptr, target_ptr, count):
    for start in range(0, count, _BLOCK):
        i = start + tl.arange(0, _BLOCK)
        tl.store(target_ptr + i, tl.load(source_ptr + i, mask=i < count), mask=i < count)


@triton.jit
def sigma_kernel(
    table_ptr,  # int64 [layers, _FIELDS], then [programs]
    layers,
    sigma_ptr,  # float32 [layers]
    u_ptr,  # float32 [Σ rows]
    v_ptr,  # float32 [Σ columns]
    workspace_ptr,  # float32: per layer the first product, then the partial second products of its programs
    counters_ptr,  # int32, 0 before and after
    eps,
    KINDS: tl.constexpr,  # ((S, C, FAST, VECTOR, STRAIGHT, long), ...)
    DTYPE: tl.constexpr,
    HOOK: tl.constexpr,
    READ: tl.constexpr,
    FROM_RESULT: tl.constexpr,
):
    """One power iteration of all layers, or σ alone with READ; the module's docstring says how.

    Program p owns the indices span · i … span · (i + 1) of layer table[layers, p], i counting its layer's programs.
    """
    layer = tl.load(table_ptr + layers * _FIELDS + tl.program_id(0))
    layer_ptr = table_ptr + layer * _FIELDS
    index = tl.program_id(0) - _field(layer_ptr, _FIRST_PROGRAM)
    begin = index * _field(layer_ptr, _SPAN)
    end = tl.minimum(begin + _field(layer_ptr, _SPAN), _field(layer_ptr, _OWNED))

    u_in = _vector_ptr(layer_ptr, u_ptr, _U, _U_START, FROM_RESULT)
    v_in = _vector_ptr(layer_ptr, v_ptr, _V, _V_START, FROM_RESULT)
    own_ptr, x_ptr = (v_in, u_in) if HOOK else (u_in, v_in)
    first_ptr = workspace_ptr + tl.load(layer_ptr + _FIRST)
    partial_ptr = workspace_ptr + tl.load(layer_ptr + _PARTIAL)
    stride = 1 if READ else _field(layer_ptr, _SPANNED)

    kind = _field(layer_ptr, _KIND)
    for i in tl.static_range(len(KINDS)):
        if kind == i:
            sweep: tl.constexpr = _sweep_long if KINDS[i][5] else _sweep
            sweep(
                layer_ptr, x_ptr, own_ptr, first_ptr, partial_ptr + index * stride, begin, end,
                KINDS[i][0], KINDS[i][1], KINDS[i][2], KINDS[i][3], KINDS[i][4], DTYPE, HOOK, READ,
            )  # fmt: skip

    # Read only now: what lives through the sweep takes registers from its tile.
    programs = _field(layer_ptr, _PROGRAM_COUNT)
    counter_ptr = counters_ptr + tl.load(layer_ptr + _COUNTER)
    if READ:
        if arrive(counter_ptr, programs):
            tl.store(sigma_ptr + layer, sum_range(partial_ptr, 0, programs, _BLOCK))
            _copy(u_in, u_ptr + tl.load(layer_ptr + _U_START), _field(layer_ptr, _ROWS))
            columns = _field(layer_ptr, _OUTER) * _field(layer_ptr, _INNER)
            _copy(v_in, v_ptr + tl.load(layer_ptr + _V_START), columns)
    else:
        group = _field(layer_ptr, _GROUP)
        number, groups = index // group, tl.cdiv(programs, group)
        size = tl.minimum(group, programs - number * group)
        if arrive(counter_ptr + 1 + number, size):
            spanned = _field(layer_ptr, _SPANNED)
            group_ptr = partial_ptr + number * group * stride
            for start in range(0, spanned, _BLOCK):
                b = start + tl.arange(0, _BLOCK)
                _store_partial(group_ptr, b, _add_partials(group_ptr, stride, size, b, spanned), spanned)
            if arrive(counter_ptr, groups):
                _finish(
                    layer_ptr,
                    sigma_ptr + layer,
                    u_ptr,
                    v_ptr,
                    first_ptr,
                    partial_ptr,
                    stride * group,
                    groups,
                    eps,
                    HOOK,
                )


@triton.jit
def gradient_kernel(
    table_ptr,  # int64 [programs, 9]: gradient, layer, start of u, start of v, rows, inner, kind, first line, end
    gradient_ptrs,  # tuple of COUNT [outer, rows, inner], contiguous
    grad_sigma_ptr,  # float32 [layers]
    u_ptr,  # float32 [Σ rows]
    v_ptr,  # float32 [Σ columns]
    COUNT: tl.constexpr,
    KINDS: tl.constexpr,  # ((C, VECTOR), ...)
    TILE: tl.constexpr,
):
    """gradient[o, r, i] = grad_sigma · u[r] · v[o, i] of several layers.

    A program writes some consecutive lines of one layer; line o · rows + r is the ``inner`` numbers from [o, r, 0] on.
    """
    record_ptr = table_ptr + tl.program_id(0) * 9
    target_ptr = select_pointer(gradient_ptrs, tl.load(record_ptr), COUNT)
    scale = tl.load(grad_sigma_ptr + tl.load(record_ptr + 1))
    u_ptr += tl.load(record_ptr + 2)
    v_ptr += tl.load(record_ptr + 3)
    rows, inner = tl.load(record_ptr + 4).to(tl.int32), tl.load(record_ptr + 5).to(tl.int32)
    begin, end = tl.load(record_ptr + 7).to(tl.int32), tl.load(record_ptr + 8).to(tl.int32)
    kind = tl.load(record_ptr + 6)
    for i in tl.static_range(len(KINDS)):
        if kind == i:
            _write_lines(
                target_ptr, scale, u_ptr, v_ptr, rows, inner, begin, end, TILE // KINDS[i][0], KINDS[i][0], KINDS[i][1]
            )


@triton.jit
def _write_lines(
    target_ptr, scale, u_ptr, v_ptr, rows, inner, begin, end,
    S: tl.constexpr, C: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Lines begin … end of one gradient. VECTOR: a line's length is a multiple of so many elements."""
    for first in range(begin, end, S):
        line = first + tl.arange(0, S)
        there = line < end
        u = tl.load(u_ptr + line % rows, mask=there, other=0.0) * scale
        for start in range(0, inner, C):
            i = start + tl.arange(0, C)
            mask = both(there[:, None], (i < inner)[None, :], VECTOR)
            v_offset = (line // rows * inner)[:, None] + i[None, :]
            v = tl.load(wide(v_ptr, v_offset, min(VECTOR, 4)), mask=mask, other=0.0)
            offset = line.to(tl.int64)[:, None] * inner + i[None, :]
            tl.store(wide(target_ptr, offset, VECTOR), u[:, None] * v, mask=mask)
