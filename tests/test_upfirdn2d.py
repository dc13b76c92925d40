"""upfirdn2d against an explicit loop over pixels and taps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

import fastgan
from fastgan import backends, ops
from fastgan.reference.activation import ACTIVATIONS
from tests.helpers import CountOps, assert_close_to_float64, gradients, layouts

# A few roundings of float32; half types are rounded once at the end of each pass, of which a gradient has two.
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def naive(x: Tensor, f: Tensor | None, up, down, padding, flip_filter: bool, gain: float) -> Tensor | None:
    """out[y, x] = gain · Σ_taps f[i, j] · u[y·down − i, x·down − j] over the upsampled, padded image u, tap by tap."""
    f = torch.ones(1, 1, dtype=torch.float64) if f is None else f.double()
    f = torch.outer(f, f) if f.ndim == 1 else f
    (fh, fw), (n, c, height, width) = f.shape, x.shape
    (up_x, up_y), (down_x, down_y), (x0, x1, y0, y1) = up, down, padding
    out_h = (height * up_y + y0 + y1 - fh + down_y) // down_y
    out_w = (width * up_x + x0 + x1 - fw + down_x) // down_x
    if min(out_h, out_w) < 1:
        return None
    out = x.new_zeros(n, c, out_h, out_w)
    for oy in range(out_h):
        for ox in range(out_w):
            for i in range(fh):
                for j in range(fw):
                    # A convolution pairs the last tap with the first pixel, a correlation the first.
                    tap = f[i, j] if flip_filter else f[fh - 1 - i, fw - 1 - j]
                    py, px = oy * down_y + i - y0, ox * down_x + j - x0
                    if py % up_y == 0 and px % up_x == 0 and 0 <= py < height * up_y and 0 <= px < width * up_x:
                        out[:, :, oy, ox] += gain * tap * x[:, :, py // up_y, px // up_x]
    return out


SEPARABLE = torch.tensor([1.0, 3.0, 2.0, 0.5])
FULL = torch.tensor([[1.0, 2.0, 0.5], [0.3, -1.0, 3.0]])


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    filter_index=st.integers(0, 2),
    up=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    down=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.integers(-2, 4)] * 4),
    flip_filter=st.booleans(),
    gain=st.sampled_from([1.0, 4.0, -0.5]),
)
def test_against_a_loop(filter_index: int, up, down, padding, flip_filter: bool, gain: float) -> None:
    x, f = image(2, 2, 4, 5), (None, SEPARABLE, FULL)[filter_index]
    want = naive(x, f, up, down, padding, flip_filter, gain)
    kwargs = {"up": up, "down": down, "padding": padding, "flip_filter": flip_filter, "gain": gain}
    if want is None:
        with pytest.raises(ValueError, match=r"upfirdn2d: x .* must be at least as large as the filter"):
            ops.upfirdn2d(x, f, **kwargs)
        return
    got = ops.upfirdn2d(x, f, **kwargs)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_short_forms_of_the_arguments() -> None:
    x = image(1, 2, 5, 6)
    long = ops.upfirdn2d(x, FULL, up=(2, 2), down=(3, 3), padding=(1, 1, 2, 2))
    assert torch.equal(ops.upfirdn2d(x, FULL, up=2, down=[3, 3], padding=(1, 2)), long)
    same = ops.upfirdn2d(x, FULL, padding=(3, 3, 3, 3))
    assert torch.equal(ops.upfirdn2d(x, FULL, padding=3), same)


def test_negative_padding_crops() -> None:
    x = image(1, 1, 6, 7)
    assert torch.equal(ops.upfirdn2d(x, None, padding=(-1, -2, -3, 0)), x[:, :, 3:, 1:-2])


@pytest.mark.parametrize("f", [SEPARABLE, FULL], ids=["separable", "full"])
def test_up_and_down_are_adjoint(f: Tensor) -> None:
    """<upfirdn2d(x), y> = <x, its backward(y)>, and the backward is upfirdn2d with up and down exchanged."""
    x = image(1, 2, 5, 6).requires_grad_()
    up, down, (x0, x1, y0, y1) = 2, 3, (2, 1, 3, 0)
    fh, fw = (len(f), len(f)) if f.ndim == 1 else f.shape
    y = ops.upfirdn2d(x, f, up=up, down=down, padding=(x0, x1, y0, y1), gain=1.5)
    cotangent = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, cotangent)
    padding = (
        fw - x0 - 1,
        x.shape[3] * up - y.shape[3] * down + x0 - up + 1,
        fh - y0 - 1,
        x.shape[2] * up - y.shape[2] * down + y0 - up + 1,
    )
    want = ops.upfirdn2d(cotangent, f, up=down, down=up, padding=padding, flip_filter=True, gain=1.5)
    torch.testing.assert_close(grad, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("f", [None, SEPARABLE, FULL], ids=["none", "separable", "full"])
def test_first_and_second_order(f: Tensor | None) -> None:
    x, bias = image(1, 2, 3, 4).requires_grad_(), image(2).requires_grad_()
    taps = None if f is None else f.double().requires_grad_()

    def function(x: Tensor, bias: Tensor, taps: Tensor | None) -> Tensor:
        epilogue = ops.Epilogue(bias=bias, act="swish")
        return ops.upfirdn2d(x, taps, up=2, down=(1, 3), padding=(2, 1, 3, 3), gain=4, epilogue=epilogue)

    assert gradcheck(function, (x, bias, taps))
    assert gradgradcheck(function, (x, bias, taps), fast_mode=True)


def test_epilogue() -> None:
    x = image(2, 3, 4, 5)
    plain = ops.upfirdn2d(x, SEPARABLE, up=2, padding=(2, 1), gain=4)
    n, c, h, w = plain.shape
    noise, bias, residual = image(h, w), image(c), image(n, c, h, w)
    epilogue = ops.Epilogue(noise, 0.5, bias, "lrelu", alpha=0.1, clamp=1.0, residual=residual, residual_gain=2.0)
    got = ops.upfirdn2d(x, SEPARABLE, up=2, padding=(2, 1), gain=4, epilogue=epilogue)
    want = (F.leaky_relu(plain + 0.5 * noise + bias[:, None, None], 0.1) * 2**0.5).clamp(-1, 1) + 2 * residual
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("f", [SEPARABLE, FULL], ids=["separable", "full"])
def test_half_types_are_rounded_once(dtype: torch.dtype, f: Tensor) -> None:
    x = image(2, 3, 13, 11).to(dtype)
    want = ops.upfirdn2d(x.double(), f, up=2, padding=3, gain=4)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.upfirdn2d(x, f, up=2, padding=3, gain=4)
    assert got.dtype == dtype
    error = (got.double() - want).abs().max() / want.abs().max()
    assert error < max(torch.finfo(dtype).eps, 1e-6)


def test_layouts_empty_and_nan() -> None:
    x = image(2, 3, 7, 5)
    want = ops.upfirdn2d(x, SEPARABLE, down=2, padding=1)
    for other in (x.contiguous(memory_format=torch.channels_last), x.repeat_interleave(2, 3)[..., ::2]):
        torch.testing.assert_close(ops.upfirdn2d(other, SEPARABLE, down=2, padding=1), want)
    expanded = ops.upfirdn2d(x[:1].expand(3, -1, -1, -1), SEPARABLE, down=2, padding=1)
    torch.testing.assert_close(expanded, want[:1].expand(3, -1, -1, -1))
    empty = x[:0].requires_grad_()
    y = ops.upfirdn2d(empty, FULL, up=2)
    y.sum().backward()
    assert y.shape == (0, 3, 13, 8)
    assert empty.grad.shape == empty.shape
    x[0, 1, 2, 2] = float("nan")
    y = ops.upfirdn2d(x, SEPARABLE, padding=2)
    assert y[0, 1].isnan().any()
    assert y[1].isfinite().all()


def test_compiles_without_breaks() -> None:
    x = image(2, 3, 6, 5).requires_grad_()

    def function(x: Tensor) -> Tensor:
        return ops.upfirdn2d(x, SEPARABLE, up=2, padding=(2, 1), gain=4, epilogue=ops.Epilogue(act="lrelu"))

    got, want = torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x) for y in (got, want)))


def test_backend_choice() -> None:
    x = image(1, 1, 4, 4)
    assert fastgan.explain("upfirdn2d", x, SEPARABLE).backend == "cpp"
    with pytest.raises(ValueError, match=r"upfirdn2d: backend 'cuda' .* it runs on cuda tensors, got cpu"):
        ops.upfirdn2d(x, None, backend="cuda")


def on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA library is there, as far as the choice of a backend can see."""
    monkeypatch.setitem(backends._LIBRARIES, "cuda", replace(backends._LIBRARIES["cuda"], reason=None))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_cuda_results_without_data(monkeypatch: pytest.MonkeyPatch, layout: torch.memory_format) -> None:
    on_the_gpu(monkeypatch)
    with FakeTensorMode(), CountOps() as mode:
        x = torch.empty(2, 3, 13, 11, device="cuda", dtype=torch.half).to(memory_format=layout)
        f = torch.empty(4, device="cuda")
        y = ops.upfirdn2d(x, f, up=2, padding=(2, 1, 2, 1), epilogue=ops.Epilogue(act="lrelu"), backend="cuda")
        assert (y.shape, y.device.type, y.dtype) == ((2, 3, 26, 22), "cuda", torch.half)
        assert y.is_contiguous(memory_format=layout)
    assert mode.calls["fastgan.upfirdn2d_cuda"] == 1


