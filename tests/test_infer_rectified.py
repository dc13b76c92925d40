"""ReLUs that a convolution's kernel does as it reads its image, where others read that image as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan import infer
from fastgan.infer import nodes
from fastgan.infer.weights import frozen
from fastgan.ops import _into
from tests.helpers import max_error

NOTHING = (None,) * 4
PLAIN = ("linear", 0.0, 1.0, None, 1.0)

# x, the weight, (stride, padding, transposed): channels that end within a group, lines shorter than a register and not
# of whole ones, an image of a pixel, few channels on each side.
CASES = {
    "3x3": ((2, 36, 26, 34), (40, 36, 3, 3), (1, 1, False)),
    "3x3 of short lines": ((1, 35, 9, 3), (40, 35, 3, 3), (1, 1, False)),
    "4x4 of stride 2": ((1, 33, 22, 18), (40, 33, 4, 4), (2, 1, False)),
    "4x4 of stride 2, transposed": ((1, 40, 21, 27), (40, 50, 4, 4), (2, 1, True)),
    "4x4 of a pixel, transposed": ((1, 40, 1, 1), (40, 64, 4, 4), (1, 0, True)),
    "few outputs, transposed": ((1, 24, 12, 64), (24, 3, 4, 4), (2, 1, True)),
    "few inputs": ((1, 3, 20, 23), (18, 3, 7, 7), (1, 3, False)),
}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_kernels_rectify_what_they_read(case: str, scaled: bool) -> None:
    """All that can serve the call; scales may be negative, and the ReLU comes behind them."""
    shape, of_weight, (stride, padding, transposed) = CASES[case]
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=g), torch.randn(of_weight, generator=g)
    in_scale = torch.randn(1, shape[1], generator=g) if scaled else None
    wide = x.double() if in_scale is None else x.double() * in_scale.double()[:, :, None, None]
    convolve = F.conv_transpose2d if transposed else F.conv2d
    want = convolve(F.relu(wide), weight.double(), stride=stride, padding=padding)
    where = ((stride,) * 2, (padding,) * 2, (0, 0), (1, 1), transposed, 1, False)
    with frozen(weight) as kept:
        found = _into.convolution_candidates(x, kept, *where, "fp32")
        for algorithm, tile, _ in found:
            out = torch.full_like(want, torch.nan, dtype=torch.float32)
            how = (True, algorithm, tile, "fp32")
            _into.scaled_conv2d_into(x, kept, in_scale, None, *NOTHING, *where, *how, *PLAIN, out)
            assert max_error(out, want) < 1e-5, (algorithm, tile)
    assert len(found) >= 3


def test_a_mirror_image_is_rectified_too() -> None:
    x, weight = torch.randn(1, 3, 15, 20), torch.randn(20, 3, 5, 5)
    want = F.conv2d(F.pad(F.relu(x.double()), [2] * 4, "reflect"), weight.double())
    where = ((1, 1), (2, 2), (0, 0), (1, 1), False, 1, True)
    for algorithm in ("direct_conv", "packed_direct"):
        out = torch.full_like(want, torch.nan, dtype=torch.float32)
        _into.scaled_conv2d_into(x, weight, None, None, *NOTHING, *where, True, algorithm, 0, "fp32", *PLAIN, out)
        assert max_error(out, want) < 1e-5, algorithm


def test_nan_stays() -> None:
    x, weight = torch.full((1, 16, 8, 8), torch.nan), torch.randn(16, 16, 3, 3)
    where = ((1, 1), (1, 1), (0, 0), (1, 1), False, 1, False)
    with frozen(weight) as kept:
        for algorithm, tile, _ in _into.convolution_candidates(x, kept, *where, "fp32"):
            out = torch.zeros_like(x)
            how = (True, algorithm, tile, "fp32")
            _into.scaled_conv2d_into(x, kept, None, None, *NOTHING, *where, *how, *PLAIN, out)
            assert out.isnan().all(), (algorithm, tile)


class Twice(nn.Module):
    """An image that is read as it is and behind a ReLU, alone or with another one at its side."""

    def __init__(self, *, beside: nn.Module | None = None, relu_again: bool = False) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.last = nn.Conv2d(16 if beside is None else 32, 16, 3, padding=1)
        self.beside, self.relu_again = beside, relu_again

    def forward(self, x: Tensor) -> Tensor:
        image = F.leaky_relu(self.first(x), 0.2)
        other = self.second(image)
        rectified = F.relu(image)
        if self.beside is None:
            y = self.last(rectified) + other
        else:
            y = self.last(torch.cat([rectified, self.beside(other)], 1))
        return y + rectified if self.relu_again else y


@pytest.mark.parametrize(
    ("model", "left"),
    [
        pytest.param(Twice(), 0, id="alone"),
        pytest.param(Twice(beside=nn.ReLU()), 0, id="beside another ReLU"),
        pytest.param(Twice(beside=nn.LeakyReLU(0.1)), 1, id="beside what has negative values"),
        pytest.param(Twice(beside=nn.ReLU(), relu_again=True), 1, id="with another reader"),
    ],
)
def test_relus_in_front_of_convolutions(model: Twice, left: int, tmp_path: Path) -> None:
    x = torch.randn(1, 16, 24, 24, generator=torch.Generator().manual_seed(0))
    fast = infer.optimize(model.eval(), (x,))
    rows = fast.report().rows
    assert sum(row.kind == "pointwise" for row in rows) == left
    (last,) = (row for row in rows if "last" in row.layer)
    assert any("relu" in name for name in last.fused) == (not left)
    with torch.no_grad():
        assert max_error(fast(x), model(x)) < 1e-5
    fast.save(tmp_path / "saved")
    again = infer.load(tmp_path / "saved")
    assert torch.equal(again(x), fast(x))
    assert again.report() == fast.report()


def test_as_a_node_it_means_the_same() -> None:
    """What runs where there are no kernels."""
    k: dict[str, Any] = {"x": torch.randn(1, 8, 9, 9), "weight": torch.randn(4, 8, 3, 3), "padding": (1, 1)}
    want = F.conv2d(F.relu(k["x"]), k["weight"], padding=1)
    assert max_error(nodes.convolution(**k, rectify=True), want) < 1e-5
