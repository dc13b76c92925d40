"""The StyleGAN2 models: state-dict keys, shapes, and numbers against a plain-torch StyleGAN2 with the same weights."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import CountOps
from plain_stylegan2 import PlainDiscriminator, PlainGenerator
from torch import Tensor, nn

import fastgan
from fastgan.models import StyleGAN2Discriminator, StyleGAN2Generator, saved

SMALL = {"channel_base": 256, "channel_max": 12, "mapping_layers": 3}


@pytest.fixture(autouse=True)
def seeded(one_thread: None) -> None:
    torch.manual_seed(0)


def networks(
    resolution: int = 16, c_dim: int = 0, dtype: torch.dtype = torch.float64, **options: object
) -> tuple[StyleGAN2Generator, StyleGAN2Discriminator]:
    """Both, with every parameter away from where it starts, so that each takes part."""
    generator = StyleGAN2Generator(6, c_dim, 8, resolution, **SMALL, **options)
    critic = StyleGAN2Discriminator(resolution, c_dim=c_dim, **SMALL, **options)
    with torch.no_grad():
        for parameter in [*generator.parameters(), *critic.parameters()]:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        generator.mapping.w_avg.normal_()
    return generator.to(dtype), critic.to(dtype)


def latents(n: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 6, dtype=dtype)


def relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


# ----------------------------------------------------------------------------------------------------------------------
# State dicts


def linear(name: str, inputs: int, outputs: int) -> dict[str, list[int]]:
    return {f"{name}.weight": [outputs, inputs], f"{name}.bias": [outputs]}


def synthesis_layer(name: str, inputs: int, outputs: int, kernel: int, size: int, w_dim: int) -> dict[str, list[int]]:
    keys = {f"{name}.weight": [outputs, inputs, kernel, kernel], f"{name}.bias": [outputs]}
    keys |= linear(f"{name}.affine", w_dim, inputs)
    if kernel == 3:
        keys |= {f"{name}.noise_const": [size, size], f"{name}.noise_strength": [], f"{name}.resample_filter": [4, 4]}
    return keys


def generator_keys(resolution: int, w_dim: int, c_dim: int, base: int, most: int) -> dict[str, list[int]]:
    """The keys of contracts.md for published generators, with their shapes."""
    keys = {"mapping.w_avg": [w_dim]}
    keys |= linear("mapping.embed", c_dim, w_dim) if c_dim else {}
    for i in range(8):
        keys |= linear(f"mapping.fc{i}", 2 * w_dim if c_dim and i == 0 else w_dim, w_dim)
    inputs, size = 0, 4
    while size <= resolution:
        outputs, block = min(base // size, most), f"synthesis.b{size}"
        keys[f"{block}.resample_filter"] = [4, 4]
        if size == 4:
            keys[f"{block}.const"] = [outputs, 4, 4]
        else:
            keys |= synthesis_layer(f"{block}.conv0", inputs, outputs, 3, size, w_dim)
        keys |= synthesis_layer(f"{block}.conv1", outputs, outputs, 3, size, w_dim)
        keys |= synthesis_layer(f"{block}.torgb", outputs, 3, 1, size, w_dim)
        inputs, size = outputs, size * 2
    return keys


def discriminator_keys(resolution: int, c_dim: int, base: int, most: int) -> dict[str, list[int]]:
    keys: dict[str, list[int]] = {}

    def conv(name: str, inputs: int, outputs: int, kernel: int, bias: bool = True) -> None:
        keys[f"{name}.weight"], keys[f"{name}.resample_filter"] = [outputs, inputs, kernel, kernel], [4, 4]
        if bias:
            keys[f"{name}.bias"] = [outputs]

    size = resolution
    while size > 4:
        inputs, outputs, block = min(base // size, most), min(base // (size // 2), most), f"b{size}"
        keys[f"{block}.resample_filter"] = [4, 4]
        if size == resolution:
            conv(f"{block}.fromrgb", 3, inputs, 1)
        conv(f"{block}.conv0", inputs, inputs, 3)
        conv(f"{block}.conv1", inputs, outputs, 3)
        conv(f"{block}.skip", inputs, outputs, 1, bias=False)
        size //= 2
    width = min(base // 4, most)
    conv("b4.conv", width + 1, width, 3)
    keys |= linear("b4.fc", width * 16, width) | linear("b4.out", width, width if c_dim else 1)
    if c_dim:
        keys |= linear("mapping.embed", c_dim, width)
        for i in range(8):
            keys |= linear(f"mapping.fc{i}", width, width)
    return keys


def shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("c_dim", [0, 10])
@pytest.mark.parametrize("resolution", [16, 32, 64, 128, 256, 512, 1024])
def test_keys_are_the_published_ones(resolution: int, c_dim: int) -> None:
    base = 16384 if resolution <= 256 else 32768
    with torch.device("meta"):
        generator = StyleGAN2Generator(512, c_dim, 512, resolution, channel_base=base)
        critic = StyleGAN2Discriminator(resolution, c_dim=c_dim, channel_base=base)
    assert shapes(generator) == generator_keys(resolution, 512, c_dim, base, 512)
    assert shapes(critic) == discriminator_keys(resolution, c_dim, base, 512)


def test_published_sizes_at_1024() -> None:
    """30.37 and 29.01 million parameters, as published for configuration F; and shapes, without a number computed."""
    with torch.device("meta"):
        generator, critic = StyleGAN2Generator(512, 0, 512, 1024), StyleGAN2Discriminator(1024)
        image = generator(torch.empty(4, 512))
        assert image.shape == (4, 3, 1024, 1024)
        assert critic(image).shape == (4, 1)
    assert generator.num_ws == 18
    assert sum(p.numel() for p in generator.parameters()) == 30_370_060
    assert sum(p.numel() for p in critic.parameters()) == 29_012_513


def test_buffers_take_no_gradient_and_parameters_have_the_published_names() -> None:
    generator, critic = networks()
    constant = ("resample_filter", "noise_const", "w_avg")
    for model in (generator, critic):
        parameters = {name for name, _ in model.named_parameters()}
        assert parameters == {name for name in model.state_dict() if not name.endswith(constant)}


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("conv_clamp", [None, 0.8])
@pytest.mark.parametrize("c_dim", [0, 3])
@pytest.mark.parametrize("resolution", [8, 16, 64])
def test_images_logits_and_gradients_match_plain_torch(resolution: int, c_dim: int, conv_clamp: float | None) -> None:
    models = networks(resolution, c_dim, conv_clamp=conv_clamp)
    plain = PlainGenerator(6, c_dim, 8, resolution, **SMALL, conv_clamp=conv_clamp).double()
    plain_critic = PlainDiscriminator(resolution, c_dim=c_dim, **SMALL, conv_clamp=conv_clamp).double()
    plain.load_state_dict(models[0].state_dict(), strict=True)
    plain_critic.load_state_dict(models[1].state_dict(), strict=True)
    z, c = latents(8), F.one_hot(torch.arange(8) % 3, 3).double() if c_dim else None
    results = []
    for generator, critic in (models, (plain, plain_critic)):
        latent = z.clone().requires_grad_()
        image = generator(latent, c, 0.7, "const")
        logits = critic(image, c)
        inputs = [latent, *generator.parameters(), *critic.parameters()]
        results.append([image, logits, *torch.autograd.grad(logits.square().sum() + image.square().sum(), inputs)])
    assert results[0][0].shape == (8, 3, resolution, resolution) and results[0][1].shape == (8, 1)
    ours, theirs = (
        dict(
            zip(
                ["image", "logits", "z", *(n for model in pair for n, _ in model.named_parameters())],
                found,
                strict=True,
            )
        )
        for pair, found in zip((models, (plain, plain_critic)), results, strict=True)
    )
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert relative(value, theirs[name]) < 1e-10, name


@pytest.mark.parametrize("noise_mode", ["const", "random", "none"])
def test_noise_modes(noise_mode: str) -> None:
    generator, _ = networks()
    plain = PlainGenerator(6, 0, 8, 16, **SMALL).double()
    plain.load_state_dict(generator.state_dict())
    ws = generator.eval().mapping(latents())
    torch.manual_seed(1)
    got = generator.synthesis(ws, noise_mode)
    torch.manual_seed(1)
    assert relative(got, plain.synthesis(ws, noise_mode)) < 1e-12
    again = generator.synthesis(ws, noise_mode)
    assert torch.equal(got, again) == (noise_mode != "random")


def test_float32_on_one_seed_is_close_to_float64() -> None:
    generator, critic = networks(32)
    z = latents()
    want = generator(z, noise_mode="const")
    image = copy.deepcopy(generator).float()(z.float(), noise_mode="const")
    assert image.dtype == torch.float32
    assert relative(image.double(), want) < 1e-5
    assert relative(copy.deepcopy(critic).float()(image).double(), critic(want)) < 1e-4


def test_half_precision_at_the_highest_sizes() -> None:
    options = {"num_fp16_res": 2, "conv_clamp": 256.0}
    generator, critic = networks(32, dtype=torch.float32, **options)
    full = StyleGAN2Generator(6, 0, 8, 32, **SMALL), StyleGAN2Discriminator(32, **SMALL)
    for half, model in zip((generator, critic), full, strict=True):
        model.load_state_dict(half.state_dict())
    seen: dict[str, torch.dtype] = {}
    for name, model in (("g", generator.synthesis), ("d", critic)):
        for key, block in model.named_children():
            block.conv1.register_forward_hook(
                lambda module, given, result, key=f"{name}.{key}": seen.update({key: result.dtype})
            ) if hasattr(block, "conv1") else None
    z = latents(dtype=torch.float32)
    image = generator(z, noise_mode="const")
    logits = critic(image)
    half = {key for key, dtype in seen.items() if dtype == torch.float16}
    assert half == {"g.b16", "g.b32", "d.b16", "d.b32"}
    assert image.dtype == logits.dtype == torch.float32
    want = full[0](z, noise_mode="const")
    assert 0 < relative(image, want) < 2e-2
    assert 0 < relative(logits, full[1](want)) < 5e-2
    logits.sum().backward()
    for name, parameter in [*generator.named_parameters(), *critic.named_parameters()]:
        assert parameter.grad.isfinite().all() and parameter.grad.dtype == torch.float32, name


def test_autocast_runs_and_answers_in_the_parameters_dtype() -> None:
    generator, critic = networks(16, 3, dtype=torch.float32)
    z, c = latents(dtype=torch.float32), F.one_hot(torch.arange(4) % 3, 3).float()
    want = generator(z, c, 0.5, "const", update_average=False)
    with torch.autocast("cpu", torch.bfloat16):
        image = generator(z, c, 0.5, "const")
        logits = critic(image, c)
    assert image.dtype == logits.dtype == generator.mapping.w_avg.dtype == torch.float32
    assert 0 < relative(image, want) < 0.1
    logits.sum().backward()


def test_empty_batch_and_channels_last() -> None:
    generator, critic = (model.eval() for model in networks())
    assert generator(latents(0)).shape == (0, 3, 16, 16)
    image = generator(latents(), noise_mode="const")
    want = critic(image)
    assert critic(image[:0]).shape == (0, 1)
    assert relative(critic(image.to(memory_format=torch.channels_last)), want) < 1e-11
    assert relative(critic.to(memory_format=torch.channels_last)(image), want) < 1e-11


# ----------------------------------------------------------------------------------------------------------------------
# Styles


def test_truncation_goes_towards_the_average() -> None:
    generator, _ = (model.eval() for model in networks())
    z, average = latents(), generator.mapping.w_avg
    ws = generator.mapping(z)
    assert ws.shape == (4, generator.num_ws, 8) and generator.num_ws == 6
    torch.testing.assert_close(generator.mapping(z, truncation=0.3), average + 0.3 * (ws - average))
    torch.testing.assert_close(generator.mapping(z, truncation=0.0), average.expand_as(ws))
    cut = generator.mapping(z, truncation=0.3, truncation_cutoff=2)
    torch.testing.assert_close(cut[:, :2], average + 0.3 * (ws[:, :2] - average))
    assert torch.equal(cut[:, 2:], ws[:, 2:])
    for cutoff in (6, 99):
        assert torch.equal(
            generator.mapping(z, truncation=0.3, truncation_cutoff=cutoff), generator.mapping(z, None, 0.3)
        )
    assert torch.equal(generator.mapping(z, truncation=0.3, truncation_cutoff=0), ws)
    assert generator.mapping(z[:0], truncation=0.3, truncation_cutoff=2).shape == (0, 6, 8)
    image = generator(z, None, 0.3, "const", truncation_cutoff=2)
    assert torch.equal(image, generator.synthesis(cut, "const"))


def test_average_is_tracked_in_training_only() -> None:
    generator, _ = networks()
    before = generator.mapping.w_avg.clone()
    z = latents()
    generator.eval()(z)
    generator.train()(z, update_average=False)
    generator(latents(0))
    assert torch.equal(generator.mapping.w_avg, before)
    ws = generator.mapping(z)
    torch.testing.assert_close(generator.mapping.w_avg, 0.998 * before + 0.002 * ws[:, 0].mean(0))
    assert not generator.mapping.w_avg.requires_grad


def test_style_mixing() -> None:
    generator, _ = (model.eval() for model in networks())
    ws, other = generator.mapping(latents()), generator.mapping(latents())
    mixed = generator.mix_styles(ws, other, 2)
    assert torch.equal(mixed[:, :2], ws[:, :2]) and torch.equal(mixed[:, 2:], other[:, 2:])
    assert torch.equal(generator.mix_styles(ws, other, 0), other)
    assert torch.equal(generator.mix_styles(ws, other, 6), ws)
    each = generator.mix_styles(ws, other, torch.tensor([0, 1, 4, 6]))
    for n, cutoff in enumerate((0, 1, 4, 6)):
        assert torch.equal(each[n], torch.cat([ws[n, :cutoff], other[n, cutoff:]]))
    assert generator.synthesis(mixed).shape == (4, 3, 16, 16)


def test_which_layer_takes_which_style() -> None:
    """4×4: 0, image 1; 8×8: 1 and 2, image 3; …: an image has the style of the next block's first layer."""
    generator, _ = networks()
    ws = torch.randn(4, 6, 8).double()
    seen: dict[str, Tensor] = {}
    for name, module in generator.synthesis.named_modules():
        if name.endswith(("conv0", "conv1", "torgb")):
            module.affine.register_forward_pre_hook(lambda m, given, name=name: seen.update({name: given[0]}))
    generator.synthesis(ws)
    used = {name: next(i for i in range(6) if torch.equal(w, ws[:, i])) for name, w in seen.items()}
    assert used == {
        "b4.conv1": 0,
        "b4.torgb": 1,
        "b8.conv0": 1,
        "b8.conv1": 2,
        "b8.torgb": 3,
        "b16.conv0": 3,
        "b16.conv1": 4,
        "b16.torgb": 5,
    }