def test_what_cuda_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    on_the_gpu(monkeypatch)
    with FakeTensorMode():
        x = torch.empty(1, 1, 4, 4, device="cuda")
        assert fastgan.explain("upfirdn2d", x, None, backend="cuda").backend == "cuda"
        assert fastgan.explain("upfirdn2d", x, None).backend != "cuda"
        with pytest.raises(ValueError, match=r"it takes float32, bfloat16 and float16, got torch\.float64"):
            ops.upfirdn2d(x.double(), None, backend="cuda")
        with pytest.raises(ValueError, match=r"sides, taps and paddings below 2\^30 and factors below 2\^24"):
            ops.upfirdn2d(x, None, down=2**24, backend="cuda")
        with pytest.raises(ValueError, match="f requires a gradient, which the reference alone computes"):
            ops.upfirdn2d(x, torch.empty(3, device="cuda", requires_grad=True), backend="cuda")


@pytest.mark.parametrize("name", ["upfirdn2d", "upfirdn2d_cuda"])
def test_gradients_stay_on_the_op(name: str) -> None:
    """Of both orders. On the CPU the reference stands in for the CUDA kernel, with the op's own gradients."""
    op = getattr(torch.ops.fastgan, name).default
    x, bias = image(2, 2, 4, 5).requires_grad_(), image(2).requires_grad_()

    def function(x: Tensor, bias: Tensor, act: str = "swish", clamp: float | None = 0.9) -> Tensor:
        fir = ((2, 2), (1, 1), (2, 1, 2, 1), False, 4.0)
        return op(x, SEPARABLE.double(), None, None, bias, None, *fir, act, 0.0, 1.4, clamp, 1.0)

    assert gradcheck(function, (x, bias), fast_mode=True)
    assert gradgradcheck(function, (x, bias), fast_mode=True)
    with CountOps() as mode:
        (grad,) = torch.autograd.grad(function(x, bias, "linear", None).square().sum(), x, create_graph=True)
        torch.autograd.grad(grad.square().sum(), x)
    assert {k: v for k, v in mode.calls.items() if k.startswith("fastgan")} == {f"fastgan.{name}": 4}
    with CountOps() as mode:
        # Where the activation's slope needs what came before it, that is the same op again.
        function(x, bias).sum().backward()
    found = {k: v for k, v in mode.calls.items() if k.startswith("fastgan")}
    assert found == {f"fastgan.{name}": 3, "fastgan.activation_grad": 1}
    rest = ((2, 2), (1, 1), (2, 1, 2, 1), False, 4.0, "swish", 0.0, 1.4, 0.9, 1.0)
    given = x.detach().float().requires_grad_()
    torch.library.opcheck(op, (given, FIR, None, None, bias.detach().float(), None, *rest))


