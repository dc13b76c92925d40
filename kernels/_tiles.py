"""What the convolution kernels' launchers share: which tile a program computes, and how a result lies in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ._dot import has_tensor_cores

# Programs that keep a GPU busy: an A100 has 108 multiprocessors, an H100 132, an RTX 4090 128. Fixed rather than asked
# of the device, so that a plan made without one is the plan that runs.
BUSY = 128

# Largest offset inside a sample that 32-bit arithmetic reaches.
_INT32_MAX = 2**31 - 1


def ceil_div(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)


def splits_to_fill(programs: int, most: int) -> int:
    """Into how many parts, ``most`` at most, to split a sum that ``programs`` programs would compute: two for each
    place, so that the last ones to start do not run alone."""
    return min(most, ceil_div(2 * BUSY, programs))


class PixelTile(NamedTuple):
    """The pixels of one tile: ``s`` samples by ``h`` rows by ``w`` columns, powers of two."""

    s: int
    h: int
    w: int

    @property
    def pixels(self) -> int:
        return self.s * self.h * self.w

    def count(self, n: int, h: int, w: int) -> tuple[int, int, int]:
        """Tiles along samples, rows and columns of [n, h, w] pixels."""
        return ceil_div(n, self.s), ceil_div(h, self.h), ceil_div(w, self.w)


def pixel_tile(
    n: int, h: int, w: int, most: int, *, least: int = 16, width: int = 16, joint_cost: float = 1.0
) -> PixelTile:
    """The tile of at most ``most`` pixels that covers [n, h, w] with the fewest pixels beyond it.

    Args:
        n, h, w: pixels to cover; n is 1 where a tile must not join samples.
        most: power of two, the matrix product's rows.
        least: the fewest rows that a matrix product takes; the tile is filled up along samples to reach it.
        width: preferred columns where two shapes cover equally well: 16 keeps a 3×3 neighbourhood compact; 32 makes a
            row of NCHW 64 bytes of a half type.
        joint_cost: factor on the cost of a tile that joins samples, above 1 where each row then has its own scales.
    """
    best: tuple[float, int, PixelTile] | None = None
    # From four columns on: a column of pixels shares nothing with its neighbours.
    column = min(4, triton.next_power_of_2(w))
    while column <= min(most, triton.next_power_of_2(w)):
        rows = min(triton.next_power_of_2(h), most // column)
        samples = min(triton.next_power_of_2(n), most // (column * rows))
        tile = PixelTile(max(samples, ceil_div(least, column * rows)), rows, column)
        tiles = tile.count(n, h, w)
        covered = tiles[0] * tiles[1] * tiles[2] * tile.pixels * (joint_cost if tile.s > 1 else 1.0)
        candidate = (covered, abs(column - width), tile)
        best = candidate if best is None else min(best, candidate)
        column *= 2
    return best[2]


@dataclass(frozen=True)
class Block:
    """A matrix product's tile and the machine's share of it: rows come from the pixel tile."""

    pixels: int
    columns: int
    depth: int
    warps: int
    stages: int
    registers: int | None  # at most, of a thread; None leaves it to the assembler


def forward_block(x: Tensor, precision: str, pixels: int, c_in: int, c_out: int, transposed: bool) -> Block:
    """Tile of pixels × C_out × C_in of the forward kernel.

    Tensor cores want large tiles: 128 × 128 in eight warps keeps 64 sums a thread, and three stages of 64 channels
    deep take 96 KiB of shared memory, which sm_80 … sm_120 have. Ordinary units (exact float32, and everything before
    sm_80, where Triton knows no others) gain nothing from that: 64 × 64. NCHW pixels shifted by a tap are read one by
    one and wait in registers, which 64 channels of them would overflow: half as deep. Small layers halve the tile until
    the programs fill a GPU.
    """
    half = x.dtype != torch.float32 and has_tensor_cores(x.device)
    columns = min(128 if half else 64, max(16, triton.next_power_of_2(c_out)))
    rows = 128 if half else 64
    while rows > 16 and ceil_div(pixels, rows) * ceil_div(c_out, columns) < BUSY:
        if columns > 32 and columns >= rows:
            columns //= 2
        else:
            rows //= 2
    tensor_cores = half or precision == "tf32"
    deepest = 64 if half and x.stride(1) == 1 else 32
    depth = max(16, min(deepest, triton.next_power_of_2(c_in)))
    # Sums per thread: 64 on tensor cores, 16 on ordinary units, which need the other registers for operands.
    warps = 8 if rows * columns >= (128 * 128 if tensor_cores else 64 * 64) else 4
    # With a phase's addresses, too, four warps have not enough registers for the occupancy that the assembler aims at,
    # and it spills a few. They may have all: so small a tile has few programs, or much shared memory in each.
    registers = 255 if half and transposed and warps == 4 else None
    return Block(rows, columns, depth, warps, 3 if tensor_cores else 2, registers)


def is_channels_last(t: Tensor) -> bool:
    """Whether torch's convolutions take ``t`` [N, C, H, W] for NHWC: strides ascend in the order C, W, H, N."""
    smallest = 0
    for dim in (1, 3, 2, 0):
        size, stride = t.shape[dim], t.stride(dim)
        if size == 0 or stride < smallest or (dim == 0 and smallest == t.stride(1)):
            return False
        smallest = stride * max(size, 1)
    return True


def empty_result(x: Tensor, weight: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised [N, C_out, H', W'], laid out as torch's convolution lays out its result: NHWC where one of its
    operands is."""
    nhwc = is_channels_last(x) or is_channels_last(weight)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)


def needs_wide(*tensors: Tensor | None) -> bool:
    """Whether an offset inside one sample of any of the [N, C, H, W] tensors passes 32 bits."""
    for t in tensors:
        if t is not None:
            # Two more rows and columns than there are: what a padded or cut-off tile points at, masked.
            reach = sum((size + 255) * stride for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True))
            if reach > _INT32_MAX:
                return True
    return False


def traffic(*tensors: Tensor | None) -> int:
    """Bytes of all given tensors, each element once."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
