"""Compiles planned launches of Triton kernels for architectures that are not here, and reads what came out.

A launch is specialised with Triton's own functions, exactly as at a real launch: the types, which integers are 1,
which numbers and addresses are divisible by 16. So what is compiled is what a GPU would run. Triton keeps its results
on disk.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fastgan.kernels._launch import Launch
from fastgan.profile import global_loads, machine_code, products
from fastgan.profile.devices import ARCHITECTURES
from fastgan.profile.global_loads import TileLoad, tile_loads
from fastgan.profile.machine_code import MachineCode

_CACHED = "fastgan-compiled.pickle"
_TOGETHER = 8  # codes that a process compiles before it reads them: machine_code.read says why


@dataclass(frozen=True)
class Reference:
    """A ``@triton.jit`` function by name, to travel to another process."""

    module: str
    name: str

    @staticmethod
    def of(function: Any) -> Reference:
        """The function's name; TypeError for what is none, an autotuner say: a launch names one configuration."""
        from triton.runtime.jit import JITFunction

        if not isinstance(function, JITFunction):
            raise TypeError(f"Launch.kernel must be a @triton.jit function, got {type(function).__name__}")
        return Reference(function.fn.__module__, function.fn.__qualname__)

    def load(self) -> Any:
        found: Any = importlib.import_module(self.module)
        for part in self.name.split("."):
            found = getattr(found, part)
        return found


@dataclass(frozen=True)
class Job:
    """What decides one compilation; two launches with the same ``key`` run the same machine code."""

    kernel: Reference
    arch: int
    key: str
    signature: Mapping[str, str] = field(compare=False)
    constants: Mapping[tuple[int, ...], Any] = field(compare=False)
    attributes: Mapping[tuple[int, ...], Any] = field(compare=False)
    options: Mapping[str, Any] = field(compare=False)


@dataclass(frozen=True)
class Compiled:
    """A kernel that was compiled.

    Attributes:
        kernel: its function's name.
        arch: 80 is sm_80.
        warps: per block, as compiled.
        shared: bytes of shared memory per block, the system's part not counted.
        code: what the machine code holds.
        products: (element type, input precision) of its matrix products, for example ("f16", "tf32") (the precision
            matters for f32 alone).
        tiles: its tile loads.
    """

    kernel: str
    arch: int
    warps: int
    shared: int
    code: MachineCode
    products: frozenset[tuple[str, str]]
    tiles: tuple[TileLoad, ...]

    @property
    def occupancy(self) -> float:
        """Resident warps as a share of what an SM holds; theoretical; 0 if the architecture cannot launch it."""
        return ARCHITECTURES[self.arch].occupancy(self.code.registers, self.shared, self.warps)


class _Address:
    """Stands for a tensor where Triton looks at its type and its address.

    Storage comes from torch's allocators, whose blocks begin at multiples of 512 bytes on CUDA, so the offset decides.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self.offset = tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self.offset

    @staticmethod
    def ptr_range() -> int:
        return 0


def _stand_in(argument: Any) -> Any:
    if isinstance(argument, (tuple, list)):
        return tuple(map(_stand_in, argument))
    return _Address(argument) if isinstance(argument, Tensor) else argument


def specialise(launch: Launch, arch: int) -> Job:
    """What Triton's JIT would compile for ``launch`` on architecture ``arch`` (80 is sm_80).

    Raises:
        TypeError: the kernel is no jitted function, or an argument is of a type that Triton does not take.
        RuntimeError: this process interprets Triton's kernels (TRITON_INTERPRET=1).
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("kernels cannot be compiled under TRITON_INTERPRET=1: unset it, in a process of its own")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel = launch.kernel
    reference = Reference.of(kernel)
    backend = make_backend(GPUTarget("cuda", arch, 32))
    arguments = {name: _stand_in(x) for name, x in launch.arguments.items()}
    keywords = {**arguments, **launch.constants, **launch.settings()}
    # What JITFunction.run adds before it binds.
    keywords |= {"debug": bool(kernel.debug), "instrumentation_mode": ""}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(**keywords)
    parsed, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialization, options)
    portable = {path: _portable(value) for path, value in constants.items()}
    facts = (_reader(), triton.__version__, reference, kernel.cache_key, arch, signature, portable, attributes)
    text = repr((facts, sorted(parsed.__dict__.items())))
    key = hashlib.sha256(text.encode()).hexdigest()
    return Job(reference, arch, key, signature, portable, attributes, dict(parsed.__dict__))


@functools.cache
def _reader() -> str:
    """A digest of the code that reads what was compiled: with other code, what was read before is read again."""
    sources = [inspect.getsource(part) for part in (global_loads, machine_code, products, Compiled, _result)]
    return hashlib.sha256("".join(sources).encode()).hexdigest()


def _portable(value: Any) -> Any:
    """A constant as what can be sent to another process and printed the same way every time."""
    if isinstance(value, tuple):
        return tuple(_portable(part) for part in value)
    return Reference.of(value) if hasattr(value, "cache_key") else value


