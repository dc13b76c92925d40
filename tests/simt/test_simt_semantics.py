"""csrc/simt computes what CUDA's manuals say: shuffles, votes, barriers, atomics, half types, tensor cores, copies."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import simt_build
import torch

LANES = np.arange(32)


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return simt_build.load(Path(__file__).parent / "semantics.cpp")


def source_lanes(kind: int, argument: int, width: int) -> np.ndarray:
    """The lane that each lane reads, from the CUDA C++ programming guide's description of the four shuffles."""
    segment = LANES // width * width
    if kind == 0:
        return segment + argument % width
    if kind == 1:
        return np.where(LANES - argument < segment, LANES, LANES - argument)
    if kind == 2:
        return np.where(LANES + argument >= segment + width, LANES, LANES + argument)
    return np.where((LANES ^ argument) >= segment + width, LANES, LANES ^ argument)


@pytest.mark.parametrize("kind", range(4))
def test_shuffles(kernels: ModuleType, kind: int) -> None:
    x = np.random.default_rng(kind).integers(-1000, 1000, 32, dtype=np.int32)
    for width in (4, 16, 32):
        for argument in (0, 1, 3, 17, 31):
            y = np.zeros_like(x)
            simt_build.run(kernels, "shuffle", x, y, kind, argument, width)
            np.testing.assert_array_equal(y, x[source_lanes(kind, argument, width)], str((argument, width)))


def test_votes_matches_and_reductions(kernels: ModuleType) -> None:
    x = np.random.default_rng(0).integers(-5, 8, 32, dtype=np.int32)
    y = np.zeros((32, 12), np.uint32)
    simt_build.run(kernels, "votes", x, y)
    for lane in range(32):
        group = LANES % 3 == 0 if lane % 3 == 0 else LANES % 3 != 0
        values, bits = x[group], x[group].view(np.uint32)
        expected = [
            sum(1 << i for i in LANES[group] if x[i] & 1),
            any(values > 6),
            all(values > -6),
            sum(1 << i for i in LANES[group] if x[i] == x[lane]),
            *(int(v) % 2**32 for v in (values.sum(), values.min(), values.max())),
            *(bits.min(), bits.max(), np.bitwise_and.reduce(bits)),
            *(np.bitwise_or.reduce(bits), np.bitwise_xor.reduce(bits)),
        ]
        assert y[lane].tolist() == [int(v) for v in expected]


def test_predicates_of_a_block(kernels: ModuleType) -> None:
    x = np.random.default_rng(0).integers(-8, 9, 70, dtype=np.int32)
    y = np.zeros((70, 3), np.int32)
    simt_build.run(kernels, "block_votes", x, y)
    np.testing.assert_array_equal(y, np.tile([(x > 0).sum(), 1, 0], (70, 1)))


