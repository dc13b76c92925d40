"""patch_loss: values and gradients of first and second order against float64, registration, layouts, messages."""

from __future__ import annotations

import importlib
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import FLOORS, CountOps, assert_close_to_float64, layouts
from torch import Tensor

import fastgan
from fastgan import ops
from fastgan.ops import _patch_loss
from fastgan.reference import patch_loss as reference

MODES = ("vanilla", "lsgan", "wgan", "hinge")
FORMS = list(itertools.product(MODES, ("critic", "generator"), (False, True)))
SHAPES = [(3, 1, 7, 5), (3, 2, 3, 3)]
needs_cpp = pytest.mark.skipif(
    fastgan.backends.available()["cpp"] is not None, reason="the C++ library is not loaded: nothing but the reference"
)


def make_maps(seed: int, dtype: torch.dtype = torch.float32, shapes=SHAPES, scale: float = 2.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for shape in shapes]


def leaves(maps: list[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in maps]


def eager_loss(real, fake, mode, side, paired, weight=None, targets=(1.0, 0.0)) -> Tensor:
    """What people write today: mean of the maps' means, in the maps' own dtype."""

    def mean(x):
        return (x if weight is None else x * weight.to(x).reshape(-1, 1, 1, 1)).mean()

    def term(x, real_label):
        target = targets[0] if real_label else targets[1]
        if mode == "vanilla":
            return mean(F.binary_cross_entropy_with_logits(x, torch.full_like(x, target), reduction="none"))
        if mode == "lsgan":
            return mean((x - target) ** 2)
        if mode == "wgan":
            return mean(-x if real_label else x)
        return mean(F.relu(1 - x if real_label else 1 + x))

    total = 0.0
    for r, f in zip(real, fake, strict=True):
        if paired:
            total = total + term(r - f if side == "critic" else f - r, True)
        elif side == "critic":
            total = total + term(r, True) + term(f, False)
        else:
            total = total + (mean(-f) if mode == "hinge" else term(f, True))
    return total / len(real)


def value_and_gradients(function, real, fake) -> list[Tensor]:
    real, fake = leaves(real), leaves(fake)
    loss = function(real, fake)
    found = torch.autograd.grad(loss, [*real, *fake], allow_unused=True, materialize_grads=True)
    return [loss.detach(), *found]


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("mode", "side", "paired"), FORMS)
def test_value_and_gradient_against_float64(mode, side, paired, dtype):
    weight = torch.tensor([0.5, 2.0, 1.0])
    targets = (0.9, 0.2)
    options = {"mode": mode, "side": side, "paired": paired, "sample_weight": weight}
    options |= {"real_target": targets[0], "fake_target": targets[1]}
    real, fake = make_maps(0, dtype), make_maps(1, dtype)
    fused = value_and_gradients(lambda r, f: ops.patch_loss(r, f, **options, backend="cpp").loss, real, fake)
    wide = ([x.double() for x in real], [x.double() for x in fake])
    exact = value_and_gradients(lambda r, f: ops.patch_loss(r, f, **options, backend="reference").loss, *wide)
    by_hand = value_and_gradients(lambda r, f: eager_loss(r, f, mode, side, paired, weight, targets), *wide)
    eager = value_and_gradients(lambda r, f: eager_loss(r, f, mode, side, paired, weight, targets), real, fake)
    assert fused[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for i, (a, b, c, d) in enumerate(zip(fused, eager, exact, by_hand, strict=True)):
        torch.testing.assert_close(c, d, rtol=1e-12, atol=1e-14)
        # The loss is float32 also where eager's is half, and wgan's terms cancel: it is held to the rounding of its
        # terms.
        floor = None if i else FLOORS[a.dtype] * (1 + 2 / float(c.abs()))
        assert_close_to_float64(a, b.to(a.dtype), c, floor=floor, what=f"output {i}")


@pytest.fixture(params=["cpp", "plain"])
def kernel(request):
    """The C++ kernels, then the plain ones that serve devices without a kernel, under the same registration."""
    if request.param == "cpp":
        yield
        return
    calls = []

    def counted(function):
        return lambda *arguments: (calls.append(function), function(*arguments))[1]

    with torch.library._scoped_library("fastgan", "IMPL") as library:
        for name in ("forward", "bwd", "bwd_bwd"):
            function = counted(getattr(_patch_loss, f"_{name}_plain"))
            opname = getattr(_patch_loss, f"_{name}")._opname
            library.impl(opname, function, "CPU", allow_override=True)
        yield
    assert len(set(calls)) == 3


@needs_cpp
@pytest.mark.parametrize(("mode", "side", "paired"), FORMS)
def test_gradcheck_and_gradgradcheck(mode, side, paired, kernel):
    real, fake = (leaves(make_maps(seed, torch.float64, [(2, 1, 3, 2), (2, 1, 1, 2)])) for seed in (2, 3))
    weight = torch.tensor([0.5, 2.0], dtype=torch.float64)

    def loss(*maps):
        return ops.patch_loss(
            maps[:2],
            maps[2:],
            mode=mode,
            side=side,
            paired=paired,
            sample_weight=weight,
            map_weight=[1.0, 3.0],
            backend="cpp",
        ).loss

    ignored = side == "generator" and not paired
    inputs = (*[x.detach() for x in real], *fake) if ignored else (*real, *fake)
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@needs_cpp
@pytest.mark.parametrize("side", ["real", "fake"])
@pytest.mark.parametrize("paired", [False, True])
def test_second_order_of_one_side(side, paired):
    """Only one side wants gradients, as in R1: the penalty's gradients match the reference's."""
    found = []
    for backend in ("cpp", "reference"):
        real, fake = make_maps(4, torch.float64), make_maps(5, torch.float64)
        wanted = leaves(real if side == "real" else fake)
        both = (wanted, fake) if side == "real" else (real, wanted)
        loss = ops.patch_loss(*both, paired=paired, backend=backend).loss
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        found.append(torch.autograd.grad(sum((g * g * (i + 1)).sum() for i, g in enumerate(first)), wanted))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-16)


