"""modulated_conv2d against a weight per sample, written from StyleGAN2's equations, and an explicit resampling."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import fastgan
from fastgan import ops
from fastgan.ops.demodulation import demodulation
from fastgan.reference.modulated_conv2d import modulation_scales
from tests.helpers import CountOps, assert_close_to_float64, gradients

pytestmark = pytest.mark.usefixtures("one_thread")

FIR = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
UNEVEN = torch.tensor([[1.0, 2.0, 0.5], [0.0, 1.0, 3.0]]) / 7.5


def per_sample(x: Tensor, weight: Tensor, style: Tensor, convolve, *, demodulate: bool, eps: float) -> Tensor:
    """Equations 1 and 3: w' = style[n, i] · w[o, i], w'' = w' / √(Σ_{i,kk} w'² + eps); one convolution for each n."""
    results = []
    for i in range(len(x)):
        modulated = weight * style[i][None, :, None, None]
        if demodulate:
            modulated = modulated * torch.rsqrt(modulated.square().sum((1, 2, 3), keepdim=True) + eps)
        results.append(convolve(x[i : i + 1], modulated))
    return torch.cat(results)


def resampled(x: Tensor, w: Tensor, f: Tensor, up: int, down: int, padding: int, correlate: bool) -> Tensor:
    """Insert zeros, pad, filter with gain up², convolve, keep every down-th: one after the other, at full size."""
    n, c, height, width = x.shape
    if up > 1:
        image = x.new_zeros(n, c, height * up, width * up)
        image[:, :, ::up, ::up] = x
    else:
        image = x
    f = f if f.ndim == 2 else f[:, None] * f[None, :]
    if up == down == 1:
        f = f.new_ones(1, 1)
    (fh, fw), factor = f.shape, max(up, down)
    sides = []
    for taps in (fw, fh):
        if up > 1:
            sides += [padding + (taps + up - 1) // 2, padding + (taps - up) // 2]
        else:
            sides += [padding + (taps - factor + 1) // 2, padding + (taps - factor) // 2]
    image = F.pad(image, sides)
    filters = f.flip((0, 1)).to(x.dtype).expand(c, 1, fh, fw)
    image = F.conv2d(image, filters, groups=c) * up**2
    return F.conv2d(image, w if correlate else w.flip((2, 3)), stride=down)


def operands(n: int = 2, i: int = 5, o: int = 4, kernel: int = 3, size: tuple[int, int] = (6, 7)) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((n, i, *size), (o, i, kernel, kernel), (n, i))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2), (3, 1), (1, 3)])
@pytest.mark.parametrize("f", [FIR, UNEVEN], ids=["separable", "uneven"])
@pytest.mark.parametrize("flip_weight", [None, True, False])
def test_against_a_weight_per_sample(
    demodulate: bool, kernel: int, up: int, down: int, f: Tensor, flip_weight: bool | None
) -> None:
    x, weight, style = operands(kernel=kernel)
    correlate = (up == 1) if flip_weight is None else flip_weight
    for padding in (0, kernel // 2, 2):
        want = per_sample(
            x,
            weight,
            style,
            lambda image, w, p=padding: resampled(image, w, f, up, down, p, correlate),
            demodulate=demodulate,
            eps=1e-8,
        )
        got = ops.modulated_conv2d(
            x,
            weight,
            style,
            demodulate=demodulate,
            up=up,
            down=down,
            padding=padding,
            resample_filter=f,
            flip_weight=flip_weight,
        )
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_geometry_of_stylegan2() -> None:
    """As published. Up: transposed convolution, then FIR with padding 1 and gain 4; down: FIR with padding 2."""
    x, weight, style = operands(size=(8, 8))
    taps = torch.outer(FIR, FIR).double()

    def fir(image: Tensor, padding: int, gain: float) -> Tensor:
        filters = taps.expand(image.shape[1], 1, 4, 4) * gain
        return F.conv2d(F.pad(image, (padding,) * 4), filters, groups=image.shape[1])

    got = ops.modulated_conv2d(x, weight, style, up=2, padding=1, resample_filter=FIR)
    assert got.shape == (2, 4, 16, 16)
    want = per_sample(
        x,
        weight,
        style,
        lambda image, w: fir(F.conv_transpose2d(image, w.transpose(0, 1), stride=2), 1, 4),
        demodulate=True,
        eps=1e-8,
    )
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)

    got = ops.modulated_conv2d(x, weight, style, down=2, padding=1, resample_filter=taps)
    assert got.shape == (2, 4, 4, 4)
    want = per_sample(
        x, weight, style, lambda image, w: F.conv2d(fir(image, 2, 1), w, stride=2), demodulate=True, eps=1e-8
    )
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("up", [1, 2])
def test_epilogue_follows_the_resampling(up: int) -> None:
    x, weight, style = operands()
    h, w = 6 * up, 7 * up
    generator = torch.Generator().manual_seed(1)
    noise, residual = (torch.randn(s, generator=generator).double() for s in ((2, 1, h, w), (2, 4, h, w)))
    bias, strength = torch.randn(4, generator=generator).double(), torch.tensor(0.3, dtype=torch.float64)
    epilogue = ops.Epilogue(noise, strength, bias, "lrelu", clamp=1.5, residual=residual, residual_gain=0.7)
    kwargs = {"up": up, "padding": 1, "resample_filter": FIR}
    plain = ops.modulated_conv2d(x, weight, style, **kwargs)
    want = (F.leaky_relu(plain + noise * strength + bias[:, None, None], 0.2) * 2**0.5).clamp(
        -1.5, 1.5
    ) + 0.7 * residual
    got = ops.modulated_conv2d(x, weight, style, **kwargs, epilogue=epilogue)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", ["stylegan2_fp16", "stylegan3"])
