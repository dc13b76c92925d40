"""``optimize``: from a trained generator to the fastest program for it that this machine runs, checked against it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fastgan import _native
from fastgan.infer import files
from fastgan.infer.capture import Captured, apart, capture
from fastgan.infer.choose import by_cost, by_trying
from fastgan.infer.fold import crop_kernels, fold_constants, fold_factors, fold_upsampling
from fastgan.infer.functional import CudaGraph, Functional, constants_in_channels_last
from fastgan.infer.fuse import fuse, fuse_dense_blocks
from fastgan.infer.lower import lower, use_energies
from fastgan.infer.narrow import LEAST_DB, NarrowWeights
from fastgan.infer.plan import Chooser, hoist, make_program
from fastgan.infer.report import Memory, Report, Row, rows_of
from fastgan.infer.run import Pool, Workspace
from fastgan.infer.verify import (
    TOLERANCE,
    check_finite,
    check_sample,
    largest_difference,
    least_psnr,
    noise_like,
    results_of,
    take_sample,
    tolerance_on,
    verify,
)
from fastgan.infer.weights import FrozenWeights, own_constants

PRECISIONS = ("fp32", "high", "bf16")


def optimize(
    model: nn.Module,
    example_args: tuple[Any, ...],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    precision: str = "fp32",
    tune: bool = False,
    progress: Callable[[str], None] | None = None,
) -> FastGenerator:
    """Turn a trained generator into the fastest program for it that this machine runs.

    The model is captured as a graph in evaluation (torch.export); batch norm, spectral norm, equalised learning rates
    and whatever else depends on weights alone are folded into the weights; activations, norms, sums, padding and
    concatenations are fused into the layers that make their inputs; each convolution gets the algorithm that is fastest
    for its sizes, with its weight prepared once; every value gets its place in one block of memory. What has no kernel
    of ours runs as torch's operator, and the report says why. At the end the result is compared with the original, on
    the example and on noise.

    Args:
        model: a module of convolutions, transposed convolutions, norms, activations, padding, up-sampling, pixel
            shuffles, concatenations and sums, ours or anybody's, on the CPU in float32. It is not changed, and later
            changes of it do not reach the result.
        example_args, example_kwargs: a call of it. The result takes calls of the same shapes and dtypes, whose
            arguments that are no tensors have the same values.
        precision: "fp32" (each convolution within 1e-5 of float64), "high" (within 3 times the error of torch's), or
            "bf16": convolutions' weights stored in bfloat16, arithmetic in float32, for layers that wait for their
            weights and for files of half the size. The result keeps a PSNR of 40 dB to the original, for which the
            layers that harm it most stay in float32. On the CPU only.
        tune: time every algorithm for each layer here and now, instead of trusting the cost model. Seconds.
        progress: called with a line for each layer that was tuned.

    Returns:
        What is called like the model and answers the same, without gradients, from any thread.

    Raises:
        TypeError: ``model`` is no module, ``example_args`` no tuple.
        ValueError: a precision that there is not, weights that are not finite, inputs that are no tensors on the CPU,
            or a model that cannot be captured: its control flow depends on data, the example does not fit, it changes
            its buffers.
        Mismatch: the result differs from the original; the message names the first layer that does.

    Example:
        >>> fast = fastgan.infer.optimize(generator, (torch.randn(1, 3, 256, 256),))
        >>> image = fast(photo)
        >>> print(fast.report())
    """
    _check_call(model, example_args, precision)
    kwargs = dict(example_kwargs or {})
    inputs = [leaf for leaf in pytree.tree_leaves((example_args, kwargs)) if isinstance(leaf, Tensor)]
    device = _device_of(model, inputs)
    if precision == "bf16" and device.type != "cpu":
        raise ValueError(f"infer.optimize: precision 'bf16' takes a model on the CPU, got one on {device}")
    with apart(device.type):
        captured = capture(model, example_args, kwargs)
        check_finite(captured.module)
        original = fx.GraphModule(captured.module, copy.deepcopy(captured.module.graph))
        arithmetic = arithmetic_of(precision)
        simplify(captured.module, arithmetic)
        own_constants(captured.module, original)
        chooser = by_trying(arithmetic, progress) if tune else by_cost(arithmetic)
        calls = {"the example": inputs, "noise": noise_like(inputs)}
        calls = {name: [value.detach().contiguous() for value in values] for name, values in calls.items()}
        if precision == "bf16":
            fast = _narrowed(captured, original, calls, chooser)
        else:
            fast = FastGenerator(captured, precision, chooser, device)
            with fast.pool.borrow() as workspace:
                for name, values in calls.items():
                    fast.differences[name] = verify(workspace, original, values, tolerance_on(device, precision))
        with fast.pool.borrow() as workspace:
            fast._sample = take_sample(workspace, inputs)
    return fast


def _narrowed(
    captured: Captured, original: fx.GraphModule, calls: Mapping[str, Sequence[Tensor]], chooser: Chooser
) -> FastGenerator:
    """The program with weights in bfloat16, as many of them as the picture can bear."""
    module, device = captured.module, torch.device("cpu")
    exact = Functional(make_program(module, lambda node: None, "fp32"), module, "fp32")
    expected = {}
    for name, values in calls.items():
        # The passes alone: what a wrong one does might be less than what rounding may do.
        verify(exact, original, values, TOLERANCE)
        expected[name] = results_of(exact, values)
    weights = NarrowWeights(module)
    while True:
        fast = FastGenerator(captured, "bf16", chooser, device)
        with fast.pool.borrow() as workspace:
            for name, values in calls.items():
                got = results_of(workspace, values)
                fast.psnr[name] = least_psnr(got, expected[name])
                fast.differences[name] = largest_difference(got, expected[name])
            worst = min(fast.psnr, key=lambda name: fast.psnr[name])
            if fast.psnr[worst] >= LEAST_DB:
                break
            if not weights.narrow:
                # Nothing is rounded: the program must compute what the original does.
                verify(workspace, original, calls[worst], TOLERANCE)
                break
        fast._weights.release()
        weights.widen_most_harmful(partial(results_of, exact, calls[worst]), expected[worst], fast.psnr[worst])
    fast.kept.update(weights.kept)
    return fast


def load(path: str | Path, *, device: torch.device | str = "cpu") -> FastGenerator:
    """Read what :meth:`FastGenerator.save` wrote; the model's own code is not needed.

    On the kind of machine that it was made on, the algorithms chosen there are used, elsewhere those of the cost model.
    It is called once, and what it answers must be what it answered when it was made.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is truncated, changed, of another version, or none of ours.
        Mismatch: it answers something else here.
    """
    captured, choices, facts = files.read(Path(path))
    precision, device = facts["precision"], torch.device(device)
    by_model = by_cost(arithmetic_of(precision))
    fast = FastGenerator(captured, precision, lambda node: choices.get(node) or by_model(node), device)
    for name in ("differences", "psnr", "kept"):
        getattr(fast, name).update(facts[name])
    fast._sample = facts["sample"]
    with apart(device.type), fast.pool.borrow() as workspace:
        check_sample(workspace, fast._sample, device, tolerance_on(device, precision))
    return fast


def arithmetic_of(precision: str) -> str:
    """The precision that the ops compute in."""
    return "fp32" if precision == "bf16" else precision


def simplify(module: fx.GraphModule, precision: str) -> None:
    """All passes over a captured graph; its constants are on the CPU then."""
    fold_constants(module)
    module.to("cpu")
    use_energies(module)
    lower(module)
    fuse(module)
    fold_factors(module)
    fuse_dense_blocks(module, precision)
    fold_upsampling(module)
    crop_kernels(module)
    hoist(module)
    module.graph.lint()


def _check_call(model: nn.Module, example_args: tuple[Any, ...], precision: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"infer.optimize: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(example_args, tuple):
        raise TypeError(f"infer.optimize: example_args must be a tuple, got {type(example_args).__name__}")
    if precision not in PRECISIONS:
        raise ValueError(f"infer.optimize: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def _device_of(model: nn.Module, inputs: Sequence[Tensor]) -> torch.device:
    """The device of the model and its inputs: the CPU or one GPU; raises ValueError for others."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors |= {f"example tensor {i}": value for i, value in enumerate(inputs)}
    devices = {tensor.device: name for name, tensor in tensors.items()}
    if len(devices) > 1 or any(device.type not in ("cpu", "cuda") for device in devices):
        got = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise ValueError(f"infer.optimize: model and example must be on the CPU or on one GPU, got {got}")
    return next(iter(devices), torch.device("cpu"))


class FastGenerator(nn.Module):
    """What :func:`optimize` and :func:`load` return: a program for one set of shapes.

    Call it as the model. It may be called from several threads at once, each with memory of its own.

    Attributes:
        precision: as it was asked for.
        differences: how far results were from the original's when it was made, of the largest value.
        psnr, kept: with weights in bfloat16, as :class:`fastgan.infer.Report` has them.
    """

    def __init__(self, captured: Captured, precision: str, choose: Chooser, device: torch.device) -> None:
        super().__init__()
        self.precision = precision
        self.differences: dict[str, float] = {}
        self.psnr: dict[str, float] = {}
        self.kept: dict[str, float] = {}
        self._captured = captured
        self._sample: dict[str, Any] = {}
        arguments = captured.in_spec.child(0)
        plain = captured.in_spec.num_leaves == arguments.num_children and all(c.is_leaf() for c in arguments.children())
        self._only_tensors = arguments.num_children if plain and all(leaf is None for leaf in captured.leaves) else None
        self._device, module, arithmetic = device, captured.module.to(device), arithmetic_of(precision)
        planned = device.type == "cpu" and _native.cpu_library() is not None
        self._weights = FrozenWeights(module if planned else None)
        self.program = program = make_program(module, choose if planned else lambda node: None, arithmetic)
        if planned:
            self.pool = Pool(lambda: Workspace(program))
        elif device.type == "cuda":
            constants_in_channels_last(module)
            self.pool = Pool(lambda: CudaGraph(program, module, arithmetic))
        else:
            self.pool = Pool(lambda: Functional(program, module, arithmetic))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns for these arguments.

        Raises:
            ValueError: arguments that are not like the example's.
        """
        results = self._run(self._inputs(args, kwargs))
        return pytree.tree_unflatten(results, self._captured.out_spec)

    def report(self) -> Report:
        """What was fused, what was not and why, and how each convolution is computed."""
        return self._report(rows_of(self.program))

    def profile(self, *args: Any, rounds: int = 10, **kwargs: Any) -> Report:
        """The report with every step's measured time: medians of ``rounds`` calls with these arguments."""
        inputs, times = self._inputs(args, kwargs), [[] for _ in self.program.steps]
        last = 0.0

        def watch(number: int, _: Any) -> None:
            nonlocal last
            now = time.perf_counter()
            times[number].append(1e3 * (now - last))
            last = time.perf_counter()

        for _ in range(rounds + 1):
            last = time.perf_counter()
            self._run(inputs, watch)
        measured = [median(of_step[1:]) for of_step in times]
        return self._report(rows_of(self.program, measured))

    def _report(self, rows: tuple[Row, ...]) -> Report:
        return Report(rows, dict(self.differences), self.precision, dict(self.psnr), dict(self.kept))

    def memory(self) -> Memory:
        """What it holds in memory."""
        constants = {tensor.data_ptr(): tensor for tensor in self.program.constants.values()}
        weights = sum(tensor.numel() * tensor.element_size() for tensor in constants.values())
        return Memory(
            weights - self._weights.dropped,
            self._weights.prepared_bytes(),
            self.program.bytes,
            self.program.alive,
            self.pool.count,
        )

    def drop_weights(self) -> int:
        """Give back the memory of weights of which only what was prepared is read; returns the bytes.

        From then on it cannot be saved, and a call with another number of threads (torch.set_num_threads) raises.
        """
        return self._weights.drop()

    def save(self, path: str | Path) -> None:
        """Write it to one file: safetensors, with the graph as JSON in its header; :func:`load` needs no other code.

        Raises:
            RuntimeError: its weights were dropped.
        """
        if self._weights.dropped:
            raise RuntimeError("infer: save must come before drop_weights, and the weights were dropped")
        facts = {name: getattr(self, name) for name in ("precision", "differences", "psnr", "kept")}
        facts["sample"] = self._sample
        files.save(Path(path), self._captured, self.program, facts)

    def _run(self, inputs: list[Tensor], watch: Callable[[int, Any], None] | None = None) -> list[Any]:
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return self._run(inputs, watch)
        with torch.no_grad(), self.pool.borrow() as workspace:
            return workspace.run(inputs, watch)

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        leaves: Sequence[Any] = args
        # What pytree would find as well, and takes as long for as a small layer.
        if kwargs or len(args) != self._only_tensors or not all([isinstance(leaf, Tensor) for leaf in args]):
            # By name they may come in any order; a graph knows one.
            names = self._captured.in_spec.child(1).context or []
            kwargs = {name: kwargs[name] for name in names} if set(names) == set(kwargs) else kwargs
            leaves, spec = pytree.tree_flatten((args, kwargs))
        else:
            spec = self._captured.in_spec
        if spec != self._captured.in_spec:
            raise ValueError(
                f"infer: arguments must be those of the example, {_signature(self._captured.in_spec)}, got "
                f"{_signature(spec)}"
            )
        inputs, expected = [], iter(self.program.inputs)
        for number, (leaf, fixed) in enumerate(zip(leaves, self._captured.leaves, strict=True)):
            if fixed is not None:
                if type(leaf) is not type(fixed[0]) or leaf != fixed[0]:
                    raise ValueError(
                        f"infer: argument {number} must be {fixed[0]!r} as in the example, got {_told(leaf)}"
                    )
                continue
            if not isinstance(leaf, Tensor):
                raise ValueError(f"infer: argument {number} must be a tensor as in the example, got {leaf!r}")
            _, shape, dtype = next(expected)
            if tuple(leaf.shape) != shape or leaf.dtype != dtype or leaf.device.type != self._device.type:
                raise ValueError(
                    f"infer: argument {number} must be {list(shape)} of {dtype} on {self._device.type} as in the "
                    f"example, got {list(leaf.shape)} of {leaf.dtype} on {leaf.device}; optimize once for each size"
                )
            inputs.append(leaf.detach().contiguous())
        return inputs


def _signature(spec: pytree.TreeSpec) -> str:
    args, kwargs = spec.child(0), spec.child(1)
    flat = all(child.is_leaf() for child in (*args.children(), *kwargs.children()))
    return f"{args.num_children} positional and {sorted(kwargs.context or [])} by name" + ("" if flat else f": {spec}")


def _told(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
