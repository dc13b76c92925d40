"""``optimize``: from a trained generator to the fastest program for it that this machine runs, checked against it."""

from __future__ import annotations

import copy
import math
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
from fastgan.infer.arguments import Arguments
from fastgan.infer.capture import Captured, apart, capture
from fastgan.infer.choose import by_cost, by_trying, is_worth_quantizing
from fastgan.infer.fold import crop_kernels, fold_constants, fold_factors, fold_upsampling
from fastgan.infer.functional import CudaGraph, Functional, constants_in_channels_last
from fastgan.infer.fuse import fuse, fuse_dense_blocks, fuse_rectifiers, fuse_reflections
from fastgan.infer.lossy import LossyLayers
from fastgan.infer.lower import lower, use_energies
from fastgan.infer.narrow import NarrowWeights
from fastgan.infer.plan import Chooser, Watch, hoist, make_program
from fastgan.infer.quantize import QuantizedLayers
from fastgan.infer.report import Memory, Report, Row, rows_of
from fastgan.infer.run import Pool, Workspace
from fastgan.infer.verify import (
    TOLERANCE,
    TOLERANCE_LOSSY,
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

PRECISIONS = ("fp32", "high", "bf16", "int8")
LOSSY = ("bf16", "int8")


def optimize(
    model: nn.Module,
    example_args: tuple[Any, ...],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    precision: str = "fp32",
    calibration: Sequence[tuple[Any, ...]] | None = None,
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
        precision: "fp32" (each convolution within 1e-5 of float64) or "high" (within 3 times the error of torch's).
            On the CPU also "bf16": convolutions' weights stored in bfloat16, arithmetic in float32, for layers that
            wait for their weights and for files of half the size; or "int8": weights and what convolutions read
            rounded to 8 bits, sums exact, where the cost model has that for faster. Pictures keep a PSNR to the
            original's of 40 and 35 dB, for which the layers that harm them most stay in float32.
        calibration: of "int8", further calls that show what layers read: tuples like ``example_args``, each with
            ``example_kwargs``. What lies beyond the range of the example's and theirs is cut off. Their pictures keep
            the PSNR as well.
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
    leaves = pytree.tree_leaves((example_args, kwargs))
    inputs = [leaf.detach().contiguous() for leaf in leaves if isinstance(leaf, Tensor)]
    device = _device_of(model, inputs)
    if precision in LOSSY and device.type != "cpu":
        raise ValueError(f"infer.optimize: precision {precision!r} takes a model on the CPU, got one on {device}")
    if calibration and precision != "int8":
        raise ValueError(f"infer.optimize: calibration is for precision 'int8', got it with {precision!r}")
    with apart(device.type):
        captured = capture(model, example_args, kwargs)
        shown = _calls_of(captured, calibration or (), kwargs)
        check_finite(captured.module)
        original = fx.GraphModule(captured.module, copy.deepcopy(captured.module.graph))
        arithmetic = arithmetic_of(precision)
        simplify(captured.module, arithmetic)
        own_constants(captured.module, original)
        chooser = by_trying(arithmetic, progress) if tune else by_cost(arithmetic)
        noise = [value.contiguous() for value in noise_like(inputs)]
        if precision in LOSSY:
            # Noise reaches beyond the range that calibration finds, by intent.
            others = {"noise": [noise] if precision == "bf16" else [], "calibration": shown}
            calls = {"the example": [inputs], **{name: of_name for name, of_name in others.items() if of_name}}
            fast = _lossy(captured, original, precision, chooser, calls, noise)
        else:
            fast = FastGenerator(captured, precision, chooser, device)
            with fast.pool.borrow() as workspace:
                for name, values in {"the example": inputs, "noise": noise}.items():
                    fast.differences[name] = verify(workspace, original, values, tolerance_on(device, precision))
        with fast.pool.borrow() as workspace:
            fast._sample = take_sample(workspace, inputs)
    return fast


def _calls_of(
    captured: Captured, calibration: Sequence[tuple[Any, ...]], kwargs: Mapping[str, Any]
) -> list[list[Tensor]]:
    """The inputs of calibration calls; raises ValueError for one that is not like the example."""
    arguments, calls = Arguments(captured, torch.device("cpu")), []
    for number, args in enumerate(calibration):
        if not isinstance(args, tuple):
            raise ValueError(
                f"infer.optimize: calibration[{number}] must be a tuple of arguments, got {type(args).__name__}"
            )
        try:
            calls.append(arguments.inputs(args, kwargs))
        except ValueError as error:
            raise ValueError(f"infer.optimize: calibration[{number}]: {error}") from error
    return calls


def _lossy(
    captured: Captured,
    original: fx.GraphModule,
    precision: str,
    chooser: Chooser,
    calls: Mapping[str, Sequence[Sequence[Tensor]]],
    noise: Sequence[Tensor],
) -> FastGenerator:
    """The program with as many layers in bfloat16 or int8 as the pictures of ``calls`` can bear."""
    module = captured.module
    exact = Functional(make_program(module, lambda node: None, "fp32"), module, "fp32")
    # The passes alone: what a wrong one does might be less than what rounding may do.
    for values in [noise, *(values for of_name in calls.values() for values in of_name)]:
        verify(exact, original, values, TOLERANCE)
    expected = {name: [results_of(exact, values) for values in of_name] for name, of_name in calls.items()}
    layers = _lossy_layers(module, precision, [values for of_name in calls.values() for values in of_name])
    while True:
        # Before the weights are frozen, so that nothing of another algorithm is kept with them.
        rounded = results_of(exact, noise)
        fast = FastGenerator(captured, precision, chooser, torch.device("cpu"))
        worst: tuple[float, Sequence[Tensor], list[Any]] = (math.inf, noise, [])
        with fast.pool.borrow() as workspace:
            for name, of_name in calls.items():
                found = [results_of(workspace, values) for values in of_name]
                decibels = [least_psnr(got, want) for got, want in zip(found, expected[name], strict=True)]
                fast.psnr[name] = min(decibels)
                fast.differences[name] = max(map(largest_difference, found, expected[name]))
                at = decibels.index(fast.psnr[name])
                worst = min(worst, (decibels[at], of_name[at], expected[name][at]), key=lambda found: found[0])
            if worst[0] >= layers.least_db or not layers.lossy:
                # The kernels, by the graph that they are of.
                tolerance = TOLERANCE_LOSSY if layers.lossy else TOLERANCE
                if largest_difference(results_of(workspace, noise), rounded) > tolerance:
                    verify(workspace, module, noise, tolerance)
                break
        fast._weights.release()
        layers.give_up_most_harmful(partial(results_of, exact, worst[1]), worst[2], worst[0])
    layers.drop_other_weights()
    fast.kept.update(layers.kept)
    return fast


def _lossy_layers(module: fx.GraphModule, precision: str, calls: Sequence[Sequence[Tensor]]) -> LossyLayers:
    if precision == "bf16":
        return NarrowWeights(module)
    return QuantizedLayers(module, calls, partial(is_worth_quantizing, precision=arithmetic_of(precision)))


def load(path: str | Path, *, device: torch.device | str = "cpu", drop_weights: bool = False) -> FastGenerator:
    """Read what :meth:`FastGenerator.save` wrote; the model's own code is not needed.

    On the kind of machine that it was made on, the algorithms chosen there are used, elsewhere those of the cost model.
    It is called once, and what it answers must be what it answered when it was made.

    Args:
        path: the file.
        device: where it shall run, the CPU or a GPU.
        drop_weights: give back the memory of each weight as soon as that call has prepared it, so that at no time both
            are there for all; see :meth:`FastGenerator.drop_weights`. Of a model with inputs that are no floating-point
            numbers there is no such call; then it is for you to call that method after the first one.

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
        after_step = (lambda number, value: fast.drop_weights()) if drop_weights else None
        check_sample(workspace, fast._sample, device, tolerance_on(device, precision), after_step)
    return fast


def arithmetic_of(precision: str) -> str:
    """The precision that the ops compute in."""
    return "fp32" if precision in LOSSY else precision


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
    fuse_reflections(module, precision)
    fuse_rectifiers(module)
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
        psnr, kept: of "bf16" and "int8", as :class:`fastgan.infer.Report` has them.
    """

    def __init__(self, captured: Captured, precision: str, choose: Chooser, device: torch.device) -> None:
        super().__init__()
        self.precision = precision
        self.differences: dict[str, float] = {}
        self.psnr: dict[str, float] = {}
        self.kept: dict[str, float] = {}
        self._captured = captured
        self._sample: dict[str, Any] = {}
        self._arguments = Arguments(captured, device)
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
        results, spec = self._run(self._arguments.inputs(args, kwargs)), self._captured.out_spec
        return results[0] if spec.is_leaf() else pytree.tree_unflatten(results, spec)

    def report(self) -> Report:
        """What was fused, what was not and why, and how each convolution is computed."""
        return self._report(rows_of(self.program))

    def profile(self, *args: Any, rounds: int = 10, **kwargs: Any) -> Report:
        """The report with every step's measured time: medians of ``rounds`` calls with these arguments.

        Steps are watched one by one, so they take longer than in a call: Python is between them, and they leave floats
        in planes behind, not bytes or groups of channels.
        """
        inputs, times = self._arguments.inputs(args, kwargs), [[] for _ in self.program.steps]
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

    def _run(self, inputs: list[Tensor], watch: Watch | None = None) -> list[Any]:
        # A small generator has finished a layer by the time that a context is entered and left.
        workspace = self.pool.take()
        try:
            if watch is None and workspace.only_recorded:
                return workspace.run(inputs)
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                return workspace.run(inputs, watch)
        finally:
            self.pool.give(workspace)
