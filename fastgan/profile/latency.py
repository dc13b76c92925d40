"""The one harness that measures time: candidates interleaved in one process, medians beside measured limits.

A shared machine changes speed from second to second. So every round runs each candidate once, in rotating order, and a
ratio is the median of the rounds' ratios: what slows a whole round cancels. Times are seconds of wall clock (on CUDA of
the device, between events), work is bytes and floating-point operations.
"""

from __future__ import annotations

import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# A sample of a short candidate is a burst of calls of about this long, so that the clock and cold caches do not count.
BURST_SECONDS = 5e-4
_MAX_BURST = 1000


@dataclass(frozen=True)
class Timing:
    """The times of one candidate.

    Attributes:
        median, p20, p80: seconds per call, over the samples.
        n: samples, one per round.
        calls: calls per sample, whose mean a sample is.
        samples: seconds per call, round by round.
    """

    median: float
    p20: float
    p80: float
    n: int
    calls: int
    samples: tuple[float, ...] = field(repr=False)

    @staticmethod
    def of(samples: Sequence[float], calls: int) -> Timing:
        """The statistics of ``samples`` (seconds per call), each the mean of ``calls`` calls."""
        cuts = statistics.quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else list(samples) * 4
        return Timing(statistics.median(samples), cuts[0], cuts[-1], len(samples), calls, tuple(samples))


