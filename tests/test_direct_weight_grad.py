"""The weight's gradient where the C++ library adds it up itself, for few channels and for many: against float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from helpers import assert_close_to_float64, layouts
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastgan import ops  # noqa: F401  (registers the op)
from fastgan._native import algorithm_calls


@dataclass(frozen=True)
class Call:
    """The convolution whose weight [c_out, c_in, kh, kw] is differentiated."""

    n: int
    c_in: int
    c_out: int
    h: int
    w: int
    kernel: tuple[int, int]
    stride: int
    padding: int
    dilation: int = 1

    def sizes(self) -> list[int]:
        """Height and width of the result."""
        spans = [self.dilation * (kernel - 1) + 1 for kernel in self.kernel]
        pairs = zip((self.h, self.w), spans, strict=True)
        return [(size + 2 * self.padding - span) // self.stride + 1 for size, span in pairs]

    def inputs(self, in_scale: tuple | None = None, g_scale: tuple | None = None, seed: int = 0) -> list[Tensor | None]:
        """x, g and scales of the given shapes, "C" and "N" standing for the sizes, spread by 10x."""
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(self.n, self.c_in, self.h, self.w, generator=g)
        cotangent = torch.randn(self.n, self.c_out, *self.sizes(), generator=g)
        scales = []
        for shape, channels in ((in_scale, self.c_in), (g_scale, self.c_out)):
            size = None if shape is None else [{"N": self.n, "C": channels}.get(s, s) for s in shape]
            scales.append(None if size is None else 10 ** (torch.rand(size, generator=g) - 0.5))
        return [x, cotangent, *scales]


CASES = {
    "image in": Call(1, 3, 64, 64, 65, (4, 4), 2, 1),
    "pair in, odd": Call(2, 6, 70, 31, 29, (4, 4), 2, 1),
    "logit": Call(3, 300, 1, 15, 18, (4, 4), 1, 1),
    "colour": Call(2, 130, 3, 16, 24, (1, 1), 1, 0),
    "3x3": Call(2, 8, 50, 17, 32, (3, 3), 1, 1),
    "7x7": Call(1, 3, 9, 20, 33, (7, 7), 1, 3),
    "stride 3": Call(2, 4, 10, 50, 49, (5, 5), 3, 2),
    "1x1 stride 2": Call(2, 8, 10, 33, 34, (1, 1), 2, 0),
    "dilated": Call(2, 8, 10, 33, 34, (3, 3), 2, 3, 2),
    "not square": Call(2, 3, 20, 5, 40, (2, 5), 1, 2),
    "few pixels": Call(3, 64, 130, 8, 7, (3, 3), 1, 1),
    "few pixels, stride 2": Call(2, 48, 131, 16, 13, (4, 4), 2, 1),
    "one pixel": Call(1, 80, 64, 2, 2, (4, 4), 2, 1),
    "few pixels, dilated": Call(2, 80, 70, 11, 10, (3, 4), 1, 2, 2),
    "few pixels, 7x7": Call(2, 32, 66, 11, 10, (7, 7), 1, 3),
    "chunks of lines": Call(2, 20, 33, 21, 40, (3, 3), 1, 1),
    "chunks of lines, stride 2": Call(1, 70, 130, 40, 44, (4, 3), 2, 1),
    "chunks of samples": Call(19, 17, 19, 5, 6, (3, 3), 1, 1),
    "a line as long as a chunk": Call(1, 9, 16, 3, 256, (3, 3), 1, 1),
    "one channel each": Call(1, 1, 1, 30, 30, (3, 3), 1, 1),
    "many lines": Call(1, 2, 6, 600, 16, (3, 3), 1, 1),
    "filtered 3x3": Call(2, 130, 115, 33, 32, (3, 3), 1, 1),
    "filtered 3x3, two chunks": Call(2, 128, 120, 64, 60, (3, 3), 1, 1),
    "filtered stride 2": Call(3, 67, 82, 37, 41, (4, 4), 2, 1),
    "filtered stride 1": Call(2, 48, 70, 19, 18, (4, 4), 1, 1),
    "filtered, no padding": Call(2, 96, 80, 44, 44, (4, 4), 2, 0),
    "filtered, much padding": Call(1, 112, 129, 32, 29, (4, 4), 1, 3),
    "filtered, many small maps": Call(19, 64, 64, 12, 12, (4, 4), 2, 1),
    "one long line": Call(3, 2, 6, 1, 1500, (1, 3), 1, 0),
}


def run(call: Call, x: Tensor, g: Tensor, in_scale: Tensor | None = None, g_scale: Tensor | None = None) -> Tensor:
    """The C++ op itself."""
    pairs = [[v, v] for v in (call.stride, call.padding, call.dilation)]
    size = [call.c_out, call.c_in, *call.kernel]
    return torch.ops.fastgan.scaled_conv2d_weight_grad.default(x, g, in_scale, g_scale, size, *pairs, 1, "fp32")


def plain(call: Call, x: Tensor, g: Tensor, in_scale: Tensor | None = None, g_scale: Tensor | None = None) -> Tensor:
    """What autograd of eager torch computes."""
    x = x if in_scale is None else x * in_scale[:, :, None, None]
    g = g if g_scale is None else g * g_scale[:, :, None, None]
    weight = torch.zeros(call.c_out, call.c_in, *call.kernel, dtype=x.dtype, requires_grad=True)
    y = torch.nn.functional.conv2d(x, weight, None, call.stride, call.padding, call.dilation)
    return torch.autograd.grad(y, weight, g)[0]


def check(call: Call, inputs: list[Tensor | None]) -> Tensor:
    got = run(call, *inputs)
    exact = plain(call, *[None if t is None else t.double() for t in inputs])
    assert_close_to_float64(got, plain(call, *inputs), exact, floor=1e-6)
    return got


def runs_torch(call: Call, inputs: list[Tensor | None]) -> bool:
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        run(call, *inputs)
    return any(event.key.startswith("aten::convolution_backward") for event in trace.key_averages())


@pytest.mark.parametrize("name", CASES)
def test_values_against_float64(name):
    """Also that torch's own is not called, and the same bits for any number of threads."""
    call = CASES[name]
    inputs = call.inputs(("N", "C"), ("N", "C"))
    filtered = algorithm_calls()["winograd_weight_grad"]
    want = check(call, inputs)
    assert algorithm_calls()["winograd_weight_grad"] - filtered == name.startswith("filtered")
    assert not runs_torch(call, inputs)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(run(call, *inputs), want)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [None, ("N", "C"), ("N", 1), (1, "C"), (1, 1)], ids=str)
