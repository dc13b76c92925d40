"""fastgan.infer.optimize: what it folds and fuses, and that the picture stays the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastgan
from bench.generators import DCGAN, ResNet9, RRDBNet, UNet256
from fastgan import infer
from fastgan.infer import nodes
from fastgan.infer.capture import constant_of
from fastgan.infer.nodes import is_a
from fastgan.models import StyleGAN2Generator, UNetGenerator
from fastgan.nn import SpectralNormConv2d
from tests.helpers import max_error

# A convolution by Winograd's filtering is within 1e-5 of float64 (style.md); a handful in a row stay below this.
FLOOR = 3e-5


def exact(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The model's picture in float64."""
    wide = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        return wide(*[a.double() if isinstance(a, Tensor) else a for a in args], **kwargs)


def assert_same(fast: infer.FastGenerator, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    with torch.no_grad():
        eager = copy.deepcopy(model).eval()(*args, **kwargs)
    reference = exact(model, *args, **kwargs)
    assert max_error(fast(*args, **kwargs), reference) <= 2 * max_error(eager, reference) + FLOOR


def randomize(model: nn.Module) -> nn.Module:
    """Norms with statistics and factors as training gives them: where they are 0 and 1, folding them proves nothing."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


def targets(fast: infer.FastGenerator) -> list[Any]:
    return [step.node.target for step in fast.program.steps]


def count(fast: infer.FastGenerator, target: Callable[..., Any]) -> int:
    return targets(fast).count(target)


# ----------------------------------------------------------------------------------------------------------------------
# Whole generators


def stylegan() -> StyleGAN2Generator:
    generator = StyleGAN2Generator(16, 0, 16, 32, channel_base=512).eval()
    for name, value in generator.named_parameters():
        if name.endswith("noise_strength"):
            nn.init.constant_(value, 0.3)
    return generator


def photo(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.rand(shape) * 2 - 1


GENERATORS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, Any]]] = {
    "U-Net": (lambda: randomize(UNet256(4)), photo(1, 3, 256, 256), {}),
    "our U-Net": (lambda: randomize(UNetGenerator(width=8, size=64)), photo(2, 3, 64, 64), {}),
    "our U-Net, instance norm": (lambda: UNetGenerator(width=8, size=32, norm="instance"), photo(1, 3, 64, 64), {}),
    "ResNet": (lambda: ResNet9(width=16, blocks=2), photo(1, 3, 64, 64), {}),
    "RRDBNet": (lambda: RRDBNet(channels=32, growth=16, blocks=2), photo(1, 3, 48, 48), {}),
    "DCGAN": (DCGAN, lambda: torch.randn(1, 100, 1, 1), {}),
    "StyleGAN2": (stylegan, lambda: torch.randn(2, 16), {"noise_mode": "const"}),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_generator(name: str) -> None:
    """The same picture for the example, for another and for the first again; nothing left to torch but styles."""
    torch.manual_seed(0)
    make, example, kwargs = GENERATORS[name]
    model = make().eval()
    first, second = example(), example()
    fast = infer.optimize(model, (first,), kwargs)
    for x in (first, second, first):
        assert_same(fast, model, x, **kwargs)
    images = [row for row in fast.report().left_to_torch if row.shape[2:].count(1) == 0 and len(row.shape) == 4]
    assert not images, f"left to torch: {images}"


def test_dense_blocks_are_found() -> None:
    fast = infer.optimize(RRDBNet(channels=32, growth=16, blocks=2).eval(), (torch.rand(1, 3, 96, 96),))
    assert count(fast, nodes.dense_block) == 6
    assert count(fast, nodes.concatenate) == 0


def test_unet_is_one_convolution_after_the_other() -> None:
    """Norms, activations and dropout are inside; concatenations are written in place; the ReLU of each skip, whose
    leaky form the next level reads, is part of reading it."""
    fast = infer.optimize(randomize(UNet256(4)), (torch.rand(1, 3, 256, 256),))
    assert count(fast, nodes.convolution) == 16
    assert len(targets(fast)) == 16


def test_whole_generator_with_mapping_and_noise_that_changes() -> None:
    """Random noise is drawn in every call; the mapping network runs in torch and is reported."""
    generator = stylegan()
    z = torch.randn(1, 16)
    fast = infer.optimize(generator, (z,), {"noise_mode": "random"})
    assert not torch.equal(fast(z, noise_mode="random"), fast(z, noise_mode="random"))
    fast = infer.optimize(generator, (z,), {"noise_mode": "const", "truncation": 0.7})
    assert_same(fast, generator, z, noise_mode="const", truncation=0.7)
    assert fast.report().left_to_torch


# ----------------------------------------------------------------------------------------------------------------------
# What is folded


def only_convolution(fast: infer.FastGenerator) -> Any:
    (node,) = [step.node for step in fast.program.steps if is_a(step.node, nodes.convolution)]
    assert len(fast.program.steps) == 1
    return node


def test_batch_norm_goes_into_the_weights() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LeakyReLU(0.1)))
    x = torch.randn(2, 3, 9, 9)
    fast = infer.optimize(model, (x,))
    node = only_convolution(fast)
    factor = model[1].weight / (model[1].running_var + model[1].eps).sqrt()
    expected = model[0].weight * factor[:, None, None, None]
    assert max_error(constant_of(node.kwargs["weight"]), expected.detach()) < 1e-6
    assert node.kwargs["act"] == "lrelu" and node.kwargs["alpha"] == pytest.approx(0.1)
    assert_same(fast, model, x)


@pytest.mark.parametrize("groups", [1, 2])
def test_batch_norm_behind_a_transposed_convolution(groups: int) -> None:
    model = randomize(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=groups), nn.BatchNorm2d(6)))
    x = torch.randn(1, 4, 5, 7)
    fast = infer.optimize(model, (x,))
    only_convolution(fast)
    assert_same(fast, model, x)


def test_spectral_norm_is_computed_once() -> None:
    torch.manual_seed(0)
    for layer in (nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3)), SpectralNormConv2d(3, 8, 3)):
        x = torch.randn(1, 3, 9, 9)
        fast = infer.optimize(layer, (x,))
        only_convolution(fast)
        assert_same(fast, layer, x)


class Scaled(nn.Module):
    """Equalised learning rate, a constant per channel, a gain, a shift."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.register_buffer("per_channel", torch.rand(8, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.nn.functional.conv2d(x, self.weight * 0.19, padding=1)
        return torch.tanh(y * self.per_channel - 0.3) * 0.5 + 0.5


def test_factors_are_folded() -> None:
    model, x = Scaled(), torch.randn(1, 3, 8, 8)
    fast = infer.optimize(model, (x,))
    assert targets(fast) == [nodes.convolution, nodes.pointwise]
    assert_same(fast, model, x)


@pytest.mark.parametrize("kernel", [3, 5, (3, 5)])
def test_nearest_upsampling_goes_into_the_weights(kernel: Any) -> None:
    padding = kernel // 2 if isinstance(kernel, int) else tuple(k // 2 for k in kernel)
    model = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 6, kernel, padding=padding), nn.ReLU())
    x = torch.randn(2, 4, 5, 7)
    fast = infer.optimize(model, (x,))
    node = only_convolution(fast)
    assert node.kwargs["transposed"] and node.kwargs["stride"] == (2, 2)
    assert "upsample" in fast.report().rows[0].fused[0]
    assert_same(fast, model, x)