def test_a_trained_filter_runs_on_the_reference() -> None:
    x, f = image(1, 1, 4, 4), SEPARABLE.clone().requires_grad_()
    assert fastgan.explain("upfirdn2d", x, f).backend == "reference"
    with pytest.raises(ValueError, match=r"'cpp' .* cannot run this call: f requires a gradient"):
        ops.upfirdn2d(x, f, backend="cpp")
    with torch.no_grad():
        assert fastgan.explain("upfirdn2d", x, f).backend == "cpp"
    args = (
        x,
        f.double(),
        None,
        None,
        None,
        None,
        (1, 1),
        (1, 1),
        (0, 0, 0, 0),
        False,
        1.0,
        "linear",
        0.0,
        1.0,
        None,
        1.0,
    )
    y = torch.ops.fastgan.upfirdn2d.default(*args)
    with pytest.raises(NotImplementedError, match="the gradient of f has no kernel; backend='reference'"):
        y.sum().backward()


FIR = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
STYLEGAN2 = {
    "behind a transposed convolution": {"f": FIR, "padding": 1, "gain": 4.0},
    "before a stride-2 convolution": {"f": torch.outer(FIR, FIR), "padding": 2},
    "skip up": {"f": torch.outer(FIR, FIR), "up": 2, "padding": (2, 1), "gain": 4.0},
    "skip down": {"f": FIR, "down": 2, "padding": 1},
    "uneven": {"f": FULL, "up": (3, 2), "down": (2, 3), "padding": (4, -1, 3, 2), "flip_filter": True},
}