def test_every_form_of_scale(shape):
    """Of x and of g, where lines of g are whole registers (32 pixels) and where not (33); few pixels; filtered."""
    own = (CASES["few pixels"], CASES["filtered stride 2"])
    for call in (*(Call(3, 5, 7, 9, w, (3, 3), 1, 1) for w in (32, 33)), *own):
        check(call, call.inputs(in_scale=shape))
        check(call, call.inputs(g_scale=shape))


@pytest.mark.parametrize("layout", ["sliced", "expanded"])
@pytest.mark.parametrize(
    "name", ["image in", "3x3", "pair in, odd", "few pixels", "chunks of lines", "filtered stride 2"]
)
def test_views(name, layout):
    """Of x and of g: the values are those of dense tensors, bit for bit, and the tensors are left alone."""
    call = CASES[name]
    x, g = (layouts(t)[layout] for t in call.inputs()[:2])
    before = x.clone(), g.clone()
    assert torch.equal(run(call, x, g), run(call, x.contiguous(), g.contiguous()))
    assert torch.equal(x, before[0])
    assert torch.equal(g, before[1])


def test_nan_and_infinity_reach_the_gradient():
    """Of the channel that has them, and of no other."""
    names = ("3x3", "few pixels", "chunks of lines", "filtered stride 1", "filtered 3x3")
    for name, side, value in itertools.product(names, (0, 1), (torch.nan, torch.inf)):
        call = CASES[name]
        inputs = call.inputs()
        inputs[side][1, 4, 4, 5] = value
        finite = run(call, *inputs).isfinite()
        index = (slice(None), 4) if side == 0 else (4,)
        assert not finite[index].any()
        finite[index] = True
        assert finite.all()


def test_what_is_left_to_torch():
    """Few channels of short lines, long lines, 1x1, channels_last, float64 and arguments that torch refuses."""
    left = {
        "lines of 11 pixels": Call(1, 3, 8, 16, 11, (3, 3), 1, 1),
        "one product per pixel": Call(1, 40, 1, 16, 16, (1, 1), 1, 0),
        "lines of 257 pixels": Call(1, 20, 20, 5, 257, (3, 3), 1, 1),
        "few rows": Call(1, 64, 8, 8, 8, (3, 3), 1, 1),
        "1x1": Call(1, 512, 512, 8, 8, (1, 1), 1, 0),
    }
    for name, call in left.items():
        assert runs_torch(call, call.inputs()), name
    call = Call(1, 8, 17, 16, 12, (3, 3), 1, 1)
    x, g, _, _ = call.inputs()
    assert not runs_torch(call, [x, g])
    assert runs_torch(call, [layouts(x)["channels_last"], g])
    assert runs_torch(call, [x, layouts(g)["channels_last"]])
    assert runs_torch(call, [x.double(), g.double()])
    with pytest.raises(RuntimeError, match="Expected a tensor of dimension 4"):
        run(call, x, g[:, :, 1:])