def measure(
    candidates: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 1.0,
    rounds: int | None = None,
    min_rounds: int = 5,
    warmup: int = 2,
    burst: float = BURST_SECONDS,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Time candidates against each other: interleaved, in rotating order, garbage collection off.

    Args:
        candidates: name -> a function without arguments; its result is dropped.
        seconds: rounds are added until the whole measurement, warm-up excluded, took this long.
        rounds: exactly this many rounds instead.
        min_rounds: at least this many, whatever ``seconds`` says.
        warmup: calls of each candidate before the first round; they also decide how many calls make a sample.
        burst: seconds that a sample takes at least (of at most 1000 calls). Where candidates have thread pools of
            their own, a long one: a pool spins for some milliseconds after its last call, on the next candidate's core.
        device: where the candidates work. On CUDA a sample is the time between two events around its calls, and the
            device is waited for.

    Returns:
        name -> :class:`Timing`, in the order given.

    Raises:
        ValueError: no candidates, or no warm-up.
    """
    if not candidates:
        raise ValueError("measure: candidates must hold at least one function, got none")
    if warmup < 1 or min_rounds < 1 or (rounds is not None and rounds < 1):
        raise ValueError(f"measure: warmup and rounds must be >= 1, got {warmup=}, {min_rounds=}, {rounds=}")
    clock = _cuda_clock if torch.device(device).type == "cuda" else _wall_clock
    calls = {}
    for name, function in candidates.items():
        fastest = min(clock(function, 1) for _ in range(warmup))
        calls[name] = min(_MAX_BURST, max(1, round(burst / max(fastest, 1e-9))))
    names = list(candidates)
    samples: dict[str, list[float]] = {name: [] for name in names}
    with _no_garbage_collection():
        start, done = time.perf_counter(), 0
        while done < (rounds or min_rounds) or (rounds is None and time.perf_counter() - start < seconds):
            shift = done % len(names)
            for name in names[shift:] + names[:shift]:
                samples[name].append(clock(candidates[name], calls[name]))
            done += 1
    return {name: Timing.of(samples[name], calls[name]) for name in names}


def speedup(timings: Mapping[str, Timing], name: str, baseline: str) -> float:
    """How many times as fast ``name`` is as ``baseline``: the median of the rounds' ratios."""
    pairs = zip(timings[baseline].samples, timings[name].samples, strict=True)
    return statistics.median(slow / fast for slow, fast in pairs)


def _wall_clock(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def _cuda_clock(function: Callable[[], object], calls: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def passes(
    function: Callable[..., Tensor], inputs: Sequence[Any], *, double: bool = False
) -> dict[str, Callable[[], object]]:
    """What training asks of ``function(*inputs)``, as candidates for :func:`measure`.

    Args:
        function: returns one tensor.
        inputs: its arguments; gradients are for the tensors among them, and in lists among them, that require grad.
        double: also the double backward; its first gradient must depend on the inputs.

    Returns:
        "fwd": without recording gradients. "bwd": the gradients from a graph recorded once. "fwd+bwd": both, recording.
        "double bwd": forward, gradients with a graph, and the gradients of their squared norm, as a gradient penalty
        does.
    """
    flat = [x for value in inputs for x in (value if isinstance(value, (list, tuple)) else [value])]
    wanted = [x for x in flat if isinstance(x, Tensor) and x.requires_grad]
    recorded: list[Tensor] = []

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    def backward() -> tuple[Tensor, ...]:
        if not recorded:
            recorded.append(function(*inputs))
        return torch.autograd.grad(recorded[0], wanted, _cotangent(recorded[0]), retain_graph=True)

    def both() -> tuple[Tensor, ...]:
        result = function(*inputs)
        return torch.autograd.grad(result, wanted, _cotangent(result))

    def penalty() -> tuple[Tensor, ...]:
        result = function(*inputs)
        gradients = torch.autograd.grad(result, wanted, _cotangent(result), create_graph=True)
        norm = torch.stack([g.square().sum() for g in gradients]).sum()
        return torch.autograd.grad(norm, wanted)

    found: dict[str, Callable[[], object]] = {"fwd": forward, "bwd": backward, "fwd+bwd": both}
    return {**found, "double bwd": penalty} if double else found


def _cotangent(result: Tensor) -> Tensor | None:
    """None for a scalar, whose cotangent autograd makes; ones cost nothing beside a result that needs them."""
    return None if result.ndim == 0 else torch.ones_like(result)


def peak_memory(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Bytes by which one call raises what torch's allocator of ``device`` holds, at its highest.

    On the CPU this follows torch's own allocations through its profiler; scratch memory of math libraries is not seen.
    """
    function()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@dataclass(frozen=True)
class Limits:
    """What the device reaches: bytes read per second, and operations per second of a float32 matrix product."""

    read_bytes: float
    sgemm_flops: float


@cache
def machine_limits(device: str = "cpu") -> Limits:
    """Measure :class:`Limits` of ``device`` with torch's own sum and matmul on all threads; once per process.

    The best of several runs: a limit is what the device can do when nothing disturbs it. Reading is a float32 sum over
    256 MiB, many times a last-level cache; the product is 2048 x 2048 x 2048.
    """
    size, side = 1 << 26, 2048
    clock = _cuda_clock if torch.device(device).type == "cuda" else _wall_clock
    vector = torch.ones(size, device=device)
    matrix = torch.randn(side, side, device=device)
    out = torch.empty_like(matrix)
    with torch.no_grad():
        read = min(clock(vector.sum, 1) for _ in range(8))
        multiply = min(clock(lambda: torch.mm(matrix, matrix, out=out), 1) for _ in range(6))
    return Limits(4 * size / read, 2 * side**3 / multiply)


@dataclass(frozen=True)
class Work:
    """What a call must at least do: bytes moved once, floating-point operations. Counted by hand, per case."""

    bytes: float = 0.0
    flops: float = 0.0

    def floor(self, limits: Limits) -> float:
        """Seconds below which the device cannot do it: the roofline."""
        return max(self.bytes / limits.read_bytes, self.flops / limits.sgemm_flops)


def throughput(timing: Timing, work: Work, limits: Limits) -> dict[str, float]:
    """GB/s and GFLOP/s at the median (0 where there are none), the roofline's share of the time (at most about 1)."""
    return {
        "gb_per_s": work.bytes / timing.median / 1e9,
        "gflop_per_s": work.flops / timing.median / 1e9,
        "of_roofline": work.floor(limits) / timing.median,
    }


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Where numbers come from: commit (of a checkout, with "+" if it has changes), versions, device and threads."""
    from fastgan import __version__, _native

    on_gpu = torch.device(device).type == "cuda"
    cpp = _native.load()["cpu"].reason
    return {
        "commit": _commit(),
        "fastgan": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cpp": _native.simd_level() if cpp is None else f"unavailable: {cpp}",
    }


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        short = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            # What was measured before is no change of what is measured now.
            ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown: {error}"
    return short + ("+" if changed else "")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
