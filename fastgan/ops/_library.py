"""Registration of ops with torch: one call gives an op its schema, its kernels' fallback, fake and autograd.

Schemas live here in Python, so every op exists without a compiled extension: the fallback below is the plain-torch
implementation and serves any device. A compiled or Triton kernel registered for a device key takes precedence over it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan._native import TRITON_INTERPRETED

LIBRARY = torch.library.Library("fastgan", "DEF")
# Op -> its Triton kernel, for who plans launches where no GPU is.
TRITON_KERNELS: dict[str, TritonKernel] = {}
# Op -> plain torch, for who counts what stands in for a missing kernel.
FALLBACKS: dict[str, Callable[..., Any]] = {}


def define(
    name: str,
    schema: str,
    *,
    fallback: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    differentiable_results: int = 1,
    triton: str | None = None,
) -> Callable[..., Any]:
    """Define ``fastgan::name`` and return the function to call it with.

    Args:
        name: the op's name, without namespace.
        schema: arguments and returns, as in ``"(Tensor x, float gain) -> Tensor"``; no defaults, nothing keyword-only.
        fallback: plain torch under no autograd, any device; returns fresh tensors, never a view of an input.
        fake: shapes, dtypes and strides of the results from those of the arguments.
        setup_context: (ctx, inputs, output), as in :func:`torch.library.register_autograd`.
        backward: (ctx, *gradients of the differentiable results) -> one gradient or None per argument. A formula calls
            only differentiable torch functions and fastgan ops, so that it can be differentiated again.
            ``ctx.needs_input_grad`` has one entry per argument and is true only for what this very backward pass was
            asked for. For a Tensor[] argument it holds a list, and the gradient is a list or None; of a Tensor[]
            result, the gradients come as one list.
        differentiable_results: how many results, counted from the first, have a gradient.
        triton: "module.function" under fastgan.kernels: the launcher of the op's Triton kernel, which takes the op's
            arguments and returns its results, or NotImplemented where the fallback has to serve (a dtype or an option
            that the kernel does not know).
    """
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, fallback, "CompositeExplicitAutograd")
    FALLBACKS[name] = fallback
    if triton is not None:
        TRITON_KERNELS[name] = TritonKernel(triton, fallback)
        LIBRARY.impl(name, TRITON_KERNELS[name], "CPU" if TRITON_INTERPRETED else "CUDA")
    torch.library.register_fake(f"fastgan::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.fastgan, name).default
    _keep_autocast_out(op)
    if backward is None or setup_context is None:
        return op
    slots = _TensorSlots(op)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.lengths = slots.lengths(inputs)
        setup_context(ctx, inputs, output)

    def flat_backward(ctx: Any, *gradients: Tensor | None) -> Sequence[Tensor | None]:
        ctx.needs_input_grad = slots.nest(ctx.needs_input_grad, ctx.lengths)
        result = backward(ctx, list(gradients)) if slots.returns_list else backward(ctx, *gradients)
        return slots.flatten_gradients(result, ctx.lengths)

    return register_autograd(
        op,
        differentiable=slots.flatten,
        setup_context=setup,
        backward=flat_backward,
        differentiable_results=differentiable_results,
    )


class TritonKernel:
    """Calls a launcher of fastgan.kernels, which is imported, and Triton with it, on the first call."""

    def __init__(self, path: str, fallback: Callable[..., Any]) -> None:
        self.module, _, self.function = path.rpartition(".")
        self.fallback = fallback
        self.launch: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if self.launch is None:
            self.launch = getattr(importlib.import_module(f"fastgan.kernels.{self.module}"), self.function)
        result = self.launch(*args)
        return self.fallback(*args) if result is NotImplemented else result


class _TensorSlots:
    """Which arguments of an op are tensors or lists of tensors, read from its schema."""

    def __init__(self, op: torch._ops.OpOverload) -> None:
        self.kinds = [str(argument.type) for argument in op._schema.arguments]
        self.returns_list = str(op._schema.returns[0].type) == "List[Tensor]"

    def lengths(self, args: Sequence[Any]) -> list[int | None]:
        """Per argument the length of a Tensor[], -1 for a tensor or None, None for what is neither."""
        kinds = zip(self.kinds, args, strict=True)
        return [
            len(arg) if kind == "List[Tensor]" else -1 if kind in ("Tensor", "Optional[Tensor]") else None
            for kind, arg in kinds
        ]

    def flatten(self, *args: Any) -> list[Tensor | None]:
        """The tensors of a call in one sequence."""
        flat: list[Tensor | None] = []
        for kind, arg in zip(self.kinds, args, strict=True):
            if kind == "List[Tensor]":
                flat.extend(arg)
            elif kind in ("Tensor", "Optional[Tensor]"):
                flat.append(arg)
        return flat

    @staticmethod
    def nest(flat: Sequence[bool], lengths: Sequence[int | None]) -> tuple[bool | list[bool], ...]:
        """One entry per argument from one per tensor."""
        rest = iter(flat)
        return tuple(
            False if length is None else next(rest) if length < 0 else [next(rest) for _ in range(length)]
            for length in lengths
        )

    @staticmethod
    def flatten_gradients(gradients: Sequence[Any], lengths: Sequence[int | None]) -> list[Tensor | None]:
        """One gradient per tensor from one per argument."""
        flat: list[Tensor | None] = []
        for gradient, length in zip(gradients, lengths, strict=True):
            if length is None:
                continue
            flat.extend([gradient] if length < 0 else [None] * length if gradient is None else gradient)
        return flat


def register_autograd(
    op: torch._ops.OpOverload,
    *,
    differentiable: Callable[..., Sequence[Tensor | None]],
    setup_context: Callable[..., None],
    backward: Callable[..., Sequence[Tensor | None]],
    differentiable_results: int = 1,
    ask_engine: bool = True,
) -> Callable[..., Any]:
    """What :func:`torch.library.register_autograd` does, at a fraction of its cost per call.

    torch's own goes from Python through the dispatcher to Python and back for every call, converting all arguments
    twice, and flattens and rebuilds lists with pytree in every forward and backward: for a loss over six small maps
    that costs more than the loss. Here the op names its differentiable tensors itself.

    Args:
        op: the op; no schema defaults.
        differentiable: (*args) -> the tensors that may get gradients, in a flat sequence; None is allowed in it.
        setup_context: (ctx, inputs, output).
        backward: (ctx, *gradients of the differentiable results) -> one gradient or None per tensor of
            ``differentiable``; ``ctx.needs_input_grad`` begins in the same order.
        differentiable_results: how many results, counted from the first, have a gradient; a single Tensor[] counts as
            one. The others are returned outside autograd.
        ask_engine: narrow ``ctx.needs_input_grad`` to what this very backward pass is for. Asking costs microseconds
            per tensor, and tens of them for a leaf of torch.autograd.grad (the engine answers with an exception): False
            is for a formula whose gradients cost less than that.

    Returns:
        A function that takes and returns what ``op`` does. In eager mode it enters autograd directly; under
        torch.compile and functorch it calls ``op``, whose Autograd kernel is the same function.
    """

    class OpFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            # The arguments of the op and a place for its results travel as one opaque object behind the tensors.
            inputs, outputs = args[-1]
            with torch._C._AutoDispatchBelowAutograd():
                result = op(*inputs)
            setup_context(ctx, inputs, result)
            outputs.append(result)
            if not isinstance(result, tuple):
                return tuple(result) if isinstance(result, list) else result
            return result[:differentiable_results] if differentiable_results > 1 else result[0]

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            if not ask_engine:
                return (*backward(ctx, *gradients), None)
            # Put back: a second pass through this node, a penalty's after its inner gradient, asks for other gradients.
            required = ctx.needs_input_grad
            ctx.needs_input_grad = _asked(ctx)
            try:
                return (*backward(ctx, *gradients), None)
            finally:
                ctx.needs_input_grad = required

    # Function.apply itself, without the unwrapping of functorch's tensors in front of it, which costs as much again.
    apply = super(torch.autograd.Function, OpFunction).apply

    def run(*args: Any) -> Any:
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)
        outputs: list[Any] = []
        graphed = apply(*differentiable(*args), (args, outputs))
        (result,) = outputs
        if isinstance(result, list):
            return list(graphed)
        if not isinstance(result, tuple):
            return graphed
        return (*(graphed if differentiable_results > 1 else (graphed,)), *result[differentiable_results:])

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return op(*args)
        return run(*args)

    OpFunction.__name__ = OpFunction.__qualname__ = f"{op._opname}_autograd"
    LIBRARY.impl(op._opname, run, "Autograd")
    return call


def _keep_autocast_out(op: torch._ops.OpOverload) -> None:
    """What a kernel calls inside runs as it is: the public functions have cast already what autocast is meant to cast.

    Without this, autocast would round the operands of the convolution inside scaled_conv2d behind its back.
    """
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU).add(torch._C.DispatchKey.AutocastCUDA)

    def without_autocast(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*args)

    for key in ("AutocastCPU", "AutocastCUDA"):
        LIBRARY.impl(op._opname, without_autocast, key)


def _asked(ctx: Any) -> tuple[bool, ...]:
    """``ctx.needs_input_grad``, narrowed to what this very backward pass is for.

    autograd.Function fixes it in forward: that an input requires a gradient. R1's inner gradient asks for the image
    alone, and would compute every weight's gradient for nothing; torch's own operators ask the engine, and so does
    this.
    """
    # Of one input that needs a gradient there is nothing to ask: this node runs for it. Asking can cost tens of
    # microseconds.
    if sum(ctx.needs_input_grad) == 1:
        return ctx.needs_input_grad
    nodes = iter([node for node, _ in ctx.next_functions if node is not None])
    return tuple(need and _will_run(next(nodes)) for need in ctx.needs_input_grad)


def _will_run(node: torch.autograd.graph.Node) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        # The engine refuses to answer in two cases, and both mean yes: a leaf whose gradient torch.autograd.grad was
        # asked for, and a node that is called by hand.
        return True
