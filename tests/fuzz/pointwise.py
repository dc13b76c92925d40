"""The epilogue of a drawn call, and the layouts and dtypes that several ops' cases draw from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from helpers import layouts
from hypothesis import strategies as st
from oracle import KINKS, KINKS_OF_ORDER_2, Case, Named, random
from torch import Tensor

from fastgan import ops
from fastgan.reference.activation import ACTIVATIONS, resolve

LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded")
SMOOTH = ("linear", "tanh", "sigmoid", "softplus", "swish")
GAINS = st.sampled_from([None, 1.0, 0.7, -1.5])
# Results above which only smooth activations are drawn: of more, some would lie too near to a kink to be compared.
MOST_WITH_KINKS = 2000
HALF = (torch.bfloat16, torch.float16)

BATCHES = st.sampled_from([0, 1, 1, 2, 3, 4, 5, 8, 13, 16])
THREADS = st.sampled_from([1, 1, 1, 2, 3, 4])
X_LAYOUTS = st.sampled_from(("contiguous", "contiguous", "contiguous", *LAYOUTS))
DTYPES = st.sampled_from([torch.float32] * 6 + [torch.float64, *HALF])


def orders(dtype: torch.dtype) -> st.SearchStrategy[int]:
    """A second order in one case of six, in types that its several roundings leave something of."""
    return st.sampled_from([0, 1, 1, 1, 1] if dtype in HALF else [0, 1, 1, 1, 1, 2])


def around(*bounds: int, least: int = 1) -> st.SearchStrategy[int]:
    """Integers at most 1 from one of ``bounds``."""
    return st.sampled_from(sorted({max(least, bound + i) for bound in bounds for i in (-1, 0, 1)}))


def laid_out(x: Tensor, layout: str) -> Tensor:
    """``x`` [N, C, H, W] in one of helpers.layouts."""
    return layouts(x)[layout]


def wide(dtype: torch.dtype) -> torch.dtype:
    """What scales, noise and biases of a call in ``dtype`` have."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, kw_only=True)
class Pointwise:
    """Everything that an Epilogue says but its tensors' values."""

    noise: str | None = None  # the letters of its shape, HW or N1HW
    strength: bool = False
    bias: bool = False
    act: str = "linear"
    gain: float | None = None
    clamp: float | None = None
    residual: str | None = None  # its layout

    def tensors(self, shape: Sequence[int], dtype: torch.dtype, seed: int) -> Named:
        """For a result of ``shape`` [N, C, H, W]."""
        n, c, h, w = shape
        found: Named = {}
        if self.noise:
            found["noise"] = random((h, w) if self.noise == "HW" else (n, 1, h, w), seed + 12).to(wide(dtype))
        if self.strength:
            found["noise_strength"] = torch.tensor(0.3, dtype=wide(dtype))
        if self.bias:
            found["bias"] = random([c], seed + 13).to(wide(dtype))
        if self.residual:
            found["residual"] = laid_out(random(shape, seed + 14).to(dtype), self.residual)
        return found

    def build(self, tensors: Named) -> ops.Epilogue:
        """With those of ``tensors`` that are its own."""
        own = {name: tensors[name] for name in ("noise", "noise_strength", "bias") if name in tensors}
        residual = tensors["residual"] if self.residual else None
        pointwise = {"act": self.act, "gain": self.gain, "clamp": self.clamp}
        return ops.Epilogue(**own, **pointwise, residual=residual, residual_gain=0.7)

    def before(self) -> Pointwise:
        """What the activation is applied to."""
        return replace(self, act="linear", gain=1.0, clamp=None, residual=None)

    def kinks(self, z: Tensor, order: int) -> list[Tensor]:
        """What is zero where the activation of ``z`` or the clamp has a kink."""
        found = [z] if self.act in (KINKS_OF_ORDER_2 if order > 1 else KINKS) else []
        if self.clamp is not None:
            alpha, gain = resolve(self.act, None, self.gain)
            found.append((ACTIVATIONS[self.act].function(z, alpha) * gain).abs() - self.clamp)
        return found


@dataclass(frozen=True, kw_only=True)
class EpilogueCase(Case):
    """A call of an op that ends in an epilogue."""

    epilogue: Pointwise = field(default_factory=Pointwise)

    def kinks(self, tensors: Named) -> list[Tensor]:
        z = replace(self, epilogue=self.epilogue.before()).call(tensors, "reference")
        return self.epilogue.kinks(z, self.order)


def pointwise(draw: Any, results: int, dtype: torch.dtype) -> Pointwise:
    """One that a result of so many values lets be compared."""
    kinks = dtype not in HALF and results <= MOST_WITH_KINKS
    noise = draw(st.sampled_from([None, None, "HW", "N1HW"]))
    return Pointwise(
        noise=noise,
        strength=noise is not None and draw(st.booleans()),
        bias=draw(st.booleans()),
        act=draw(st.sampled_from(tuple(ACTIVATIONS) if kinks else SMOOTH)),
        gain=draw(GAINS),
        clamp=draw(st.sampled_from([None, None, 1.1])) if kinks else None,
        residual=draw(st.sampled_from([None, None, *LAYOUTS])),
    )