def test_labels_matter() -> None:
    generator, critic = networks(c_dim=3)
    z, labels = latents(3), torch.eye(3).double()
    images = generator(z[:1].expand(3, -1), labels, noise_mode="const")
    assert relative(images[0], images[1]) > 1e-3
    image = images[:1].expand(3, -1, -1, -1)
    logits = critic(image, labels)
    assert logits.unique().numel() == 3


# ----------------------------------------------------------------------------------------------------------------------
# Copies, files, compilation, calls


def test_average_of_weights_by_deepcopy() -> None:
    generator, _ = networks(dtype=torch.float32)
    average = copy.deepcopy(generator).eval().requires_grad_(False)
    optimiser = torch.optim.SGD(generator.parameters(), lr=0.1)
    z = latents(dtype=torch.float32)
    before = average(z, noise_mode="const")
    generator(z).square().mean().backward()
    optimiser.step()
    assert torch.equal(average(z, noise_mode="const"), before)
    with torch.no_grad():
        for kept, new in zip(average.parameters(), generator.parameters(), strict=True):
            kept.lerp_(new, 1.0)
        for kept, new in zip(average.buffers(), generator.buffers(), strict=True):
            kept.copy_(new)
    assert torch.equal(average(z, noise_mode="const"), generator.eval()(z, noise_mode="const"))


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_saved_models_are_rebuilt(kind: str, tmp_path: Path) -> None:
    write = saved.write_safetensors if kind == "safetensors" else saved.write_pth
    models = networks(c_dim=3, dtype=torch.float32, conv_clamp=100.0)
    z, c = latents(dtype=torch.float32), torch.eye(3)[[0, 1, 2, 0]]
    image = models[0].eval()(z, c, 0.5, "const")
    for model in models:
        file = io.BytesIO()
        write(file, model.state_dict(), saved.describe(type(model).__name__, model.arguments))
        path = tmp_path / f"{type(model).__name__}.{kind}"
        path.write_bytes(file.getvalue())
    generator = fastgan.load(tmp_path / f"StyleGAN2Generator.{kind}")
    critic = fastgan.load(tmp_path / f"StyleGAN2Discriminator.{kind}")
    assert type(generator) is StyleGAN2Generator and generator.arguments == models[0].arguments
    assert torch.equal(generator(z, c, 0.5, "const"), image)
    assert torch.equal(critic(image, c), models[1](image, c))


