"""PatchGAN against plain torch layers with the same keys: outputs, gradients and weights over training steps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from fastgan.models import PatchGAN, _layers

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True, params=["norm_act", "few"])
def few_values(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of conv_norm_act for these small maps: through norm_act, and as it is, through torch's norms."""
    if request.param == "norm_act":
        monkeypatch.setattr(_layers, "FEW_VALUES", {"batch": 0, "instance": 0})
    return request.param


class PlainPatchGAN(nn.Module):
    """Pix2Pix's critic, written from its paper and its published state-dict keys."""

    def __init__(self, in_channels: int, width: int, layers: int, norm: str, spectral: bool) -> None:
        super().__init__()

        def conv(given: int, wanted: int, stride: int, bias: bool) -> nn.Module:
            layer = nn.Conv2d(given, wanted, 4, stride, 1, bias=bias)
            return spectral_norm(layer) if spectral else layer

        norms = {"instance": nn.InstanceNorm2d, "batch": nn.BatchNorm2d, "none": nn.Identity}
        modules = [conv(in_channels, width, 2, True), nn.LeakyReLU(0.2)]
        before = width
        for i in range(1, layers + 1):
            after = width * min(2**i, 8)
            modules += [
                conv(before, after, 2 if i < layers else 1, norm != "batch"),
                norms[norm](after),
                nn.LeakyReLU(0.2),
            ]
            before = after
        self.model = nn.Sequential(*modules, conv(before, 1, 1, True))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def pair(
    norm: str, spectral: bool, *, layers: int = 3, width: int = 6, dtype: torch.dtype = torch.float64
) -> tuple[PatchGAN, PlainPatchGAN]:
    """The same weights in both, with norm weights and biases far enough from 1 and 0 to matter."""
    torch.manual_seed(0)
    fused = PatchGAN(4, width, layers, norm, spectral)
    plain = PlainPatchGAN(4, width, layers, norm, spectral)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.mul_(2).add_(torch.randn_like(parameter), alpha=0.02)
    fused, plain = fused.to(dtype), plain.to(dtype)
    plain.load_state_dict(fused.state_dict(), strict=True)
    # Vectors drawn in float32 have length 1 to 7 digits; ours evaluates with their direction, torch with what they are.
    image = torch.randn(2, 4, 48, 48, dtype=dtype)
    fused(image), plain(image)
    return fused, plain


def relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-6)).item()


norms = pytest.mark.parametrize("norm", ["instance", "batch", "none"])
spectrals = pytest.mark.parametrize("spectral", [False, True], ids=["plain", "spectral"])


@norms
@spectrals
@pytest.mark.parametrize("layers", [1, 3, 4])
def test_state_dicts_are_exchanged_both_ways(norm: str, spectral: bool, layers: int) -> None:
    fused, plain = pair(norm, spectral, layers=layers)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in plain.named_parameters()]
    fused.load_state_dict(PlainPatchGAN(4, 6, layers, norm, spectral).state_dict(), strict=True)


def test_keys_are_pix2pix() -> None:
    batch = set(PatchGAN(6, width=1, norm="batch", spectral=False).state_dict())
    assert {f"model.{i}.weight" for i in (0, 2, 3, 5, 6, 8, 9, 11)} <= batch
    assert {key.split(".")[1] for key in batch if key.endswith("bias")} == {"0", "3", "6", "9", "11"}
    instance = set(PatchGAN(6, width=1, spectral=False).state_dict())
    assert instance == {f"model.{i}.{name}" for i in (0, 2, 5, 8, 11) for name in ("weight", "bias")}
    modern = (
        "parametrizations.weight.original",
        "parametrizations.weight.0._u",
        "parametrizations.weight.0._v",
        "bias",
    )
    assert set(PatchGAN(6, width=1).state_dict()) == {f"model.{i}.{name}" for i in (0, 2, 5, 8, 11) for name in modern}


@norms
@spectrals
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_and_gradients_match_plain_torch(norm: str, spectral: bool, training: bool, dtype: torch.dtype) -> None:
    fused, plain = (model.train(training) for model in pair(norm, spectral, dtype=dtype))
    x = torch.randn(2, 4, 32, 40, dtype=dtype)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [model(given) for model, given in zip((fused, plain), inputs, strict=True)]
    assert outputs[0].shape == (2, 1, 2, 3)
    bound = 1e-11 if dtype == torch.float64 else 2e-4
    assert relative(*outputs) < bound
    target = torch.randn_like(outputs[0])
    for output in outputs:
        (output * target).sum().backward()
    assert relative(inputs[0].grad, inputs[1].grad) < bound
    largest = max(p.grad.abs().max().item() for p in plain.parameters())
    for (name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        # A bias before a normalisation has no effect: its gradient is rounding, so it is measured against the others.
        scale = max(theirs.grad.abs().max().item(), 0.01 * largest)
        assert (ours.grad - theirs.grad).abs().max().item() < bound * scale, name


@norms
@spectrals
def test_training_steps_match_plain_torch(norm: str, spectral: bool) -> None:
    """Two forwards a step, real and fake, as critics are trained; a spectral layer steps its vectors at each."""
    fused, plain = pair(norm, spectral, width=3)
    optimisers = [torch.optim.Adam(model.parameters(), 1e-3, betas=(0.5, 0.999), eps=1e-4) for model in (fused, plain)]
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        real, fake = torch.randn(2, 2, 4, 32, 32, generator=generator, dtype=torch.float64)
        losses = []
        for model, optimiser in zip((fused, plain), optimisers, strict=True):
            loss = torch.relu(1 - model(real)).mean() + torch.relu(1 + model(fake)).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[key], value, rtol=1e-7, atol=1e-9, msg=key)
    before = copy.deepcopy(fused.state_dict())
    x = torch.randn(1, 4, 32, 32, dtype=torch.float64)
    assert relative(fused.eval()(x), plain.eval()(x)) < 1e-9
    for key, value in fused.state_dict().items():
        assert torch.equal(value, before[key]), f"evaluation changed {key}"


