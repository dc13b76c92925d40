"""Spectral-normalised layers and their groups against torch.nn.utils.parametrizations.spectral_norm."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_spectral_sigma import Calls
from torch import Tensor, nn
from torch.nn.utils import spectral_norm as hook_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel

from fastgan.nn import (
    SpectralNormConv2d,
    SpectralNormConvTranspose2d,
    SpectralNormLinear,
    group_spectral_norm,
)

Make = Callable[..., nn.Module]
OURS = {
    nn.Conv2d: SpectralNormConv2d,
    nn.ConvTranspose2d: SpectralNormConvTranspose2d,
    nn.Linear: SpectralNormLinear,
}
CONVS = [
    (nn.Conv2d, (6, 8, 4, 2, 1), {}),
    (nn.Conv2d, (6, 8, 3), {"padding": "same", "padding_mode": "reflect"}),
    (nn.Conv2d, (6, 8, 4), {"padding": "same", "bias": False}),
    (nn.Conv2d, (6, 8, (3, 1), 1, (1, 0)), {"padding_mode": "circular"}),
    (nn.Conv2d, (6, 8, 3), {"dilation": 2, "groups": 2, "padding_mode": "replicate", "padding": 1}),
    (nn.ConvTranspose2d, (6, 8, 4, 2, 1), {}),
    (nn.ConvTranspose2d, (6, 8, 3, 2, 1), {"output_padding": 1, "bias": False}),
]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def theirs(kind: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    torch.manual_seed(7)
    return spectral_norm(kind(*args, **kwargs))


def ours(kind: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    torch.manual_seed(7)
    return OURS[kind](*args, **kwargs)


def assert_same_state(a: nn.Module, b: nn.Module, **tolerance: float) -> None:
    assert list(a.state_dict()) == list(b.state_dict())
    torch.testing.assert_close(dict(a.state_dict()), dict(b.state_dict()), **tolerance)


def critic(conv: Make) -> nn.Sequential:
    lrelu = nn.LeakyReLU(0.2)
    return nn.Sequential(conv(6, 16, 4, 2, 1), lrelu, conv(16, 32, 4, 2, 1), lrelu, conv(32, 1, 4, 1, 1))


def critics(**ours_kwargs: Any) -> tuple[nn.Sequential, nn.Sequential]:
    """The same critic from the same seed, torch's and ours."""
    torch.manual_seed(3)
    a = critic(lambda *args: spectral_norm(nn.Conv2d(*args)))
    torch.manual_seed(3)
    return a, critic(lambda *args: SpectralNormConv2d(*args, **ours_kwargs))


def hinge_step(model: nn.Module, optimizer: torch.optim.Optimizer, real: Tensor, fake: Tensor) -> float:
    loss = (1 - model(real)).relu().mean() + (1 + model(fake)).relu().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def images(count: int = 2, size: int = 32) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 6, size, size), torch.randn(count, 6, size, size)