def test_indices_of_threads_and_blocks(kernels: ModuleType) -> None:
    y = np.zeros((2, 3, 2, 2, 3, 4, 6), np.int32)
    simt_build.run(kernels, "indices", y)
    bz, by, bx, tz, ty, tx = np.meshgrid(*map(np.arange, y.shape[:-1]), indexing="ij")
    np.testing.assert_array_equal(y, np.stack([tx, ty, tz, bx, by, bz], -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensor_core_product(kernels: ModuleType, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    y = np.zeros((16, 8), np.float32)
    if dtype == torch.float16:
        simt_build.run(kernels, "product_f16", a.numpy(), b.numpy(), y)
    else:
        simt_build.run(kernels, "product_bf16", *(x.view(torch.uint16).numpy() for x in (a, b)), y)
    # Products of 16-bit numbers are exact in float32, sums of 16 of them are wrong by at most 16 roundings.
    np.testing.assert_allclose(y, (a.double() @ b.double()).numpy(), atol=16 * 2**-24 * 32)


def test_matrices_of_fragments(kernels: ModuleType) -> None:
    x = np.arange(64, dtype=np.uint16).reshape(8, 8)
    y = np.zeros((2, 32), np.uint32)
    simt_build.run(kernels, "matrices", x, y)
    for i, matrix in enumerate((x, x.T)):
        pairs = matrix.reshape(32, 2).astype(np.uint32)
        np.testing.assert_array_equal(y[i], pairs[:, 0] | pairs[:, 1] << 16)


def test_asynchronous_copies(kernels: ModuleType) -> None:
    x = np.random.default_rng(0).integers(-9, 9, (5, 64)).astype(np.float32)
    y = np.zeros(64, np.float32)
    simt_build.run(kernels, "pipeline", x, y)
    x[-1, 32:] = 0
    np.testing.assert_array_equal(y, x.sum(0)[::-1])


def test_barriers_of_part_of_a_block(kernels: ModuleType) -> None:
    x = np.random.default_rng(0).integers(-9, 9, (2, 64)).astype(np.float32)
    y = np.zeros_like(x)
    simt_build.run(kernels, "named_barriers", x, y)
    expected = x.copy()
    for half in range(2):
        for _ in range(2 + half):
            expected[half] += expected[half, ::-1]
    np.testing.assert_array_equal(y, expected)


def test_atomics(kernels: ModuleType) -> None:
    x = np.random.default_rng(0).integers(-99, 99, 70, dtype=np.int32)
    y = np.array([0, -(2**31), 2**31 - 1, 0, -1, 0], np.int32)
    z = np.zeros(2, np.uint32)
    simt_build.run(kernels, "atomics", x, y, z)
    reductions = [x.sum(), x.max(), x.min()]
    reductions += [ufunc.reduce(x) for ufunc in (np.bitwise_or, np.bitwise_and, np.bitwise_xor)]
    assert y.tolist() == [int(v) for v in reductions]
    # atomicInc counts 0 ... 9.
    assert z.tolist() == [70 % 10, 140]


def test_vector_loads(kernels: ModuleType) -> None:
    x = np.random.default_rng(0).standard_normal((40, 4), dtype=np.float32)
    y = np.zeros((40, 2), np.float32)
    traffic = simt_build.run(kernels, "vectors", x, y)
    np.testing.assert_array_equal(y, np.stack([x[:, :2].max(1), x[:, 2:].min(1)], 1))
    assert [entry[1:] for entry in traffic] == [(640, 0), (0, 320)]


def floats_of_every_size() -> torch.Tensor:
    """float32: of every 2^16 consecutive bit patterns eight, ties between two halves among them."""
    low = torch.tensor([0x0000, 0x0001, 0x0FFF, 0x1000, 0x1001, 0x2000, 0x8000, 0x8001])
    return (torch.arange(2**16)[:, None] * 2**16 + low).flatten().to(torch.uint32).view(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_round_as_torch_does(kernels: ModuleType, dtype: torch.dtype) -> None:
    x = floats_of_every_size()
    if dtype == torch.float16:
        # Where all is infinity or 0, the beginnings are enough.
        x = x[(x.abs() < 2**17) & (x.abs() > 2**-27) | ~x.isfinite() | (x == 0)]
        x = x[: len(x) // 256 * 256].contiguous()
    y, z = np.zeros(len(x), np.float16 if dtype == torch.float16 else np.uint16), np.zeros(len(x), np.float32)
    name = "convert_f16" if dtype == torch.float16 else "convert_bf16"
    simt_build.run(kernels, name, x.numpy(), y, z, schedules=[("forward", 0)])
    expected = x.to(dtype)
    got = torch.from_numpy(y).view(dtype)
    number = ~expected.isnan()
    assert torch.equal(got[number].view(torch.int16), expected[number].view(torch.int16))
    assert got[~number].isnan().all()
    assert torch.equal(torch.from_numpy(z)[number], expected[number].float())


def test_cooperative_groups(kernels: ModuleType) -> None:
    x = np.random.default_rng(0).integers(-9, 9, (8, 8)).astype(np.float32)
    y = np.zeros((8, 2), np.float32)
    simt_build.run(kernels, "group_sums", x, y)
    np.testing.assert_array_equal(y[:, 0], x.sum(1))
    np.testing.assert_array_equal(y[:, 1], ((x > 0) << np.arange(8)).sum(1))
