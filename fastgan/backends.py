"""Which implementation of an op runs and how exactly it has to compute: the choice, its reasons, and how a user
overrides it.

The first that applies decides: the ``backend=`` argument of the call, an enclosing ``with fastgan.backend(name)``, the
environment variable ``FASTGAN_BACKEND`` (read once, at import), and last the default order of :data:`DEFAULT_ORDER`. A
backend answers ``can_run(...) -> None | reason`` from shapes, dtypes and device alone. An explicit choice that cannot
run raises with the reason; the automatic choice takes the next backend and logs that once.

The precision comes from an enclosing ``with fastgan.precision(name)``, else from ``FASTGAN_PRECISION`` (read once, at
import), else it is "fp32".
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastgan import _native

logger = logging.getLogger("fastgan")

NAMES = ("reference", "cpp", "triton", "cuda")
DEFAULT_ORDER = ("cuda", "triton", "cpp", "reference")
PRECISIONS = ("fp32", "high")
# Backends that serve only where they are named: no run on a GPU has shown yet that their kernels are faster than what
# they would replace.
ONLY_IF_NAMED = frozenset({"cuda"})

# Loaded here, once: a call through functools.cache on every op would cost time and stop torch.compile's tracing.
_LIBRARIES = _native.load()
# Triton itself is imported with the first kernel that runs: it costs as much as the rest of the package together.
_TRITON_MISSING = None if importlib.util.find_spec("triton") else "triton is not installed"


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source}: backend must be one of {', '.join(NAMES)}, got {name!r}")
    return name


def _checked_precision(name: str, source: str) -> str:
    if name not in PRECISIONS:
        raise ValueError(f"{source}: precision must be one of {', '.join(PRECISIONS)}, got {name!r}")
    return name


_from_environment = os.environ.get("FASTGAN_BACKEND") or None
if _from_environment is not None:
    _checked(_from_environment, "FASTGAN_BACKEND")
_precision_from_environment = _checked_precision(os.environ.get("FASTGAN_PRECISION") or "fp32", "FASTGAN_PRECISION")


class _Local(threading.local):
    # Set in every thread from the start: torch.compile's guards on attributes of the class do not see that an
    # instance has got its own, and a graph compiled before the first ``with`` would serve what is inside it.
    def __init__(self) -> None:
        self.override: str | None = None
        self.precision: str | None = None
        self.recording = False


_local = _Local()
# Op -> what tells the algorithm of a call on the cpp backend: (algorithm, verdict on each).
_explainers: dict[str, Callable[..., tuple[str, dict[str, str]]]] = {}
PREDICTION = "predictions are the cost model's, for two threads of AMD Zen 3"
_logged: set[tuple[str, str, str]] = set()


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Make every fastgan op inside the ``with`` block of this thread run on ``name``.

    Args:
        name: ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: for another name; and from the op itself, with the reason, if the backend cannot run what it is
            given.
    """
    previous, _local.override = _local.override, _checked(name, "fastgan.backend")
    try:
        yield
    finally:
        _local.override = previous


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """Make the convolutions of every fastgan op inside the ``with`` block of this thread as exact as ``name`` says.

    Their gradients, of both orders and wherever they are computed, keep the precision that the call was made with. It
    is about float32: half types are rounded far more coarsely, float64 has one way to compute. The reference backend
    is torch's convolution and follows torch's settings.

    Args:
        name: "fp32": at most 1e-5 from float64, relative to the largest result; on the GPU, TF32 where torch allows it
            to its own convolutions. "high": at most 3 times the error of torch's own float32 convolution on the CPU: of
            Winograd's tiles, the kernels take those of 2 and 3 only (measured, a tile of 4 has up to 20 times torch's
            error, everything else up to 2.5 times; bench/precision.py); on the GPU, float32 products whatever torch
            allows.

    Raises:
        ValueError: for another name.
    """
    previous, _local.precision = _local.precision, _checked_precision(name, "fastgan.precision")
    try:
        yield
    finally:
        _local.precision = previous


