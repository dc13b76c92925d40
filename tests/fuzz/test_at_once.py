"""Two and four Python threads in one op or one module at the same time: each gets the bits that it gets alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conv_cases import ConvCase
from dense_cases import DenseCase
from layer_cases import BiasCase, FilterCase, ModulatedCase, NormCase, PixelCase, StddevCase
from loss_cases import MatchingCase, PatchCase, SigmaCase
from oracle import Case, Named, evaluate, threads
from pointwise import Pointwise
from torch import Tensor, nn

from fastgan.models import PatchGAN, UNetGenerator
from fastgan.nn import ModulatedConv2d

PADDED = {"kernel": (3, 3), "padding": (1, 1, 1, 1)}
STYLED = {"in_scale": "NC", "out_scale": "NC"}
ACTIVE = Pointwise(noise="HW", bias=True, act="lrelu")
PATCH = {"mode": "lsgan", "side": "critic", "paired": False, "over_maps": "mean"}
MAPS = ((2, 3, 13, 7), (2, 1500))
# One call of each algorithm of a convolution, and of each other op. Layers that go to torch's convolution are left out:
# how torch splits its sums among threads is its own affair.
CALLS: dict[str, Case] = {
    "winograd": ConvCase(n=1, c_in=128, c_out=130, h=19, w=20, **PADDED, **STYLED, epilogue=ACTIVE),
    "direct": ConvCase(n=2, c_in=3, c_out=20, h=30, w=31, **PADDED, **STYLED, epilogue=ACTIVE),
    "few pixels": ConvCase(n=2, c_in=96, c_out=130, h=4, w=4, **PADDED, **STYLED, epilogue=ACTIVE),
    "unfolded": ConvCase(n=1, c_in=128, c_out=130, h=8, w=8, **PADDED, **STYLED, epilogue=ACTIVE),
    "dense_block": DenseCase(n=1, channels=64, growth=32, layers=3, h=33, w=40, act="lrelu"),
    "upfirdn2d": FilterCase(shape=(2, 3, 17, 19), taps=(4,), up=(2, 2), down=(1, 1), padding=(2, 1, 2, 1)),
    "norm_act": NormCase(
        shape=(2, 5, 31, 33), kind="batch", weight="C", bias="C", running="advanced", act="lrelu", gain=None
    ),
    "bias_act": BiasCase(shape=(2, 5, 31, 33), dim=1, bias=True, act="swish", gain=None, clamp=None),
    "pixel_norm": PixelCase(shape=(2, 5, 31, 33), dim=1),
    "minibatch_stddev": StddevCase(group=2, groups=2, share=5, num_channels=2, h=9, w=11),
    "modulated_conv2d": ModulatedCase(n=1, c_in=80, c_out=8, h=8, w=9, kernel=3, options={"padding": 1}),
    "patch_loss": PatchCase(shapes=MAPS, options=PATCH),
    "feature_matching_loss": MatchingCase(shapes=MAPS, kind="l1", map_weight=None, mask=None),
    "spectral_sigma": SigmaCase(shapes=((64, 48, 3, 3), (33, 70)), dims=(0, 1), order_of_steps="hook", n_iter=2),
}


def at_once(count: int, function: Callable[[int], Named]) -> list[list[Named]]:
    """What ``function(i)`` gave to thread i, three times; all begin together."""
    gate = threading.Barrier(count)

    def work(i: int) -> list[Named]:
        gate.wait()
        return [function(i) for _ in range(3)]

    # Four threads that each woke two more would mostly wait for a core.
    with threads(2 if count == 2 else 1), ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


def hold_together(cases: Sequence[Case], order: int) -> None:
    """A thread per case, each with tensors of its own: the bits of every result are those of the case alone."""
    inputs = [case.inputs() for case in cases]
    for i, tensors in enumerate(inputs):
        for t in tensors.values():
            t.mul_(1 + i / 8)

    def call(i: int) -> Named:
        return evaluate(cases[i], inputs[i], "cpp", order, torch.clone)

    alone = [call(i) for i in range(len(cases))]
    for i, results in enumerate(at_once(len(cases), call)):
        for found in results:
            for name, value in alone[i].items():
                assert torch.equal(found[name], value), f"{cases[i]}: {name}"


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("order", [0, 1], ids=["value", "gradients"])
@pytest.mark.parametrize("name", CALLS)
def test_one_op(name: str, order: int, count: int) -> None:
    hold_together([CALLS[name]] * count, order)


@pytest.mark.parametrize("count", [2, 4])
def test_different_ops(count: int) -> None:
    every = [*CALLS.values()]
    for first in range(0, len(every), count):
        hold_together([every[(first + i) % len(every)] for i in range(count)], 1)


def layer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return ModulatedConv2d(64, 64, 3, style_dim=16, noise=False), (torch.randn(1, 64, 12, 13), torch.randn(1, 16))


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize("name", ["ModulatedConv2d", "UNetGenerator", "PatchGAN"])
def test_one_module(name: str, grad: bool, count: int) -> None:
    """In evaluation, where modules keep what follows from their weights: the first call of each makes it."""
    torch.manual_seed(0)
    make = {
        "ModulatedConv2d": layer,
        "UNetGenerator": lambda: (UNetGenerator(width=8, size=16), (torch.randn(1, 3, 16, 16),)),
        "PatchGAN": lambda: (PatchGAN(3, 8), (torch.randn(1, 3, 48, 48),)),
    }[name]
    module, args = make()
    module.eval()

    def call(i: int) -> Named:
        x = (args[0] * (1 + i / 8)).requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            y = module(x, *args[1:])
            grads = torch.autograd.grad(y.sum(), [x, *module.parameters()], allow_unused=True) if grad else ()
        return {"y": y.detach(), **{f"gradient {i}": g for i, g in enumerate(grads) if g is not None}}

    together = at_once(count, call)
    for i, results in enumerate(together):
        alone = call(i)
        for found in results:
            for key, value in alone.items():
                torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))
