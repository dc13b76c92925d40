"""Mirror images and sums that the inference engine's kernels take in: padding by reflection, an image behind a norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quantized import check, geometry, layer
from torch import Tensor, nn

from fastgan import infer
from fastgan.infer import nodes
from fastgan.infer.quantize import Steps
from fastgan.ops import _into
from tests.helpers import max_error

NOTHING = (None,) * 6
PLAIN = ("linear", 0.0, 1.0, None, 1.0)


def reflected(pads: int, stride: int = 1, dilation: int = 1) -> tuple[Any, ...]:
    """The geometry of a convolution that mirrors so many pixels."""
    return (stride,) * 2, (pads,) * 2, (0, 0), (dilation,) * 2, False, 1, True


# x, the weight, (pads, stride, dilation): sizes that tiles do not divide, images hardly larger than their padding,
# channels on both sides of a group of 16.
CASES = {
    "3x3": ((1, 20, 13, 18), (24, 20, 3, 3), (1, 1, 1)),
    "3x3, several samples": ((3, 16, 9, 7), (18, 16, 3, 3), (1, 1, 1)),
    "2x2": ((1, 20, 12, 12), (32, 20, 2, 2), (1, 1, 1)),
    "4x4 of stride 2": ((2, 17, 14, 11), (20, 17, 4, 4), (2, 2, 1)),
    "3x3 of stride 2": ((1, 20, 12, 13), (20, 20, 3, 3), (1, 2, 1)),
    "3x3, all but one line is mirrored": ((1, 16, 4, 5), (16, 16, 3, 3), (3, 1, 1)),
    "7x7 of few channels": ((2, 3, 21, 16), (20, 3, 7, 7), (3, 1, 1)),
    "few channels of stride 2": ((1, 3, 15, 20), (20, 3, 4, 4), (1, 2, 1)),
    "few channels, dilated": ((1, 3, 11, 12), (20, 3, 3, 3), (2, 1, 2)),
    "7x7 of few outputs": ((2, 35, 19, 58), (3, 35, 7, 7), (3, 1, 1)),
    "few outputs, dilated": ((1, 16, 10, 60), (2, 16, 3, 3), (2, 1, 2)),
}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_kernels_read_the_mirror_image(case: str, scaled: bool) -> None:
    shape, of_weight, (pads, stride, dilation) = CASES[case]
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=g), torch.randn(of_weight, generator=g)
    in_scale = torch.rand(1, shape[1], generator=g) + 0.5 if scaled else None
    wide = x.double() if in_scale is None else x.double() * in_scale.double()[:, :, None, None]
    want = F.conv2d(F.pad(wide, [pads] * 4, "reflect"), weight.double(), stride=stride, dilation=dilation)
    where = reflected(pads, stride, dilation)
    tiles = (2, 4) if of_weight[2:] == (3, 3) and stride == 1 else (2, 3)
    few = min(of_weight[:2]) <= 8
    several = [("direct_conv", 0)] if few else [("winograd", tile) for tile in tiles]
    for algorithm, tile in [*several, ("packed_direct", 0)]:
        out = torch.full_like(want, torch.nan, dtype=torch.float32)
        how = (False, algorithm, tile, "fp32")
        _into.scaled_conv2d_into(x, weight, in_scale, *NOTHING[1:], *where, *how, *PLAIN, out)
        assert max_error(out, want) < 1e-5, (algorithm, tile)


@pytest.mark.parametrize("case", ["3x3", "2x2", "4x4 of stride 2"])
def test_quantized_kernels_read_the_mirror_image(case: str) -> None:
    (n, c_in, h, w), (c_out, _, kernel, _), (pads, stride, _) = CASES[case]
    k = layer(n, c_in, c_out, (h, w), kernel)
    assert check(k, geometry(stride, pads, reflect=True), Steps(0.02, -128, 127))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pads": 8}, "mirrors fewer than 8 pixels, got 8"),
        ({"algorithm": "torch"}, "pads with zeros"),
        ({"algorithm": "few_pixels"}, "pads with zeros"),
        ({"algorithm": "unfolded_conv"}, "pads with zeros"),
    ],
)
def test_what_cannot_mirror_says_so(change: dict[str, Any], message: str) -> None:
    call = {"pads": 1, "algorithm": "winograd", "outputs": 16, **change}
    x, weight = torch.randn(1, 64, 8, 64), torch.randn(call["outputs"], 64, 3, 3)
    out = torch.empty(1, call["outputs"], 6 + 2 * call["pads"], 62 + 2 * call["pads"])
    arguments = (*reflected(call["pads"]), False, call["algorithm"], 2, "fp32", *PLAIN)
    with pytest.raises(RuntimeError, match=message):
        _into.scaled_conv2d_into(x, weight, *NOTHING, *arguments, out)


class Padded(nn.Module):
    """A convolution with something in front of it."""

    def __init__(
        self, channels: int, kernel: int, pads: tuple[int, ...], mode: str, outputs: int = 64, **options: Any
    ) -> None:
        super().__init__()
        self.pads, self.mode = pads, mode
        self.convolution = nn.Conv2d(channels, outputs, kernel, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(F.pad(x, self.pads, self.mode))


@pytest.mark.parametrize(
    ("model", "inside"),
    [
        pytest.param(Padded(64, 3, (1, 1, 1, 1), "reflect"), True, id="mirrored"),
        pytest.param(Padded(64, 3, (2, 2, 1, 1), "reflect"), True, id="more columns than rows"),
        pytest.param(Padded(64, 7, (3, 3, 3, 3), "reflect", 3), True, id="few outputs"),
        pytest.param(nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"), True, id="the layer's own"),
        pytest.param(Padded(64, 3, (1, 2, 1, 1), "reflect"), False, id="not symmetric"),
        pytest.param(Padded(64, 3, (1, 1, 1, 1), "replicate"), False, id="replicated"),
        pytest.param(Padded(64, 3, (1, 1, 1, 1), "reflect", padding=1), False, id="zeros around the mirror image"),
        pytest.param(Padded(64, 1, (1, 1, 1, 1), "reflect"), False, id="torch's 1x1"),
    ],
)
def test_reflection_becomes_the_convolutions_own(model: nn.Module, inside: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 64, 40, 40)
    fast = infer.optimize(model.eval(), (x,))
    found = [step.node.target for step in fast.program.steps]
    assert found == ([nodes.convolution] if inside else [nodes.pad, nodes.convolution])
    with torch.no_grad():
        assert max_error(fast(x), model.double()(x.double())) < 3e-5
    model.float()


class Residual(nn.Module):
    """x + norm(conv(x)) in one of the ways that people write it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.convolution, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.InstanceNorm2d(8, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.convolution(x))
        if self.way == "relu":
            return torch.relu(y) + x
        if self.way == "sum, relu":
            return torch.relu(x + y)
        return {"sum": x + y, "alpha": torch.add(y, x, alpha=0.5), "twice": y + x + x}[self.way]