def precision_in_force() -> str:
    """ "fp32" or "high": what a convolution called now in this thread has to keep to."""
    return _local.precision or _precision_from_environment


def override() -> tuple[str | None, str | None, bool]:
    """What :func:`choose` and plans depend on beside their arguments, for callers that keep answers."""
    return _local.override, _local.precision, _local.recording


@dataclass(frozen=True)
class Decision:
    """Which backend an op call uses and why; ``print`` it.

    Of a convolution on the cpp backend also which algorithm: ``algorithm`` is the name, with Winograd's tile behind it,
    and ``algorithms`` has for each that there is the time that the kernels' own cost model predicts, or why it cannot
    serve or was not asked. The names are those of ``fastgan._native.ALGORITHMS``.
    """

    op: str
    backend: str
    chosen_by: str
    reasons: Mapping[
        str, str | None
    ]  # backend -> why it cannot run, None if it can; a missing backend has no such kernel
    algorithm: str | None = None
    algorithms: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op} runs on {self.backend} ({self.chosen_by})"]
        for name in DEFAULT_ORDER:
            if name not in self.reasons:
                state = "has no kernel for this op"
            else:
                reason = self.reasons[name]
                state = "can run" if reason is None else f"cannot run: {reason}"
                if reason is None and name in ONLY_IF_NAMED:
                    state = "can run, where it is named: no GPU has shown yet that it is the faster one"
            lines.append(f"  {name:<10}{state}")
        if self.algorithm is not None:
            lines.append(f"its convolution is computed by {self.algorithm} ({PREDICTION})")
            lines += [f"  {name:<24}{verdict}" for name, verdict in self.algorithms.items()]
        return "\n".join(lines)


class _Recorded(Exception):
    def __init__(self, decision: Decision) -> None:
        super().__init__(str(decision))
        self.decision = decision


def choose(
    op: str, argument: str | None, can_run: Mapping[str, Callable[..., str | None]], /, *args: Any, **facts: Any
) -> str:
    """Resolve the backend of one call of ``op``.

    Args:
        op: the op's public name, for messages.
        argument: the call's own ``backend=``, or None.
        can_run: backend name -> predicate; it is called with ``*args, **facts`` and returns None or a reason.

    Returns:
        The backend's name.

    Raises:
        ValueError: unknown name, or an explicit choice that cannot run.
    """
    explicit, chosen_by = None, "default order"
    if argument is not None:
        explicit, chosen_by = _checked(argument, op), "backend= argument"
    elif _local.override is not None:
        explicit, chosen_by = _local.override, "fastgan.backend"
    elif _from_environment is not None:
        explicit, chosen_by = _from_environment, "FASTGAN_BACKEND"

    if _local.recording:
        reasons = {name: predicate(*args, **facts) for name, predicate in can_run.items()}
        able = (name for name in DEFAULT_ORDER if name in reasons and reasons[name] is None)
        name = explicit or next(name for name in able if name not in ONLY_IF_NAMED)
        raise _Recorded(Decision(op, name, chosen_by, reasons))
    if explicit is not None:
        reason = can_run[explicit](*args, **facts) if explicit in can_run else "it has no kernel for this op"
        if reason is not None:
            raise ValueError(f"{op}: backend {explicit!r} (chosen by {chosen_by}) cannot run this call: {reason}")
        return explicit
    return _first_that_can(op, can_run, *args, **facts)


def _first_that_can(op: str, can_run: Mapping[str, Callable[..., str | None]], *args: Any, **facts: Any) -> str:
    for name in DEFAULT_ORDER:
        if name not in can_run or name in ONLY_IF_NAMED:
            continue
        reason = can_run[name](*args, **facts)
        if reason is None:
            return name
        _log_once(op, name, reason)
    raise RuntimeError(f"{op}: no backend can run this call; the reference backend must always be able to")


