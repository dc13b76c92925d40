"""nn.ModulatedConv2d and nn.ToRGB against each convention's layer, written out in plain torch by its keys."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.nn import ModulatedConv2d, ToRGB

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")

IN, OUT, W_DIM, SIZE = 5, 4, 6, 8
CONVENTIONS = ("nvlabs", "rosinality", "basicsr", "basicsr_clean")
EQUALIZED = {name: name != "basicsr_clean" for name in CONVENTIONS}
PREFIX = {"nvlabs": "", "rosinality": "conv.", "basicsr": "modulated_conv.", "basicsr_clean": "modulated_conv."}
AFFINE = {"nvlabs": "affine", "rosinality": "modulation", "basicsr": "modulation", "basicsr_clean": "modulation"}
NOISE = {"nvlabs": "noise_strength", "rosinality": "noise.weight", "basicsr": "weight", "basicsr_clean": "weight"}
BIAS = {"nvlabs": "bias", "rosinality": "activate.bias", "basicsr": "activate.bias", "basicsr_clean": "bias"}

TAPS = torch.outer(*[torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8] * 2)


@pytest.fixture
def seeded() -> None:
    torch.manual_seed(3)


def style_of(state: dict[str, Tensor], convention: str, w: Tensor) -> Tensor:
    key = f"{PREFIX[convention]}{AFFINE[convention]}"
    weight = state[f"{key}.weight"]
    gain = 1 / math.sqrt(W_DIM) if EQUALIZED[convention] else 1.0
    return F.linear(w, weight * gain, state[f"{key}.bias"])


def convolve(x: Tensor, weights: Tensor, *, up: int = 1, down: int = 1) -> Tensor:
    """Sample by sample, ``weights`` [N, O, I, k, k]: the geometry of contracts.md for the codes that filter."""
    results = []
    for image, weight in zip(x.split(1), weights, strict=True):
        if up == 2 and weight.shape[-1] == 3:
            y = F.conv_transpose2d(image, weight.transpose(0, 1), stride=2)
            y = F.conv2d(F.pad(y, (1, 1, 1, 1)), (TAPS * 4).expand(len(weight), 1, 4, 4), groups=len(weight))
        elif down == 2:
            y = F.conv2d(F.pad(image, (2, 2, 2, 2)), TAPS.expand(IN, 1, 4, 4), groups=IN)
            y = F.conv2d(y, weight, stride=2)
        else:
            y = F.conv2d(image, weight, padding=weight.shape[-1] // 2)
        results.append(y)
    return torch.cat(results)


def published(
    state: dict[str, Tensor], convention: str, x: Tensor, w: Tensor, noise: Tensor, *, up: int, down: int
) -> Tensor:
    """The styled convolution in the order of operations of its public code."""
    weight = state[f"{PREFIX[convention]}weight"]
    weight = weight if weight.ndim == 5 else weight[None]
    style = style_of(state, convention, w)[:, None, :, None, None]
    if convention in ("rosinality", "basicsr"):
        weight = weight / math.sqrt(IN * weight.shape[-1] ** 2)
    weights = weight * style
    weights = weights * torch.rsqrt(weights.square().sum((2, 3, 4), keepdim=True) + 1e-8)
    strength, bias = state[NOISE[convention]], state[BIAS[convention]].reshape(1, OUT, 1, 1)
    if convention == "basicsr_clean":
        factor = up / down
        x = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False) if factor != 1 else x
        return F.leaky_relu(convolve(x, weights) * math.sqrt(2) + strength * noise + bias, 0.2)
    y = convolve(x, weights, up=up, down=down)
    return F.leaky_relu(y + strength * noise + bias, 0.2) * math.sqrt(2)


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    return module.double()


def layer(convention: str, **options: object) -> ModulatedConv2d:
    if convention == "nvlabs":
        options["resolution"] = SIZE * options.get("up", 1) // options.get("down", 1)
    return randomised(ModulatedConv2d(IN, OUT, style_dim=W_DIM, convention=convention, **options))


@pytest.mark.parametrize("small", [1.0, 1e-4], ids=["usual", "where eps acts"])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_output_and_gradients_are_the_published_ones(convention: str, up: int, down: int, small: float) -> None:
    """With styles of 1e-4, the conventions' different places of eps are worth percents."""
    module = layer(convention, up=up, down=down)
    with torch.no_grad():
        module.get_submodule(f"{PREFIX[convention]}{AFFINE[convention]}").bias.mul_(small)
    x = torch.randn(3, IN, SIZE, SIZE).double().requires_grad_()
    w = (torch.randn(3, W_DIM).double() * small).requires_grad_()
    noise = torch.randn(3, 1, SIZE * up // down, SIZE * up // down).double()
    leaves = dict(module.named_parameters())
    state = {**module.state_dict(), **leaves}
    got, want = module(x, w, noise), published(state, convention, x, w, noise, up=up, down=down)
    assert got.shape == (3, OUT, SIZE * up // down, SIZE * up // down)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn_like(got)
    inputs = [x, w, *leaves.values()]
    ours, theirs = (torch.autograd.grad(y, inputs, cotangent) for y in (got, want))
    for name, a, b in zip(["x", "w", *leaves], ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max(), name


def test_where_eps_acts_differs() -> None:
    """The check above can tell: the same tensors give other numbers under another convention."""
    results = []
    x, w, noise = (
        torch.randn(2, IN, SIZE, SIZE).double(),
        torch.randn(2, W_DIM).double() * 1e-4,
        torch.zeros(1, 1, 8, 8),
    )
    for convention in ("nvlabs", "rosinality"):
        module = layer(convention)
        module.get_submodule(f"{PREFIX[convention]}{AFFINE[convention]}").bias.data.zero_()
        results.append(module(x, w, noise.double()))
    assert (results[0] - results[1]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("convention", "up", "expected"),
    [
        (
            "nvlabs",
            1,
            {
                "weight": [OUT, IN, 3, 3],
                "bias": [OUT],
                "noise_strength": [],
                "noise_const": [SIZE, SIZE],
                "resample_filter": [4, 4],
                "affine.weight": [IN, W_DIM],
                "affine.bias": [IN],
            },
        ),
        (
            "rosinality",
            1,
            {
                "conv.weight": [1, OUT, IN, 3, 3],
                "conv.modulation.weight": [IN, W_DIM],
                "conv.modulation.bias": [IN],
                "noise.weight": [1],
                "activate.bias": [OUT],
            },
        ),
        (
            "rosinality",
            2,
            {
                "conv.weight": [1, OUT, IN, 3, 3],
                "conv.modulation.weight": [IN, W_DIM],
                "conv.modulation.bias": [IN],
                "conv.blur.kernel": [4, 4],
                "noise.weight": [1],
                "activate.bias": [OUT],
            },
        ),
        (
            "basicsr",
            2,
            {
                "modulated_conv.weight": [1, OUT, IN, 3, 3],
                "modulated_conv.modulation.weight": [IN, W_DIM],
                "modulated_conv.modulation.bias": [IN],
                "weight": [1],
                "activate.bias": [OUT],
            },
        ),
        (
            "basicsr_clean",
            2,
            {
                "modulated_conv.weight": [1, OUT, IN, 3, 3],
                "modulated_conv.modulation.weight": [IN, W_DIM],
                "modulated_conv.modulation.bias": [IN],
                "weight": [1],
                "bias": [1, OUT, 1, 1],
            },
        ),
    ],
)
def test_keys_and_shapes(convention: str, up: int, expected: dict[str, list[int]]) -> None:
    module = ModulatedConv2d(
        IN,
        OUT,
        style_dim=W_DIM,
        convention=convention,
        up=up,
        resolution=SIZE if convention == "nvlabs" else None,
    )
    assert {name: list(value.shape) for name, value in module.state_dict().items()} == expected
    if "conv.blur.kernel" in expected:
        assert module.state_dict()["conv.blur.kernel"].sum().item() == pytest.approx(4.0)


@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_to_rgb(convention: str, up: int) -> None:
    module = randomised(ToRGB(IN, 3, style_dim=W_DIM, convention=convention, up=up))
    prefix = PREFIX[convention]
    expected = {f"{prefix}weight": [3, IN, 1, 1] if convention == "nvlabs" else [1, 3, IN, 1, 1]}
    expected |= {f"{prefix}{AFFINE[convention]}.weight": [IN, W_DIM], f"{prefix}{AFFINE[convention]}.bias": [IN]}
    expected |= {"bias": [3] if convention == "nvlabs" else [1, 3, 1, 1]}
    if convention == "rosinality" and up == 2:
        expected |= {"upsample.kernel": [4, 4]}
    assert {name: list(value.shape) for name, value in module.state_dict().items()} == expected

    x, w = torch.randn(2, IN, SIZE, SIZE).double(), torch.randn(2, W_DIM).double()
    image = torch.randn(2, 3, SIZE // up, SIZE // up).double()
    state = module.state_dict()
    scale = 1 / math.sqrt(IN) if EQUALIZED[convention] else 1.0
    weights = state[f"{prefix}weight"].reshape(1, 3, IN, 1, 1) * style_of(state, convention, w)[:, None, :, None, None]
    want = convolve(x, weights * scale) + state["bias"].reshape(1, 3, 1, 1)
    torch.testing.assert_close(module(x, w), want, rtol=1e-11, atol=1e-11)
    if up == 2 and EQUALIZED[convention]:
        spread = torch.zeros(2, 3, SIZE, SIZE).double()
        spread[:, :, ::2, ::2] = image
        image_up = F.conv2d(F.pad(spread, (2, 1, 2, 1)), (TAPS * 4).expand(3, 1, 4, 4), groups=3)
    else:
        image_up = F.interpolate(image, scale_factor=up, mode="bilinear", align_corners=False) if up == 2 else image
    torch.testing.assert_close(module(x, w, image), want + image_up, rtol=1e-11, atol=1e-11)


def test_filters_are_read_from_the_state_dict() -> None:
    """Another filter than the usual, as a checkpoint may bring one."""
    module = layer("rosinality", up=2)
    x, w, noise = torch.randn(1, IN, SIZE, SIZE).double(), torch.randn(1, W_DIM).double(), torch.zeros(1, 1, 16, 16)
    before = module(x, w, noise.double())
    state = copy.deepcopy(module.state_dict())
    state["conv.blur.kernel"] = torch.zeros(4, 4).double()
    module.load_state_dict(state)
    after = module(x, w, noise.double())
    bias = state["activate.bias"].reshape(1, OUT, 1, 1)
    torch.testing.assert_close(after, (F.leaky_relu(bias, 0.2) * math.sqrt(2)).expand_as(after))
    assert not torch.equal(before, after)


def test_initial_values() -> None:
    for convention in CONVENTIONS:
        torch.manual_seed(0)
        module = ModulatedConv2d(64, 64, style_dim=32, convention=convention, resolution=8)
        state = module.state_dict()
        scale = 1.0 if EQUALIZED[convention] else 1 / 24
        weight = state[f"{PREFIX[convention]}weight"]
        assert weight.std().item() == pytest.approx(scale, rel=0.05)
        affine = f"{PREFIX[convention]}{AFFINE[convention]}"
        assert (state[f"{affine}.bias"] == 1).all()
        assert not state[NOISE[convention]].any() and not state[BIAS[convention]].any()


def test_noise_modes() -> None:
    module = layer("nvlabs")
    x, w = torch.randn(3, IN, SIZE, SIZE).double(), torch.randn(3, W_DIM).double()
    const, none = module(x, w, "const"), module(x, w, "none")
    assert torch.equal(const, module(x, w, module.noise_const))
    assert torch.equal(none, module(x, w, torch.zeros(SIZE, SIZE).double()))
    torch.manual_seed(1)
    drawn = module(x, w)
    torch.manual_seed(1)
    assert torch.equal(drawn, module(x, w, torch.randn(3, 1, SIZE, SIZE, dtype=torch.float64)))
    shared = torch.randn(1, 1, SIZE, SIZE).double()
    assert torch.equal(module(x, w, shared), module(x, w, shared.expand(3, 1, SIZE, SIZE)))
    assert not torch.equal(const, none) and not torch.equal(const, drawn)


def test_gain_clamp_and_residual() -> None:
    module = layer("nvlabs", clamp=0.7)
    x, w, residual = torch.randn(2, IN, SIZE, SIZE).double(), torch.randn(2, W_DIM).double(), torch.randn(2, OUT, 8, 8)
    unclamped = copy.deepcopy(module)
    unclamped.clamp = None
    plain = unclamped(x, w, "const")
    got = module(x, w, "const", gain=0.5, residual=residual.double())
    torch.testing.assert_close(got, (plain * 0.5).clamp(-0.35, 0.35) + residual.double(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_half_precision_and_wide_images(convention: str) -> None:
    module, rgb = layer(convention).float(), randomised(ToRGB(OUT, 3, style_dim=W_DIM, convention=convention)).float()
    x, w = torch.randn(2, IN, SIZE, SIZE), torch.randn(2, W_DIM)
    noise, image = torch.randn(SIZE, SIZE), torch.randn(2, 3, SIZE, SIZE)
    want = module(x, w, noise)
    got = module(x.half(), w, noise)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), want, rtol=0, atol=4e-3 * want.abs().max().item())
    drawn = rgb(got, w, image)
    assert drawn.dtype == torch.float32
    expected = rgb(want, w, image)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=4e-3 * expected.abs().max().item())
    # Larger than float16 without its scales: the product must never exist unscaled.
    huge = module(x.half() * 2000, w * 30, noise)
    assert huge.isfinite().all()


def test_compiles_without_breaks() -> None:
    for convention in CONVENTIONS:
        module = layer(convention, up=2).float()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        x, w, noise = torch.randn(2, IN, SIZE, SIZE), torch.randn(2, W_DIM), torch.randn(2 * SIZE, 2 * SIZE)
        torch.testing.assert_close(compiled(x, w, noise), module(x, w, noise), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"convention": "nvidia"},
            "convention must be one of nvlabs, rosinality, basicsr, basicsr_clean, got 'nvidia'",
        ),
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"style_dim": 0}, "channels and style_dim must be at least 1, got 5, 4 and 0"),
        ({"clamp": 0.0}, "clamp must be above 0 or None, got 0.0"),
        ({}, "resolution must be given for nvlabs' constant noise, got None"),
    ],
)
def test_wrong_arguments(arguments: dict, text: str) -> None:
    with pytest.raises(ValueError, match=f"ModulatedConv2d: {text}"):
        ModulatedConv2d(IN, OUT, **arguments)


def test_wrong_inputs() -> None:
    x, w = torch.randn(2, IN, SIZE, SIZE).double(), torch.randn(2, W_DIM).double()
    cases = (
        (lambda: layer("nvlabs")(x, w[:1]), r"ModulatedConv2d: w must be \[N, style_dim\] = \[2, 6\], got \[1, 6\]"),
        (
            lambda: layer("nvlabs")(x, w, "fixed"),
            "ModulatedConv2d: noise must be a Tensor or one of random, const, none",
        ),
        (lambda: layer("basicsr")(x, w, "const"), "ModulatedConv2d: noise must not be 'const' with basicsr"),
        (lambda: layer("basicsr", noise=False)(x, w, torch.zeros(8, 8)), "noise must be 'none' without a strength"),
        (lambda: layer("nvlabs")(x[:, :2], w), "modulated_conv2d: weight must be"),
    )
    for call, text in cases:
        with pytest.raises(ValueError, match=text):
            call()