def _restored(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_restored(part) for part in value)
    return value.load() if isinstance(value, Reference) else value


@dataclass(frozen=True)
class Failure:
    """A job that did not compile: Triton's or ptxas's own words."""

    kernel: str
    arch: int
    message: str

    @staticmethod
    def of(job: Job, error: Exception) -> Failure:
        return Failure(job.kernel.name, job.arch, f"{type(error).__name__}: {error}")


def compile_jobs(jobs: Sequence[Job]) -> list[Compiled | Failure]:
    """Compile jobs of one architecture in this process and read the results, or take what was read before from Triton's
    cache. One failure does not stop the others."""
    from triton.runtime.cache import get_cache_manager

    found: dict[str, Compiled | Failure] = {}
    fresh: list[tuple[Job, Any]] = []
    for job in jobs:
        path = get_cache_manager(job.key).get_file(_CACHED)
        if path is not None:
            found[job.key] = pickle.loads(Path(path).read_bytes())
            continue
        try:
            fresh.append((job, _compile(job)))
        except Exception as error:  # noqa: BLE001 - whatever a compiler raises is this job's result, and is reported
            found[job.key] = Failure.of(job, error)
    try:
        codes = machine_code.read([kernel.asm["cubin"] for _, kernel in fresh], jobs[0].arch) if fresh else []
    except RuntimeError as error:
        return [found.get(job.key, Failure.of(job, error)) for job in jobs]
    for (job, kernel), code in zip(fresh, codes, strict=True):
        found[job.key] = _result(job, kernel, code)
        get_cache_manager(job.key).put(pickle.dumps(found[job.key]), _CACHED)
    return [found[job.key] for job in jobs]


def _compile(job: Job) -> Any:
    """Triton's CompiledKernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {path: _restored(value) for path, value in job.constants.items()}
    source = ASTSource(job.kernel.load(), dict(job.signature), constants, dict(job.attributes))
    return triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=dict(job.options))


def _result(job: Job, kernel: Any, code: MachineCode) -> Compiled:
    reserved = ARCHITECTURES[job.arch].shared_reserved
    # From sm_90 on the code's own shared memory contains the system's part, before it does not.
    static = max(0, code.static_shared - reserved)
    return Compiled(
        kernel=job.kernel.name,
        arch=job.arch,
        warps=kernel.metadata.num_warps,
        shared=kernel.metadata.shared + static,
        code=code,
        products=frozenset(products.products(kernel.asm["ttir"])),
        tiles=tuple(tile_loads(kernel.asm["ttgir"], kernel.asm["ptx"])),
    )


def compile_all(
    jobs: Iterable[Job], processes: int | None = None, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Compiled | Failure]:
    """Compile each job once, in parallel processes; key -> what came out. One failure does not stop the others.

    Results are kept a few at a time, so a call that was stopped goes on where it was.

    Args:
        processes: None takes one for each CPU of this process.
        progress: called with how many distinct jobs are done, and of how many.
    """
    distinct = {job.key: job for job in jobs}
    batches = _batches(distinct.values())
    processes = min(processes or len(os.sched_getaffinity(0)), len(batches))
    # Fresh processes: a fork would inherit torch's threads, locks and all.
    context = multiprocessing.get_context("spawn")
    found: dict[str, Compiled | Failure] = {}
    with ProcessPoolExecutor(processes, mp_context=context) if processes > 1 else nullcontext() as pool:
        results = map(compile_jobs, batches) if pool is None else pool.map(compile_jobs, batches)
        for batch, batch_results in zip(batches, results, strict=True):
            for job, result in zip(batch, batch_results, strict=True):
                found[job.key] = result
                progress(len(found), len(distinct))
    return {key: found[key] for key in distinct}


def _batches(jobs: Iterable[Job]) -> list[list[Job]]:
    """Jobs of one architecture each, _TOGETHER at most."""
    by_arch: dict[int, list[Job]] = {}
    for job in jobs:
        by_arch.setdefault(job.arch, []).append(job)
    return [group[i : i + _TOGETHER] for group in by_arch.values() for i in range(0, len(group), _TOGETHER)]


def vector_bits(tensor: Tensor) -> int:
    """The widest load, up to 128 bits, that ``tensor``'s memory allows everywhere along its dense dimension.

    Its address, its other strides and the length of the dense dimension must be multiples of the load. A map
    [N, C, H, W] in NCHW order allows one element: a window's taps shift the dense dimension by single pixels.
    """
    bits = 8 * tensor.element_size()
    sizes_strides = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    dense = [size for size, stride in sizes_strides if stride == 1]
    if not dense or (tensor.ndim == 4 and tensor.shape[1] > 1 and tensor.stride(1) != 1):
        return bits
    steps = [tensor.storage_offset(), dense[0], *[stride for _, stride in sizes_strides if stride != 1]]
    while bits < 128 and all(step * 8 * tensor.element_size() % (2 * bits) == 0 for step in steps):
        bits *= 2
    return bits