def _log_once(op: str, name: str, reason: str) -> None:
    if torch.compiler.is_compiling() or (op, name, reason) in _logged:
        return
    _logged.add((op, name, reason))
    logger.info("%s: %s cannot run (%s); trying the next backend", op, name, reason)


def always(*args: Any, **facts: Any) -> None:
    """The reference backend's ``can_run``: plain torch runs everywhere."""
    return None


def cpp_can_run(device: torch.device, dtype: torch.dtype, **facts: Any) -> str | None:
    """The C++ backend's common conditions: its library is loaded, the tensors are on the CPU, a floating dtype it
    knows."""
    if device.type != "cpu":
        return f"it runs on cpu tensors, got {device.type}"
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"it takes float32, float64, bfloat16 and float16, got {dtype}"
    return _LIBRARIES["cpu"].reason


def triton_can_run(device: torch.device, dtype: torch.dtype, **facts: Any) -> str | None:
    """The Triton backend's common conditions: Triton is there, CUDA tensors (CPU ones under its interpreter), a dtype
    it computes in."""
    served = "cpu" if _native.TRITON_INTERPRETED else "cuda"
    if device.type != served:
        hint = "" if _native.TRITON_INTERPRETED else "; TRITON_INTERPRET=1 runs it on cpu tensors, slowly"
        return f"it runs on {served} tensors, got {device.type}{hint}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, got {dtype}"
    return _TRITON_MISSING


def cuda_can_run(device: torch.device, dtype: torch.dtype, **facts: Any) -> str | None:
    """The CUDA C++ backend's common conditions: CUDA tensors, its library is loaded, a dtype it computes in."""
    if device.type != "cuda":
        return f"it runs on cuda tensors, got {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, got {dtype}"
    return _LIBRARIES["cuda"].reason


def available() -> dict[str, str | None]:
    """Backend name -> None if it can be used on this machine, else the reason why not."""
    gpu = None if torch.cuda.is_available() else "torch sees no CUDA device"
    return {
        "reference": None,
        "cpp": _LIBRARIES["cpu"].reason,
        "triton": _TRITON_MISSING or (None if _native.TRITON_INTERPRETED else gpu),
        "cuda": gpu or _LIBRARIES["cuda"].reason,
    }


def explain(op: Callable[..., Any] | str, /, *args: Any, **kwargs: Any) -> Decision:
    """Say which backend ``op(*args, **kwargs)`` would run on, and why the others would not; of a convolution on the cpp
    backend also which algorithm. Nothing is computed.

    Args:
        op: a function of :mod:`fastgan.ops`, or its name.
        *args, **kwargs: the call's own arguments, checked as in a call.

    Returns:
        A :class:`Decision`; printing it gives one line per backend, and one per algorithm.

    Raises:
        ValueError: if there is no such op, or the arguments are wrong.
    """
    from fastgan import ops

    function = getattr(ops, op, None) if isinstance(op, str) else op
    if function is None or not callable(function):
        raise ValueError(f"explain: op must be one of fastgan.ops, got {op!r}")
    _local.recording = True
    try:
        function(*args, **kwargs)
    except _Recorded as recorded:
        decision = recorded.decision
    else:
        raise ValueError(f"explain: {op!r} is not a fastgan op")
    finally:
        _local.recording = False
    if decision.backend != "cpp" or decision.op not in _explainers or decision.reasons["cpp"] is not None:
        return decision
    algorithm, algorithms = _explainers[decision.op](*args, **kwargs)
    return replace(decision, algorithm=algorithm, algorithms=algorithms)


def explains_algorithm(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates what tells the algorithm of a call of ``op`` on the cpp backend: it takes the call's arguments, which
    were checked, and returns the algorithm's name and the verdict on each, by name."""

    def register(explainer: Callable[..., tuple[str, dict[str, str]]]) -> Callable[..., Any]:
        _explainers[op] = explainer
        return explainer

    return register
