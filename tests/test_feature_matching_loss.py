"""feature_matching_loss: values and gradients of both orders against float64, masks, layouts, messages."""

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

# The module, not the function of the same name that the package exports.
feature_matching = importlib.import_module("fastgan.ops.feature_matching_loss")
KINDS = ("l1", "l2")
SHAPES = [(2, 3, 5, 7), (2, 4, 16, 17), (2, 5, 37, 41)]
needs_cpp = pytest.mark.skipif(
    fastgan.backends.available()["cpp"] is not None, reason="the C++ library is not loaded: nothing but the reference"
)


def make_maps(seed: int, dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def make_masks(seed: int, shapes=SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand((n, 1, *rest), generator=generator) * (i != 1) for i, (n, _, *rest) in enumerate(shapes)]


def leaves(maps: list[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in maps]


def eager_loss(fake, real, kind, weights, masks=None) -> Tensor:
    """What people write today."""
    total = 0.0
    for i, (f, r, weight) in enumerate(zip(fake, real, weights, strict=True)):
        if masks is None:
            total = total + weight * (F.l1_loss if kind == "l1" else F.mse_loss)(f, r)
        elif masks[i].sum() > 0:
            distance = (f - r).abs() if kind == "l1" else (f - r) ** 2
            mask = masks[i].to(f).expand_as(f)
            total = total + weight * (distance * mask).sum() / mask.sum()
    return total


def value_and_gradients(function, fake, real) -> list[Tensor]:
    fake, real = leaves(fake), leaves(real)
    loss = function(fake, real)
    found = torch.autograd.grad(loss, [*fake, *real], allow_unused=True, materialize_grads=True)
    return [loss.detach(), *found]


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kind", "masked"), list(itertools.product(KINDS, (False, True))))
def test_value_and_gradient_against_float64(kind, masked, dtype):
    weights, masks = [1.0, 0.5, 2.0], make_masks(2) if masked else None
    options = {"kind": kind, "map_weight": weights, "mask": masks}
    fake, real = make_maps(0, dtype), make_maps(1, dtype)
    wide = ([x.double() for x in fake], [x.double() for x in real])
    fused = value_and_gradients(lambda f, r: ops.feature_matching_loss(f, r, **options, backend="cpp"), fake, real)
    exact = value_and_gradients(lambda f, r: ops.feature_matching_loss(f, r, **options, backend="reference"), *wide)
    by_hand = value_and_gradients(lambda f, r: eager_loss(f, r, kind, weights, masks), *wide)
    eager = value_and_gradients(lambda f, r: eager_loss(f, r, kind, weights, masks), fake, real)
    assert fused[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for i, (a, b, c, d) in enumerate(zip(fused, eager, exact, by_hand, strict=True)):
        torch.testing.assert_close(c, d, rtol=1e-12, atol=1e-15)
        floor = None if i else FLOORS[a.dtype]
        assert_close_to_float64(a, (b if i else c).to(a.dtype), c, floor=floor, what=f"output {i}")


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
            opname = "feature_matching_loss" + ("" if name == "forward" else f"_{name}")
            library.impl(opname, counted(getattr(feature_matching, f"_{name}_plain")), "CPU", allow_override=True)
        yield
    assert len(set(calls)) == 3


@needs_cpp
@pytest.mark.parametrize(("kind", "masked"), list(itertools.product(KINDS, (False, True))))
def test_gradcheck_and_gradgradcheck(kind, masked, kernel):
    shapes = [(2, 2, 3, 2), (2, 1, 1, 2)]
    fake, real = (leaves(make_maps(seed, torch.float64, shapes)) for seed in (3, 4))
    fake[0].data = fake[0].data.contiguous(memory_format=torch.channels_last)
    masks = [m.double() for m in make_masks(5, shapes)] if masked else None

    def loss(*maps):
        return ops.feature_matching_loss(
            maps[:2], maps[2:], kind=kind, map_weight=[1.0, 3.0], mask=masks, backend="cpp"
        )

    assert torch.autograd.gradcheck(loss, (*fake, *real))
    assert torch.autograd.gradgradcheck(loss, (*fake, *real))


@needs_cpp
@pytest.mark.parametrize("kind", KINDS)
def test_third_order_raises_and_names_the_reference(kind):
    fake, real = leaves(make_maps(6, torch.float64)), make_maps(7, torch.float64)
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    loss = ops.feature_matching_loss(fake, real, kind=kind, backend="cpp") * scale
    first = torch.autograd.grad(loss, fake, create_graph=True)
    second = torch.autograd.grad(first[0].pow(3).sum(), scale, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"fastgan\.reference\.feature_matching_loss"):
        torch.autograd.grad(second[0], fake[0])


@needs_cpp
@pytest.mark.parametrize(("kind", "masked"), list(itertools.product(KINDS, (False, True))))
def test_opcheck(kind, masked):
    fake, real = leaves(make_maps(8)), leaves(make_maps(9))
    masks = make_masks(10) if masked else []
    weight = [1.0, 0.5, 2.0]
    torch.library.opcheck(
        torch.ops.fastgan.feature_matching_loss.default, (fake, real, masks, weight, kind, kind == "l1")
    )
    _, signs, factors = feature_matching._forward(fake, real, masks, weight, kind, kind == "l1")
    grad = torch.tensor(2.0, requires_grad=True)
    torch.library.opcheck(
        torch.ops.fastgan.feature_matching_loss_bwd.default, (grad, signs, factors, fake, real, masks, kind, True, True)
    )
    fixed = ([x.detach() for x in fake], [x.detach() for x in real])
    cotangents = [0.1 * x for x in (*fixed[0], *fixed[1])]
    setting = (grad.detach(), signs, factors, *fixed, masks, kind, True, True)
    torch.library.opcheck(torch.ops.fastgan.feature_matching_loss_bwd_bwd.default, (cotangents, *setting))


@needs_cpp
@pytest.mark.parametrize(("kind", "compiler"), [("l1", "aot_eager"), ("l2", "aot_eager"), ("l1", "inductor")])
def test_compiled_without_graph_breaks(kind, compiler):
    torch.compiler.reset()

    masks = make_masks(0)

    def masked(fake, real):
        return ops.feature_matching_loss([x * 2 for x in fake], [x * 2 for x in real], kind=kind, mask=masks)

    compiled = torch.compile(masked, fullgraph=True, backend=compiler)
    fake, real = make_maps(11), make_maps(12)
    for a, b in zip(value_and_gradients(compiled, fake, real), value_and_gradients(masked, fake, real), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@needs_cpp
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("fake_layout", ["contiguous", "channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("real_layout", ["contiguous", "channels_last"])
def test_layouts(kind, masked, fake_layout, real_layout):
    shape = [(3, 5, 13, 19)]
    fake = layouts(make_maps(13, shapes=shape)[0])[fake_layout]
    real = layouts(make_maps(14, shapes=shape)[0])[real_layout]
    mask = make_masks(15, shape)[0] if masked else None

    def result(fake, real, backend):
        fake, real = fake.detach().requires_grad_(), real.detach().requires_grad_()
        loss = ops.feature_matching_loss(fake, real, kind=kind, mask=mask, backend=backend)
        return [loss, *torch.autograd.grad(loss, [fake, real])]

    expected = result(fake.contiguous().double(), real.contiguous().double(), "reference")
    for a, b in zip(result(fake, real, "cpp"), expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=1e-9)


@needs_cpp
@pytest.mark.parametrize("kind", KINDS)
def test_equal_values_nan_and_infinity(kind):
    fake = torch.tensor([[1.0, 2.0, 3.0, float("nan"), 5.0]], requires_grad=True)
    real = torch.tensor([[1.0, 3.0, 2.0, 4.0, float("-inf")]])
    loss = ops.feature_matching_loss(fake, real, kind=kind, backend="cpp")
    assert torch.isnan(loss)
    (gradient,) = torch.autograd.grad(loss, fake)
    expected = [0.0, -0.2, 0.2, float("nan"), 0.2] if kind == "l1" else [0.0, -0.4, 0.4, float("nan"), float("inf")]
    torch.testing.assert_close(gradient, torch.tensor([expected]), equal_nan=True)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch_and_mask_of_zeros(backend, kind):
    if fastgan.backends.available()[backend] is not None:
        pytest.skip(f"{backend} is unavailable")
    empty = torch.empty(0, 3, 4, 4, requires_grad=True)
    loss = ops.feature_matching_loss(empty, empty.detach(), kind=kind, backend=backend)
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss, empty)[0].shape == empty.shape
    fake = torch.randn(2, 3, 4, 4, requires_grad=True)
    mask = torch.zeros(1, 1, 4, 1, dtype=torch.bool)
    loss = ops.feature_matching_loss(fake, torch.zeros_like(fake), kind=kind, mask=mask, backend=backend)
    assert loss.item() == 0.0
    assert not torch.autograd.grad(loss, fake)[0].any()


@needs_cpp
def test_signs_are_packed_in_one_format():
    """The plain kernels and the C++ ones read each other's signs."""
    fake, real = make_maps(16), make_maps(17)
    fake[0][0, 0, 0, :2] = torch.tensor([float("nan"), 1.0])
    real[0][0, 0, 0, 1] = 1.0
    fake[1] = fake[1].contiguous(memory_format=torch.channels_last)
    real[1] = real[1].contiguous(memory_format=torch.channels_last)
    _, signs, factors = feature_matching._forward(fake, real, [], [1.0] * 3, "l1", True)
    _, plain_signs, plain_factors = feature_matching._forward_plain(fake, real, [], [1.0] * 3, "l1", True)
    assert torch.equal(signs, plain_signs)
    torch.testing.assert_close(factors, plain_factors)
    assert signs.numel() * 4 < 0.1 * sum(x.numel() * 4 for x in fake)


@needs_cpp
def test_nothing_is_computed_that_nobody_asked_for():
    fake, real = make_maps(18), make_maps(19)
    with CountOps() as count:
        ops.feature_matching_loss(fake, real)
    assert count.calls == {"fastgan.feature_matching_loss": 1}
    wanted = leaves(fake)
    with CountOps() as count:
        found = torch.autograd.grad(ops.feature_matching_loss(wanted, real), wanted)
    assert {k: v for k, v in count.calls.items() if k.startswith("fastgan.")} == {
        "fastgan.feature_matching_loss": 1,
        "fastgan.feature_matching_loss_bwd": 1,
    }
    assert len(found) == 3
    # Without gradients to come no signs are kept, and for l2 none ever.
    assert feature_matching._forward(fake, real, [], [1.0] * 3, "l1", False)[1].numel() == 0
    assert feature_matching._forward(fake, real, [], [1.0] * 3, "l2", True)[1].numel() == 0


@needs_cpp
def test_same_bits_for_any_number_of_threads():
    fake, real = make_maps(20, shapes=[(2, 8, 101, 103)]), make_maps(21, shapes=[(2, 8, 101, 103)])
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(value_and_gradients(ops.feature_matching_loss, fake, real))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


X = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X, X), {"kind": "huber"}, "kind must be one of l1, l2, got 'huber'"),
        (([X], [X, X]), {}, "real must have as many maps as fake = 1, got 2"),
        (([], [X]), {}, "fake must hold at least one map, got an empty list"),
        ((X, X[:, :2]), {}, "real[0] must be like fake[0] = [2, 3, 4, 4], got [2, 2, 4, 4]"),
        ((X, X.half()), {}, "real[0] must be torch.float32 like fake[0], got torch.float16"),
        ((X, X.to("meta")), {}, "real[0] must be on cpu like fake[0], got meta"),
        (
            (X[..., :0], X[..., :0]),
            {},
            "fake[0] must be [N, C, ...] with at least one element per sample, got [2, 3, 4, 0]",
        ),
        ((X, X), {"map_weight": [1.0, 1.0]}, "map_weight must be [maps] = [1], got [2]"),
        ((X, X), {"mask": torch.ones(2, 3, 4, 4)}, "mask[0] must be broadcastable to [2, 1, 4, 4], got [2, 3, 4, 4]"),
        ((X, X), {"mask": [X, X]}, "mask must be a tensor or have as many maps as fake = 1, got 2"),
        (
            (X, X),
            {"mask": torch.ones(1, 1, 4, 4, requires_grad=True)},
            "mask[0] must be a constant, got a tensor that requires grad",
        ),
    ],
)
def test_messages(arguments, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(f'feature_matching_loss: {message}')}$"):
        ops.feature_matching_loss(*arguments, **options)


def test_types_and_choice():
    with pytest.raises(TypeError, match=r"feature_matching_loss: fake must be a Tensor or a list of Tensors, got int"):
        ops.feature_matching_loss(3, X)
    with pytest.raises(TypeError, match=r"feature_matching_loss: mask\[0\] must be a Tensor, got float"):
        ops.feature_matching_loss(X, X, mask=[1.0])
    assert fastgan.explain(ops.feature_matching_loss, X, X, backend="reference").backend == "reference"


@needs_cpp
@pytest.mark.parametrize("kind", KINDS)
def test_retained_graph_answers_every_backward_pass(kind):
    """What one pass was asked for must not narrow the next."""
    fake, real = leaves(make_maps(22)), leaves(make_maps(23))
    loss = ops.feature_matching_loss(fake, real, kind=kind)
    alone = torch.autograd.grad(loss, fake[0], retain_graph=True)[0]
    both = torch.autograd.grad(loss, [*fake, *real], retain_graph=True)
    again = torch.autograd.grad(loss, [*fake, *real])
    assert torch.equal(alone, both[0])
    assert all(torch.equal(a, b) for a, b in zip(both, again, strict=True))
    assert all(torch.equal(a, -b) for a, b in zip(both[:3], both[3:], strict=True))