class TestLayer:
    @pytest.mark.parametrize(("kind", "args", "kwargs"), [*CONVS, (nn.Linear, (12, 5), {})])
    def test_same_seed_same_numbers(self, kind, args, kwargs):
        a, b = theirs(kind, *args, **kwargs), ours(kind, *args, **kwargs)
        assert [name for name, _ in a.named_parameters()] == [name for name, _ in b.named_parameters()]
        assert_same_state(a, b)
        x = torch.randn(3, 6, 9, 11) if kind is not nn.Linear else torch.randn(3, 4, 12)
        for _ in range(3):
            xs = [x.clone().requires_grad_() for _ in range(2)]
            y, z = a(xs[0]), b(xs[1])
            torch.testing.assert_close(z, y)
            cotangent = torch.randn_like(y)
            for model, result in ((a, y), (b, z)):
                model.zero_grad()
                result.backward(cotangent)
            torch.testing.assert_close(xs[1].grad, xs[0].grad)
            for p, q in zip(a.parameters(), b.parameters(), strict=True):
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4)
        assert_same_state(a, b)
        torch.testing.assert_close(b.eval().weight, a.eval().weight)

    def test_unbatched_input_and_output_size(self):
        for kind, extra in ((nn.Conv2d, {}), (nn.ConvTranspose2d, {"output_size": [18, 19]})):
            a, b = theirs(kind, 6, 8, 3, 2, 1), ours(kind, 6, 8, 3, 2, 1)
            x = torch.randn(6, 9, 10)
            torch.testing.assert_close(b(x, **extra), a(x, **extra))

    @pytest.mark.parametrize(("kind", "args"), [(nn.Conv2d, (6, 8, 3)), (nn.Linear, (9, 8))])
    def test_activation_is_fused(self, kind, args):
        a = theirs(kind, *args)
        b = ours(kind, *args, act="lrelu", alpha=0.1, gain=2.0, clamp=0.5) if kind is nn.Conv2d else None
        torch.manual_seed(7)
        b = b or SpectralNormLinear(*args, act="lrelu", alpha=0.1, gain=2.0, clamp=0.5)
        x = torch.randn(2, 6, 9, 9)
        want = (2 * nn.functional.leaky_relu(a(x), 0.1)).clamp(-0.5, 0.5)
        torch.testing.assert_close(b(x), want)
        assert "act=lrelu" in repr(b)

    def test_hook_order_trains_as_the_hook(self):
        torch.manual_seed(7)
        a = hook_spectral_norm(nn.Conv2d(6, 8, 3))
        b = ours(nn.Conv2d, 6, 8, 3, order="hook")
        x = torch.randn(2, 6, 9, 9)
        for _ in range(3):
            torch.testing.assert_close(b(x), a(x))
        u, v = b.power_vectors
        torch.testing.assert_close((u, v), (a.weight_u, a.weight_v))

    def test_eval_never_iterates(self):
        layer = ours(nn.Conv2d, 6, 8, 3).eval()
        before = copy.deepcopy(layer.state_dict())
        layer(torch.randn(1, 6, 5, 5))
        _ = layer.weight
        layer.train()
        _ = layer.weight
        torch.testing.assert_close(dict(layer.state_dict()), dict(before), rtol=0, atol=0)
        # Before any training σ is already right: torch's 15 iterations happened in the constructor.
        assert torch.linalg.matrix_norm(layer.eval().weight.flatten(1), 2) < 1.05

    def test_second_order(self):
        a, b = theirs(nn.Conv2d, 3, 4, 3).double(), ours(nn.Conv2d, 3, 4, 3).double()
        b.load_state_dict(a.state_dict())
        x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
        for model in (a, b):
            xs = x.clone().requires_grad_()
            (grad,) = torch.autograd.grad(model(xs).square().sum(), xs, create_graph=True)
            grad.square().sum().backward()
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad)

    def test_frozen_critic_costs_no_weight_gradient(self):
        layer = ours(nn.Conv2d, 6, 8, 3).requires_grad_(False)
        x = torch.randn(1, 6, 8, 8, requires_grad=True)
        with Calls() as calls:
            layer(x).square().sum().backward()
        assert not {"spectral_sigma_bwd", "scaled_conv2d_weight_grad", "pixel_dot"} & set(calls.names())
        assert calls.names().count("spectral_sigma") == 1

    def test_weight_is_not_writable_by_mistake(self):
        layer = ours(nn.Conv2d, 6, 8, 3)
        with pytest.raises(KeyError, match="already exists"):
            layer.weight = nn.Parameter(torch.zeros(8, 6, 3, 3))
        with pytest.raises(AttributeError, match="weight"):
            layer.weight = torch.zeros(8, 6, 3, 3)

    def test_reset_vectors_after_setting_the_weight(self):
        layer = ours(nn.Conv2d, 6, 8, 3)
        with torch.no_grad():
            layer.weight_original.normal_(0, 0.02)
        layer.reset_vectors()
        assert 0.99 < torch.linalg.matrix_norm(layer.weight.flatten(1), 2) < 1.05

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="SpectralNormConv2d: n_power_iterations must be >= 1, got 0"):
            SpectralNormConv2d(3, 4, 3, n_power_iterations=0)
        with pytest.raises(ValueError, match="SpectralNormLinear: order must be one of parametrization, hook, got 'x'"):
            SpectralNormLinear(3, 4, order="x")

    @pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
    def test_compiled(self, compiler):
        layer = ours(nn.Conv2d, 6, 8, 4, 2, 1, act="lrelu")
        twin = copy.deepcopy(layer)
        compiled = torch.compile(twin, fullgraph=True, backend=compiler)
        x = torch.randn(2, 6, 9, 9)
        for _ in range(2):
            for model, call in ((layer, layer), (twin, compiled)):
                model.zero_grad()
                call(x).square().sum().backward()
            for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(q.grad, p.grad)
        assert_same_state(layer, twin)
        torch.testing.assert_close(compiled.eval()(x), layer.eval()(x))