def test_weights_of_a_published_dtype_load_onto_a_model_without_memory() -> None:
    source, critic = networks(dtype=torch.float32)
    with torch.device("meta"):
        target, judge = StyleGAN2Generator(6, 0, 8, 16, **SMALL), StyleGAN2Discriminator(16, **SMALL)
    target.load_state_dict(source.state_dict(), assign=True)
    judge.load_state_dict(critic.state_dict(), assign=True)
    z = latents(dtype=torch.float32)
    image = target.eval()(z, noise_mode="const")
    assert torch.equal(image, source.eval()(z, noise_mode="const"))
    assert torch.equal(judge(image), critic(image))


@pytest.mark.parametrize("noise_mode", ["const", "none"])
def test_compiles_without_breaks(noise_mode: str) -> None:
    generator, critic = networks(8, dtype=torch.float32)
    synthesis = torch.compile(generator.synthesis, fullgraph=True, backend="aot_eager")
    judge = torch.compile(copy.deepcopy(critic), fullgraph=True, backend="aot_eager")
    ws = generator.mapping(latents(dtype=torch.float32)).detach()
    want = generator.synthesis(ws, noise_mode)
    got = synthesis(ws, noise_mode)
    assert relative(got, want) < 1e-5
    assert relative(judge(want), critic(want)) < 1e-5
    parameters = [p for n, p in generator.synthesis.named_parameters() if noise_mode == "const" or "strength" not in n]
    ours, theirs = (torch.autograd.grad(image.square().sum(), parameters) for image in (got, want))
    for mine, other in zip(ours, theirs, strict=True):
        assert relative(mine, other) < 1e-4