def test_upsampling_that_somebody_else_reads_stays() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            up = nn.functional.interpolate(x, scale_factor=2)
            return up + self.conv(up)

    model, x = Both(), torch.randn(1, 4, 5, 5)
    fast = infer.optimize(model, (x,))
    assert fast.report().left_to_torch[0].kind.startswith("aten::upsample_nearest2d")
    assert_same(fast, model, x)


def test_taps_that_only_meet_padding_are_cut() -> None:
    down, up = nn.Conv2d(8, 8, 4, 2, 1), nn.ConvTranspose2d(8, 8, 4, 2, 1)
    for layer, size in ((down, 2), (up, 1)):
        x = torch.randn(1, 8, size, size)
        fast = infer.optimize(layer, (x,))
        weight = constant_of(only_convolution(fast).kwargs["weight"])
        assert tuple(weight.shape[2:]) == (2, 2)
        assert_same(fast, layer, x)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_cropped_kernels_compute_the_same(stride: int, size: int, transposed: bool) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    for kernel, padding in ((3, 1), (4, 1), (4, 2), (5, 2), (7, 3)):
        if transposed and (size - 1) * stride - 2 * padding + kernel < 1:
            continue
        if not transposed and size + 2 * padding < kernel:
            continue
        layer, x = kind(3, 5, kernel, stride, padding), torch.randn(2, 3, size, size)
        assert_same(infer.optimize(layer, (x,)), layer, x)


# ----------------------------------------------------------------------------------------------------------------------
# What it costs and tells