class TestStateDict:
    def test_ours_loads_into_torch_and_back(self):
        a, b = critics()
        x, y = images()
        hinge_step(b, torch.optim.Adam(b.parameters()), x, y)
        a.load_state_dict(b.state_dict(), strict=True)
        torch.testing.assert_close(a.eval()(x), b.eval()(x))
        hinge_step(a.train(), torch.optim.Adam(a.parameters()), x, y)
        b.load_state_dict(a.state_dict(), strict=True)
        torch.testing.assert_close(b.eval()(x), a.eval()(x))

    def test_hook_format(self):
        a, (_, b) = critic(lambda *args: hook_spectral_norm(nn.Conv2d(*args))), critics()
        x, y = images()
        hinge_step(a, torch.optim.Adam(a.parameters()), x, y)
        state = a.state_dict()
        keys = list(state)
        b.load_state_dict(state, strict=True)
        assert list(state) == keys
        torch.testing.assert_close(b.eval()(x), a.eval()(x))

    def test_hook_format_of_its_first_version(self):
        a, b = hook_spectral_norm(nn.Conv2d(6, 8, 3)), ours(nn.Conv2d, 6, 8, 3)
        x = torch.randn(1, 6, 7, 7)
        for _ in range(200):
            a(x)
        state = {"bias": a.bias, "weight_orig": a.weight_orig, "weight_u": a.weight_u, "weight": a.weight.detach()}
        b.load_state_dict(state, strict=True)
        torch.testing.assert_close(b.eval()(x), a.eval()(x), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_plain_format(self, dtype):
        plain, (_, b) = critic(nn.Conv2d).to(dtype), critics()
        before = torch.get_rng_state()
        b.load_state_dict(plain.state_dict(), strict=True)
        assert torch.equal(torch.get_rng_state(), before)
        for p, q in zip(plain[::2], b[::2], strict=True):
            assert torch.equal(q.weight_original, p.weight.float())
            assert 0.99 < torch.linalg.matrix_norm(q.weight.flatten(1), 2) < 1.1
        again = critics()[1]
        again.load_state_dict(plain.state_dict())
        assert_same_state(b, again, rtol=0, atol=0)

    def test_missing_and_misshaped_keys_are_reported(self):
        b = ours(nn.Conv2d, 6, 8, 3)
        with pytest.raises(RuntimeError, match=r"Missing key.*parametrizations\.weight\.original"):
            b.load_state_dict({"bias": b.bias})
        with pytest.raises(RuntimeError, match=r"size mismatch for parametrizations\.weight\.original"):
            b.load_state_dict(nn.Conv2d(6, 9, 3).state_dict())

    def test_meta_and_assign(self):
        b = ours(nn.Conv2d, 6, 8, 3)
        with torch.device("meta"):
            empty = SpectralNormConv2d(6, 8, 3)
        empty.load_state_dict(b.state_dict(), assign=True)
        assert_same_state(empty, b)
        empty = SpectralNormConv2d(6, 8, 3, device="meta").to_empty(device="cpu")
        empty.load_state_dict(b.state_dict())
        assert_same_state(empty, b)


class TestCopies:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_keeps_the_vectors(self, dtype):
        layer = ours(nn.Conv2d, 6, 8, 3)
        before = [vector.clone() for vector in layer.power_vectors]
        layer.to(dtype)
        assert layer.weight.dtype == dtype
        torch.testing.assert_close(layer.power_vectors, tuple(before), rtol=0, atol=0)
        x = torch.randn(2, 6, 8, 8, dtype=dtype)
        y = layer(x)
        assert y.dtype == dtype
        want = copy.deepcopy(layer).float().eval()(x.float())
        torch.testing.assert_close(y.float(), want, rtol=2e-2, atol=2e-2)
        assert layer.float().power_vectors[0].dtype == torch.float32
        assert layer.double().power_vectors[0].dtype == torch.float64

    def test_autocast(self):
        a, b = theirs(nn.Conv2d, 6, 8, 3).eval(), ours(nn.Conv2d, 6, 8, 3).eval()
        x = torch.randn(2, 6, 8, 8)
        with torch.autocast("cpu", torch.bfloat16):
            y = b(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), a(x), rtol=2e-2, atol=2e-2)

    def test_deepcopy_is_independent(self):
        layer = ours(nn.Conv2d, 6, 8, 3)
        twin = copy.deepcopy(layer)
        layer.weight_original.data.mul_(3)
        layer(torch.randn(1, 6, 5, 5))
        assert_same_state(twin, ours(nn.Conv2d, 6, 8, 3), rtol=0, atol=0)

    @pytest.mark.parametrize("use_buffers", [False, True])
    def test_averaged_copy_keeps_sigma_right(self, use_buffers):
        """An EMA over u and v makes them shorter than 1; σ must not shrink with them."""
        _, model = critics()
        average = AveragedModel(model, use_buffers=use_buffers)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(5):
            hinge_step(model, optimizer, *images())
            average.update_parameters(model)
        for layer in average.module.eval()[::2]:
            matrix = layer.weight_original.flatten(1)
            u, v = (nn.functional.normalize(vector, dim=0) for vector in layer.power_vectors)
            torch.testing.assert_close(1 / layer.inverse_sigma(), u @ matrix @ v)
            torch.testing.assert_close(layer.weight.flatten(1), matrix / (u @ matrix @ v))


