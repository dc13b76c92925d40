"""EqualizedLinear and EqualizedConv2d against weights that are multiplied out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import CountOps

from fastgan.nn import EqualizedConv2d, EqualizedLinear

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


@pytest.fixture
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("lr", [1.0, 0.01])
@pytest.mark.parametrize("act", ["linear", "lrelu"])
def test_linear(act: str, lr: float) -> None:
    layer = EqualizedLinear(7, 5, act=act, lr_multiplier=lr, bias_init=0.5).double()
    assert (layer.bias == 0.5).all()
    with torch.no_grad():
        layer.bias.normal_()
    x = torch.randn(2, 3, 7).double().requires_grad_()
    want = F.linear(x, layer.weight * (lr / math.sqrt(7)), layer.bias * lr)
    want = F.leaky_relu(want, 0.2) * math.sqrt(2) if act == "lrelu" else want
    got = layer(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    leaves = [x, layer.weight, layer.bias]
    ours, theirs = (torch.autograd.grad(y.square().sum(), leaves) for y in (got, want))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("down", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("act", ["linear", "lrelu"])
@pytest.mark.parametrize("bias", [True, False])
def test_convolution(kernel: int, down: int, act: str, bias: bool) -> None:
    layer = EqualizedConv2d(3, 4, kernel, bias, act=act, down=down, clamp=1.5).double()
    if bias:
        with torch.no_grad():
            layer.bias.normal_()
    x, residual = torch.randn(2, 3, 8, 8).double(), torch.randn(2, 4, 8 // down, 8 // down).double()
    image, weight, options = x, layer.weight / math.sqrt(3 * kernel**2), {"padding": kernel // 2}
    if down == 2:
        # [1, 3, 3, 1] / 8 on both axes; a 1×1 kernel needs one pixel around for it, a 3×3 one another.
        row = torch.tensor([1.0, 3.0, 3.0, 1.0]).double() / 8
        sides = (1 if kernel == 1 else 2,) * 4
        image = F.conv2d(F.pad(x, sides), torch.outer(row, row).expand(3, 1, 4, 4), groups=3)
        options = {"stride": 2}
    want = F.conv2d(image, weight, layer.bias, **options)
    want = F.leaky_relu(want, 0.2) * math.sqrt(2) if act == "lrelu" else want
    torch.testing.assert_close(layer(x), want.clamp(-1.5, 1.5), rtol=1e-12, atol=1e-12)
    want = (want * 0.5).clamp(-0.75, 0.75) + residual
    torch.testing.assert_close(layer(x, gain=0.5, residual=residual), want, rtol=1e-12, atol=1e-12)
    assert list(layer.state_dict()) == ["weight", *(["bias"] if bias else []), "resample_filter"]


def test_learning_rate_is_equalised() -> None:
    """Unit weights whatever the fan-in, unit outputs all the same, and no scaled weight on the way."""
    layer = EqualizedConv2d(64, 128, 3)
    assert layer.weight.std().item() == pytest.approx(1.0, rel=0.02)
    with CountOps() as count:
        y = layer(torch.randn(2, 64, 16, 16))
    assert y[:, :, 1:-1, 1:-1].std().item() == pytest.approx(1.0, rel=0.1)
    assert count.calls["aten.mul"] == 0
    linear = EqualizedLinear(256, 256, lr_multiplier=0.01)
    assert linear.weight.std().item() == pytest.approx(100.0, rel=0.02)
    assert linear(torch.randn(64, 256)).std().item() == pytest.approx(1.0, rel=0.1)


def test_wrong_arguments() -> None:
    cases = (
        (lambda: EqualizedLinear(0, 3), "EqualizedLinear: features must be at least 1, got 0 and 3"),
        (lambda: EqualizedLinear(4, 3)(torch.zeros(2, 5)), r"EqualizedLinear: x must be \[..., 4\], got \[2, 5\]"),
        (lambda: EqualizedConv2d(3, 0, 3), "EqualizedConv2d: channels and down must be at least 1, got 3, 0 and 1"),
        (lambda: EqualizedConv2d(3, 4, 2), "EqualizedConv2d: kernel_size must be odd, got 2"),
        (lambda: EqualizedConv2d(3, 4, 3)(torch.zeros(2, 4, 8, 8)), "scaled_conv2d: weight must be"),
    )
    for call, text in cases:
        with pytest.raises(ValueError, match=text):
            call()
