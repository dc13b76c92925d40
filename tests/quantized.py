"""The CPU's convolution of whole numbers and the same in float64, for the tests of ``infer``'s int8."""

from __future__ import annotations

from typing import Any

import torch
from helpers import max_error
from torch import Tensor

from fastgan.infer.nodes import quantized_convolution
from fastgan.infer.quantize import Steps
from fastgan.ops import _into


def layer(
    n: int, c_in: int, c_out: int, size: tuple[int, int], kernel: int, *, transposed: bool = False
) -> dict[str, Tensor]:
    """Random x, weight and weight_scale."""
    g = torch.Generator().manual_seed(c_in + 1000 * c_out)
    channels = (c_in, c_out) if transposed else (c_out, c_in)
    weight = torch.randint(-127, 128, (*channels, kernel, kernel), generator=g, dtype=torch.int8)
    return {
        "x": torch.randn(n, c_in, *size, generator=g),
        "weight": weight,
        "weight_scale": torch.rand(c_out, generator=g) + 0.1,
    }


def geometry(
    stride: int = 1,
    padding: int = 0,
    output_padding: int = 0,
    *,
    transposed: bool = False,
    groups: int = 1,
    reflect: bool = False,
) -> dict[str, Any]:
    pairs = {"stride": stride, "padding": padding, "output_padding": output_padding, "dilation": 1}
    return {
        **{name: (value, value) for name, value in pairs.items()},
        "transposed": transposed,
        "groups": groups,
        "reflect": reflect,
    }


PLAIN = {"act": "linear", "alpha": 0.0, "gain": 1.0, "clamp": None, "residual_gain": 1.0}
TENSORS = ("in_scale", "out_scale")
SHIFTS = ("noise", "noise_strength", "bias", "residual")
# Floats in, floats out.
FLOATS = (None, [], [], [], [])


def convolve(
    tile: int, out: Tensor, *, steps: Steps, where: dict[str, Any], handed_on: tuple[Any, ...] = FLOATS, **k: Any
) -> Tensor:
    """The kernel, into ``out``; ``handed_on`` is what it reads and writes as bytes."""
    _into.quantized_conv2d_into(
        *(k["x"], k["weight"], k["weight_scale"]),
        *(k.get(name) for name in TENSORS),
        *(steps.step, steps.low, steps.high),
        *(k.get(name) for name in SHIFTS),
        *where.values(),
        tile,
        *({name: k.get(name, default) for name, default in PLAIN.items()}).values(),
        *handed_on,
        out,
    )
    return out


def expected(*, steps: Steps, where: dict[str, Any], **k: Any) -> Tensor:
    """The same in float64, but for what is rounded."""
    doubles = {name: v.double() if isinstance(v, Tensor) and name != "weight" else v for name, v in k.items()}
    scaled = k["x"] if k.get("in_scale") is None else k["x"] * k["in_scale"][:, :, None, None]
    whole = torch.clamp(torch.round(scaled * (1 / steps.step)), steps.low, steps.high)
    doubles["x"] = whole.double() * steps.step
    doubles["in_scale"] = None
    rounding = {"step": steps.step, "low": steps.low, "high": steps.high}
    return quantized_convolution(**doubles, **rounding, **where)


def tiles(weight: Tensor, x: Tensor, where: dict[str, Any]) -> list[int]:
    return [tile for tile, _ in _into.quantized_tiles(x, weight, *where.values())]


def check(k: dict[str, Any], where: dict[str, Any], steps: Steps) -> list[int]:
    """Every tile that serves a call computes it; returns them."""
    want = expected(steps=steps, where=where, **k)
    found = tiles(k["weight"], k["x"], where)
    for tile in found:
        got = convolve(tile, torch.full_like(want, torch.nan, dtype=torch.float32), steps=steps, where=where, **k)
        assert max_error(got, want) < 1e-6, tile
    return found