@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_prenormalisation_is_that_of_weight_and_style(kind: str, eps: float) -> None:
    x, weight, style = operands()
    if kind == "stylegan2_fp16":
        normal_weight = weight / (45**0.5 * weight.abs().amax((1, 2, 3), keepdim=True))
        normal_style = style / style.abs().amax(1, keepdim=True)
    else:
        normal_weight = weight * weight.square().mean((1, 2, 3), keepdim=True).rsqrt()
        normal_style = style * style.square().mean().rsqrt()
    want = per_sample(x, normal_weight, normal_style, F.conv2d, demodulate=True, eps=eps)
    got = ops.modulated_conv2d(x, weight, style, prenormalize=kind, eps=eps)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    untouched = ops.modulated_conv2d(x, weight, style, prenormalize=kind, demodulate=False)
    torch.testing.assert_close(untouched, ops.modulated_conv2d(x, weight, style, demodulate=False))


def test_auto_prenormalises_float16_only() -> None:
    x, weight, style = operands()
    for dtype, kind in ((torch.float16, "stylegan2_fp16"), (torch.bfloat16, "none"), (torch.float32, "none")):
        args = (x.to(dtype), weight.float(), style.float() * 1e-4)
        auto, named = (ops.modulated_conv2d(*args, prenormalize=p, eps=1e-4) for p in ("auto", kind))
        assert auto.dtype == dtype
        assert torch.equal(auto, named)
    other = ops.modulated_conv2d(x.half(), weight.float(), style.float() * 1e-4, prenormalize="none", eps=1e-4)
    assert not torch.allclose(other, ops.modulated_conv2d(x.half(), weight.float(), style.float() * 1e-4, eps=1e-4))


@pytest.mark.parametrize("shape", [(), (5,), (2, 5)])
def test_input_gain_escapes_demodulation(shape: tuple[int, ...]) -> None:
    x, weight, style = operands()
    gain = torch.rand(shape, dtype=torch.float64) + 0.5
    want = per_sample(x * gain.expand(2, 5)[:, :, None, None], weight, style, F.conv2d, demodulate=True, eps=1e-8)
    torch.testing.assert_close(ops.modulated_conv2d(x, weight, style, input_gain=gain), want, rtol=1e-11, atol=1e-11)
    if not shape:
        got = ops.modulated_conv2d(x, weight, style, input_gain=gain.item())
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", ["none", "stylegan2_fp16", "stylegan3"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_zero_style_gives_zeros_and_finite_gradients(kind: str, rows: int, dtype: torch.dtype) -> None:
    x, weight, style = operands()
    x, weight = x.to(dtype).requires_grad_(), weight.float().requires_grad_()
    style = style.float()
    style[:rows] = 0
    style.requires_grad_()
    y = ops.modulated_conv2d(x, weight, style, prenormalize=kind)
    assert not y[:rows].any()
    grads = torch.autograd.grad(y.float().sum(), (x, weight, style), create_graph=True)
    if dtype == torch.float64:  # d = 1e4 for a zero row: the penalty's gradients go past float16's 65504
        grads += torch.autograd.grad(sum(grad.square().sum() for grad in grads), (x, weight, style))
    assert len(grads) == (6 if dtype == torch.float64 else 3)
    for tensor in (y, *grads):
        assert tensor.isfinite().all()