def test_tuning_measures_every_candidate_and_keeps_the_picture() -> None:
    model, x = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()), torch.randn(1, 32, 32, 32)
    told: list[str] = []
    fast = infer.optimize(model, (x,), tune=True, progress=told.append)
    (row,) = fast.report().rows
    assert row.measured and row.ms > 0
    assert len(told) == 1 and "ms" in told[0]
    assert_same(fast, model, x)


def test_high_precision_rules_out_the_tiles_of_four() -> None:
    model, x = nn.Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 64, 64)
    rows = {
        precision: infer.optimize(model, (x,), precision=precision).report().rows[0] for precision in ("fp32", "high")
    }
    assert rows["fp32"].algorithm == "winograd m=4"
    assert rows["high"].algorithm in ("winograd m=2", "packed_direct")


def test_report_names_layers_and_reasons() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.gelu(torch.relu(self.first(x)))

    fast = infer.optimize(Model(), (torch.randn(1, 3, 8, 8),))
    report = fast.report()
    assert [row.reason is None for row in report.rows] == [True, False]
    text = str(report)
    assert "first: conv2d" in text and "aten::gelu" in text and "no kernel of ours" in text
    measured = fast.profile(torch.randn(1, 3, 8, 8), rounds=3)
    assert all(row.measured and row.ms > 0 for row in measured.rows)


def test_model_stays_as_it_is_and_goes_its_own_way() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(1, 3, 8, 8)
    fast = infer.optimize(model, (x,))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    picture = fast(x)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(1.0)
    assert torch.equal(fast(x), picture)


def test_results_are_the_callers() -> None:
    """A later call does not write into an earlier result, whatever it is: an image, a view, an input, a constant."""

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.register_buffer("fixed", torch.arange(3.0))

        def forward(self, x: Tensor) -> dict[str, Any]:
            y = self.conv(x)
            return {
                "y": y,
                "view": torch.relu(y).flatten(1),
                "part": self.conv(y[:, :3])[:, 1:2],
                "x": x,
                "fixed": self.fixed,
            }

    model = Many()
    first, second = torch.randn(1, 3, 6, 6), torch.randn(1, 3, 6, 6)
    fast = infer.optimize(model, (first,))
    results = fast(first)
    kept = {name: value.clone() for name, value in results.items()}
    fast(second)
    for name, value in results.items():
        assert torch.equal(value, kept[name]), name
    results["fixed"].zero_()
    assert torch.equal(fast(first)["fixed"], torch.arange(3.0))


def test_memory_is_planned_and_weights_can_be_dropped() -> None:
    model, x = nn.Sequential(*[nn.Conv2d(64, 64, 3, padding=1) for _ in range(4)]), torch.randn(1, 64, 32, 32)
    fast = infer.optimize(model, (x,))
    picture, memory = fast(x), fast.memory()
    image = x.numel() * 4
    # Two of the three images between the layers live at a time.
    assert memory.alive == 2 * image and memory.activations == memory.alive
    assert memory.weights == sum(4 * value.numel() for value in model.parameters())
    assert memory.prepared >= sum(4 * layer.weight.numel() for layer in model)
    assert memory.total == memory.weights + memory.prepared + memory.activations
    freed = fast.drop_weights()
    assert freed == sum(4 * layer.weight.numel() for layer in model)
    assert fast.memory().weights == memory.weights - freed
    assert torch.equal(fast(x), picture)


def test_is_a_module_of_the_package() -> None:
    assert fastgan.infer is infer
    fast = infer.optimize(nn.Conv2d(3, 3, 1), (torch.randn(1, 3, 4, 4),))
    assert isinstance(fast, nn.Module) and not list(fast.parameters())


class InPlace(nn.Module):
    """What is written in place and read again later, through the tensor itself, a view of it, and in another dtype."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.conv, self.way = nn.Conv2d(3, 4, 3, padding=1), way

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.way == "view before":
            rows = y.flatten(2)
            y.relu_()
            return rows + 1
        if self.way == "view after":
            z = y.relu_()
            return y[:, 1:] * 2 + z[:, :3]
        if self.way == "part":
            y[:, :2].mul_(3)
            return y
        if self.way == "wider":
            y.mul_(torch.tensor([2.0], dtype=torch.float64))
            return y
        y.add_(x[:, :1]).clamp_(-0.5, 0.5)
        return torch.cat([y, y.tanh_()], 1)


@pytest.mark.parametrize("way", ["view before", "view after", "part", "wider", "chain"])
def test_in_place(way: str) -> None:
    torch.manual_seed(0)
    model, x = InPlace(way), torch.randn(1, 3, 8, 8)
    fast = infer.optimize(model, (x,))
    with torch.no_grad():
        expected = model(x)
    assert fast(x).dtype == expected.dtype
    torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=1e-6)
