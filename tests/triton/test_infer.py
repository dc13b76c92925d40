"""fastgan.infer without a plan of the CPU's: node by node under the interpreter, as a captured CUDA graph on a GPU."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from device import DEVICE, interpreted
from torch import Tensor, nn

from fastgan import infer
from fastgan.infer.functional import CudaGraph, Functional
from fastgan.models import StyleGAN2Generator
from tests.helpers import max_error

# TF32 has 10 bits; the interpreter multiplies in float32.
FLOOR = 2e-6 if interpreted() else 1e-2


class Generator(nn.Module):
    """A down and an up convolution with norms, a skip, something of torch's between."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.LeakyReLU(0.2))
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.GELU())
        self.up = nn.ConvTranspose2d(8, 3, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(x)
        return torch.tanh(self.up(torch.cat([y, self.inner(y)], 1))) * 0.5 + 0.5


def exact(model: nn.Module, *args: Tensor, **kwargs: str) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).double()(*[a.double() for a in args], **kwargs)


def assert_runs(model: nn.Module, first: Tensor, second: Tensor, **kwargs: str) -> infer.FastGenerator:
    """The right pictures for the example, another and the first again, each the caller's own."""
    fast = infer.optimize(model, (first,), kwargs)
    pictures = [fast(x, **kwargs) for x in (first, second, first)]
    for x, picture in zip((first, second, first), pictures, strict=True):
        assert picture.device.type == DEVICE
        assert max_error(picture, exact(model, x, **kwargs)) <= FLOOR
    assert isinstance(fast.pool._free[0], Functional if interpreted() else CudaGraph)
    return fast


def test_plain_generator(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Generator().eval()
    fast = assert_runs(model, torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8))
    assert [row.kind for row in fast.report().left_to_torch] == ["aten::gelu"]
    assert all(row.ms >= 0 for row in fast.profile(torch.randn(1, 3, 8, 8), rounds=1).rows)
    fast.save(tmp_path / "generator.safetensors")
    again, x = infer.load(tmp_path / "generator.safetensors", device=DEVICE), torch.randn(1, 3, 8, 8)
    assert max_error(again(x), fast(x)) <= FLOOR


def test_stylegan_synthesis() -> None:
    torch.manual_seed(0)
    generator = StyleGAN2Generator(8, 0, 8, 8, channel_base=64).eval()
    ws = torch.randn(1, generator.num_ws, 8)
    fast = infer.optimize(generator.synthesis, (ws,), {"noise_mode": "const"})
    assert max_error(fast(ws, noise_mode="const"), exact(generator.synthesis, ws, noise_mode="const")) <= FLOOR


def test_high_precision() -> None:
    """Without TF32 a GPU is as exact as the CPU."""
    model, x = Generator().eval(), torch.randn(1, 3, 8, 8)
    fast = infer.optimize(model, (x,), precision="high")
    assert max_error(fast(x), exact(model, x)) <= 2e-6