@pytest.mark.parametrize(
    ("up", "down", "kind", "backend"),
    [
        (1, 1, "none", None),
        (1, 1, "stylegan2_fp16", None),
        (1, 1, "stylegan3", None),
        (2, 1, "none", None),
        (1, 2, "none", None),
        (2, 1, "stylegan3", "reference"),
    ],
)
def test_first_and_second_order(up: int, down: int, kind: str, backend: str | None) -> None:
    x, weight, style = (t.requires_grad_() for t in operands(n=2, i=2, o=2, size=(2, 3)))
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    gain = torch.rand(2, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, weight: Tensor, style: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
        epilogue = ops.Epilogue(bias=bias, act="softplus")
        return ops.modulated_conv2d(
            x,
            weight,
            style,
            up=up,
            down=down,
            padding=1,
            resample_filter=FIR,
            input_gain=gain,
            prenormalize=kind,
            eps=0.1,
            epilogue=epilogue,
            backend=backend,
        )

    inputs = (x, weight, style, bias, gain)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs, fast_mode=True)


def test_frozen_weight_gets_no_gradient() -> None:
    x, weight, style = operands()
    style.requires_grad_()
    ops.modulated_conv2d(x, weight, style).sum().backward()
    assert style.grad is not None
    assert x.grad is weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_precision_and_layout(dtype: torch.dtype, up: int, layout: torch.memory_format) -> None:
    x, weight, style = operands(n=3, i=7, o=5, size=(11, 13))
    x = x.to(dtype).double()
    want = ops.modulated_conv2d(x, weight, style, up=up, padding=1, resample_filter=FIR)
    got = ops.modulated_conv2d(
        x.to(dtype).to(memory_format=layout),
        weight.to(torch.float32),
        style.float(),
        up=up,
        padding=1,
        resample_filter=FIR,
    )
    assert got.dtype == dtype
    # Weight, convolution and filtered result are each rounded once to dtype.
    error = (got.double() - want).abs().max() / want.abs().max()
    assert error < 3 * torch.finfo(dtype).eps


def test_autocast_keeps_the_scales() -> None:
    x, weight, style = (t.float() for t in operands())
    style = style * 300 + 1000  # Σ style² would overflow float16
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.modulated_conv2d(x, weight, style, up=2, padding=1, resample_filter=FIR)
    want = ops.modulated_conv2d(x.bfloat16(), weight, style, up=2, padding=1, resample_filter=FIR)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)


def test_empty_batch() -> None:
    x, weight, style = operands(n=0)
    weight.requires_grad_()
    for up, down, kind in itertools.product((1, 2), (1,), ("none", "stylegan2_fp16", "stylegan3")):
        y = ops.modulated_conv2d(x, weight, style, up=up, down=down, padding=1, resample_filter=FIR, prenormalize=kind)
        assert y.shape == (0, 4, 6 * up, 7 * up)
        weight.grad = None
        y.sum().backward()
        assert weight.grad is not None
        assert not weight.grad.any()


def test_nan_stays_in_its_sample() -> None:
    x, weight, style = operands()
    style[0, 1] = float("nan")
    y = ops.modulated_conv2d(x, weight, style, up=2, padding=1, resample_filter=FIR)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


