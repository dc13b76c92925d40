"""Gradient penalties: closed forms; and on a small StyleGAN2, every parameter's gradient against other computations."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import FLOORS, CountOps, max_error
from plain_stylegan2 import PlainDiscriminator, PlainGenerator
from torch import Tensor, nn

import fastgan
from fastgan.models import StyleGAN2Discriminator, StyleGAN2Generator
from fastgan.train.losses import lazy_adam, path_length_penalty, r1_penalty, r2_penalty, wgan_gp

pytestmark = pytest.mark.usefixtures("one_thread")

PENALTIES = ("r1", "r2", "wgan_gp", "path_length")
SMALL = {"channel_base": 128, "channel_max": 8, "mapping_layers": 2}


def networks(dtype: torch.dtype, c_dim: int = 0) -> tuple[StyleGAN2Generator, StyleGAN2Discriminator]:
    """A StyleGAN2 of 16×16 with all parameters away from where they start: biases and noise take part."""
    torch.manual_seed(0)
    generator = StyleGAN2Generator(6, c_dim, 8, 16, **SMALL)
    critic = StyleGAN2Discriminator(16, c_dim=c_dim, **SMALL)
    with torch.no_grad():
        for parameter in [*generator.parameters(), *critic.parameters()]:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return generator.to(dtype), critic.to(dtype)


def plain_twin(generator: nn.Module, critic: nn.Module) -> tuple[nn.Module, nn.Module]:
    dtype, c_dim = generator.mapping.w_avg.dtype, generator.c_dim
    twins = PlainGenerator(6, c_dim, 8, 16, **SMALL), PlainDiscriminator(16, c_dim=c_dim, **SMALL)
    for twin, model in zip(twins, (generator, critic), strict=True):
        twin.to(dtype).load_state_dict(model.state_dict())
    return twins


def drawn(dtype: torch.dtype, *shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def penalty(kind: str, generator: nn.Module, critic: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """The penalty, and its gradient for each parameter that it depends on."""
    dtype = generator.mapping.w_avg.dtype
    real, fake = (drawn(dtype, 4, 3, 16, 16, seed=seed) for seed in (1, 2))
    if kind == "r1":
        value = r1_penalty(critic(real.requires_grad_()), real, gamma=3.0, every=2)
    elif kind == "r2":
        # Not detached: the gradient goes on into the generator.
        fake = generator(drawn(dtype, 4, 6, seed=3), noise_mode="const")
        value = r2_penalty(critic(fake), fake, gamma=3.0)
    elif kind == "wgan_gp":
        value = wgan_gp(critic, real, fake, generator=torch.Generator().manual_seed(4))
    else:
        ws = generator.mapping(drawn(dtype, 4, 6, seed=3))
        noise = drawn(dtype, 4, 3, 16, 16, seed=5)
        value = path_length_penalty(generator.synthesis(ws, "const"), ws, 0.3, noise=noise).penalty
    parameters = {f"generator {name}": p for name, p in generator.named_parameters()}
    parameters |= {f"critic {name}": p for name, p in critic.named_parameters()}
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    grads = {name: g.detach() for name, g in zip(parameters, found, strict=True) if g is not None}
    return value.detach(), grads


def on_reference(kind: str, generator: nn.Module, critic: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    with fastgan.backend("reference"):
        return penalty(kind, generator, critic)


def weights_within_reach(kind: str) -> set[str]:
    """The weights that the penalty must have a gradient for. (A bias may move no inner gradient at all.)"""
    generator, critic = networks(torch.float32)
    names = {f"critic {name}" for name, _ in critic.named_parameters()} if kind != "path_length" else set()
    if kind in ("r2", "path_length"):
        names |= {f"generator {name}" for name, _ in generator.named_parameters()}
    return {name for name in names if name.endswith("weight")}


@pytest.mark.parametrize("kind", PENALTIES)
@pytest.mark.parametrize("other", ["reference backend", "plain torch"])
def test_value_and_every_gradient_in_float64(kind: str, other: str) -> None:
    models = networks(torch.float64)
    value, grads = penalty(kind, *models)
    if other == "plain torch":
        want, want_grads = penalty(kind, *plain_twin(*networks(torch.float64)))
    else:
        want, want_grads = on_reference(kind, *networks(torch.float64))
    assert value > 0
    assert max_error(value, want) < 1e-12
    assert weights_within_reach(kind) <= {name for name, grad in grads.items() if grad.any()}
    for name in grads.keys() | want_grads.keys():
        # Where only one of the two has a graph to a parameter, its gradient must be zero.
        got, expected = (found.get(name, torch.zeros(())) for found in (grads, want_grads))
        largest = max(float(expected.abs().max()), 1e-6 * float(want))
        assert float((got - expected).abs().max()) <= 1e-10 * largest, name


@pytest.mark.parametrize("kind", PENALTIES)
def test_every_gradient_in_float32_is_as_exact_as_the_reference(kind: str) -> None:
    """The reference's own error is the largest of four: from these weights, and from weights one rounding away.

    A gradient of second order is a sum of thousands of products that cancel in part, so that one run may be exact by
    chance.
    """
    value, grads = penalty(kind, *networks(torch.float32))
    exact, exact_grads = on_reference(kind, *networks(torch.float64))
    runs = []
    for seed in range(4):
        models = networks(torch.float32)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in [p for model in models for p in model.parameters()] if seed > 0 else []:
                step = 2 * torch.rand(parameter.shape, generator=draw) - 1
                parameter.mul_(1 + step * torch.finfo(torch.float32).eps)
        runs.append(on_reference(kind, *models))
    assert max_error(value, exact) <= 2 * max(max_error(eager, exact) for eager, _ in runs) + FLOORS[torch.float32]
    scale = max(float(grad.abs().max()) for grad in exact_grads.values())
    for name, expected in exact_grads.items():
        if float(expected.abs().max()) < 1e-10 * scale:
            continue
        allowed = 2 * max(max_error(eager[name], expected) for _, eager in runs) + FLOORS[torch.float32]
        assert allowed < 1e-3, name
        assert max_error(grads[name], expected) <= allowed, name


@pytest.mark.parametrize("kind", PENALTIES)
def test_the_same_twice_is_the_same_to_the_bit(kind: str) -> None:
    (value, grads), (again, grads_again) = (penalty(kind, *networks(torch.float32)) for _ in range(2))
    assert torch.equal(value, again)
    assert all(torch.equal(grad, grads_again[name]) for name, grad in grads.items())


def test_penalties_run_on_the_fused_ops_to_second_order() -> None:
    generator, critic = networks(torch.float32)
    with CountOps() as count:
        penalty("r1", generator, critic)
    convolutions = {name: n for name, n in count.calls.items() if "conv" in name and not name.startswith("fastgan")}
    assert count.calls["fastgan.scaled_conv2d"] > 20
    assert count.calls["fastgan.activation_grad"] > 0
    assert count.calls["fastgan.scaled_conv2d_weight_grad"] > 0
    # What is left to torch is the resampling filter.
    assert count.calls["fastgan.scaled_conv2d"] > sum(convolutions.values()) / 2


@pytest.mark.parametrize("kind", ["r1", "path_length"])
def test_half_precision_at_the_highest_sizes(kind: str) -> None:
    """float16 in the forward and in both backward passes: finite, and the same penalty but for its rounding."""
    found = []
    for half in (0, 2):
        torch.manual_seed(0)
        generator = StyleGAN2Generator(6, 0, 8, 16, **SMALL, num_fp16_res=half)
        value, grads = penalty(kind, generator, StyleGAN2Discriminator(16, **SMALL, num_fp16_res=half))
        assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads.values())
        found.append((value, grads))
    (want, want_grads), (got, got_grads) = found
    # A bias of ToRGB moves no gradient: its own is zero, or it is left out where no clamp ties it to the result.
    names = sorted(want_grads.keys() & got_grads.keys())
    assert not any(grad.any() for grads in (want_grads, got_grads) for name, grad in grads.items() if name not in names)
    want_grad, got_grad = (torch.cat([grads[name].flatten() for name in names]) for grads in (want_grads, got_grads))
    assert 0 < max_error(got, want) < 0.01
    assert 0 < float((got_grad - want_grad).norm() / want_grad.norm()) < 0.02


def test_conditional_critic() -> None:
    values = []
    labels = F.one_hot(torch.tensor([0, 2, 1, 2]), 3).double()
    for critic in (networks(torch.float64, 3)[1], plain_twin(*networks(torch.float64, 3))[1]):
        real = drawn(torch.float64, 4, 3, 16, 16, seed=1).requires_grad_()
        values.append(r1_penalty(critic(real, labels), real).detach())
    assert values[0] > 0
    assert max_error(*values) < 1e-12


# ----------------------------------------------------------------------------------------------------------------------
# Closed forms


def linear(direction: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: (x * direction).flatten(1).sum(1)


def test_zero_centred_penalties_of_a_linear_and_a_quadratic_critic() -> None:
    direction, x = torch.randn(3, 4, 4).double(), torch.randn(5, 3, 4, 4).double().requires_grad_()
    for function in (r1_penalty, r2_penalty):
        value = function(linear(direction)(x), x, gamma=7.0, every=16)
        assert value.item() == pytest.approx(16 * 3.5 * direction.square().sum().item(), rel=1e-12)
        value = function(x.square().flatten(1).sum(1, keepdim=True), x)
        assert value.item() == pytest.approx(5 * 4 * x.square().sum().item() / 5, rel=1e-12)
        (grad,) = torch.autograd.grad(value, x)
        torch.testing.assert_close(grad, 2 * 4 * x.detach(), rtol=1e-12, atol=0)


def test_wgan_gp_of_a_linear_critic_and_what_it_mixes() -> None:
    direction = torch.randn(3, 4, 4).double().requires_grad_()
    real, fake = torch.randn(2, 6, 3, 4, 4).double().unbind()
    value = wgan_gp(linear(direction), real, fake, weight=5.0, target=2.0, every=3)
    norm = direction.detach().norm().item()
    assert value.item() == pytest.approx(15 * (norm - 2) ** 2, rel=1e-12)
    (grad,) = torch.autograd.grad(value, direction)
    torch.testing.assert_close(grad, 30 * (norm - 2) * direction.detach() / norm, rtol=1e-10, atol=1e-12)

    seen = []
    wgan_gp(
        lambda x: seen.append(x.detach()) or linear(direction)(x),
        real,
        fake,
        generator=torch.Generator().manual_seed(9),
    )
    alpha = torch.rand(6, 1, 1, 1, generator=torch.Generator().manual_seed(9)).double()
    torch.testing.assert_close(seen[0], real + alpha * (fake - real), rtol=1e-12, atol=1e-12)
    assert ((alpha > 0) & (alpha < 1)).all()


def test_path_length_of_a_linear_generator() -> None:
    """image = Σ_l A_l w_l: the gradient of <image, y> for w_l is A_lᵀ y."""
    matrices = torch.randn(3, 2 * 4 * 4, 5).double().requires_grad_()
    ws = torch.randn(6, 3, 5).double().requires_grad_()
    images = torch.einsum("lpd,nld->np", matrices, ws).reshape(6, 2, 4, 4)
    noise = torch.randn(6, 2, 4, 4).double()
    found = path_length_penalty(images, ws, 1.5, weight=3.0, decay=0.25, every=4, noise=noise)
    gradient = torch.einsum("lpd,np->nld", matrices, noise.flatten(1) / 4)
    lengths = gradient.square().sum(2).mean(1).sqrt()
    mean = 0.75 * 1.5 + 0.25 * lengths.mean()
    want = 12 * (lengths - mean).square().mean()
    torch.testing.assert_close(found.lengths, lengths.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.mean, mean.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.penalty, want, rtol=1e-12, atol=0)
    assert found.penalty.requires_grad and not found.mean.requires_grad and not found.lengths.requires_grad
    ours, theirs = (torch.autograd.grad(value, matrices)[0] for value in (found.penalty, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_running_mean_goes_from_call_to_call() -> None:
    mean: Tensor | float = 0.0
    for _ in range(400):
        ws = torch.randn(8, 2, 3).requires_grad_()
        images = ws.sum((1, 2))[:, None, None, None].expand(8, 1, 2, 2)
        _, mean, lengths = path_length_penalty(images, ws, mean, decay=0.02)
    # g = Σ of 4 noises / 2 ~ N(0, 1), the same in all 6 places: the length is √3·|g|, of mean √3·√(2/π).
    assert mean.item() == pytest.approx(math.sqrt(6 / math.pi), rel=0.1)


def test_zero_gradients_are_no_nan() -> None:
    scale = torch.zeros((), requires_grad=True)
    real, fake = torch.randn(2, 4, 3, 2, 2).unbind()
    value = wgan_gp(lambda x: (x * scale).sum((1, 2, 3)), real, fake)
    assert value.item() == 10.0
    assert torch.autograd.grad(value, scale)[0].isfinite()
    ws = torch.randn(4, 2, 3).requires_grad_()
    images = (ws.sum((1, 2)) * scale)[:, None, None, None].expand(4, 3, 2, 2)
    found = path_length_penalty(images, ws, 1.0)
    assert found.lengths.tolist() == [0.0] * 4
    assert torch.autograd.grad(found.penalty, scale)[0].isfinite()


def test_sums_of_squares_do_not_overflow_half_precision() -> None:
    x = torch.ones(2, 3, 4, 4, dtype=torch.float16, requires_grad=True)
    value = r1_penalty((x * 300.0).flatten(1).sum(1), x, gamma=2.0)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(48 * 300.0**2, rel=1e-6)


def test_lazy_adam_keeps_the_horizon() -> None:
    settings = lazy_adam(16, lr=0.002, betas=(0.0, 0.99))
    assert settings["lr"] == pytest.approx(0.002 * 16 / 17)
    assert settings["betas"][0] == 0.0
    # 17 steps with the new one forget as much as 16 with the old one.
    assert settings["betas"][1] ** 17 == pytest.approx(0.99**16)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)], **settings)


def test_wrong_arguments() -> None:
    x, leaf = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4, requires_grad=True)
    ws = torch.randn(2, 3, 5, requires_grad=True)
    cases = (
        (lambda: r1_penalty(x.sum((1, 2, 3)), x), "r1_penalty: images must require a gradient and be used"),
        (lambda: r2_penalty((leaf * 2).sum(), torch.randn(2, requires_grad=True)), "r2_penalty: images must require"),
        (lambda: r1_penalty(leaf.sum(), leaf, every=0), "r1_penalty: every must be at least 1, got 0"),
        (lambda: wgan_gp(linear(x), x, x[:1]), r"wgan_gp: fake must be \[2, 3, 4, 4\], as real, got \[1, 3, 4, 4\]"),
        (lambda: wgan_gp(lambda image: ws.sum(), x, x), "wgan_gp: critic's image must require a gradient and be used"),
        (lambda: path_length_penalty(leaf * 1, ws), "path_length_penalty: ws must require a gradient and be used"),
        (lambda: path_length_penalty(leaf, ws[:, 0]), r"path_length_penalty: ws must be \[N, L, w_dim\], got \[2, 5\]"),
        (lambda: path_length_penalty(leaf, ws, noise=x[:1]), r"noise must be \[2, 3, 4, 4\], as images, got \[1, 3"),
        (lambda: lazy_adam(0, lr=1.0, betas=(0.0, 0.9)), "lazy_adam: every must be at least 1, got 0"),
    )
    for call, text in cases:
        with pytest.raises(ValueError, match=text):
            call()
