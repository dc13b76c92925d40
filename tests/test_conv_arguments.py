"""Bad input of scaled_conv2d: each wrong argument is named, with what was expected and what came."""

from __future__ import annotations

import pytest
import torch

from fastgan import ops
from fastgan.ops import scaled_conv2d

IMAGE, KERNEL = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)


def conv(x=IMAGE, weight=KERNEL, *scales, epilogue=None, **options):
    return scaled_conv2d(x, weight, *scales, **options, epilogue=ops.Epilogue(**(epilogue or {})))


BAD = [
    (lambda: conv(IMAGE[0], KERNEL), r"x must have 4 dimensions, got \[3, 8, 8\]"),
    (lambda: conv(IMAGE, KERNEL[:, :2]), r"C_in/groups = 3 .* got \[4, 2, 3, 3\]"),
    (lambda: conv(groups=2), r"C_in/groups = 1 .* groups = 2"),
    (lambda: conv(IMAGE, KERNEL, torch.ones(2, 4)), r"in_scale must be \[N, C\] = \[2, 3\], .* got \[2, 4\]"),
    (lambda: conv(IMAGE, KERNEL, None, torch.ones(3)), r"out_scale must be .*\[4\], .* got \[3\]"),
    (lambda: conv(IMAGE, KERNEL.double()), r"weight must be torch.float32 like x, got torch.float64"),
    (lambda: conv(IMAGE.long(), KERNEL), r"x must be floating point, got torch.int64"),
    (lambda: conv(IMAGE, KERNEL.to("meta")), r"weight must be on cpu like x, got meta"),
    (lambda: conv(IMAGE[:, :, :0], KERNEL), r"x must have H and W of at least 1, got \[2, 3, 0, 8\]"),
    (lambda: conv(IMAGE[:, :, :2], KERNEL), r"large enough .* gives 0x6"),
    (lambda: conv(stride=0), r"stride must be an int or \(h, w\), each at least 1, got 0"),
    (lambda: conv(padding=-1), r"padding must be .* got -1"),
    (lambda: conv(padding=8, padding_mode="reflect"), r"padding must be below H and W = \[8, 8\]"),
    (lambda: conv(padding_mode="circular"), r"padding_mode must be one of .* got 'circular'"),
    (lambda: conv(output_padding=1), r"output_padding must be 0 unless transposed"),
    (lambda: conv(IMAGE, KERNEL[:3], transposed=True, output_padding=1), r"output_padding must be below stride"),
    (lambda: conv(epilogue={"bias": torch.ones(3)}), r"epilogue.bias must be \[C_out\] = \[4\]"),
    (lambda: conv(epilogue={"act": "gelu"}), r"epilogue.act must be one of .* got 'gelu'"),
    (lambda: conv(epilogue={"clamp": 0}), r"epilogue.clamp must be positive"),
    (lambda: conv(epilogue={"noise": torch.ones(8, 8)}), r"noise must be \[H, W\] = \[6, 6\]"),
    (lambda: conv(epilogue={"residual": IMAGE}), r"residual must be .* \[2, 4, 6, 6\]"),
    (lambda: conv(backend="metal"), r"backend must be one of .* got 'metal'"),
    (lambda: conv(backend="triton"), r"'triton' .* cannot run this call: it runs on cuda tensors, got cpu"),
    (lambda: conv(backend="cuda"), r"'cuda' .* cannot run this call: it runs on cuda tensors, got cpu"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_errors(function, message):
    with pytest.raises(ValueError, match=r"^scaled_conv2d: .*" + message):
        function()


def test_a_tensor_is_asked_for():
    with pytest.raises(TypeError, match="scaled_conv2d: weight must be a Tensor, got list"):
        scaled_conv2d(IMAGE, [1.0])


def test_options_as_lists():
    """JSON configurations hold lists where Python code would write tuples."""
    got = scaled_conv2d(IMAGE, KERNEL, stride=[2, 1], padding=[1, 1, 1, 1])
    assert torch.equal(got, scaled_conv2d(IMAGE, KERNEL, stride=(2, 1), padding=1))