def test_one_convolution_per_layer() -> None:
    """No weight per sample, no second convolution; an affine map is one product with its bias."""
    generator, critic = networks(16, dtype=torch.float32)
    ws = generator.mapping(latents(dtype=torch.float32))
    with torch.no_grad(), CountOps() as count:
        image = generator.synthesis(ws, "const")
    # Eight layers, each with its affine map.
    assert count.calls["fastgan.scaled_conv2d"] == count.calls["aten.addmm"] == 8
    assert not any(count.calls[f"aten.{name}"] for name in ("bmm", "convolution"))
    with torch.no_grad(), CountOps() as count:
        critic(image)
    # The last layer has no activation: its product with the bias is torch's.
    assert count.calls["fastgan.scaled_conv2d"] == 1 + 2 * 3 + 2
    assert count.calls["aten.addmm"] == 1
    assert not any(count.calls[f"aten.{name}"] for name in ("bmm", "leaky_relu", "convolution"))


# ----------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"resolution": 48}, "resolution must be a power of two from 8 on, got 48"),
        ({"resolution": 4}, "resolution must be a power of two from 8 on, got 4"),
        ({"w_dim": 0}, "w_dim must be at least 1, got 0"),
        ({"channel_max": 0}, "channel_max must be at least 1, got 0"),
    ],
)
def test_wrong_arguments(arguments: dict, text: str) -> None:
    with pytest.raises(ValueError, match=f"StyleGAN2Generator: {text}"):
        StyleGAN2Generator(**({"z_dim": 4, "c_dim": 0, "w_dim": 4, "resolution": 16} | arguments))
    if "w_dim" not in arguments:
        with pytest.raises(ValueError, match=f"StyleGAN2Discriminator: {text}"):
            StyleGAN2Discriminator(**({"resolution": 16} | arguments))