class TestTraining:
    @pytest.mark.parametrize("how", ["layers", "forward", "compiled", "compiled group", "channels_last"])
    def test_critic_trains_as_torchs(self, how):
        a, b = critics()
        if how in ("forward", "compiled group"):
            group_spectral_norm(b)
        if how == "channels_last":
            b.to(memory_format=torch.channels_last)
        call = torch.compile(b, backend="aot_eager", fullgraph=True) if "compiled" in how else b
        optimizers = [torch.optim.Adam(m.parameters(), 4e-3, betas=(0.0, 0.9)) for m in (a, b)]
        for _ in range(6):
            real, fake = images()
            losses = [hinge_step(m, o, real, fake) for m, o in zip((a, call), optimizers, strict=True)]
            assert losses[1] == pytest.approx(losses[0], rel=2e-5)
        assert_same_state(a, b, rtol=1e-3, atol=2e-5)


class TestGroup:
    def test_one_call_for_all_layers(self):
        model = nn.Sequential(*critics()[1], nn.Flatten(), SpectralNormLinear(49, 3))
        group_spectral_norm(model)
        with Calls() as calls:
            model(images()[0]).sum().backward()
        assert calls.names().count("spectral_sigma") == 1
        assert calls.names().count("spectral_sigma_bwd") == 1

    def test_step_reads_the_weights_once_per_update(self):
        _, model = critics()
        group_spectral_norm(model, "step")
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        real, fake = images()
        for _ in range(2):
            with Calls() as calls:
                hinge_step(model, optimizer, real, fake)
            assert calls.names().count("spectral_sigma") == 1
            assert calls.names().count("spectral_sigma_known") == 2
        with Calls() as calls:
            model.eval()(real)
        assert calls.names().count("spectral_sigma") == 1
        u = model[0].power_vectors[0].clone()
        model.train()
        model(real)
        model.load_state_dict(model.state_dict())
        assert not torch.equal(model[0].power_vectors[0], u)
        u = model[0].power_vectors[0].clone()
        model(real)
        assert not torch.equal(model[0].power_vectors[0], u)

    def test_step_gradient_of_two_forwards(self):
        """σ is the same in both; the gradient is that of one forward over both batches."""
        _, model = critics()
        twin = copy.deepcopy(model)
        group_spectral_norm(model, "step")
        group_spectral_norm(twin, "forward")
        real, fake = images()
        (model(real).mean() - model(fake).mean()).backward()
        y = twin(torch.cat([real, fake]))
        (y[:2].mean() - y[2:].mean()).backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)

    def test_a_layer_called_twice_or_alone(self):
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = ours(nn.Conv2d, 6, 6, 3, 1, 1)

            def forward(self, x: Tensor) -> Tensor:
                return self.conv(self.conv(x))

        model, plain = Twice(), Twice()
        group_spectral_norm(model)
        x = torch.randn(1, 6, 5, 5)
        torch.testing.assert_close(model(x), plain(x))
        torch.testing.assert_close(model.conv(x), plain.conv(x))
        assert_same_state(model, plain)
        group_spectral_norm(model, "step")
        model(x)
        u = model.conv.power_vectors[0].clone()
        model(x)
        assert torch.equal(model.conv.power_vectors[0], u)
        model.conv(x)
        assert not torch.equal(model.conv.power_vectors[0], u)

    def test_nothing_is_left_after_a_forward_that_raised(self):
        _, model = critics()
        group_spectral_norm(model)
        with pytest.raises(ValueError, match="scaled_conv2d"):
            model(torch.randn(1, 5, 32, 32))
        assert all(layer._inverse_sigma is None for layer in model[::2])
        copy.deepcopy(model)

    @pytest.mark.parametrize("per", ["forward", "step"])
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_a_copy_has_its_own_group(self, per, copied):
        _, model = critics()
        group_spectral_norm(model, per)
        real, fake = images()
        model(real)
        keys = list(model.state_dict())
        twin = copied(model)
        assert list(twin.state_dict()) == keys
        before = copy.deepcopy(model.state_dict())
        with Calls() as calls:
            hinge_step(twin, torch.optim.Adam(twin.parameters()), real, fake)
        assert calls.names().count("spectral_sigma") == (2 if per == "forward" else 1)
        torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
        twin._spectral_group.remove()
        with Calls() as calls:
            twin(real)
            model(real)
        assert calls.names().count("spectral_sigma") == (4 if per == "forward" else 3)

    def test_regroup_remove_nested_and_changed_layers(self):
        _, model = critics()
        group_spectral_norm(model)
        group = group_spectral_norm(model, "forward")
        group_spectral_norm(model[:1])
        outer = nn.Sequential(model)
        group_spectral_norm(outer)
        with Calls() as calls:
            outer(images()[0])
        assert calls.names().count("spectral_sigma") == 1
        model[2] = ours(nn.Conv2d, 16, 32, 4, 2, 1)
        with Calls() as calls:
            model(images()[0])
        assert calls.names().count("spectral_sigma") == 1
        group.remove()
        with Calls() as calls:
            model(images()[0])
        assert calls.names().count("spectral_sigma") == 3

    def test_layers_of_several_kinds(self):
        model = nn.Sequential(ours(nn.Conv2d, 6, 6, 3), ours(nn.Conv2d, 6, 6, 3), ours(nn.Conv2d, 6, 6, 3, eps=1e-6))
        model[1].eval()
        group_spectral_norm(model)
        u = model[1].power_vectors[0].clone()
        with Calls() as calls:
            model(torch.randn(1, 6, 9, 9))
        assert calls.names().count("spectral_sigma") == 3
        assert torch.equal(model[1].power_vectors[0], u)

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="group_spectral_norm: per must be one of forward, step, got 'never'"):
            group_spectral_norm(critics()[1], "never")
        with pytest.raises(ValueError, match="group_spectral_norm: model must have spectral-normalised"):
            group_spectral_norm(nn.Conv2d(3, 4, 3))
