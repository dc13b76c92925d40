"""How each convolution is computed: by the cost model, or by trying."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx

from fastgan import _native
from fastgan.infer import nodes
from fastgan.infer.capture import constant_of
from fastgan.infer.nodes import is_a, shape_of, storage_of
from fastgan.infer.plan import Choice, Chooser
from fastgan.infer.weights import frozen
from fastgan.ops import _into

# Values of a weight for whose transform it is worth to be rounded once more: fewer stay in the caches (measured).
_MANY = 1 << 19
# Calls that each candidate is timed by, after one that prepares its weight.
_ROUNDS = 7


def candidates(node: fx.Node, precision: str, weight: Tensor | None = None) -> list[Choice]:
    """What can compute a convolution, of its weight or of another one; the cost model's choice comes first."""
    k = node.kwargs
    x = torch.empty(shape_of(k["x"]), dtype=torch.float32)
    weight = constant_of(k["weight"]) if weight is None else weight
    if is_a(node, nodes.quantized_convolution):
        return _quantized(x, weight, node)
    found = _into.convolution_candidates(x, weight, *(k[name] for name in nodes.GEOMETRY), precision)
    choices = [Choice(*one) for one in found]
    for choice in choices:
        choice.storage = _storage(choice, storage_of(node), weight.numel())
    return choices


def _quantized(x: Tensor, weight: Tensor, node: fx.Node) -> list[Choice]:
    found = _into.quantized_tiles(x, weight, *(node.kwargs[name] for name in nodes.GEOMETRY))
    return [
        Choice(f"quantized_{'winograd' if tile else 'direct'}", tile, ms, storage="int16" if tile > 1 else "int8")
        for tile, ms in found
    ]


def is_worth_quantizing(node: fx.Node, precision: str) -> bool:
    """Whether a convolution can be computed in 8 bits, and is predicted to be faster then."""
    weight = constant_of(node.kwargs["weight"])
    if _native.cpu_library() is None or weight is None:
        return False
    x = torch.empty(shape_of(node.kwargs["x"]), dtype=torch.float32)
    quantized = _quantized(x, torch.empty_like(weight, dtype=torch.int8).contiguous(), node)
    with frozen(weight) as of_engine:
        exact = candidates(node, precision, of_engine)[0]
    # Of few channels on either side, and of what is left to torch, nothing is predicted: the image is most of the work,
    # and it would be rounded first.
    return bool(quantized and exact.predicted_ms) and quantized[0].predicted_ms < exact.predicted_ms


def _storage(choice: Choice, of_weight: str, values: int) -> str:
    """How what an algorithm makes of a weight is stored. Not Winograd's tiles of 4: what is transformed back amplifies
    their weights' rounding, which takes 10 dB of a CycleGAN's picture (tiles of 2 and 3: 4 dB of a U-Net's)."""
    narrow = choice.algorithm in ("packed_direct", "few_pixels") or (
        choice.algorithm == "winograd" and choice.tile < 4 and values >= _MANY
    )
    return of_weight if narrow else "fp32"


def by_cost(precision: str) -> Chooser:
    """The cost model's choice."""
    return lambda node: candidates(node, precision)[0]


def by_trying(precision: str, progress: Callable[[str], None] | None = None) -> Chooser:
    """The fastest of all candidates on this machine: their calls take turns, medians count.

    Layers of the same sizes are tried once.
    """
    known: dict[Any, list[Choice]] = {}

    def choose(node: fx.Node) -> Choice:
        geometry = tuple(node.kwargs[name] for name in nodes.GEOMETRY)
        key = (shape_of(node.kwargs["x"]), shape_of(node), constant_of(node.kwargs["weight"]).shape, geometry)
        key += (storage_of(node), node.target)
        if key not in known:
            known[key] = _timed(node, candidates(node, precision))
            if progress is not None:
                best = known[key][0]
                progress(f"{nodes.name_of(node)}: {best.algorithm} {best.tile or ''} {best.measured_ms:.2f} ms")
        return known[key][0]

    return choose


def _timed(node: fx.Node, found: list[Choice]) -> list[Choice]:
    """The candidates with their times, the fastest first."""
    k = node.kwargs
    x, out = torch.randn(shape_of(k["x"]), dtype=torch.float32), torch.empty(shape_of(node), dtype=torch.float32)
    scales = {name: None if k.get(name) is None else _like(k[name]) for name in ("in_scale", "out_scale")}
    factors = (scales["in_scale"], scales["out_scale"])
    geometry = tuple(k[name] for name in nodes.GEOMETRY)
    nothing, plain = (None, None, None, None), ("linear", 0.0, 1.0, None, 1.0)

    def call(choice: Choice, weight: Tensor) -> float:
        start = time.perf_counter()
        if is_a(node, nodes.quantized_convolution):
            rounding = (k["step"], k["low"], k["high"])
            arguments = (x, weight, constant_of(k["weight_scale"]), *factors, *rounding, *nothing, *geometry)
            _into.quantized_conv2d_into(*arguments, choice.tile, *plain, None, [], [], [], [], out)
        else:
            how = (k.get("rectify", False), choice.algorithm, choice.tile, choice.storage)
            _into.scaled_conv2d_into(x, weight, *factors, *nothing, *geometry, *how, *plain, out)
        return 1e3 * (time.perf_counter() - start)

    # What those that are not taken make of the weight must not stay.
    with frozen(constant_of(k["weight"])) as weight:
        for choice in found:
            call(choice, weight)
        times = [[call(choice, weight) for choice in found] for _ in range(_ROUNDS)]
    for choice, of_choice in zip(found, zip(*times, strict=True), strict=True):
        choice.measured_ms = median(of_choice)
    return sorted(found, key=lambda choice: choice.measured_ms)


def _like(node: fx.Node) -> Tensor:
    value = constant_of(node)
    return torch.ones(shape_of(node), dtype=torch.float32) if value is None else value