def make_epilogue(shape: tuple[int, ...], act: str, dtype: torch.dtype, **options) -> tuple[list[Tensor], dict]:
    """Leaves (noise, strength, bias, residual) for a result of ``shape``, and the rest of an epilogue."""
    n, c, h, w = shape
    noise, bias, residual = image(n, 1, h, w), image(c), image(*shape)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [noise.to(wide), torch.tensor(0.3, dtype=wide), bias.to(wide), residual.to(dtype)]
    return leaves, {"act": act, "residual_gain": 0.7, **options}


def with_epilogue(x, noise, strength, bias, residual, *, options: dict, epilogue: dict, backend: str) -> Tensor:
    found = ops.Epilogue(noise, strength, bias, residual=residual, **epilogue)
    return ops.upfirdn2d(x, epilogue=found, backend=backend, **options)


def eager(x, noise, strength, bias, residual, *, options: dict, epilogue: dict) -> Tensor:
    """The sequence that users write, in x's dtype throughout."""
    y = ops.upfirdn2d(x, **options, backend="reference")
    y = y + (noise * strength + bias[:, None, None]).to(x.dtype)
    y = ACTIVATIONS[epilogue["act"]].function(y, 0.2) * ACTIVATIONS[epilogue["act"]].gain
    return y if residual is None else y + epilogue["residual_gain"] * residual