@pytest.mark.parametrize(("way", "sums"), [("sum", 0), ("alpha", 0), ("relu", 0), ("sum, relu", 1), ("twice", 1)])
@pytest.mark.parametrize("size", [(12, 10), (70, 40)])
def test_an_image_added_behind_a_norm(way: str, sums: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model, x = Residual(way).eval(), torch.randn(2, 8, *size)
    fast = infer.optimize(model, (x,))
    found = [step.node.target for step in fast.program.steps]
    assert found.count(nodes.instance_norm) == 1 and found.count(nodes.pointwise) == sums
    with torch.no_grad():
        assert max_error(fast(x), model.double()(x.double())) < 3e-5


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (80, 60)])
def test_the_norms_kernel_adds_an_image(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x, residual, weight, bias = torch.randn(2, 9, *size), torch.randn(2, 9, *size), torch.randn(9), torch.randn(9)
    out = torch.full_like(x, torch.nan)
    _into.norm_act_into(x, weight, bias, residual, 1e-5, "lrelu", 0.2, 1.5, -0.75, out)
    mean, var = x.double().mean((2, 3), keepdim=True), x.double().var((2, 3), correction=0, keepdim=True)
    z = (x - mean) / torch.sqrt(var + 1e-5) * weight[:, None, None] + bias[:, None, None]
    assert max_error(out, 1.5 * F.leaky_relu(z, 0.2) - 0.75 * residual) < 1e-6