def test_wrong_inputs() -> None:
    generator, critic = networks()
    conditional, judge = networks(c_dim=3)
    z, image, ws = latents(), torch.zeros(4, 3, 16, 16).double(), torch.zeros(4, 6, 8).double()
    cases = (
        (lambda: generator(z[:, :5]), r"mapping: z must be \[N, z_dim\] = \[N, 6\], got \[4, 5\]"),
        (lambda: conditional(z), r"mapping: c must be \[N, c_dim\] = \[N, 3\], got None"),
        (lambda: conditional(z, torch.eye(3)), "mapping: c must have as many rows as z, 4, got 3"),
        (
            lambda: judge.mapping(None, torch.eye(3), 0.5),
            "mapping: truncation must be 1 without an average of w, got 0.5",
        ),
        (
            lambda: generator.mapping(z, truncation=0.5, truncation_cutoff=-1),
            "mapping: truncation_cutoff must be at least 0 or None, got -1",
        ),
        (lambda: judge(image), r"mapping: c must be \[N, c_dim\] = \[N, 3\], got None"),
        (
            lambda: generator.synthesis(ws[:, :5]),
            r"synthesis: ws must be \[N, L, w_dim\] = \[N, 6, 8\], got \[4, 5, 8\]",
        ),
        (lambda: generator(z, noise_mode="off"), "synthesis: noise_mode must be one of const, random, none, got 'off'"),
        (lambda: generator.mix_styles(ws, ws[:1], 2), r"mix_styles: other must be \[N, L, w_dim\] = \[4, 6, 8\]"),
        (
            lambda: generator.mix_styles(ws, ws, torch.tensor([1, 2])),
            r"mix_styles: cutoff must be an int or \[N\] = \[4",
        ),
        (lambda: critic(image[:, :2]), r"StyleGAN2Discriminator: image must be \[N, 3, 16, 16\], got \[4, 2, 16, 16\]"),
    )
    for call, text in cases:
        with pytest.raises(ValueError, match=text):
            call()
