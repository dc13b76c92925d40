"""UNetGenerator against a plain-torch U-Net with the same keys: outputs, gradients and weights over training steps."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan import ops
from fastgan.models import UNetGenerator, _layers
from fastgan.models._layers import ConvAct

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True, params=["norm_act", "few"])
def few_values(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of conv_norm_act for these small maps: through norm_act, and as it is, through torch's norms."""
    if request.param == "norm_act":
        monkeypatch.setattr(_layers, "FEW_VALUES", {"batch": 0, "instance": 0})
    return request.param


class PlainBlock(nn.Module):
    """One level of Pix2Pix's U-Net, written from its paper and its published state-dict keys."""

    def __init__(self, outer: int, width: int, norm: str, inner: PlainBlock | None, dropout: bool) -> None:
        super().__init__()
        bias = norm == "instance"
        make_norm = nn.InstanceNorm2d if bias else nn.BatchNorm2d
        down = nn.Conv2d(outer, width, 4, 2, 1, bias=bias)
        up = nn.ConvTranspose2d(width if inner is None else 2 * width, outer, 4, 2, 1, bias=bias)
        layers = [nn.LeakyReLU(0.2), down]
        if inner is not None:
            layers += [make_norm(width), inner]
        layers += [nn.ReLU(), up, make_norm(outer)]
        if dropout:
            layers.append(nn.Dropout(0.5))
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.model(x)], 1)


class PlainUNet(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, width: int, levels: int, norm: str, dropout: bool) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, *[8 * width] * max(levels - 3, 0)][:levels]
        block = PlainBlock(widths[-2], widths[-1], norm, None, False)
        for level in range(levels - 2, 0, -1):
            block = PlainBlock(widths[level - 1], widths[level], norm, block, dropout and level >= 4)
        self.model = nn.Module()
        self.model.model = nn.Sequential(
            nn.Conv2d(in_channels, width, 4, 2, 1, bias=norm == "instance"),
            block,
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, out_channels, 4, 2, 1),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.model.model(x)


def pair(norm: str, *, size: int = 32, width: int = 6, dropout: bool = False) -> tuple[UNetGenerator, PlainUNet]:
    """The same weights in both, with norm weights and biases far enough from 1 and 0 to matter."""
    torch.manual_seed(0)
    fused = UNetGenerator(3, 2, width, size, norm, dropout=dropout)
    plain = PlainUNet(3, 2, width, size.bit_length() - 1, norm, dropout)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.mul_(4).add_(torch.randn_like(parameter), alpha=0.02)
    plain.load_state_dict(fused.state_dict(), strict=True)
    return fused, plain


def relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-6)).item()


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("size", [4, 8, 64])
def test_state_dicts_are_exchanged_both_ways(norm: str, size: int) -> None:
    fused, plain = pair(norm, size=size)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in plain.named_parameters()]
    fused.load_state_dict(PlainUNet(3, 2, 6, size.bit_length() - 1, norm, False).state_dict(), strict=True)


def test_keys_are_pix2pix() -> None:
    keys = set(UNetGenerator(size=256, width=1).state_dict())
    assert "model.model.0.weight" in keys
    assert {"model.model.3.weight", "model.model.3.bias"} <= keys
    assert {f"model.model.1.model.{i}.weight" for i in (1, 2, 5, 6)} <= keys
    innermost = "model.model.1" + ".model.3" * 6
    assert {f"{innermost}.model.{key}" for key in ("1.weight", "3.weight", "4.weight", "4.num_batches_tracked")} <= keys
    assert not any(key.startswith(f"{innermost}.model.2") for key in keys)
    assert not any(key.endswith("bias") and key.split(".")[-2] in ("0", "1", "5") for key in keys)


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_and_gradients_match_plain_torch(norm: str, training: bool, dtype: torch.dtype) -> None:
    fused, plain = (model.to(dtype).train(training) for model in pair(norm))
    x = torch.randn(2, 3, 32, 64, dtype=dtype)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [model(given) for model, given in zip((fused, plain), inputs, strict=True)]
    assert outputs[0].shape == (2, 2, 32, 64)
    bound = 1e-11 if dtype == torch.float64 else 2e-4
    assert relative(*outputs) < bound
    target = torch.randn_like(outputs[0])
    for output in outputs:
        (output - target).abs().mean().backward()
    assert relative(inputs[0].grad, inputs[1].grad) < bound
    for (name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        # A bias before a normalisation has no effect: its gradient is rounding, so it is measured against the weight's.
        scale = max(theirs.grad.abs().max().item(), 0.01 * max(p.grad.abs().max().item() for p in plain.parameters()))
        assert (ours.grad - theirs.grad).abs().max().item() < bound * scale, name


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_training_steps_match_plain_torch(norm: str) -> None:
    fused, plain = (model.double() for model in pair(norm))
    optimisers = [torch.optim.Adam(model.parameters(), 1e-3, betas=(0.5, 0.999), eps=1e-4) for model in (fused, plain)]
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        x = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
        target = torch.randn(2, 2, 32, 32, generator=generator, dtype=torch.float64)
        losses = []
        for model, optimiser in zip((fused, plain), optimisers, strict=True):
            loss = (model(x) - target).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[key], value, rtol=1e-7, atol=1e-9, msg=key)
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert relative(fused.eval()(x), plain.eval()(x)) < 1e-9


