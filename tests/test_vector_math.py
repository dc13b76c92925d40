"""csrc/cpu/vector_math.h through the activations that use it: errors in units in the last place over all binades."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastgan import ops


def every_binade(low: float, high: float) -> Tensor:
    """float32 values between low and high: 64 mantissas in each binade, both ends, both signs where they fit."""
    exponents = torch.arange(-126, 128, dtype=torch.float64)
    mantissas = 1 + torch.rand(254, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    magnitudes = (mantissas * torch.exp2(exponents)[:, None]).flatten()
    values = torch.cat([-magnitudes, torch.tensor([low, -0.0, 0.0, high], dtype=torch.float64), magnitudes])
    return values[(values >= low) & (values <= high)].float()


def apply(act: str, x: Tensor) -> Tensor:
    """act(x) by the C++ kernel, one pixel per value."""
    weight = torch.ones(1, 1, 1, 1)
    return ops.scaled_conv2d(x.reshape(1, 1, 1, -1), weight, epilogue=ops.Epilogue(act=act), backend="cpp").flatten()


EXACT = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "elu": torch.nn.functional.elu,
}

# Measured over these 25 thousand values: tanh 0.9, sigmoid 1.5, softplus 1.8, elu 1.1 ulp.
ULPS = {"tanh": 2, "sigmoid": 4, "softplus": 4, "elu": 2}


@pytest.mark.parametrize("act", EXACT)
def test_error_in_units_in_the_last_place(act: str) -> None:
    # Below -87 sigmoid and softplus are smaller than e^-87 and flushed to zero.
    x = every_binade(-87.0, 3e38)
    exact = EXACT[act](x.double())
    spacing = torch.nextafter(exact.float().abs(), torch.tensor(torch.inf)).double() - exact.float().abs().double()
    error = ((apply(act, x).double() - exact).abs() / spacing).max().item()
    assert error <= ULPS[act], f"{act}: {error:.2f} ulp"


@pytest.mark.parametrize(
    ("act", "at_minus_infinity", "at_infinity"),
    [("tanh", -1.0, 1.0), ("sigmoid", 0.0, 1.0), ("softplus", 0.0, torch.inf), ("elu", -1.0, torch.inf)],
)
def test_infinities_and_nan(act: str, at_minus_infinity: float, at_infinity: float) -> None:
    got = apply(act, torch.tensor([-torch.inf, torch.inf, torch.nan, -200.0, 200.0]))
    assert got[0] == at_minus_infinity
    assert got[1] == at_infinity
    assert got[2].isnan()
    assert got[3] == at_minus_infinity
    assert got[4] == min(at_infinity, 200.0)
