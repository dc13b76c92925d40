"""The nine activations of StyleGAN's bias_act, in plain torch: names, defaults and formulas that every backend
follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """One activation.

    Attributes:
        function: (x, alpha) -> act(x), elementwise.
        alpha: default slope below zero (lrelu only; 0 elsewhere).
        gain: default factor on the activation's result: √2 where it halves the second moment, else 1 (contracts.md).
        invertible: whether act' can be computed from act's result alone.
        curved: whether act'' differs from zero somewhere.
    """

    function: Callable[[Tensor, float], Tensor]
    alpha: float = 0.0
    gain: float = 1.0
    invertible: bool = True
    curved: bool = True


_SQRT2 = 2.0**0.5

ACTIVATIONS: dict[str, Activation] = {
    "linear": Activation(lambda x, alpha: x, curved=False),
    "relu": Activation(lambda x, alpha: torch.relu(x), gain=_SQRT2, curved=False),
    "lrelu": Activation(lambda x, alpha: F.leaky_relu(x, alpha), alpha=0.2, gain=_SQRT2, curved=False),
    "tanh": Activation(lambda x, alpha: torch.tanh(x)),
    "sigmoid": Activation(lambda x, alpha: torch.sigmoid(x)),
    "elu": Activation(lambda x, alpha: F.elu(x)),
    "selu": Activation(lambda x, alpha: F.selu(x)),
    "softplus": Activation(lambda x, alpha: torch.logaddexp(x, x.new_zeros(()))),
    "swish": Activation(lambda x, alpha: torch.sigmoid(x) * x, gain=_SQRT2, invertible=False),
}


def resolve(act: str, alpha: float | None, gain: float | None) -> tuple[float, float]:
    """``alpha`` and ``gain`` with None replaced by the activation's defaults."""
    activation = ACTIVATIONS[act]
    return (
        activation.alpha if alpha is None else float(alpha),
        activation.gain if gain is None else float(gain),
    )


def activate(x: Tensor, act: str, alpha: float | None, gain: float | None, clamp: float | None) -> Tensor:
    """clamp(gain · act(x), ±clamp), elementwise; None takes the activation's default, no clamp.

    Differentiable without end. softplus is log(1 + exp(x)) everywhere: F.softplus turns linear above 20, off by 2e-9
    there.
    """
    alpha, gain = resolve(act, alpha, gain)
    y = ACTIVATIONS[act].function(x, alpha)
    if gain != 1.0:
        y = y * gain
    return y if clamp is None else y.clamp(-clamp, clamp)
