"""The CPU's convolution of packed weights and the same in float64, for the tests of ``infer``."""

from __future__ import annotations

from typing import Any

import torch
from helpers import max_error
from quantized import SHIFTS, TENSORS
from torch import Tensor

from fastgan.infer.nodes import PLAIN, convolution
from fastgan.ops import _into


def layer(
    n: int, c_in: int, c_out: int, size: tuple[int, int], kernel: int, *, transposed: bool = False
) -> dict[str, Tensor]:
    """Random x and weight."""
    g = torch.Generator().manual_seed(c_in + 1000 * c_out)
    channels = (c_in, c_out) if transposed else (c_out, c_in)
    weight = torch.randn(*channels, kernel, kernel, generator=g)
    return {"x": torch.randn(n, c_in, *size, generator=g), "weight": weight / (c_in * kernel**2) ** 0.5}


def expected(*, where: dict[str, Any], **k: Any) -> Tensor:
    """In float64."""
    return convolution(**{name: v.double() if isinstance(v, Tensor) else v for name, v in k.items()}, **where)


def convolve(*, where: dict[str, Any], storage: str = "fp32", out: Tensor | None = None, **k: Any) -> Tensor:
    """The kernel, into ``out`` or a tensor that nothing was written to."""
    if out is None:
        out = torch.full_like(expected(where=where, **k), torch.nan, dtype=torch.float32)
    epilogue = {name: k.get(name, default) for name, default in PLAIN.items()}
    _into.scaled_conv2d_into(
        *(k["x"], k["weight"]),
        *(k.get(name) for name in (*TENSORS, *SHIFTS)),
        *where.values(),
        *(False, "packed_direct", 0, storage),
        *epilogue.values(),
        out,
    )
    return out


def check(k: dict[str, Any], where: dict[str, Any], storage: str = "fp32") -> None:
    """Products of floats are all that it rounds; "bf16" rounds the weights before."""
    rounded = k["weight"].bfloat16().float() if storage == "bf16" else k["weight"]
    want = expected(where=where, **{**k, "weight": rounded})
    assert max_error(convolve(where=where, storage=storage, **k), want) < 2e-6