def test_compiles_without_breaks() -> None:
    x, weight, style = (t.float().requires_grad_() for t in operands())

    def function(x: Tensor, weight: Tensor, style: Tensor) -> Tensor:
        return ops.modulated_conv2d(
            x, weight, style, up=2, padding=1, resample_filter=FIR, epilogue=ops.Epilogue(act="lrelu")
        )

    got = torch.compile(function, fullgraph=True, backend="aot_eager")(x, weight, style)
    want = function(x, weight, style)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(y.square().sum(), (x, weight, style)) for y in (got, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_backend_choice() -> None:
    x, weight, style = operands()
    decision = fastgan.explain(ops.modulated_conv2d, x, weight, style, up=2, padding=1)
    assert (decision.op, decision.backend) == ("modulated_conv2d", "cpp")
    assert fastgan.explain("modulated_conv2d", x, weight, style, backend="reference").chosen_by == "backend= argument"
    with pytest.raises(ValueError, match=r"modulated_conv2d: backend 'cuda'.* it runs on cuda tensors, got cpu"):
        ops.modulated_conv2d(x, weight, style, up=2, backend="cuda")


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that a kernel returns inside the ``with`` block."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(t, Tensor)]
        self.elements = max([self.elements, *[t.numel() for t in tensors]])
        return result


@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_no_weight_per_sample(up: int, down: int, backend: str) -> None:
    """Forward, backward and R1's second order of 8 samples never hold 8 weights."""
    x, weight, style = (t.float().requires_grad_() for t in operands(n=8, i=32, o=32, size=(4, 4)))
    with LargestTensor() as mode:
        y = ops.modulated_conv2d(
            x, weight, style, up=up, down=down, padding=1, resample_filter=FIR, backend=backend,
            epilogue=ops.Epilogue(act="lrelu"),
        )  # fmt: skip
        grads = torch.autograd.grad(y.square().sum(), (x, style), create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in grads), (x, weight, style))
    images = 8 * 32 * (4 * up + 5) ** 2
    assert mode.elements <= images < 8 * weight.numel()


def test_calls() -> None:
    """The scales, the convolution, and behind up = 2 the filter, which then has the epilogue."""
    x, weight, style = (t.float() for t in operands())
    epilogue = ops.Epilogue(noise=torch.randn(6, 7), bias=torch.randn(4), act="lrelu")

    def calls(function) -> dict[str, int]:
        with CountOps() as mode:
            function()
        return {k.removeprefix("fastgan."): v for k, v in mode.calls.items() if k.startswith("fastgan")}

    three = {"demodulation": 1, "scaled_conv2d": 1, "upfirdn2d": 1}
    assert calls(lambda: ops.modulated_conv2d(x, weight, style, padding=1, epilogue=epilogue)) == {
        "demodulation": 1,
        "scaled_conv2d": 1,
    }
    epilogue = ops.Epilogue(noise=torch.randn(12, 14), bias=torch.randn(4), act="lrelu")
    kwargs = {"padding": 1, "resample_filter": FIR}
    assert calls(lambda: ops.modulated_conv2d(x, weight, style, up=2, **kwargs, epilogue=epilogue)) == three
    assert calls(lambda: ops.modulated_conv2d(x, weight, style, down=2, **kwargs)) == three
    assert calls(lambda: ops.modulated_conv2d(x, weight, style, demodulate=False)) == {"scaled_conv2d": 1}


def reference_scales(weight: Tensor, style: Tensor, kind: str, eps: float) -> tuple[Tensor, Tensor]:
    return modulation_scales(weight, style, demodulate=True, eps=eps, prenormalize=kind, input_gain=None)


