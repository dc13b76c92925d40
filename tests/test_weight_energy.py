"""weight_energy, and modulated_conv2d with it: the numbers of the reference without a read of the weight for
demodulation. What a module keeps of it is tested in test_weight_energy_cache.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastgan import ops
from tests.helpers import CountOps, assert_close_to_float64

pytestmark = pytest.mark.usefixtures("one_thread")

FIR = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
KINDS = ["none", "stylegan2_fp16", "stylegan3"]


def operands(n: int = 2, i: int = 5, o: int = 4, kernel: int = 3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((n, i, 6, 7), (o, i, kernel, kernel), (n, i))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weight_energy(up: int, down: int, kind: str, dtype: torch.dtype) -> None:
    """The same numbers without a read of the weight for demodulation; an eps that counts, zero rows, a large style."""
    x, weight, style = operands(n=3, i=37, o=11)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, weight, style = x.to(dtype), weight.to(wide), style.to(wide)
    weight[2], style[1], style[2] = 0, 0, style[2] * 3e4
    gain = torch.rand(3, 37, dtype=wide)
    for input_gain in (None, -0.7, gain):
        options = {"up": up, "down": down, "padding": (2, 1, 1, 1), "resample_filter": FIR, "prenormalize": kind}
        options |= {"eps": 1e-2, "epilogue": ops.Epilogue(bias=torch.ones(11, dtype=wide), act="lrelu", clamp=3.0)}
        energy = ops.weight_energy(weight)
        assert energy.energy.dtype == energy.peak.dtype == wide
        with CountOps() as mode:
            got = ops.modulated_conv2d(x, weight, style, **options, input_gain=input_gain, weight_energy=energy)
        assert (mode.calls["fastgan.demodulation"], mode.calls["fastgan.demodulated_conv2d"]) == (0, 1)
        options["epilogue"] = ops.Epilogue(bias=torch.ones(11).double(), act="lrelu", clamp=3.0)
        if isinstance(input_gain, Tensor):
            input_gain = input_gain.double()
        options |= {"input_gain": input_gain, "backend": "reference"}
        plain = ops.modulated_conv2d(x, weight, style, **options)
        exact = ops.modulated_conv2d(x.double(), weight.double(), style.double(), **options)
        assert_close_to_float64(got, plain, exact)


def test_weight_energy_of_every_dtype_and_layout() -> None:
    _, weight, _ = operands(o=6, kernel=5)
    weight[1] = 0
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        given = weight.to(dtype)
        peak = 125 * torch.where(given == 0, 0, given.double()).abs().amax((1, 2, 3)).square()
        peak[1] = 125
        for backend in ("cpp", "reference"):
            for layout in (torch.contiguous_format, torch.channels_last):
                energy = ops.weight_energy(given.to(memory_format=layout).requires_grad_(), backend=backend)
                assert not energy.energy.requires_grad and not energy.peak.requires_grad
                rounding = 1e-14 if dtype == torch.float64 else 1e-6
                want = given.double().square().sum((2, 3))
                torch.testing.assert_close(energy.energy.double(), want, rtol=rounding, atol=0)
                torch.testing.assert_close(energy.peak.double(), peak, rtol=rounding, atol=0)


@pytest.mark.parametrize("name", ["x", "weight", "style", "input_gain", "bias"])
def test_weight_energy_is_ignored_where_a_gradient_is_recorded(name: str) -> None:
    """One of another weight: what it would give shows."""
    x, weight, style = operands()
    leaves = {"x": x, "weight": weight, "style": style, "input_gain": torch.ones(5).double()}
    leaves["bias"] = torch.zeros(4).double()
    leaves[name].requires_grad_()
    energy = ops.weight_energy(3 * weight)

    def call(weight_energy: ops.WeightEnergy | None) -> Tensor:
        epilogue = ops.Epilogue(bias=leaves["bias"])
        x, weight, style, gain = (leaves[key] for key in ("x", "weight", "style", "input_gain"))
        return ops.modulated_conv2d(x, weight, style, input_gain=gain, epilogue=epilogue, weight_energy=weight_energy)

    want = torch.autograd.grad(call(None).square().sum(), leaves[name])
    assert torch.equal(torch.autograd.grad(call(energy).square().sum(), leaves[name])[0], want[0])
    with torch.no_grad():
        assert not torch.allclose(call(energy), call(None))
    assert torch.equal(ops.modulated_conv2d(x, weight, style, weight_energy=energy, backend="reference"),
                       ops.modulated_conv2d(x, weight, style, backend="reference"))  # fmt: skip


def test_weight_energy_under_transforms_and_compilers() -> None:
    x, weight, style = (t.float() for t in operands())
    energy = ops.weight_energy(weight)

    def function(x: Tensor, style: Tensor) -> Tensor:
        return ops.modulated_conv2d(x, weight, style, padding=1, weight_energy=energy)

    want = function(x, style)
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(x, style), want)
    with torch.inference_mode():
        torch.testing.assert_close(function(x, style), want)


@pytest.mark.parametrize("kind", KINDS)
def test_ops_of_weight_energy(kind: str) -> None:
    x, weight, style = (t.float() for t in operands())
    energy = ops.weight_energy(weight)
    torch.library.opcheck(torch.ops.fastgan.demodulation_factor.default, (style, *energy, 9, kind, 1e-4))
    settings = (
        kind,
        1e-4,
        0.5,
        None,
        None,
        torch.ones(4),
        None,
        (1, 1),
        (1, 1),
        False,
        "fp32",
        "lrelu",
        0.2,
        1.0,
        0.5,
        1.0,
    )
    args = (x, weight, style, None, *energy, *settings)
    torch.library.opcheck(torch.ops.fastgan.demodulated_conv2d.default, args)
    for op, inputs in (("demodulation_factor", (style, *energy, 9, kind, 1e-4)), ("demodulated_conv2d", args)):
        leaves = [t.clone().requires_grad_() if t is style else t for t in inputs]
        y = getattr(torch.ops.fastgan, op).default(*leaves)
        with pytest.raises(NotImplementedError, match=f"{op}: it has no derivative"):
            y.sum().backward()


def test_wrong_weight() -> None:
    with pytest.raises(
        ValueError, match=r"weight_energy: weight must be \[C_out, C_in, k_h, k_w\].*got \[1, 4, 5, 3, 3\]"
    ):
        ops.weight_energy(torch.ones(1, 4, 5, 3, 3))
    with pytest.raises(TypeError, match="weight_energy: weight must be a Tensor, got list"):
        ops.weight_energy([1.0])
