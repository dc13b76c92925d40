"""Convolutions in 8 bits: which of a graph's are, with which steps, and which stay float32.

Weights are rounded per output channel, to 127 steps either way; what a convolution reads is rounded to 255 steps of one
size, whose range is the one that costs least mean square error over the calibration calls.

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", section 2; Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference", section
3, for weights per channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fastgan.infer import nodes
from fastgan.infer.capture import add_constant, constant_of
from fastgan.infer.lossy import LossyLayers
from fastgan.infer.nodes import is_a, name_of
from fastgan.infer.verify import same_noise

_LEVELS, _LARGEST_WEIGHT = 255, 127
# Of what a layer reads in all calls: so many values tell its distribution.
_SAMPLES = 1 << 17
# Of the largest values that were seen: where the range may end.
_CLIPS = [1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]


class QuantizedLayers(LossyLayers):
    """A graph's convolutions, each in 8 bits or in float32; parts are nodes.

    Args:
        module: the graph; it is changed.
        calls: the inputs of calls that show what layers read.
        worth: whether a convolution can be computed in 8 bits, and would be faster then.
    """

    least_db = 35.0

    def __init__(
        self, module: fx.GraphModule, calls: Sequence[Sequence[Tensor]], worth: Callable[[fx.Node], bool]
    ) -> None:
        super().__init__(module)
        found = [node for node in module.graph.nodes if is_a(node, nodes.convolution) and worth(node)]
        observed = _observe(module, found, calls)
        # No step reaches an infinite value.
        found = [node for node in found if torch.isfinite(observed[node]).all()]
        made: dict[Any, tuple[fx.Node, fx.Node]] = {}
        self._nodes = {node.name: node for node in found}
        self._exact = {node.name: dict(node.kwargs) for node in found}
        self._quantized = {}
        for node in found:
            key = (node.kwargs["weight"].target, node.kwargs["transposed"])
            if key not in made:
                constants = quantize_weight(constant_of(node.kwargs["weight"]), transposed=key[1])
                first = next(iter(module.graph.nodes))
                made[key] = tuple(add_constant(module, constant, first) for constant in constants)
            weight, weight_scale = made[key]
            steps = best_steps(observed[node])
            if node.kwargs.get("rectify", False):
                steps = replace(steps, low=0)
            kwargs = {name: value for name, value in node.kwargs.items() if name != "rectify"}
            self._quantized[node.name] = {**kwargs, "weight": weight, "weight_scale": weight_scale, **asdict(steps)}
        for name in self._nodes:
            self.set(name, lossy=True)

    def set(self, name: str, *, lossy: bool) -> None:
        node = self._nodes[name]
        node.target = nodes.quantized_convolution if lossy else nodes.convolution
        node.kwargs = (self._quantized if lossy else self._exact)[name]
        (self.lossy.add if lossy else self.lossy.discard)(name)
        self._module.recompile()

    def layers_of(self, name: str) -> list[str]:
        return [name_of(self._nodes[name])]


@dataclass(frozen=True)
class Steps:
    """x stands as clamp(round(x / step), low, high); low ≤ 0 ≤ high, at most 255 apart."""

    step: float
    low: int
    high: int

    def round(self, values: Tensor) -> Tensor:
        """The values that are left of these."""
        return torch.clamp(torch.round(values * (1 / self.step)), self.low, self.high) * self.step


def best_steps(values: Tensor) -> Steps:
    """Those that keep most of some float32 values, by the mean square error; a range that ends before the largest of
    them has finer steps for the rest."""
    low, high = min(values.min().item(), 0.0), max(values.max().item(), 0.0)
    if high - low < 1e-30:
        return Steps(1.0, -1, 1)

    def error(steps: Steps) -> float:
        return (steps.round(values) - values).square().mean().item()

    # Both ends together, then each on its own.
    both = min(_CLIPS, key=lambda clip: error(_steps(clip * low, clip * high)))
    of_high = min(_CLIPS, key=lambda clip: error(_steps(both * low, clip * high)))
    of_low = min(_CLIPS, key=lambda clip: error(_steps(clip * low, of_high * high)))
    return _steps(of_low * low, of_high * high)


def _steps(low: float, high: float) -> Steps:
    step = (high - low) / _LEVELS
    first = round(low / step)
    return Steps(step, first, first + _LEVELS)


def quantize_weight(weight: Tensor, *, transposed: bool) -> tuple[Tensor, Tensor]:
    """A weight in int8 and what its output channels are multiplied by, [C_out].

    Args:
        weight: [C_out, C_in, kH, kW], transposed [C_in, C_out, kH, kW].
        transposed: see there.
    """
    channels = (1, -1, 1, 1) if transposed else (-1, 1, 1, 1)
    largest = weight.abs().amax([0, 2, 3] if transposed else [1, 2, 3])
    scale = torch.where(largest > 0, largest / _LARGEST_WEIGHT, 1.0)
    return torch.round(weight / scale.view(channels)).to(torch.int8).contiguous(), scale


def _observe(
    module: fx.GraphModule, layers: Sequence[fx.Node], calls: Sequence[Sequence[Tensor]]
) -> dict[fx.Node, Tensor]:
    """Values that layers read in these calls, scaled as they scale them: some of them, and the extremes."""
    wanted = set(layers)
    seen: dict[fx.Node, list[Tensor]] = {node: [] for node in layers}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n in wanted:
                _, kwargs = self.fetch_args_kwargs_from_env(n)
                x, scale = kwargs["x"], kwargs.get("in_scale")
                x = x if scale is None else x * scale[:, :, None, None]
                x = F.relu(x) if kwargs.get("rectify", False) else x
                values = x.flatten()
                step = max(1, values.numel() * len(calls) // _SAMPLES)
                seen[n] += [values[::step], torch.stack([values.min(), values.max()])]
            return super().run_node(n)

    for inputs in calls:
        with same_noise():
            Recorder(module).run(*inputs)
    return {node: torch.cat(values) for node, values in seen.items()}
