"""Registration of ops with torch: one call gives an op its schema, its kernels' fallback, fake and autograd.

Schemas live here in Python, so every op exists without a compiled extension: the fallback below is the plain-torch
implementation and serves any device. A compiled or Triton kernel registered for a device key takes precedence over it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("fastgan", "DEF")


def define(
    name: str,
    schema: str,
    *,
    fallback: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> torch._ops.OpOverload:
    """Define ``fastgan::name`` and return its overload, ready to call.

    Args:
        name: the op's name, without namespace.
        schema: arguments and returns, as in ``"(Tensor x, float gain) -> Tensor"``.
        fallback: plain torch under no autograd, any device; returns fresh tensors, never a view of an input.
        fake: shapes, dtypes and strides of the results from those of the arguments.
        setup_context, backward: as in :func:`torch.library.register_autograd`. A backward formula calls only
            differentiable torch functions and fastgan ops, so that it can be differentiated again. For a Tensor[]
            argument ``ctx.needs_input_grad`` holds a list, and the gradient is a list or None.
    """
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, fallback, "CompositeExplicitAutograd")
    qualified = f"fastgan::{name}"
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    op = getattr(torch.ops.fastgan, name).default
    _keep_autocast_out(op)
    if backward is not None and setup_context is not None and _has_tensor_lists(op):
        _register_list_autograd(op, setup_context, backward)
    elif backward is not None:
        torch.library.register_autograd(
            qualified, _only_what_is_asked(backward), setup_context=setup_context, lib=LIBRARY
        )
    return op


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
    nodes = iter([node for node, _ in ctx.next_functions if node is not None])
    return tuple(need and _will_run(next(nodes)) for need in ctx.needs_input_grad)


def _only_what_is_asked(backward: Callable[..., Any]) -> Callable[..., Any]:
    def narrowed(ctx: Any, *grads: Any) -> Any:
        ctx.needs_input_grad = _asked(ctx)
        return backward(ctx, *grads)

    return narrowed


def _will_run(node: torch.autograd.graph.Node) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        # The engine refuses to answer in two cases, and both mean yes: a leaf whose gradient torch.autograd.grad was
        # asked for, and a node that is called by hand.
        return True


def _is_tensor_list(argument: torch._C.Argument) -> bool:
    return str(argument.type) in ("List[Tensor]", "List[Optional[Tensor]]")


def _has_tensor_lists(op: torch._ops.OpOverload) -> bool:
    return any(_is_tensor_list(value) for value in (*op._schema.arguments, *op._schema.returns))


def _register_list_autograd(
    op: torch._ops.OpOverload, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> None:
    """What torch.library.register_autograd does, for ops with tensor lists, without its cost per call.

    autograd.Function knows only flat tensors. register_autograd flattens all arguments with pytree and back, in every
    forward and every backward (five layers of spectral_sigma: 450 us where this takes 100 us); the schema already says
    which are lists.

    Returns are either tensors or a single Tensor[].
    """
    arguments = op._schema.arguments
    if any(argument.kwarg_only for argument in arguments):
        raise NotImplementedError(f"{op}: keyword-only arguments together with tensor lists")
    returns_list = _is_tensor_list(op._schema.returns[0])
    if len(op._schema.returns) > 1 and any(map(_is_tensor_list, op._schema.returns)):
        raise NotImplementedError(f"{op}: several returns, one of them a tensor list")
    is_list = [_is_tensor_list(argument) for argument in arguments]

    class ListFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: torch._C.DispatchKeySet, args: tuple[Any, ...], *flat: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
            setup_context(ctx=ctx, inputs=args, output=output)
            ctx.lengths = [len(arg) if many else None for many, arg in zip(is_list, args, strict=True)]
            return tuple(output) if returns_list else output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            flat_needs = ctx.needs_input_grad
            remaining = iter(_asked(ctx)[2:])
            ctx.needs_input_grad = tuple(
                next(remaining) if length is None else [next(remaining) for _ in range(length)]
                for length in ctx.lengths
            )
            try:
                result = backward(ctx, list(grads)) if returns_list else backward(ctx, *grads)
            finally:
                ctx.needs_input_grad = flat_needs
            flat: list[Any] = [None, None]
            for length, grad in zip(ctx.lengths, result, strict=True):
                flat.extend([grad] if length is None else [None] * length if grad is None else grad)
            return tuple(flat)

    def autograd(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        # The dispatcher leaves out trailing arguments that equal their defaults.
        args = (*args, *(argument.default_value for argument in arguments[len(args) :]))
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        flat: list[Any] = []
        for many, arg in zip(is_list, args, strict=True):
            flat.extend(arg) if many else flat.append(arg)
        output = ListFunction.apply(keyset, args, *flat)
        return list(output) if returns_list else output

    LIBRARY.impl(op._schema.name.removeprefix("fastgan::"), autograd, "Autograd", with_keyset=True)


def register_autograd_for_lists(
    op: torch._ops.OpOverload,
    *,
    differentiable: Callable[..., Sequence[Tensor]],
    setup_context: Callable[..., None],
    backward: Callable[..., Sequence[Tensor | None]],
) -> Callable[..., Any]:
    """Autograd for an op with ``Tensor[]`` arguments whose Python overhead counts.

    :func:`torch.library.register_autograd` flattens and rebuilds every nested argument, result and gradient with
    pytree: for a loss over six small maps that costs more than the loss. Here the op names its differentiable tensors
    itself.

    Args:
        op: its first result is differentiable (a Tensor or a Tensor[]), all others are not; no schema defaults.
        differentiable: (*args) -> the tensors that may get gradients, in a flat sequence.
        setup_context: (ctx, inputs, output), as in :func:`torch.library.register_autograd`.
        backward: (ctx, *gradients of the tensors of the first result) -> one gradient or None per tensor of
            ``differentiable``; ``ctx.needs_input_grad`` begins in the same order. A formula calls only differentiable
            torch functions and fastgan ops, so that it can be differentiated again.

    Returns:
        A function that takes and returns what ``op`` does. In eager mode it enters autograd without the detour from
        Python through the dispatcher to Python, which would convert every argument twice; elsewhere it calls ``op``.
    """

    class Lists(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            # The arguments of the op and a place for its results travel as one opaque object behind the tensors.
            inputs, outputs = args[-1]
            with torch._C._AutoDispatchBelowAutograd():
                result = op(*inputs)
            setup_context(ctx, inputs, result)
            outputs.append(result)
            first = result[0] if isinstance(result, tuple) else result
            return tuple(first) if isinstance(first, list) else first

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            ctx.needs_input_grad = _asked(ctx)
            return (*backward(ctx, *gradients), None)

    # Function.apply itself, without the unwrapping of functorch's tensors in front of it, which costs as much again.
    apply = super(torch.autograd.Function, Lists).apply

    def run(*args: Any) -> Any:
        tensors = differentiable(*args) if torch.is_grad_enabled() else ()
        if not any(t.requires_grad for t in tensors):
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)
        outputs: list[Any] = []
        first = apply(*tensors, (args, outputs))
        first = list(first) if isinstance(first, tuple) else first
        return (first, *outputs[0][1:]) if isinstance(outputs[0], tuple) else first

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return op(*args)
        return run(*args)

    Lists.__name__ = Lists.__qualname__ = f"{op._opname}_autograd"
    LIBRARY.impl(op._opname, run, "Autograd")
    return call