def test_batch_statistics_advance_only_in_training() -> None:
    fused, plain = pair("batch")
    for momentum in (0.1, None):
        for model in (fused, plain):
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = momentum
        for _ in range(2):
            x = torch.randn(2, 3, 32, 32)
            fused(x), plain(x)
    counts = [v.item() for k, v in fused.state_dict().items() if k.endswith("num_batches_tracked")]
    assert counts
    assert set(counts) == {4}
    before = copy.deepcopy(fused.state_dict())
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(before[key], value, rtol=1e-4, atol=1e-5, msg=key)
    fused.eval()(torch.randn(2, 3, 32, 32))
    for key, value in fused.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_dropout_draws_and_drops_as_plain_torch() -> None:
    fused, plain = (model.double() for model in pair("batch", size=128, width=2, dropout=True))
    x = torch.randn(2, 3, 128, 128, dtype=torch.float64)
    torch.manual_seed(5)
    ours = fused(x)
    after_ours = torch.get_rng_state()
    torch.manual_seed(5)
    theirs = plain(x)
    assert torch.equal(after_ours, torch.get_rng_state())
    assert relative(ours, theirs) < 1e-11
    assert not torch.equal(fused(x), fused(x))
    assert torch.equal(fused.eval()(x), fused(x))


@pytest.mark.parametrize(("size", "dropping"), [(16, 0), (32, 0), (64, 1), (256, 3)])
def test_dropout_sits_in_the_middle_levels(size: int, dropping: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    dropout = F.dropout
    monkeypatch.setattr(F, "dropout", lambda y, p, training: calls.append((p, training)) or dropout(y, p, training))
    UNetGenerator(3, 3, 1, size)(torch.randn(1, 3, size, size))
    assert calls == [(0.5, True)] * dropping
    calls.clear()
    UNetGenerator(3, 3, 1, size, dropout=False)(torch.randn(1, 3, size, size))
    assert not calls


def test_initial_weights_are_pix2pix() -> None:
    torch.manual_seed(0)
    model = UNetGenerator(width=16, size=64)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 4 and parameter.numel() > 2000:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
            assert abs(parameter.mean().item()) < 0.002, name
        elif name.endswith("bias"):
            assert not parameter.any(), name
    norm_weights = torch.cat([m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)])
    assert norm_weights.mean().item() == pytest.approx(1.0, abs=0.005)
    assert norm_weights.std().item() == pytest.approx(0.02, rel=0.2)


def test_evaluation_is_one_call_per_convolution(few_values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folded batch norms, also where the convolution before has a bias and the norm has no weights."""
    calls = []
    norm_act = ops.norm_act
    monkeypatch.setattr(ops, "norm_act", lambda *args, **kwargs: calls.append(1) or norm_act(*args, **kwargs))
    fused, plain = (model.double() for model in pair("batch"))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    fused(x), plain(x)
    assert len(calls) == (7 if few_values == "norm_act" else 0)
    bare = nn.BatchNorm2d(12, affine=False).double()
    bare.running_mean.normal_()
    conv = ConvAct(6, 12, 4, 2, 1).double()
    inner, plain_inner = fused.model.model["1"].model, plain.model.model[1].model
    inner["1"], inner["2"] = conv, bare
    plain_inner[1], plain_inner[2] = nn.Conv2d(6, 12, 4, 2, 1).double(), bare
    plain_inner[1].load_state_dict(conv.state_dict())
    calls.clear()
    assert relative(fused.eval()(x), plain.eval()(x)) < 1e-11
    assert not calls


def test_exchanged_and_hooked_norms_keep_their_activation() -> None:
    fused, plain = (model.double().eval() for model in pair("batch"))
    seen = {}
    for key in ("2", "5"):
        fused.model.model["1"].model[key].register_forward_hook(
            lambda module, given, result, key=key: seen.update({key: result})
        )
    inner = fused.model.model["1"].model["3"].model
    other = nn.GroupNorm(1, inner["2"].num_features, affine=False).double()
    inner["2"] = other
    plain.model.model[1].model[3].model[2] = other
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert relative(fused(x), plain(x)) < 1e-11
    assert seen["2"].shape[1] == 12
    assert seen["5"].shape[1] == 6
    for result in seen.values():  # what the hook sees is not activated yet
        assert result.min() < 0


def test_channels_last_and_empty_batch() -> None:
    fused, _ = pair("batch")
    fused.double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    want = fused(x)
    assert relative(fused(x.to(memory_format=torch.channels_last)), want) < 1e-11
    assert fused(x[:0]).shape == (0, 2, 32, 32)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_compiles_without_breaks(norm: str) -> None:
    fused, _ = pair(norm, width=2, size=8)
    reference = copy.deepcopy(fused)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 16, 16)
    want, got = reference(x), compiled(x)
    assert relative(got, want) < 1e-5
    want.square().sum().backward()
    got.square().sum().backward()
    for ours, theirs in zip(fused.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3)
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"size": 96}, "UNetGenerator: size must be a power of two from 4 on, got 96"),
        ({"size": 2}, "UNetGenerator: size must be a power of two from 4 on, got 2"),
        ({"norm": "layer"}, "UNetGenerator: norm must be one of batch, instance, got 'layer'"),
        ({"width": 0}, "UNetGenerator: width must be at least 1, got 0"),
    ],
)
def test_wrong_arguments(arguments: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        UNetGenerator(**arguments)


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((1, 3, 32, 48), r"x must have H and W in multiples of 32, got \[1, 3, 32, 48\]"),
        ((1, 3, 0, 32), r"x must have H and W in multiples of 32, got \[1, 3, 0, 32\]"),
        ((1, 4, 32, 32), r"x must be \[N, 3, H, W\], got \[1, 4, 32, 32\]"),
        ((3, 32, 32), r"x must be \[N, 3, H, W\], got \[3, 32, 32\]"),
    ],
)
def test_wrong_images(shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(ValueError, match=f"UNetGenerator: {text}"):
        UNetGenerator(width=1, size=32)(torch.zeros(shape))
