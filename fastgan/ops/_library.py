"""Registration of ops with torch: one call gives an op its schema, its kernels' fallback, fake and autograd.

Schemas live here in Python, so every op exists without a compiled extension: the fallback below is the plain-torch
implementation and serves any device. A compiled or Triton kernel registered for a device key takes precedence over it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

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
