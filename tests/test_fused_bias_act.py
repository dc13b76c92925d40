"""FusedBiasAct against torch's layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastgan.nn import FusedBiasAct


def test_defaults_are_fused_leaky_relu() -> None:
    layer = FusedBiasAct(5)
    assert {key: value.shape for key, value in layer.state_dict().items()} == {"bias": (5,)}
    assert not layer.bias.any()
    layer.load_state_dict({"bias": torch.randn(5)}, strict=True)
    for shape in ((2, 5), (2, 5, 3, 4)):
        x = torch.randn(shape, requires_grad=True)
        bias = layer.bias.reshape(1, 5, *[1] * (len(shape) - 2))
        want = F.leaky_relu(x + bias, 0.2) * 2**0.5
        got = layer(x)
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(y.square().sum(), (x, layer.bias)) for y in (got, want)]
        torch.testing.assert_close(*grads)


def test_arguments() -> None:
    x = torch.randn(2, 5, 3, 4)
    assert not list(FusedBiasAct(5, bias=False).parameters())
    torch.testing.assert_close(FusedBiasAct(5, False, 0.1, 3.0)(x), F.leaky_relu(x, 0.1) * 3)
    torch.testing.assert_close(FusedBiasAct(5, scale=3.0, gain=0.5)(x), F.leaky_relu(x, 0.2) * 0.5)
    torch.testing.assert_close(FusedBiasAct(5, act="relu")(x), F.relu(x) * 2**0.5)
    torch.testing.assert_close(FusedBiasAct(5, act="tanh")(x), torch.tanh(x))
    torch.testing.assert_close(FusedBiasAct(5, clamp=0.3)(x), (F.leaky_relu(x, 0.2) * 2**0.5).clamp(-0.3, 0.3))
    assert "act=tanh" in repr(FusedBiasAct(5, act="tanh"))


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="FusedBiasAct: channels must be at least 1, got 0"):
        FusedBiasAct(0)
    with pytest.raises(ValueError, match=r"bias_act: b must be \[C\] = \[4\], got \[5\]"):
        FusedBiasAct(5)(torch.randn(2, 4))
