"""csrc/simt finds what it says it finds: every planted bug is named, and its corrected twin passes."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import simt_build

SOURCE = Path(__file__).parent / "planted.cpp"

# Kernel -> what the machine has to say of its planted bug.
SAYS = {
    "missing_barrier": r"race: it writes shared memory `tile` at byte 0 .*no barrier lies between",
    "missing_second_barrier": r"race: it reads shared memory `tile` at byte 252 .*of its block wrote \[planted.cpp:",
    "missing_warp_barrier": r"race: it writes shared memory `tile` .* which thread \(0,0,0\) of its block read",
    "shuffle_as_barrier": r"(race: it reads|reads uninitialised) shared memory `tile`",
    "shared_index": r"index 9 is out of bounds of a 'float \[9\]' \[planted.cpp:\d+\]",
    "shared_pointer": r"writes 4 bytes out of bounds: shared memory `tile`, 0 bytes past its end \(it has 256 bytes\)",
    "dynamic_shared_memory": r"writes 4 bytes out of bounds: shared memory `dynamic`, 0 bytes past its end",
    "uninitialised": r"thread \(0,0,0\): reads uninitialised shared memory `tile` at byte 0",
    "global_overrun": r"thread \(63,0,0\): reads 4 bytes out of bounds: global memory `argument 0`, 0 bytes past",
    "write_to_input": r"writes what is only to be read: global memory `argument 0`",
    "misaligned_vector": r"misaligned access to a '.*float4': the address is 4 bytes past a multiple of 16",
    "mask_without_own_lane": r"__shfl_down_sync \[planted.cpp:\d+\] with mask 0xfffffffe, which lacks its own lane 0",
    "shuffle_from_unnamed_lane": r"__shfl_sync \[planted.cpp:\d+\] reads lane 20, which its mask does not name",
    "lane_missing": r"deadlock: .* at __shfl_xor_sync \[planted.cpp:\d+\], .* at __syncwarp",
    "exited_lane": r"exits while lanes of its warp wait for it at __ballot_sync",
    "exit_before_barrier": r"divergent barrier: it exits while 41 threads wait at __syncthreads",
    "divergent_barrier": r"divergent barrier: it is at __syncthreads .*, 1 threads wait at __syncthreads",
    "barrier_of_too_many": r"deadlock: 32 threads .* at bar.sync \[planted.cpp:\d+\], 32 threads .* exited",
    "producer_and_consumer": r"(race: it reads|reads uninitialised) shared memory `tile`",
    "copy_not_awaited": r"reads shared memory `tile` .* while cp.async of thread \(15,0,0\) .* is in flight",
    "copy_without_barrier": r"shared memory `tile`",
    "misaligned_copy": r"misaligned cp.async of 16 bytes \[planted.cpp:\d+\]",
    "misaligned_matrix": r"misaligned row of ldmatrix: the address is 8 bytes past a multiple of 16",
    "local_memory_of_another": r"reads the local memory of another thread",
    "blocks_write_the_same": r"block \(1,0,0\) .*race: it writes global memory `argument 1` .* of block 0 wrote",
    "atomic_beside_write": r"race: it writes global memory `argument 1` .* updated atomically",
    "too_much_shared_memory": r"declares 49156 bytes of static shared memory .* at most 49152",
}


@pytest.fixture(scope="module")
def planted() -> ModuleType:
    return simt_build.load(SOURCE)


def arrays() -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).standard_normal(64, dtype=np.float32)
    return x, np.zeros(128, np.float32)


def test_every_planted_kernel_is_tested(planted: ModuleType) -> None:
    functions = {name for name in vars(planted) if not name.startswith("__")} - {"Error", "set_schedule"}
    assert functions == set(SAYS) | {"last_block", "sum_of_atomics"}


@pytest.mark.parametrize("name", SAYS)
def test_the_planted_bug_is_found_and_named(planted: ModuleType, name: str) -> None:
    with pytest.raises(planted.Error, match=SAYS[name]) as caught:
        simt_build.run(planted, name, *arrays(), True, schedules=[("forward", 0)])
    assert str(caught.value).startswith(f"{name}<true>: block (")
    assert str(caught.value).endswith("(schedule forward)")


@pytest.mark.parametrize("name", SAYS)
@pytest.mark.parametrize("schedule", simt_build.SCHEDULES[1:])
def test_the_planted_bug_is_found_under_every_schedule(planted: ModuleType, name: str, schedule) -> None:
    with pytest.raises(planted.Error):
        simt_build.run(planted, name, *arrays(), True, schedules=[schedule])


@pytest.mark.parametrize("name", SAYS)
def test_the_corrected_twin_passes(planted: ModuleType, name: str) -> None:
    simt_build.run(planted, name, *arrays(), False)


def last_block_arrays() -> tuple[np.ndarray, ...]:
    x, y = arrays()
    return x, y[:64], np.full(5 * 64, np.nan, np.float32), np.zeros(1, np.uint32)


@pytest.mark.parametrize("bug", [1, 2, 3])
@pytest.mark.parametrize("schedule", simt_build.SCHEDULES)
def test_a_missing_fence_between_blocks_is_a_race(planted: ModuleType, bug: int, schedule: tuple[str, int]) -> None:
    says = r"race: it reads global memory `argument 2` .* wrote .*no fences and atomics order the two blocks"
    with pytest.raises(planted.Error, match=says):
        simt_build.run(planted, "last_block", *last_block_arrays(), bug, schedules=[schedule])


def test_the_last_block_may_read_what_the_others_wrote(planted: ModuleType) -> None:
    x, y, partial, counter = last_block_arrays()
    simt_build.run(planted, "last_block", x, y, partial, counter, 0)
    np.testing.assert_allclose(y, 15 * x, rtol=1e-6)
    assert counter[0] == 5


def test_a_sum_that_depends_on_the_order_differs_between_schedules(planted: ModuleType) -> None:
    x, y = arrays()
    simt_build.run(planted, "sum_of_atomics", x, y, False)
    assert y[1] == 63 * 64 / 2
    with pytest.raises(AssertionError, match="sum_of_atomics: array 1 has other bits under schedule"):
        simt_build.run(planted, "sum_of_atomics", x, y, True)


def test_a_launch_that_no_gpu_takes(planted: ModuleType) -> None:
    x, y = arrays()
    with pytest.raises(planted.Error, match="argument 1 must be an array of f4, got f8"):
        planted.missing_barrier(x, y.astype(np.float64), False)
    y.flags.writeable = False
    with pytest.raises(planted.Error, match="argument 1 must be writable"):
        planted.missing_barrier(x, y, False)
    with pytest.raises(planted.Error, match="missing_barrier takes 3 arguments, got 2"):
        planted.missing_barrier(x, x)
