"""Small Triton kernels for the tests of the GPU report: one that is as it should be, and one for each thing to find.

In a module of their own, since the processes that compile import them by name.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastgan.kernels._launch import Launch

from fastgan.profile.cuda_code import CudaCode
from fastgan.profile.machine_code import MachineCode


@triton.jit
def tile(ptr, rows, columns, stride, row_count, column_count):
    mask = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def product_kernel(a_ptr, b_ptr, bias_ptr, y_ptr, m, n, k, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """y = a @ b + bias, row-major; both operands through the same helper."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, k, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        acc = tl.dot(tile(a_ptr, rows, depth, k, m, k), tile(b_ptr, depth, columns, n, k, n), acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, mask=columns < n, other=0.0)[None, :]
    mask = (rows < m)[:, None] & (columns < n)[None, :]
    tl.store(y_ptr + rows[:, None] * n + columns[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


def product(
    m: int = 256, n: int = 256, k: int = 256, dtype: torch.dtype = torch.float16, block: int = 64, num_warps: int = 4
) -> Launch:
    a, b, y = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((m, k), (k, n), (m, n)))
    bias = torch.empty(n, device="meta")
    arguments = {"a_ptr": a, "b_ptr": b, "bias_ptr": bias, "y_ptr": y, "m": m, "n": n, "k": k}
    moved = sum(x.numel() * x.element_size() for x in (a, b, bias, y))
    grid = (triton.cdiv(m, block), triton.cdiv(n, block))
    constants = {"BLOCK": block, "DEPTH": 32}
    return Launch(product_kernel, grid, arguments, constants, num_warps, 2, moved, 2 * m * n * k)


@triton.jit
def outer_kernel(a_ptr, b_ptr, y_ptr, k, BLOCK: tl.constexpr):
    """A matrix product spelt out: rank-one updates, no tl.dot, so no tensor core can help."""
    rows = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in range(k):
        a = tl.load(a_ptr + i * BLOCK + rows).to(tl.float32)
        b = tl.load(b_ptr + i * BLOCK + rows).to(tl.float32)
        acc += a[:, None] * b[None, :]
    tl.store(y_ptr + rows[:, None] * BLOCK + rows[None, :], acc.to(tl.float16))


def outer(k: int = 4096, block: int = 64) -> Launch:
    a, b = (torch.empty(k, block, dtype=torch.float16, device="meta") for _ in range(2))
    y = torch.empty(block, block, dtype=torch.float16, device="meta")
    moved = 2 * (2 * k * block + block * block)
    return Launch(
        outer_kernel, (1,), {"a_ptr": a, "b_ptr": b, "y_ptr": y, "k": k}, {"BLOCK": block},
        bytes=moved, flops=2 * k * block * block,
    )  # fmt: skip


@triton.jit
def copy_kernel(x_ptr, y_ptr, size, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """y = x in order (STEP 1), or with neighbours in a thread's hands exchanged, which no wide load can do (STEP 0)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if STEP == 0:
        at = at ^ 1
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < size), mask=at < size)


def copy(size: int = 1 << 20, step: int = 1, offset: int = 0, dtype: torch.dtype = torch.float16) -> Launch:
    x = torch.empty(size + offset, dtype=dtype, device="meta")[offset:]
    y = torch.empty_like(x)
    arguments = {"x_ptr": x, "y_ptr": y, "size": size}
    return Launch(
        copy_kernel, (triton.cdiv(size, 1024),), arguments, {"STEP": step, "BLOCK": 1024},
        bytes=2 * size * x.element_size(),
    )  # fmt: skip


@triton.jit
def broken_kernel(x_ptr, BLOCK: tl.constexpr):
    """Does not compile: shapes that cannot be joined."""
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32) + tl.zeros([BLOCK // 2], tl.float32))


def broken() -> Launch:
    return Launch(broken_kernel, (1,), {"x_ptr": torch.empty(64, device="meta")}, {"BLOCK": 64})


def cuda_code(arch: int, **changes: int) -> CudaCode:
    """What is read of a kernel of CUDA C++, all in order but for ``changes``."""
    facts = {"registers": 40, "stack": 0, "static_shared": 2048, "spills": 0, **changes}
    return CudaCode("some_kernel<float>", arch, 256, MachineCode(**facts, tensor={}, loads={128: 2}, stores={32: 1}))
