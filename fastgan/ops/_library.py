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
            differentiable torch functions and fastgan ops, so that it can be differentiated again.
    """
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, fallback, "CompositeExplicitAutograd")
    qualified = f"fastgan::{name}"
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=LIBRARY)
    return getattr(torch.ops.fastgan, name).default


def register_autograd_for_lists(
    op: torch._ops.OpOverload,
    *,
    differentiable: Callable[..., Sequence[Tensor]],
    setup_context: Callable[..., None],
    backward: Callable[..., Sequence[Tensor | None]],
) -> Callable[..., Any]:
    """Autograd for an op with ``Tensor[]`` arguments whose Python overhead counts.

    :func:`torch.library.register_autograd` flattens and rebuilds every nested argument, result and gradient with pytree: for a
    loss over six small maps that costs more than the loss. Here the op names its differentiable tensors itself.

    Args:
        op: its first result is differentiable (a Tensor or a Tensor[]), all others are not; no schema defaults.
        differentiable: (*args) -> the tensors that may get gradients, in a flat sequence.
        setup_context: (ctx, inputs, output), as in :func:`torch.library.register_autograd`.
        backward: (ctx, *gradients of the tensors of the first result) -> one gradient or None per tensor of
            ``differentiable``; ``ctx.needs_input_grad`` begins in the same order. A formula calls only differentiable torch
            functions and fastgan ops, so that it can be differentiated again.

    Returns:
        A function that takes and returns what ``op`` does. In eager mode it enters autograd without the detour from Python
        through the dispatcher to Python, which would convert every argument twice; elsewhere it calls ``op``.
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
            return (*backward(ctx, *gradients), None)

    # Function.apply itself, without the unwrapping of functorch's tensors in front of it, which costs as much again.
    apply = super(torch.autograd.Function, Lists).apply

    def run(*args: Any) -> Any:
        tensors = differentiable(*args) if torch.is_grad_enabled() else ()
        if not any([t.requires_grad for t in tensors]):
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
