"""compare, parity and the report page."""

from __future__ import annotations

import base64
import io
import math
import re
from copy import deepcopy
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from fastgan import ops
from fastgan.profile import compare, plain
from fastgan.profile.layers import pair_layers
from fastgan.profile.parity import Error, Parity, against_reference, check_parity
from fastgan.profile.report import encode_png, line_chart, smooth


def test_compare_finds_equal_layers_within_bounds_and_times_both():
    layer = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.2))
    result = compare(layer, deepcopy(layer), [torch.randn(2, 3, 12, 12)], name="a layer", seconds=0.02)
    assert result.parity.within
    assert {error.name for error in result.parity.errors} == {
        "output",
        "gradient of input 0",
        "gradient of 0.weight",
        "gradient of 0.bias",
    }
    assert result.speedup("forward") > 0
    assert result.speedup("training") > 0
    text = str(result)
    assert text.startswith("a layer\n  parity    within bounds; worst ")
    assert re.search(r"forward   original [\d.]+ ms \([\d.]+–[\d.]+\), fused [\d.]+ ms .*: [\d.]+×", text)


def test_compare_takes_functions_keywords_and_several_outputs():
    def original(x, *, scale):
        return x * scale, x.sum()

    result = compare(original, original, [torch.randn(4)], {"scale": torch.tensor(2.0)}, backward=False, seconds=0.01)
    assert [error.name for error in result.parity.errors] == ["output 0", "output 1"]
    assert result.training is None
    assert "training" not in str(result)


def test_a_wrong_value_and_a_wrong_gradient_are_outside_bounds():
    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2.001

    x = [torch.randn(5)]
    wrong_value = check_parity(lambda x: x * 2, lambda x: x * 2 * 1.001, x, {}, backward=False)
    assert not wrong_value.within
    assert wrong_value.worst.fused == pytest.approx(1e-3, rel=0.01)
    wrong_gradient = check_parity(lambda x: x * 2, WrongGradient.apply, x, {}, backward=True)
    assert [error.name for error in wrong_gradient.errors if not error.within] == ["gradient of input 0"]


def test_a_nan_is_never_within_bounds():
    assert not Error("output", original=1e-7, fused=math.nan, floor=1e-6).within
    assert not check_parity(lambda x: x, lambda x: x * math.nan, [torch.ones(3)], {}, backward=False).within


def test_parity_starts_both_from_the_same_state_and_leaves_it_alone():
    layer = spectral_norm(nn.Conv2d(3, 8, 3)).train()
    before = deepcopy(layer.state_dict())
    assert check_parity(layer, layer, [torch.randn(1, 3, 8, 8)], {}, backward=True).within
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_compare_leaves_modules_as_they_are():
    layer = nn.Sequential(spectral_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)).train()
    before = deepcopy(layer.state_dict())
    compare(layer, layer, [torch.randn(2, 3, 8, 8)], seconds=0.01)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_parity_gives_both_the_same_dropout_and_keeps_the_random_state():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    assert check_parity(nn.Dropout(0.5), nn.Dropout(0.5), [x], {}, backward=True).within
    assert torch.equal(before, torch.random.get_rng_state())


def test_shapes_and_missing_outputs_are_refused():
    x = [torch.ones(3)]
    with pytest.raises(ValueError, match=r"compare: output of fused must be \[3\], as of original, got \[2\]"):
        check_parity(lambda x: x, lambda x: x[:2], x, {}, backward=False)
    with pytest.raises(ValueError, match="must return what original does, got no output 2"):
        check_parity(lambda x: (x, x, x), lambda x: (x, x), x, {}, backward=False)


def test_errors_are_relative_to_the_largest_value_of_the_reference():
    exact = {"output": torch.tensor([0.0, 100.0], dtype=torch.float64)}
    parity = against_reference(exact, {"output": torch.tensor([0.0, 100.0])}, {"output": torch.tensor([1.0, 100.0])})
    assert parity.errors[0].fused == pytest.approx(0.01)
    assert parity.errors[0].original == 0.0
    assert not Parity(parity.errors).within


def test_a_gradient_that_is_zero_by_construction_is_measured_against_the_others():
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4))
    parity = check_parity(layer, deepcopy(layer), [torch.randn(2, 3, 8, 8)], {}, backward=True)
    bias = next(error for error in parity.errors if error.name == "gradient of 0.bias")
    assert bias.fused < 1e-5
    assert parity.within


def test_a_given_floor_is_allowed_and_no_more():
    exact = {"output": torch.ones(1, dtype=torch.float64)}
    original, fused = {"output": torch.tensor([1.0])}, {"output": torch.tensor([1.0 + 2.8e-5])}
    assert not against_reference(exact, original, fused).within
    assert against_reference(exact, original, fused, floor=3e-5).within
    assert not against_reference(exact, original, {"output": fused["output"] + 1e-5}, floor=3e-5).within