@pytest.mark.parametrize("kind", ["none", "stylegan2_fp16", "stylegan3"])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_demodulation(kind: str, kernel: int, dtype: torch.dtype) -> None:
    """Both scales and their gradients, from a weight of any dtype; a zero row of each, and a tiny weight."""
    _, weight, style = operands(n=3, i=37, o=11, kernel=kernel)
    weight, style = weight.to(dtype), style.to(dtype if dtype == torch.float64 else torch.float32)
    weight[2], style[1] = 0, 0
    weight[3] = weight[3] * 2.0**-10

    def both(function):
        return lambda w, s: torch.cat([t.reshape(-1) / t.detach().abs().max() for t in function(w, s)])

    def fused(w: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return demodulation(w, s, prenormalize=kind, eps=1e-2)

    got = gradients(both(fused), [weight, style])
    want = gradients(both(lambda w, s: reference_scales(w, s, kind, 1e-2)), [weight.double(), style.double()])
    plain = gradients(both(lambda w, s: reference_scales(w, s, kind, 1e-2)), [weight, style])
    for name, g, p, w in zip(("scales", "weight", "style"), got, plain, want, strict=True):
        assert_close_to_float64(g, p, w, floor=None if dtype != torch.float32 else 2e-6, what=name)


@pytest.mark.parametrize("kind", ["none", "stylegan2_fp16", "stylegan3"])
def test_demodulation_to_second_order(kind: str) -> None:
    _, weight, style = (t.requires_grad_() for t in operands(n=3, i=4, o=5))

    def function(weight: Tensor, style: Tensor) -> tuple[Tensor, Tensor]:
        return demodulation(weight, style, prenormalize=kind, eps=0.1)

    assert gradcheck(function, (weight, style))
    assert gradgradcheck(function, (weight, style))
    for needs in ((True, False), (False, True)):
        leaves = [t.detach().requires_grad_(need) for t, need in zip((weight, style), needs, strict=True)]
        assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("kind", ["none", "stylegan2_fp16", "stylegan3"])
@pytest.mark.parametrize("save_energy", [True, False])
def test_opcheck_of_demodulation(kind: str, save_energy: bool) -> None:
    _, weight, style = (t.float().requires_grad_(save_energy) for t in operands())
    torch.library.opcheck(torch.ops.fastgan.demodulation.default, (weight, style, kind, 1e-4, save_energy))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"style": torch.zeros(2, 4)}, r"style must be \[N, C_in\] = \[2, 5\], got \[2, 4\]"),
        ({"weight": torch.zeros(4, 3, 3, 3)}, r"weight must be \[C_out, C_in = 5, k_h, k_w\], got \[4, 3, 3, 3\]"),
        ({"x": torch.zeros(2, 5, 0, 3)}, r"x must have C_in, H and W of at least 1, got \[2, 5, 0, 3\]"),
        ({"x": torch.zeros(2, 5, 2, 2)}, r"x must be large enough .* got \[2, 5, 2, 2\] with kernel \[3, 3\].* 0x0"),
        ({"up": 0}, "up must be an int >= 1, got 0"),
        ({"up": 2, "down": 2}, "up or down must be 1, got 2 and 2"),
        ({"eps": 0}, "eps must be above 0, got 0"),
        ({"padding": -1}, "padding must be an int.*got -1"),
        ({"padding": (1, 2, 3)}, r"padding must be an int.*got \(1, 2, 3\)"),
        ({"prenormalize": "sg4"}, "prenormalize must be one of auto, none, stylegan2_fp16, stylegan3, got 'sg4'"),
        ({"input_gain": torch.ones(3)}, r"input_gain must be a number, 0-dim, \[C_in\] = \[5\].*got \[3\]"),
        ({"resample_filter": torch.ones(1, 2, 3)}, r"resample_filter must be \[taps\] or \[fh, fw\].*\[1, 2, 3\]"),
        (
            {"weight_energy": ops.WeightEnergy(torch.ones(4, 4), torch.ones(4))},
            r"weight_energy.energy must be \[4, 5\], got \[4, 4\]",
        ),
        (
            {"weight_energy": ops.WeightEnergy(torch.ones(4, 5), torch.ones(5))},
            r"weight_energy.peak must be \[4\], got \[5\]",
        ),
        ({"epilogue": ops.Epilogue(bias=torch.ones(3))}, r"epilogue.bias must be \[C_out\] = \[4\], got \[3\]"),
        ({"epilogue": ops.Epilogue(noise=torch.ones(9, 9))}, r"epilogue.noise must be .*\[4, 5\].*got \[9, 9\]"),
    ],
)
def test_error_text(change: dict, text: str) -> None:
    x, weight, style = operands()
    with pytest.raises(ValueError, match=f"modulated_conv2d: {text}"):
        ops.modulated_conv2d(**{"x": x, "weight": weight, "style": style, **change})
