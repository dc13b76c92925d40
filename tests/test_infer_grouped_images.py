"""Results that one convolution or filter hands on to the next in groups of 16 channels side by side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import max_error
from packed import expected, layer
from plain_stylegan2 import fir
from quantized import SHIFTS, TENSORS, geometry
from skips import Skips
from torch import Tensor, nn

from bench.generators import UNet256, randomize
from fastgan import infer
from fastgan.infer.grouped_images import grouped_images
from fastgan.infer.nodes import PLAIN
from fastgan.models import StyleGAN2Generator
from fastgan.ops import _into, upfirdn2d

EPILOGUE = {"act": "lrelu", "alpha": 0.2, "gain": 1.4, "clamp": 1.5}
WAYS = [(True, False), (False, True), (True, True)]


def grouped(x: Tensor) -> Tensor:
    """x [N, C, H, W] with its values in groups; the sizes are told as if they were not."""
    return x.unflatten(1, (-1, 16)).permute(0, 1, 3, 4, 2).contiguous().view(x.shape)


def planar(x: Tensor) -> Tensor:
    """What ``grouped`` made of this."""
    n, c, h, w = x.shape
    return x.view(n, c // 16, h, w, 16).permute(0, 1, 4, 2, 3).reshape(x.shape)


def shifts(n: int, c_in: int, size: torch.Size) -> dict[str, Tensor]:
    c_out = size[1]
    scales = {"in_scale": torch.rand(n, c_in) + 0.5, "out_scale": torch.rand(1, c_out) + 0.5}
    noise = {"noise": torch.randn(n, 1, *size[2:]), "noise_strength": torch.tensor(0.3)}
    return {**scales, **noise, "bias": torch.randn(c_out)}


# ----------------------------------------------------------------------------------------------------------------------
# Kernels


def convolve(
    k: dict[str, Any], where: dict[str, Any], how: tuple[str, int], images: tuple[bool, bool], size: torch.Size
) -> Tensor:
    """The kernel, on x and to a result of which each is grouped or not, ``images`` says."""
    out = torch.full(size, torch.nan)
    _into.scaled_conv2d_into(
        *(grouped(k["x"]) if images[0] else k["x"], k["weight"]),
        *(k.get(name) for name in (*TENSORS, *SHIFTS)),
        *where.values(),
        *(k.get("rectify", False), *how, k.get("storage", "fp32")),
        *{name: k.get(name, default) for name, default in PLAIN.items()}.values(),
        *(out, *images),
    )
    return planar(out) if images[1] else out


# Blocks of tiles that are whole and that are not, phases, lines of several samples, mirrored edges.
LAYERS = [
    pytest.param((1, 32, 48, (19, 23), 3), geometry(1, 1), ("winograd", 4), id="tiles of 4x4"),
    pytest.param((2, 16, 64, (9, 6), 3), geometry(1, 1), ("winograd", 2), id="tiles of 2x2, samples"),
    pytest.param((1, 16, 16, (12, 70), 3), geometry(1, 1, reflect=True), ("winograd", 4), id="tiles, mirrored"),
    pytest.param((1, 64, 16, (9, 200), 3), geometry(1, 1), ("winograd", 4), id="tiles, blocks of columns"),
    pytest.param((1, 16, 32, (256, 258), 3), geometry(1, 1), ("winograd", 4), id="tiles, past the caches"),
    pytest.param((1, 64, 32, (33, 65), 3), geometry(2, 0, transposed=True), ("winograd", 3), id="tiles of phases"),
    pytest.param((1, 16, 32, (128, 128), 3), geometry(2, 0, transposed=True), ("winograd", 3), id="phases, past them"),
    pytest.param((2, 32, 16, (7, 5), 3), geometry(2, 1, transposed=True), ("winograd", 2), id="phases, odd results"),
    pytest.param((1, 32, 80, (12, 9), 4), geometry(2, 1, transposed=True), ("winograd", 3), id="tiles, 4x4 up"),
    pytest.param((1, 32, 32, (14, 14), 4), geometry(2, 1), ("winograd", 2), id="tiles, 4x4 down"),
    pytest.param((1, 48, 160, (9, 7), 3), geometry(1, 1), ("packed_direct", 0), id="packed"),
    pytest.param((2, 32, 48, (8, 11), 3), geometry(1, 1, reflect=True), ("packed_direct", 0), id="packed, mirrored"),
    pytest.param((1, 16, 32, (21, 18), 4), geometry(2, 1), ("packed_direct", 0), id="packed, down"),
    pytest.param((2, 32, 64, (5, 6), 3), geometry(2, 0, transposed=True), ("packed_direct", 0), id="packed, up"),
    pytest.param((1, 64, 32, (1, 1), 4), geometry(1, 0, transposed=True), ("packed_direct", 0), id="packed, a pixel"),
    pytest.param((1, 16, 32, (130, 128), 4), geometry(2, 1, transposed=True), ("packed_direct", 0), id="packed, past"),
]


@pytest.mark.parametrize(("shape", "where", "how"), LAYERS)
@pytest.mark.parametrize("images", WAYS)
def test_layers_compute_the_same(shape: Any, where: dict[str, Any], how: tuple[str, int], images: Any) -> None:
    torch.manual_seed(0)
    k = layer(*shape, transposed=where["transposed"])
    size = expected(where=where, **k).shape
    k |= {**shifts(shape[0], shape[1], size), **EPILOGUE}
    assert _into.grouped_images(k["x"], k["weight"], *where.values(), *how) == (True, True)
    error = max_error(convolve(k, where, how, images, size), expected(where=where, **k))
    assert error <= max_error(convolve(k, where, how, (False, False), size), expected(where=where, **k)) + 2e-7


@pytest.mark.parametrize("how", [("winograd", 4), ("packed_direct", 0)])
@pytest.mark.parametrize("more", [{"rectify": True}, {"storage": "bf16"}, {"act": "tanh"}])
def test_every_form_of_a_layer(how: tuple[str, int], more: dict[str, Any]) -> None:
    torch.manual_seed(0)
    k, where = {**layer(1, 32, 32, (16, 16), 3), **more}, geometry(1, 1)
    plain = convolve(k, where, how, (False, False), torch.Size((1, 32, 16, 16)))
    assert max_error(convolve(k, where, how, (True, True), plain.shape), plain) < 3e-7


@pytest.mark.parametrize(
    ("shape", "where"),
    [
        pytest.param((1, 64, 3, (40, 64), 1), geometry(), id="1x1, rows shorter than registers"),
        pytest.param((2, 32, 3, (9, 190), 3), geometry(1, 1), id="3x3, samples"),
        pytest.param((2, 32, 3, (9, 58), 7), geometry(1, 3, reflect=True), id="7x7, mirrored"),
        pytest.param((1, 128, 3, (20, 128), 4), geometry(2, 1, transposed=True), id="4x4 up"),
    ],
)
@pytest.mark.parametrize("rectify", [False, True])
def test_few_outputs_read_groups(shape: Any, where: dict[str, Any], rectify: bool) -> None:
    torch.manual_seed(0)
    k = {**layer(*shape, transposed=where["transposed"]), "rectify": rectify}
    want = expected(where=where, **k)
    k |= {"in_scale": torch.rand(shape[0], shape[1]) + 0.5, "residual": torch.randn(want.shape)}
    assert _into.grouped_images(k["x"], k["weight"], *where.values(), "direct_conv", 0) == (True, False)
    got = convolve(k, where, ("direct_conv", 0), (True, False), want.shape)
    assert max_error(got, expected(where=where, **k)) < 2e-6


@pytest.mark.parametrize(
    ("f", "padding"),
    [
        pytest.param(fir(), (1, 1, 1, 1), id="StyleGAN2's"),
        pytest.param(torch.tensor([1.0, -2, 0.5, 3]), (2, 1, 0, 3), id="along both axes"),
        pytest.param(torch.tensor([[1.0, 2, 0], [3, 6, 0]]), (0, 0, 0, 0), id="2x3"),
        pytest.param(fir(), (-1, 2, 3, -2), id="cropped"),
    ],
)
@pytest.mark.parametrize("flip", [False, True])
def test_filters_compute_the_same(f: Tensor, padding: tuple[int, ...], flip: bool) -> None:
    torch.manual_seed(0)
    x, bias, strength = torch.randn(2, 48, 37, 150), torch.randn(48), torch.tensor(0.3)
    settings = {"padding": list(padding), "flip_filter": flip}
    size = upfirdn2d(x, f, **settings).shape
    noise = torch.randn(2, 1, *size[2:])
    out, want = torch.full(size, torch.nan), torch.empty(size)
    assert _into.grouped_filter(f, (1, 1), (1, 1))

    def run(x: Tensor, out: Tensor, *images: bool) -> None:
        how = ((1, 1), (1, 1), padding, flip, 4.0, *{**PLAIN, "act": "lrelu", "alpha": 0.2, "gain": 1.4}.values())
        _into.upfirdn2d_into(x, f, noise, strength, bias, None, *how, out, *images)

    run(x, want)
    run(grouped(x), out, True, True)
    assert max_error(planar(out), want) < 1e-6


def test_a_filter_stores_large_results_past_the_caches() -> None:
    torch.manual_seed(0)
    x, f = torch.randn(1, 32, 257, 260), fir()
    out, how = torch.full((1, 32, 256, 259), torch.nan), ((1, 1), (1, 1), (1, 1, 1, 1), False, 1.0, *PLAIN.values())
    _into.upfirdn2d_into(grouped(x), f, None, None, None, None, *how, out, True, True)
    assert max_error(planar(out), upfirdn2d(x, f, padding=1)) < 1e-6


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("parameters", ["none", "of channels", "of samples"])
@pytest.mark.parametrize("size", [(2, 48, 1, 1), (2, 48, 37, 50), (1, 16, 90, 80)])
def test_norms_compute_the_same(size: tuple[int, ...], parameters: str, residual: bool) -> None:
    torch.manual_seed(0)
    x, added, (n, c) = 3 + torch.randn(size), torch.randn(size), size[:2]
    of = {"none": None, "of channels": (c,), "of samples": (n, c)}[parameters]
    weight, bias = (torch.randn(of) if of else None for _ in range(2))
    settings = (1e-5, "lrelu", 0.2, 1.5, -0.75)
    out, want = torch.full(size, torch.nan), torch.empty(size)
    _into.norm_act_into(grouped(x), weight, bias, grouped(added) if residual else None, *settings, out, True, True)
    _into.norm_act_into(x, weight, bias, added if residual else None, *settings, want)
    assert max_error(planar(out), want) < 1e-6


def test_what_cannot_be_grouped() -> None:
    where, k = geometry(1, 1), layer(1, 32, 40, (9, 9), 3)
    size = torch.Size((1, 40, 9, 9))
    for how, may in {("packed_direct", 0): (True, False), ("torch", 0): (False, False)}.items():
        assert _into.grouped_images(k["x"], k["weight"], *where.values(), *how) == may
        with pytest.raises(RuntimeError, match=f"_scaled_conv2d_into: by {how[0]} there are no grouped images here"):
            convolve(k, where, how, (not may[0], True), size)
    k, residual = layer(1, 32, 32, (9, 9), 3), torch.zeros(1, 32, 9, 9)
    with pytest.raises(RuntimeError, match="there are no grouped images here, or none with a residual"):
        convolve({**k, "residual": residual}, where, ("packed_direct", 0), (False, True), residual.shape)
    for f, up in ((fir(), 2), (torch.rand(4, 4), 1), (torch.rand(5), 1)):
        assert not _into.grouped_filter(f, (up, up), (1, 1))
        how = ((up, up), (1, 1), (2, 2, 2, 2), False, 1.0, *PLAIN.values())
        out = upfirdn2d(residual, f, up=up, padding=2)
        with pytest.raises(RuntimeError, match="_upfirdn2d_into: both images are grouped"):
            _into.upfirdn2d_into(residual, f, None, None, None, None, *how, out, True, True)
    for x, images in ((residual, (True, False)), (torch.zeros(1, 24, 9, 9), (True, True))):
        with pytest.raises(RuntimeError, match="_norm_act_into: all images are grouped, or none is"):
            _into.norm_act_into(x, None, None, None, 1e-5, "linear", 0.0, 1.0, 1.0, torch.empty_like(x), *images)


# ----------------------------------------------------------------------------------------------------------------------
# Engines


def check_against_planes(fast: infer.FastGenerator, x: Tensor, error: float = 2e-6) -> None:
    """Watched, each step has planes."""
    with torch.no_grad(), fast.pool.borrow() as workspace:
        for factor in (1.0, 0.3):
            (planes,), (got,) = (workspace.run([factor * x], watch) for watch in (lambda number, value: None, None))
            assert max_error(got, planes) < error


def names_of(fast: infer.FastGenerator) -> tuple[set[str], set[str]]:
    """Steps that read groups, and steps that make them."""
    found = grouped_images(fast.program)
    steps = [(step.name.split(":")[0], found.get(step.slot, (False, False))) for step in fast.program.steps]
    return tuple({name for name, images in steps if images[which]} for which in (0, 1))


@pytest.mark.parametrize(
    ("seen", "reading", "making"),
    [
        ("", {"second", "third", "up", "joined", "last"}, {"first", "second", "third", "up", "joined"}),
        ("torch", {"third", "up"}, {"second", "third"}),
        ("sum", {"third", "up"}, {"second", "third"}),
    ],
)
@pytest.mark.parametrize("n", [1, 2])
def test_values_are_handed_on_between_layers(seen: str, reading: set[str], making: set[str], n: int) -> None:
    """Of several samples the parts of a concatenation do not lie beside each other, and are copied."""
    torch.manual_seed(0)
    x = torch.randn(n, 32, 48, 48)
    fast = infer.optimize(Skips(seen).eval(), (x,))
    if n > 1:
        reading, making = reading - {"second", "joined"}, making - {"first", "up"}
    assert names_of(fast) == (reading, making)
    check_against_planes(fast, x)


class Filtered(nn.Module):
    """A convolution, a filter, and a convolution or something else behind it."""

    def __init__(self, last: nn.Module, *, direct: bool) -> None:
        super().__init__()
        self.first, self.last, self.direct = nn.Conv2d(16, 32, 3, padding=1), last, direct
        self.register_buffer("f", fir())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(upfirdn2d(x if self.direct else F.relu(self.first(x)), self.f, padding=(1, 2, 1, 2)))


@pytest.mark.parametrize(
    ("last", "direct", "count"),
    [
        pytest.param(nn.Conv2d(32, 32, 3), False, 2, id="a convolution"),
        pytest.param(nn.InstanceNorm2d(32), False, 0, id="a norm"),
        pytest.param(nn.Identity(), False, 0, id="nothing"),
        pytest.param(nn.Conv2d(16, 32, 3), True, 0, id="in front of all"),
    ],
)
def test_both_images_of_a_filter_are_grouped_or_none(last: nn.Module, direct: bool, count: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 16, 40, 40)
    fast = infer.optimize(Filtered(last, direct=direct).eval(), (x,))
    reading, making = names_of(fast)
    assert len(reading) == len(making) == count
    check_against_planes(fast, x)


class Normed(nn.Module):
    """Convolutions and norms, the second of which adds what the first has made, or something else."""

    def __init__(self, seen: str) -> None:
        super().__init__()
        self.seen = seen
        self.first, self.second, self.last = (nn.Conv2d(32, 32, 3, padding=1) for _ in range(3))
        self.norm, self.other = nn.InstanceNorm2d(32, affine=True), nn.InstanceNorm2d(32)

    def forward(self, x: Tensor) -> Tensor:
        one = F.relu(self.norm(self.first(x)))
        two = self.other(self.second(one)) + {"input": x, "torch": torch.flip(one, [3])}.get(self.seen, one)
        return two if self.seen == "result" else self.last(two)


@pytest.mark.parametrize(
    ("seen", "reading", "making"),
    [
        ("", {"norm", "second", "other", "last"}, {"first", "norm", "second", "other"}),
        ("input", {"norm", "second"}, {"first", "norm"}),
        ("result", set(), set()),
        ("torch", set(), set()),
    ],
)
@pytest.mark.parametrize("n", [1, 2])
def test_all_images_of_a_norm_are_grouped_or_none(seen: str, reading: set[str], making: set[str], n: int) -> None:
    torch.manual_seed(0)
    x, model = torch.randn(n, 32, 40, 40), Normed(seen).eval()
    fast = infer.optimize(model, (x,))
    assert names_of(fast) == (reading, making)
    check_against_planes(fast, x, 1e-5)
    with torch.no_grad():
        assert max_error(fast(x), model(x)) < 2e-5


def test_a_unet_and_a_stylegan2() -> None:
    """Of the U-Net every image but those that the first layer makes, or a part of; of the StyleGAN2 what convolutions,
    filters and to-RGB layers read."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, 256, 256)
    fast = infer.optimize(randomize(UNet256(16), x).eval(), (x,))
    layers = {step.name.split(":")[0] for step in fast.program.steps if step.choice}
    reading, making = names_of(fast)
    assert len(reading) == len(making) == len(layers) - 3
    check_against_planes(fast, x)
    generator = StyleGAN2Generator(64, 0, 64, 64, channel_base=2048).eval()
    ws = torch.randn(1, generator.synthesis.num_ws, 64)
    fast = infer.optimize(generator.synthesis, (ws,), {"noise_mode": "const"})
    assert {"b64.conv0", "b64.conv1"} <= set.intersection(*names_of(fast))
    with torch.no_grad():
        assert max_error(fast(ws, noise_mode="const"), generator.synthesis(ws, noise_mode="const")) < 1e-5