@needs_cpp
def test_third_order_raises_and_names_the_reference():
    real = leaves(make_maps(6, torch.float64))
    loss = ops.patch_loss(real, None, backend="cpp").loss
    first = torch.autograd.grad(loss, real, create_graph=True)
    second = torch.autograd.grad(first[0].square().sum(), real[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"fastgan\.reference\.patch_loss"):
        torch.autograd.grad(second[0].sum(), real[0])


@needs_cpp
@pytest.mark.parametrize("paired", [False, True])
def test_opcheck(paired):
    real, fake = leaves(make_maps(7)), leaves(make_maps(8))
    weight = torch.tensor([0.5, 2.0, 1.0])
    arguments = (real, fake, weight, [0.5, 0.5], "bce", 1.0, 0.0, 0.0, paired, True, True)
    torch.library.opcheck(_patch_loss._forward, arguments)
    slopes = _patch_loss._forward(*arguments)[3]
    setting = (slopes, real, fake, weight, [0.5, 0.5], "bce", paired, True, True)
    torch.library.opcheck(_patch_loss._bwd, (torch.tensor(2.0, requires_grad=True), *setting))
    cotangents = [x.detach() * 0.1 for x in (*real, *fake)]
    no_graph = (slopes, [x.detach() for x in real], [x.detach() for x in fake], *setting[3:])
    torch.library.opcheck(_patch_loss._bwd_bwd, (cotangents, torch.tensor(2.0), *no_graph))


@needs_cpp
@pytest.mark.parametrize(
    ("mode", "side", "paired", "compiler"),
    [*[(*form, "aot_eager") for form in FORMS], ("vanilla", "critic", False, "inductor")],
)
def test_compiled_without_graph_breaks(mode, side, paired, compiler):
    torch.compiler.reset()

    def loss(real, fake):
        return ops.patch_loss([x * 2 for x in real], [x * 2 for x in fake], mode=mode, side=side, paired=paired).loss

    real, fake = make_maps(9), make_maps(10)
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    for a, b in zip(value_and_gradients(compiled, real, fake), value_and_gradients(loss, real, fake), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("real_layout", ["contiguous", "channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("fake_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("paired", [False, True])
def test_layouts(backend, real_layout, fake_layout, paired):
    if fastgan.backends.available()[backend] is not None:
        pytest.skip(f"{backend} is unavailable")
    shape = [(3, 2, 5, 7)]
    real, fake = (
        layouts(make_maps(11, shapes=shape)[0])[real_layout],
        layouts(make_maps(12, shapes=shape)[0])[fake_layout],
    )
    weight = torch.tensor([0.5, 2.0, 1.0])

    def result(real, fake, backend):
        real, fake = real.detach().requires_grad_(), fake.detach().requires_grad_()
        found = ops.patch_loss(real, fake, paired=paired, sample_weight=weight, backend=backend)
        gradients = torch.autograd.grad(found.loss, [real, fake], create_graph=True)
        second = torch.autograd.grad(
            gradients[0].square().sum(), [real, fake], allow_unused=True, materialize_grads=True
        )
        return [found.loss, found.real_accuracy, found.fake_accuracy, *gradients, *second]

    actual = result(real, fake, backend)
    expected = result(real.contiguous().double(), fake.contiguous().double(), "reference")
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_one_map_other_ranks_and_prime_sizes(backend):
    if fastgan.backends.available()[backend] is not None:
        pytest.skip(f"{backend} is unavailable")
    for shape in [(5,), (3, 7), (2, 3, 11), (1, 1, 131, 257)]:
        (real,), (fake,) = make_maps(13, shapes=[shape]), make_maps(14, shapes=[shape])
        expected = F.binary_cross_entropy_with_logits(real.double(), torch.ones_like(real.double()))
        expected += F.binary_cross_entropy_with_logits(fake.double(), torch.zeros_like(fake.double()))
        loss, real_accuracy, fake_accuracy = ops.patch_loss(real, fake, backend=backend)
        assert abs(float(loss) - float(expected)) <= 3e-7 * float(expected)
        assert real_accuracy.tolist() == pytest.approx([float((real > 0).float().mean())])
        assert fake_accuracy.tolist() == pytest.approx([float((fake <= 0).float().mean())])


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("mode", MODES)
def test_empty_batch(backend, mode):
    if fastgan.backends.available()[backend] is not None:
        pytest.skip(f"{backend} is unavailable")
    empty = torch.empty(0, 1, 3, 3, requires_grad=True)
    result = ops.patch_loss([empty], [empty], mode=mode, backend=backend)
    assert result.loss.item() == 0.0
    assert result.real_accuracy.tolist() == [0.0]
    assert result.fake_accuracy.tolist() == [0.0]
    assert torch.autograd.grad(result.loss, empty)[0].shape == empty.shape


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(("mode", "side", "paired"), FORMS)
def test_nan_spreads(backend, mode, side, paired):
    if fastgan.backends.available()[backend] is not None:
        pytest.skip(f"{backend} is unavailable")
    real, fake = make_maps(15), make_maps(16)
    fake[1][0, 0, 0, 0] = float("nan")
    result = ops.patch_loss(real, fake, mode=mode, side=side, paired=paired, backend=backend)
    assert torch.isnan(result.loss)
    assert torch.isfinite(result.fake_accuracy).all()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_extreme_logits(backend):
    """softplus must neither overflow nor lose the slope of a confident answer."""
    if fastgan.backends.available()[backend] is not None:
        pytest.skip(f"{backend} is unavailable")
    x = torch.tensor([[-1e4, -100.0, -30.0, -20.0, 0.0, 20.0, 30.0, 100.0, 1e4]], requires_grad=True)
    loss = ops.patch_loss(x, None, backend=backend).loss
    (gradient,) = torch.autograd.grad(loss, x)
    exact = x.detach().double()
    torch.testing.assert_close(gradient.double(), -torch.sigmoid(-exact) / 9, rtol=1e-6, atol=1e-36)
    assert float(loss) == pytest.approx(float(torch.logaddexp(-exact, torch.zeros_like(exact)).mean()), rel=1e-6)


@needs_cpp
def test_half_gradients_survive_a_small_share():
    """1 / elements alone would round to a float16 denormal: the loss scale must be multiplied in before rounding."""
    x = (0.1 * torch.randn(1, 1, 512, 512, generator=torch.Generator().manual_seed(0))).half().requires_grad_()
    (ops.patch_loss(x, None).loss * 65536.0).backward()
    exact = -65536.0 * torch.sigmoid(-x.detach().double()) / x.numel()
    assert float(((x.grad.double() - exact) / exact).abs().max()) < 6e-4


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_accuracy_and_over_maps(backend):
    if fastgan.backends.available()[backend] is not None:
        pytest.skip(f"{backend} is unavailable")
    real = [torch.tensor([[1.0, -1.0, 0.6, 0.0]]), torch.tensor([[2.0, 3.0]])]
    fake = [torch.tensor([[1.0, -1.0, 0.4, 0.0]]), torch.tensor([[-2.0, 3.0]])]

    def result(**options):
        return ops.patch_loss(real, fake, backend=backend, **options)

    assert result().real_accuracy.tolist() == [0.5, 1.0]
    assert result().fake_accuracy.tolist() == [0.5, 0.5]
    assert result(mode="lsgan").real_accuracy.tolist() == [0.5, 1.0]
    assert result(mode="lsgan").fake_accuracy.tolist() == [0.75, 0.5]
    assert result(mode="lsgan", fake_target=-1.0).fake_accuracy.tolist() == [0.5, 0.5]
    generator = result(side="generator")
    assert generator.real_accuracy is None
    assert generator.fake_accuracy.tolist() == [0.5, 0.5]
    pairs = result(paired=True, side="generator")
    assert pairs.real_accuracy.tolist() == pairs.fake_accuracy.tolist() == [0.25, 0.5]
    assert not result().real_accuracy.requires_grad
    assert float(result(over_maps="sum").loss) == pytest.approx(2 * float(result().loss))
    first = ops.patch_loss(real[0], fake[0], backend=backend).loss
    assert float(result(over_maps="sum", map_weight=torch.tensor([3.0, 0.0])).loss) == pytest.approx(3 * float(first))


@needs_cpp
def test_nothing_is_computed_that_nobody_asked_for():
    real, fake = make_maps(17), make_maps(18)
    with CountOps() as count:
        ops.patch_loss(real, fake)
    assert count.calls == {"fastgan.patch_loss": 1}
    wanted = leaves(fake)
    with CountOps() as count:
        loss = ops.patch_loss(real, wanted).loss
        torch.autograd.grad(loss, wanted)
    assert count.calls["fastgan.patch_loss"] == count.calls["fastgan.patch_loss_bwd"] == 1
    assert {name for name in count.calls if name.startswith("fastgan.")} == {
        "fastgan.patch_loss",
        "fastgan.patch_loss_bwd",
    }
    # The slopes of the detached side are not stored.
    slopes = _patch_loss.forward(real, wanted, None, [0.5, 0.5], "bce", 1.0, 0.0, 0.0, False, False, True)[3]
    assert slopes.numel() == sum(x.numel() for x in fake)


@needs_cpp
def test_same_bits_for_any_number_of_threads():
    (real,), (fake,) = make_maps(19, shapes=[(4, 1, 300, 301)]), make_maps(20, shapes=[(4, 1, 300, 301)])
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(value_and_gradients(lambda r, f: ops.patch_loss(r, f).loss, [real], [fake]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_cpp
def test_gradients_of_a_retained_graph_are_fresh():
    """Two backward passes through one graph must not write into one buffer."""
    real = leaves(make_maps(21))
    loss = ops.patch_loss(real, None).loss
    first = torch.autograd.grad(loss, real, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, real, torch.tensor(3.0))
    for a, b, c in zip(first, kept, second, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, 3 * b)


def check_against_reference(real, fake, **options) -> None:
    wide = [[x.double() for x in maps] for maps in (real, fake)]
    actual = value_and_gradients(lambda r, f: ops.patch_loss(r, f, **options).loss, real, fake)
    expected = value_and_gradients(lambda r, f: ops.patch_loss(r, f, **options, backend="reference").loss, *wide)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=3e-6, atol=1e-8)


@needs_cpp
def test_a_kept_plan_serves_only_its_own_signature():
    """A call that differs from an earlier one in one thing alone gets its own answer."""
    real, fake = make_maps(22), make_maps(23)
    for paired in (False, True):
        check_against_reference(real, fake, paired=paired)
        check_against_reference([x.to(memory_format=torch.channels_last) for x in real], fake, paired=paired)
        check_against_reference([layouts(x)["sliced"] for x in real], fake, paired=paired)
        check_against_reference([x[:2] for x in real], [x[:2] for x in fake], paired=paired)
        for dtype in (torch.float64, torch.float32):
            check_against_reference([x.to(dtype) for x in real], [x.to(dtype) for x in fake], paired=paired)
    for options in (
        {"real_target": 0.8},
        {"fake_target": 0.1},
        {"map_weight": [1.0, 2.0]},
        {"map_weight": [2.0, 1.0]},
        {"over_maps": "sum"},
        {"sample_weight": torch.tensor([1.0, 2.0, 3.0])},
        {"sample_weight": torch.tensor([3.0, 2.0, 1.0])},
        {"mode": "hinge"},
        {"side": "generator"},
    ):
        check_against_reference(real, fake, **options)
    check_against_reference(real[:1], fake[:1])
    # The same maps, on which side a gradient is wanted and whether any is recorded.
    for wanted_real, wanted_fake in ((False, True), (True, False), (True, True)):
        maps = leaves(real) if wanted_real else real, leaves(fake) if wanted_fake else fake
        for detached in (False, True):
            with torch.set_grad_enabled(not detached):
                assert ops.patch_loss(*maps).loss.requires_grad is not detached
        wanted = [x for side in maps for x in side if x.requires_grad]
        assert all(float(g.abs().max()) > 0 for g in torch.autograd.grad(ops.patch_loss(*maps).loss, wanted))
    with fastgan.backend("reference"), CountOps() as count:
        ops.patch_loss(real, fake)
    assert "fastgan.patch_loss" not in count.calls
    with CountOps() as count:
        ops.patch_loss(real, fake)
    assert count.calls["fastgan.patch_loss"] == 1


@needs_cpp
def test_kept_plans_are_bounded(monkeypatch):
    module = importlib.import_module("fastgan.ops.patch_loss")
    monkeypatch.setattr(module, "_plans", {})
    monkeypatch.setattr(module, "_PLANS_MOST", 3)
    for n in range(1, 9):
        ops.patch_loss(torch.zeros(n, 2), None)
        assert 0 < len(module._plans) <= 3


def test_backend_choice_is_explained():
    decision = fastgan.explain("patch_loss", torch.zeros(1, 1, 2, 2), None, backend="reference")
    assert decision.backend == "reference"
    assert fastgan.explain(ops.patch_loss, None, torch.zeros(1, 1, 2, 2), side="generator").op == "patch_loss"


X = torch.zeros(2, 1, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X, X), {"mode": "bce"}, "patch_loss: mode must be one of vanilla, lsgan, wgan, hinge, got 'bce'"),
        ((X, X), {"mode": ["vanilla"]}, "patch_loss: mode must be one of vanilla, lsgan, wgan, hinge, got ['vanilla']"),
        ((X, X), {"side": "d"}, "patch_loss: side must be one of critic, generator, got 'd'"),
        ((X, X), {"over_maps": "max"}, "patch_loss: over_maps must be one of mean, sum, got 'max'"),
        ((None, None), {}, "patch_loss: real or fake must be a map or maps, got None for both"),
        ((X, None), {"side": "generator"}, "patch_loss: fake must be a map or maps for side='generator', got None"),
        (
            (None, X),
            {"paired": True},
            "patch_loss: real must be a map or maps, since paired compares it with fake, got None",
        ),
        (([], X), {}, "patch_loss: real must hold at least one map, got an empty list"),
        (([X, X], [X]), {}, "patch_loss: fake must have as many maps as real = 2, got 1"),
        ((X.long(), X), {}, "patch_loss: real[0] must be floating point, got torch.int64"),
        ((X, X.double()), {}, "patch_loss: fake[0] must be torch.float32 like the first map, got torch.float64"),
        ((X, X.to("meta")), {}, "patch_loss: fake[0] must be on cpu like the first map, got meta"),
        (
            (X, X[..., :0]),
            {},
            "patch_loss: fake[0] must be [N, ...] with at least one element per sample, got [2, 1, 3, 0]",
        ),
        ((X, X[:1]), {"paired": True}, "patch_loss: fake[0] must be like real[0] = [2, 1, 3, 3], got [1, 1, 3, 3]"),
        ((X, X), {"map_weight": [1.0, 2.0]}, "patch_loss: map_weight must be [maps] = [1], got [2]"),
        ((X, X), {"sample_weight": torch.ones(3)}, "patch_loss: sample_weight must be [N] of real[0] = [2], got [3]"),
        (
            (X, X),
            {"sample_weight": torch.ones(2, requires_grad=True)},
            "patch_loss: sample_weight must be a constant, got a tensor that requires grad",
        ),
        (
            (X, X),
            {"real_target": torch.ones((), requires_grad=True)},
            "patch_loss: real_target must be a constant, got a tensor that requires grad",
        ),
    ],
)
def test_messages(arguments, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ops.patch_loss(*arguments, **options)


def test_types():
    with pytest.raises(TypeError, match=r"patch_loss: real must be a Tensor, a list of Tensors or None, got int"):
        ops.patch_loss(3, X)
    with pytest.raises(TypeError, match=r"patch_loss: fake\[1\] must be a Tensor, got float"):
        ops.patch_loss([X, X], [X, 1.0])
    with pytest.raises(TypeError, match=r"map_weight must be a list of floats, a Tensor or None, got float"):
        ops.patch_loss(X, X, map_weight=2.0)


def test_reference_has_third_order():
    x = torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True)
    value = reference.patch_loss(
        [x],
        None,
        mode="vanilla",
        side="critic",
        real_target=1.0,
        fake_target=0.0,
        sample_weight=None,
        map_scale=[1.0],
        paired=False,
    )[0]
    for _ in range(3):
        (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    s = torch.sigmoid(x.detach())
    torch.testing.assert_close(value.detach(), s * (1 - s) * (1 - 2 * s))