def test_the_bound_of_winograd_is_for_convolutions_that_went_through_it():
    """Two layers with the same small error: only the one whose product was Winograd's may have it."""

    def convolve(x, weight):
        return nn.functional.conv2d(x, weight, padding=1)

    def fused(x, weight):
        backend = "cpp" if x.dtype == torch.float32 else "reference"
        return ops.scaled_conv2d(x, weight, padding=1, backend=backend) * (1 + 7e-6)

    for channels, size, floor in ((128, 40, 1e-5), (8, 8, 4 * torch.finfo(torch.float32).eps)):
        x, weight = torch.randn(1, channels, size, size), torch.randn(channels, channels, 3, 3)
        parity = check_parity(convolve, fused, [x, weight], {}, backward=True)
        assert {error.floor for error in parity.errors} == {floor}
        assert all(error.within == (floor == 1e-5) for error in parity.errors)
        assert all(error.fused > 5e-6 for error in parity.errors)


def test_layers_are_paired_once_per_kind_and_shape():
    from fastgan.models import PatchGAN

    arguments = {"in_channels": 4, "width": 8, "layers": 2}
    fused, twin = PatchGAN(**arguments).train(), plain.PatchCritic(**arguments)
    twin.load_state_dict(fused.state_dict())
    vectors = deepcopy(fused.state_dict())
    x = torch.randn(1, 4, 32, 32)
    pairs = pair_layers(fused, twin, x)
    assert [pair.names for pair in pairs] == [["model.0"], ["model.2"], ["model.5"], ["model.8"]]
    assert pairs[0].shape == (1, 4, 32, 32)
    assert pairs[0].title == "spectral norm, 4×4 stride 2, lrelu, 4→8 at 32×32"
    assert fused.training
    assert all(torch.equal(value, vectors[key]) for key, value in fused.state_dict().items())
    for pair in pairs:
        parity = check_parity(pair.plain, pair.fused, [torch.randn(pair.shape)], {}, backward=True)
        assert parity.within, pair.title
        # Spectral norm keeps its weight under another name, on both sides the same one.
        gradients = ["gradient of input 0", "gradient of bias", "gradient of parametrizations.weight.original"]
        assert sorted(error.name for error in parity.errors) == sorted([*gradients, "output"])


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_the_plain_generator_is_the_fused_one_with_other_layers(norm):
    from fastgan.models import UNetGenerator

    torch.manual_seed(0)
    arguments = {"in_channels": 1, "out_channels": 3, "width": 4, "size": 32, "norm": norm}
    fused, twin = UNetGenerator(**arguments), plain.UNet(**arguments)
    twin.load_state_dict(fused.state_dict())
    x = [torch.randn(2, 1, 32, 32)]
    assert check_parity(twin.eval(), fused.eval(), x, {}, backward=True).within


def test_plain_adversarial_loss_is_patch_loss():
    from fastgan import ops

    real, fake = torch.randn(2, 1, 6, 6), torch.randn(2, 1, 6, 6)
    for arguments in ((real, fake, "critic"), (None, fake, "generator")):
        ours = ops.patch_loss(*arguments[:2], mode="vanilla", side=arguments[2]).loss
        torch.testing.assert_close(plain.bce_adversarial(*arguments), ours)


def test_png_keeps_the_picture():
    picture = torch.rand(3, 9, 7) * 2 - 1
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(encode_png(picture)))))
    torch.testing.assert_close(pixels.permute(2, 0, 1), ((picture + 1) * 127.5).round().to(torch.uint8))
    assert Image.open(io.BytesIO(encode_png(picture[:1]))).mode == "RGB"


def test_smoothing_looks_back_only():
    assert smooth([0.0, 2.0, 4.0, 6.0], 2) == [0.0, 1.0, 3.0, 5.0]


def test_chart_stays_inside_its_frame_and_small():
    values = [math.exp(-i / 300) + (50.0 if i == 700 else 0.0) for i in range(5000)]
    svg = line_chart(values)
    assert len(svg) < 15_000
    for points in re.findall(r'points="([^"]+)"', svg):
        for pair in points.split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= 320
            assert 0 <= y <= 150
    assert ">5000<" in svg
    assert line_chart([]) == ""
    assert "<polyline" in line_chart([1.0])


class Page(HTMLParser):
    """Collects what a page would fetch, and its images."""

    def __init__(self):
        super().__init__()
        self.external, self.images = [], []

    def handle_starttag(self, tag, attributes):
        for key, value in attributes:
            if key == "src" and value.startswith("data:image/png;base64,"):
                self.images.append(base64.b64decode(value.split(",", 1)[1]))
            elif key in ("src", "href", "srcset", "data", "action", "poster"):
                self.external.append((tag, key, value))


def read_page(text):
    """The page's external references and its images."""
    page = Page()
    page.feed(text)
    return page