@pytest.mark.parametrize("norm", ["instance", "none"])
@spectrals
def test_gradient_penalty_matches_plain_torch(norm: str, spectral: bool) -> None:
    fused, plain = pair(norm, spectral, width=3, layers=2)
    x = torch.randn(2, 4, 16, 16, dtype=torch.float64)
    for model in (fused, plain):
        given = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(given).sum(), given, create_graph=True)
        grad.square().sum().backward()
    largest = max(p.grad.abs().max().item() for p in plain.parameters() if p.grad is not None)
    for (name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        ours, theirs = (torch.zeros_like(p) if p.grad is None else p.grad for p in (ours, theirs))
        assert (ours - theirs).abs().max().item() < 1e-9 * largest, name


@norms
def test_features_are_the_activated_maps(norm: str) -> None:
    fused, plain = (model.eval() for model in pair(norm, True))
    x = torch.randn(2, 4, 32, 32, dtype=torch.float64)
    want, y = [], x
    for module in plain.model:
        y = module(y)
        if isinstance(module, nn.LeakyReLU):
            want.append(y)
    got = fused(x, features=True)
    assert len(got) == len(want) + 1 == 5
    for ours, theirs in zip(got, [*want, y], strict=True):
        assert ours.shape == theirs.shape
        assert relative(ours, theirs) < 1e-11
    assert torch.equal(got[-1], fused(x))


def test_evaluation_before_training_is_torchs() -> None:
    torch.manual_seed(0)
    fused, plain = PatchGAN(4, 6).eval(), PlainPatchGAN(4, 6, 3, "instance", True).eval()
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(2, 4, 32, 32)
    assert relative(fused(x), plain(x)) < 1e-5
    for (key, ours), theirs in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key


@pytest.mark.parametrize("spectral", [False, True], ids=["plain", "spectral"])
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_compiles_without_breaks(norm: str, spectral: bool) -> None:
    fused = pair(norm, spectral, width=2, layers=1)[0]
    reference = copy.deepcopy(fused)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 16, 16, dtype=torch.float64)
    want, got = reference(x), compiled(x)
    assert relative(got, want) < 1e-11
    want.square().sum().backward()
    got.square().sum().backward()
    for (key, ours), theirs in zip(fused.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-11, msg=key)
    for (key, ours), theirs in zip(fused.state_dict().items(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12, msg=key)


def test_one_logit_sees_70_pixels() -> None:
    critic = PatchGAN(3, 2, norm="none").eval()
    x = torch.randn(1, 3, 256, 256, requires_grad=True)
    logits = critic(x)
    assert logits.shape == (1, 1, 30, 30)
    logits[0, 0, 15, 15].backward()
    seen = x.grad.abs().sum((0, 1)) > 0
    assert seen.any(0).nonzero().numel() == seen.any(1).nonzero().numel() == 70


def test_channels_last_and_empty_batch() -> None:
    fused = pair("instance", True)[0].eval()
    x = torch.randn(2, 4, 32, 32, dtype=torch.float64)
    assert relative(fused(x.to(memory_format=torch.channels_last)), fused(x)) < 1e-11
    assert fused(x[:0]).shape == (0, 1, 2, 2)


def test_initial_weights_are_pix2pix() -> None:
    torch.manual_seed(0)
    critic = PatchGAN(6, 32, norm="batch", spectral=True)
    for name, parameter in critic.named_parameters():
        if parameter.ndim == 4:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert parameter.mean().item() == pytest.approx(1.0, abs=0.02), name
            assert 0.01 < parameter.std().item() < 0.03, name


def test_initial_vectors_belong_to_the_initial_weights() -> None:
    """Before any training, each convolution is near spectral norm 1; vectors of other weights are far off."""
    torch.manual_seed(0)
    for module in PatchGAN(6, 16).model.children():
        if isinstance(module, nn.Conv2d):
            norm = torch.linalg.matrix_norm(module.weight.detach().flatten(1), 2).item()
            assert 0.999 < norm < 1.3


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"layers": 0}, "PatchGAN: layers must be at least 1, got 0"),
        ({"in_channels": 0}, "PatchGAN: in_channels must be at least 1, got 0"),
        ({"norm": "layer"}, "PatchGAN: norm must be one of instance, batch, none, got 'layer'"),
    ],
)
def test_wrong_arguments(arguments: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        PatchGAN(**{"in_channels": 3, **arguments})


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((1, 3, 23, 64), r"x must have H and W of at least 24, got \[1, 3, 23, 64\]"),
        ((1, 4, 32, 32), r"x must be \[N, 3, H, W\], got \[1, 4, 32, 32\]"),
        ((3, 32, 32), r"x must be \[N, 3, H, W\], got \[3, 32, 32\]"),
    ],
)
def test_wrong_images(shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(ValueError, match=f"PatchGAN: {text}"):
        PatchGAN(3, width=1)(torch.zeros(shape))


def test_smallest_image() -> None:
    assert PatchGAN(3, width=1)(torch.randn(1, 3, 24, 25)).shape == (1, 1, 1, 1)
