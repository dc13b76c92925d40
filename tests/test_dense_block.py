"""dense_block against its definition: values, gradients, and that tiles are shared exactly where they can be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import fastgan
from fastgan import ops
from fastgan._native import algorithm_calls, winograd_tile_calls
from fastgan.nn import ResidualDenseBlock
from fastgan.ops._kept_weights import kept_bytes
from tests.helpers import CountOps, assert_close_to_float64, gradients, layouts, max_error

BOUND = 1e-5


def by_definition(x: Tensor, weights: list[Tensor], biases: list[Tensor], scale: float = 0.2) -> Tensor:
    features = [x]
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        features.append(F.leaky_relu(F.conv2d(torch.cat(features, 1), weight, bias, padding=1), 0.2))
    return x + scale * F.conv2d(torch.cat(features, 1), weights[-1], biases[-1], padding=1)


def operands(n: int, channels: int, growth: int, h: int, w: int, layers: int = 5) -> tuple[Tensor, list, list]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inputs = [channels + i * growth for i in range(layers)]
    outputs = [growth] * (layers - 1) + [channels]
    weights = [normal(o, i, 3, 3) / (9 * i) ** 0.5 for o, i in zip(outputs, inputs, strict=True)]
    return normal(n, channels, h, w), weights, [normal(o) for o in outputs]


def doubled(tensors: list[Tensor]) -> list[Tensor]:
    return [t.double() for t in tensors]


SHARED = {
    "RRDBNet's": operands(1, 64, 32, 64, 65),
    "batch": operands(3, 64, 32, 33, 39),
    "lines in pieces": operands(1, 64, 16, 21, 203),
    "two layers": operands(1, 64, 64, 40, 41, layers=2),
    "one layer": operands(1, 64, 32, 70, 71, layers=1),
    "more channels than a panel": operands(1, 208, 48, 24, 40, layers=3),
}
ONE_BY_ONE = {
    "channels no multiple of 16": operands(1, 60, 32, 40, 41),
    "growth no multiple of 16": operands(1, 64, 24, 40, 41),
    "few pixels": operands(1, 64, 32, 4, 4),
    "nothing": operands(0, 64, 32, 40, 41),
}


@pytest.mark.parametrize("name", SHARED)
@torch.no_grad()
def test_shared_tiles_against_float64(name):
    """And the same bits for any number of threads, from x in whichever strides."""
    x, weights, biases = SHARED[name]
    exact = by_definition(x.double(), doubled(weights), doubled(biases))
    threads, results, before = torch.get_num_threads(), [], algorithm_calls()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with CountOps() as counter:
                results.append(ops.dense_block(x, weights, biases))
            assert counter.calls["fastgan.dense_block"] == 1
    finally:
        torch.set_num_threads(threads)
    assert algorithm_calls()["winograd"] - before["winograd"] == 3 * len(weights)
    assert max_error(results[0], exact) <= BOUND
    assert all(torch.equal(y, results[0]) for y in results)
    assert torch.equal(ops.dense_block(layouts(x)["sliced"], weights, biases), results[0])


@pytest.mark.parametrize("name", ONE_BY_ONE)
@torch.no_grad()
def test_one_by_one_against_float64(name):
    x, weights, biases = ONE_BY_ONE[name]
    with CountOps() as counter:
        y = ops.dense_block(x, weights, biases)
    assert counter.calls["fastgan.dense_block"] == 0
    exact = by_definition(x.double(), doubled(weights), doubled(biases))
    assert y.shape == exact.shape
    assert max_error(y, exact) <= BOUND


@torch.no_grad()
def test_channels_last_stays_so():
    x, weights, biases = SHARED["RRDBNet's"]
    y = ops.dense_block(layouts(x)["channels_last"], weights, biases)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert max_error(y, by_definition(x.double(), doubled(weights), doubled(biases))) <= BOUND


@torch.no_grad()
def test_settings():
    """Of the epilogues, of the residual, and no biases."""
    x, weights, _ = SHARED["two layers"]
    exact = ops.dense_block(
        x.double(), doubled(weights), act="swish", gain=1.3, residual_scale=0.7, backend="reference"
    )
    with CountOps() as counter:
        y = ops.dense_block(x, weights, act="swish", gain=1.3, residual_scale=0.7)
    assert counter.calls["fastgan.dense_block"] == 1
    assert max_error(y, exact) <= BOUND


@torch.no_grad()
def test_high_precision():
    x, weights, biases = SHARED["RRDBNet's"]
    exact = by_definition(x.double(), doubled(weights), doubled(biases)) - x.double()
    before = winograd_tile_calls()
    with fastgan.precision("high"):
        y = ops.dense_block(x, weights, biases)
    ran = {tile for tile, calls in winograd_tile_calls().items() if calls > before[tile]}
    assert ran == {(2, 3)}
    assert max_error(y - x, exact) <= 3 * max_error(by_definition(x, weights, biases) - x, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients(dtype):
    x, weights, biases = operands(2, 16, 8, 9, 10, layers=3)
    flat = [t.to(dtype) for t in (x, *weights, *biases)]

    def block(x: Tensor, *rest: Tensor, backend: str = "cpp") -> Tensor:
        return ops.dense_block(x, rest[:3], rest[3:], backend=backend)

    exact = gradients(block, doubled(flat))
    fused, plain = gradients(block, flat), gradients(lambda *t: block(*t, backend="reference"), flat)
    floor = {torch.float32: 3e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    for i, (got, other, want) in enumerate(zip(fused, plain, exact, strict=True)):
        assert_close_to_float64(got, other, want, floor=floor, what=f"result {i}")


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_both_orders(backend):
    x, weights, biases = operands(1, 2, 1, 3, 4, layers=3)
    flat = [t.double().requires_grad_() for t in (x, *weights, *biases)]

    def block(x: Tensor, *rest: Tensor) -> Tensor:
        return ops.dense_block(x, rest[:3], rest[3:], act="softplus", backend=backend)

    assert gradcheck(block, flat)
    assert gradgradcheck(block, flat)


def test_opcheck():
    x, weights, biases = SHARED["two layers"]
    arguments = (x, weights, biases, "lrelu", 0.2, 1.0, 0.2, "fp32")
    torch.library.opcheck(torch.ops.fastgan.dense_block.default, arguments)


def test_compiles_without_breaks():
    x, weights, biases = SHARED["two layers"]
    with torch.no_grad():
        got = torch.compile(ops.dense_block, fullgraph=True, backend="aot_eager")(x, weights, biases)
        assert max_error(got, ops.dense_block(x, weights, biases)) <= BOUND


def test_the_ops_own_derivative_is_refused():
    x, weights, biases = SHARED["two layers"]
    y = torch.ops.fastgan.dense_block(x.detach().requires_grad_(), weights, biases, "lrelu", 0.2, 1.0, 0.2, "fp32")
    with pytest.raises(NotImplementedError, match="no derivative"):
        y.sum().backward()


@torch.no_grad()
def test_a_nan_stays_in_its_sample():
    x, weights, biases = SHARED["batch"]
    x = x.clone()
    x[1, 3, 5, 7] = float("nan")
    bad = ops.dense_block(x, weights, biases).isnan().flatten(1).any(1)
    assert bad.tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda x, w, b: (x[0], w, b), ValueError, "x must have 4 dimensions"),
        (lambda x, w, b: (x, [], []), ValueError, "weights must have at least one kernel, got none"),
        (lambda x, w, b: (x, w, b[:-1]), ValueError, "biases must be 5, one for each weight, got 4"),
        (lambda x, w, b: (x, [*w[:4], w[3]], b), ValueError, r"weights\[4\] must be \[64, 192, 3, 3\], got"),
        (lambda x, w, b: (x, [w[0], *w[2:]], b[1:]), ValueError, r"weights\[1\] must be \[32, 96, 3, 3\], got"),
        (lambda x, w, b: (x, w, [*b[:4], b[0]]), ValueError, r"biases\[4\] must be \[64\], got \[32\]"),
        (lambda x, w, b: (x.double(), w, b), ValueError, "must be torch.float64 like x, got torch.float32"),
        (lambda x, w, b: (x, [w[0], None, *w[2:]], b), TypeError, r"weights\[1\] must be a Tensor, got NoneType"),
    ],
)
def test_errors(change, error, text):
    with pytest.raises(error, match=f"dense_block: .*{text}"):
        ops.dense_block(*change(*SHARED["RRDBNet's"]))


class PlainBlock(nn.Module):
    """The block as people write it."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        for i in range(5):
            self.add_module(f"conv{i + 1}", nn.Conv2d(channels + i * growth, channels if i == 4 else growth, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self.children())
        return by_definition(x, [layer.weight for layer in layers], [layer.bias for layer in layers])


def test_the_module_takes_the_plain_ones_place():
    torch.manual_seed(0)
    plain, ours = PlainBlock(64, 32), ResidualDenseBlock(64, 32)
    ours.load_state_dict(plain.state_dict())
    x, before = torch.randn(1, 64, 64, 65), kept_bytes()
    with torch.no_grad():
        first = ours(x)
        assert max_error(first, plain.double()(x.double())) <= BOUND
        kept = kept_bytes()
        assert kept > before
        assert torch.equal(ours(x), first)
        assert kept_bytes() == kept
        ours.conv3.weight.data.mul_(2.0)
        plain.conv3.weight.mul_(2.0)
        assert max_error(ours(x), plain(x.double())) <= BOUND
    assert ours(x).grad_fn is not None
    assert max_error(ours(x).detach(), plain(x.double()).detach()) <= BOUND


def test_the_modules_start():
    torch.manual_seed(0)
    block = ResidualDenseBlock()
    for convolution in block.children():
        std = 0.1 * (2 / (9 * convolution.in_channels)) ** 0.5
        assert convolution.weight.std().item() == pytest.approx(std, rel=0.05)
        assert not convolution.bias.any()
    with pytest.raises(
        ValueError, match="ResidualDenseBlock: num_feat and num_grow_ch must be at least 1, got 0 and 32"
    ):
        ResidualDenseBlock(0)