@pytest.mark.parametrize("name", STYLEGAN2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
def test_accuracy(name: str, dtype: torch.dtype, layout: str) -> None:
    """Value and every gradient, with and without the residual that hides the activation."""
    options = STYLEGAN2[name]
    x = layouts(image(2, 3, 13, 11).to(dtype))[layout]
    shape = tuple(ops.upfirdn2d(x, **options).shape)
    for has_residual in (True, False):
        leaves, epilogue = make_epilogue(shape, "lrelu", dtype)
        leaves = [x, *leaves] if has_residual else [x, *leaves[:3]]

        def run(function, *given: Tensor, epilogue=epilogue, **rest) -> Tensor:
            given = given if len(given) == 5 else (*given, None)
            return function(*given, options=options, epilogue=epilogue, **rest)

        fused = gradients(lambda *t: run(with_epilogue, *t, backend="cpp"), leaves)
        exact = gradients(lambda *t: run(with_epilogue, *t, backend="reference"), [t.double() for t in leaves])
        plain = gradients(lambda *t: run(eager, *t), leaves)
        for which, got, other, want in zip(("y", "x", *"nsbr"), fused, plain, exact, strict=False):
            # The one scalar is measured against the root sum of squares of its terms: how much they cancel is luck.
            terms = float(exact[2].norm() / 0.3 / want.abs()) if which == "s" else 0.25
            floor = 4 * FLOOR[dtype] * terms
            assert_close_to_float64(got, other, want, floor=floor, what=which)
        assert fused[0].is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


@pytest.mark.parametrize("name", STYLEGAN2)
@pytest.mark.parametrize("act", ["linear", "lrelu", "tanh", "swish"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_both_orders(name: str, act: str, layout: str) -> None:
    """For every input at once: x, noise, its strength, bias, residual."""
    options = STYLEGAN2[name]
    x = layouts(image(2, 2, 4, 5))[layout]
    leaves, epilogue = make_epilogue(tuple(ops.upfirdn2d(x, **options).shape), act, torch.float64, clamp=1.9)
    leaves = [t.requires_grad_() for t in (x, *leaves)]

    def function(*given: Tensor) -> Tensor:
        return with_epilogue(*given, options=options, epilogue=epilogue, backend="cpp")

    assert gradcheck(function, leaves, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("shape", [(1, 1, 3, 5001), (1, 1, 5001, 3), (5, 1, 1, 1), (3, 700, 2, 3)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sizes_around_the_blocks(shape: tuple[int, ...], layout: str) -> None:
    """Rows longer than a block, blocks of many rows, planes of one pixel, more values in a pixel than a block has."""
    x = layouts(image(*shape))[layout]
    noise = image(shape[0], 1, 2 * shape[2], 2 * shape[3])
    for f in (FIR, FULL):
        options = {"up": 2, "padding": (2, 1 if f is FIR else 0, 2 if f is FIR else 1, 1 if f is FIR else 0)}
        epilogue = ops.Epilogue(noise, 0.5, image(shape[1]), "lrelu")
        got, want = (ops.upfirdn2d(x, f, **options, epilogue=epilogue, backend=b) for b in ("cpp", "reference"))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_a_filter_of_rank_one_is_its_two_vectors() -> None:
    """To the last bit in float32; one that is nearly of rank one is not taken for it."""
    x = image(1, 2, 9, 8).float()
    rows = torch.tensor([1.0, 2.0, -4.0])
    separable = torch.outer(rows, FIR)
    got = ops.upfirdn2d(x, separable, padding=2)
    want = F.conv2d(F.pad(x, (2, 2, 2, 2)).double(), separable.flip((0, 1)).double().expand(2, 1, 3, 4), groups=2)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    nearly = torch.outer(FIR, FIR).double()
    nearly[1, 2] *= 1 + 1e-9
    one = torch.zeros(1, 1, 7, 7, dtype=torch.float64)
    one[0, 0, 3, 3] = 1
    assert torch.equal(ops.upfirdn2d(one, nearly, padding=0)[0, 0], nearly)


def test_zero_and_nan_filters() -> None:
    x = image(1, 1, 5, 5)
    assert not ops.upfirdn2d(x, torch.zeros(3, 3)).any()
    assert ops.upfirdn2d(x, torch.full((3, 3), torch.nan)).isnan().all()


def test_calls() -> None:
    """One kernel forward, one for the gradient of x with a linear epilogue; second order is the same kernel again."""
    x = torch.randn(1, 2, 6, 6, requires_grad=True)

    def calls(mode: CountOps) -> dict[str, int]:
        return {k: v for k, v in mode.calls.items() if k.startswith("fastgan")}

    with CountOps() as mode:
        y = ops.upfirdn2d(x, FIR, down=2, padding=1)
    assert calls(mode) == {"fastgan.upfirdn2d": 1}
    with CountOps() as mode:
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert calls(mode) == {"fastgan.upfirdn2d": 1}
    with CountOps() as mode:
        torch.autograd.grad(grad.square().sum(), x)
    assert calls(mode) == {"fastgan.upfirdn2d": 2}
    bias = torch.zeros(2, requires_grad=True)
    y = ops.upfirdn2d(x.detach(), FIR, epilogue=ops.Epilogue(bias=bias, act="lrelu"))
    with CountOps() as mode:
        y.sum().backward()
    assert calls(mode) == {"fastgan.activation_grad": 1}


@pytest.mark.parametrize("name", STYLEGAN2)
def test_opcheck(name: str) -> None:
    options = {"up": 1, "down": 1, "flip_filter": False, "gain": 1.0, **STYLEGAN2[name]}
    fir = [(v, v) if isinstance(v, int) else v for v in (options["up"], options["down"])]
    padding = options["padding"]
    padding = (padding,) * 4 if isinstance(padding, int) else padding
    padding = padding if len(padding) == 4 else (padding[0],) * 2 + (padding[1],) * 2
    for layout in ("contiguous", "channels_last"):
        x = layouts(torch.randn(2, 3, 6, 5))[layout].requires_grad_()
        bias = torch.randn(3, requires_grad=True)
        rest = (*fir, padding, options["flip_filter"], options["gain"], "swish", 0.0, 1.4, 0.9, 1.0)
        torch.library.opcheck(torch.ops.fastgan.upfirdn2d.default, (x, options["f"], None, None, bias, None, *rest))


def test_same_result_for_any_number_of_threads() -> None:
    x, bias = torch.randn(3, 5, 97, 89), torch.randn(5)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(ops.upfirdn2d(x, FIR, padding=2, epilogue=ops.Epilogue(bias=bias, act="lrelu")))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": torch.ones(3, 4, 4)}, r"x must have 4 dimensions, got \[3, 4, 4\]"),
        ({"x": torch.ones(1, 2, 0, 4)}, r"x must have C, H and W of at least 1, got \[1, 2, 0, 4\]"),
        ({"f": torch.ones(2, 2, 2)}, r"f must be \[taps\] or \[fh, fw\] with at least one tap, got \[2, 2, 2\]"),
        ({"f": torch.ones(0)}, r"f must be \[taps\] or \[fh, fw\] with at least one tap, got \[0\]"),
        ({"f": torch.ones(6)}, r"x .* must be at least as large as the filter = \[6, 6\], got \[4, 5\]"),
        ({"up": 0}, r"up must be an int >= 1 or \(x, y\) of such, got 0"),
        ({"down": (1, 2, 3)}, r"down must be an int >= 1 or \(x, y\) of such, got \(1, 2, 3\)"),
        ({"padding": (1, 2, 3)}, r"padding must be an int, \(x, y\) or \(x0, x1, y0, y1\), got \(1, 2, 3\)"),
        ({"epilogue": ops.Epilogue(act="gelu")}, "epilogue.act must be one of linear, .*, got 'gelu'"),
        ({"epilogue": ops.Epilogue(clamp=-1.0)}, "epilogue.clamp must be positive or None, got -1.0"),
        ({"epilogue": ops.Epilogue(noise_strength=1.0)}, "epilogue.noise_strength must be None without noise, got 1.0"),
        ({"epilogue": ops.Epilogue(bias=torch.ones(3))}, r"epilogue.bias must be \[C_out\] = \[2\], got \[3\]"),
        (
            {"epilogue": ops.Epilogue(noise=torch.ones(4, 4))},
            r"epilogue.noise must be \[H, W\] = \[4, 5\] or \[N, 1, H, W\] = \[1, 1, 4, 5\], got \[4, 4\]",
        ),
        (
            {"epilogue": ops.Epilogue(residual=torch.ones(1, 2, 4, 4))},
            r"epilogue.residual must be \[N, C_out, H, W\] = \[1, 2, 4, 5\], got \[1, 2, 4, 4\]",
        ),
    ],
)
def test_error_text(change: dict, text: str) -> None:
    with pytest.raises(ValueError, match=f"upfirdn2d: {text}"):
        ops.upfirdn2d(**{"x": torch.ones(1, 2, 4, 5), "f": None, **change})
