"""Calls of dense_block: around the bounds of what shares tiles, in whichever order of gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from layer_cases import common
from oracle import Case, Named, check, random
from pointwise import DTYPES, X_LAYOUTS, around, laid_out
from torch import Tensor

from fastgan import ops

__all__ = ["DenseCase", "check"]


@dataclass(frozen=True, kw_only=True)
class DenseCase(Case):
    """dense_block of x [n, channels, h, w]."""

    n: int
    channels: int
    growth: int
    layers: int
    h: int
    w: int
    act: str = "softplus"
    bias: bool = True
    x_layout: str = "contiguous"

    def inputs(self) -> Named:
        x = random((self.n, self.channels, self.h, self.w), self.seed).to(self.dtype)
        found = {"x": laid_out(x, self.x_layout)}
        for i in range(self.layers):
            inputs = self.channels + i * self.growth
            outputs = self.channels if i + 1 == self.layers else self.growth
            weight = random((outputs, inputs, 3, 3), self.seed + 10 + i) / (9 * inputs) ** 0.5
            found[f"weight {i}"] = weight.to(self.dtype)
            if self.bias:
                found[f"bias {i}"] = random((outputs,), self.seed + 20 + i).to(self.dtype)
        return found

    def call(self, tensors: Named, backend: str) -> Tensor:
        weights = [t for name, t in tensors.items() if name.startswith("weight")]
        biases = [t for name, t in tensors.items() if name.startswith("bias")]
        return ops.dense_block(tensors["x"], weights, biases, act=self.act, backend=backend)


@st.composite
def dense_cases(draw: Any) -> DenseCase:
    dtype, order = draw(DTYPES), draw(st.sampled_from([0, 0, 0, 1]))
    few = order > 0
    # Gradients go through scaled_conv2d, which has cases of its own; slopes without jumps spare a look for kinks.
    size = st.integers(1, 9) if few else st.one_of(st.integers(1, 20), around(24, 33, 48, 65))
    act = draw(st.sampled_from(["softplus", "swish", "tanh"] if few else ["lrelu", "relu", "softplus", "linear"]))
    return DenseCase(
        n=draw(st.integers(0, 3)),
        channels=draw(st.integers(1, 8) if few else st.sampled_from([16, 32, 40, 64])),
        growth=draw(st.integers(1, 5) if few else st.sampled_from([16, 20, 32])),
        layers=draw(st.integers(1, 4)),
        h=draw(size),
        w=draw(size),
        act=act,
        bias=draw(st.booleans()),
        x_layout=draw(X_LAYOUTS),
        **common(draw, dtype) | {"order": order},
    )
