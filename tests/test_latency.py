"""The harness that measures time: its statistics, its order, what it says about memory and the machine."""

from __future__ import annotations

import gc
import time

import pytest
import torch

from fastgan.profile import latency


def test_statistics_of_samples():
    timing = latency.Timing.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0], calls=3)
    assert (timing.median, timing.p20, timing.p80, timing.n, timing.calls) == (3.5, 2.0, 5.0, 6, 3)
    single = latency.Timing.of([2.0], calls=1)
    assert (single.median, single.p20, single.p80) == (2.0, 2.0, 2.0)


def test_candidates_are_interleaved_in_rotating_order():
    order: list[str] = []

    def candidate(name):
        return lambda: (order.append(name), time.sleep(0.001))

    timings = latency.measure({name: candidate(name) for name in "abc"}, rounds=3, warmup=1)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert all(timing.n == 3 and timing.calls == 1 and timing.median >= 0.001 for timing in timings.values())
    assert gc.isenabled()


def test_short_candidates_are_timed_in_bursts_and_long_ones_are_not():
    timings = latency.measure({"short": lambda: None, "long": lambda: time.sleep(0.005)}, rounds=2)
    assert timings["short"].calls > 100
    assert timings["long"].calls == 1
    assert latency.speedup(timings, "short", "long") > 100


def test_time_bounds_the_rounds():
    start = time.perf_counter()
    timing = latency.measure({"a": lambda: time.sleep(0.002)}, seconds=0.1)["a"]
    assert 5 <= timing.n <= 60
    assert time.perf_counter() - start < 2.0
    assert latency.measure({"a": lambda: time.sleep(0.002)}, seconds=0.0, min_rounds=4)["a"].n == 4


@pytest.mark.parametrize("options", [{"warmup": 0}, {"rounds": 0}, {"min_rounds": 0}])
def test_bad_counts(options):
    with pytest.raises(ValueError, match="measure: warmup and rounds must be >= 1"):
        latency.measure({"a": lambda: None}, **options)
    with pytest.raises(ValueError, match="measure: candidates must hold at least one function, got none"):
        latency.measure({})


def test_passes_compute_what_their_names_say():
    x = [torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0, 4.0])]
    found = latency.passes(lambda maps: (maps[0] ** 3 * maps[1]).sum(), [x], double=True)
    gradient = 3 * x[0].detach() ** 2 * x[1]
    assert not found["fwd"]().requires_grad
    for which in ("bwd", "bwd", "fwd+bwd"):
        (g,) = found[which]()
        torch.testing.assert_close(g, gradient)
    # d/dx of (3 x² y)² is 2 · 3 x² y · 6 x y.
    torch.testing.assert_close(found["double bwd"]()[0], 2 * gradient * 6 * x[0].detach() * x[1])


def test_peak_memory_follows_torch_allocations():
    size = 1 << 20
    once = latency.peak_memory(lambda: torch.zeros(size))
    twice = latency.peak_memory(lambda: torch.zeros(size) + torch.zeros(size))
    assert 4 * size <= once < 5 * size
    assert 12 * size <= twice < 13 * size


def test_roofline_of_counted_work():
    limits = latency.Limits(read_bytes=10e9, sgemm_flops=100e9)
    work = latency.Work(bytes=5e9, flops=20e9)
    assert work.floor(limits) == 0.5
    rates = latency.throughput(latency.Timing.of([1.0], 1), work, limits)
    assert rates == {"gb_per_s": 5.0, "gflop_per_s": 20.0, "of_roofline": 0.5}


def test_machine_limits_are_measured_once():
    limits = latency.machine_limits()
    assert limits is latency.machine_limits()
    assert 1e8 < limits.read_bytes < 1e13
    assert 1e8 < limits.sgemm_flops < 1e15


def test_environment_says_where_numbers_come_from():
    facts = latency.environment()
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["device"]
    assert {"commit", "fastgan", "python", "platform", "cpp"} <= set(facts)
