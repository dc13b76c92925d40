"""The checks of scaled_conv2d, once and in one place: what a caller may pass, turned into what kernels take."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgan.ops import _check
from fastgan.ops._epilogue import check_epilogue, contiguous, epilogue_tensors
from fastgan.reference.epilogue import Epilogue

_NAME = "scaled_conv2d"


def _pair(name: str, value: int | tuple[int, int], minimum: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(v, int) or v < minimum for v in pair):
        raise ValueError(f"{_NAME}: {name} must be an int or (h, w), each at least {minimum}, got {value}")
    return pair


def _four(padding: int | tuple[int, ...]) -> tuple[int, int, int, int]:
    values = (padding,) * 4 if isinstance(padding, int) else tuple(padding)
    if len(values) == 2:
        values = (values[1], values[1], values[0], values[0])
    if len(values) != 4 or any(not isinstance(v, int) or v < 0 for v in values):
        raise ValueError(
            f"{_NAME}: padding must be an int, (h, w) or (left, right, top, bottom), each at least 0, got {padding}"
        )
    return values


@dataclass(frozen=True)
class ConvArguments:
    """The convolution's options: pairs are (h, w), padding is (left, right, top, bottom)."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    output_padding: tuple[int, int]
    dilation: tuple[int, int]
    padding_mode: str
    transposed: bool
    groups: int

    def output_size(self, input_hw: torch.Size, kernel_hw: torch.Size) -> tuple[int, int]:
        """(H', W') in pixels."""
        left, right, top, bottom = self.padding
        sizes = []
        for i, pad in enumerate((top + bottom, left + right)):
            span = self.dilation[i] * (kernel_hw[i] - 1) + 1
            if self.transposed:
                sizes.append((input_hw[i] - 1) * self.stride[i] - pad + span + self.output_padding[i])
            else:
                sizes.append((input_hw[i] + pad - span) // self.stride[i] + 1)
        return tuple(sizes)

    def as_kwargs(self) -> dict:
        """The reference's keyword arguments."""
        return dict(vars(self))


@dataclass(frozen=True)
class Geometry:
    """The linear part's fixed arguments, in the order of the op's schema; all that follows from a call has its
    precision, the gradients too."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    output_padding: tuple[int, int]
    dilation: tuple[int, int]
    transposed: bool
    groups: int
    precision: str  # see fastgan.precision

    def adjoint(self, input_hw: torch.Size, output_hw: torch.Size, kernel_hw: torch.Size) -> Geometry:
        """The convolution that maps cotangents of the output back to the input, with the same weight."""
        if self.transposed:
            return replace(self, output_padding=(0, 0), transposed=False)
        extra = tuple(
            input_hw[i]
            + 2 * self.padding[i]
            - self.dilation[i] * (kernel_hw[i] - 1)
            - 1
            - (output_hw[i] - 1) * self.stride[i]
            for i in (0, 1)
        )
        return replace(self, output_padding=extra, transposed=True)

    def as_args(self) -> tuple:
        """The op's arguments from stride to precision."""
        options = (self.stride, self.padding, self.output_padding, self.dilation, self.transposed, self.groups)
        return (*options, self.precision)


def resolve(stride, padding, output_padding, dilation, padding_mode, transposed, groups) -> ConvArguments:
    """From the public function's arguments; raises ValueError for those that no tensor could make right."""
    args = ConvArguments(
        _pair("stride", stride, 1),
        _four(padding),
        _pair("output_padding", output_padding, 0),
        _pair("dilation", dilation, 1),
        padding_mode,
        bool(transposed),
        groups,
    )
    _check.one_of(_NAME, "padding_mode", padding_mode, ("zeros", "reflect", "replicate"))
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"{_NAME}: groups must be an int, at least 1, got {groups}")
    left, right, top, bottom = args.padding
    if args.transposed:
        if padding_mode != "zeros":
            raise ValueError(f"{_NAME}: padding_mode must be zeros when transposed, got {padding_mode!r}")
        if left != right or top != bottom:
            raise ValueError(f"{_NAME}: padding must be symmetric when transposed, got {args.padding}")
        if any(extra >= step for extra, step in zip(args.output_padding, args.stride, strict=True)):
            raise ValueError(f"{_NAME}: output_padding must be below stride = {args.stride}, got {args.output_padding}")
    elif any(args.output_padding):
        raise ValueError(f"{_NAME}: output_padding must be 0 unless transposed, got {args.output_padding}")
    return args


def check_call(
    x: Tensor,
    weight: Tensor,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    args: ConvArguments,
    epilogue: Epilogue,
) -> None:
    """Check all that depends on the tensors: kinds, shapes, dtypes, devices, and the epilogue's options."""
    _check.tensor(_NAME, "x", x, ndim=4)
    _check.tensor(_NAME, "weight", weight, ndim=4)
    others = {"weight": weight, "in_scale": in_scale, "out_scale": out_scale}
    for name, value in others.items():
        if value is not None:
            _check.tensor(_NAME, name, value)
    _check.same_device(_NAME, x=x, **others)
    _check.same_dtype(_NAME, x=x, weight=weight)
    c_in, c_out = _channels(x, weight, args)
    hw = _spatial(x, weight, args)
    n = x.shape[0]
    _check_scale("in_scale", in_scale, n, c_in)
    _check_scale("out_scale", out_scale, n, c_out)
    check_epilogue(_NAME, epilogue, x, (n, c_out, *hw))


def _channels(x: Tensor, weight: Tensor, args: ConvArguments) -> tuple[int, int]:
    c_in = x.shape[1]
    if args.transposed:
        expected, got, c_out = c_in, weight.shape[0], weight.shape[1] * args.groups
        axis = "weight must be [C_in, C_out/groups, k, k] with C_in"
    else:
        expected, got, c_out = c_in // args.groups, weight.shape[1], weight.shape[0]
        axis = "weight must be [C_out, C_in/groups, k, k] with C_in/groups"
    if got != expected or c_in % args.groups or c_out % args.groups:
        raise ValueError(
            f"{_NAME}: {axis} = {expected} for x {list(x.shape)} and groups = {args.groups}, got {list(weight.shape)}"
        )
    return c_in, c_out


def _spatial(x: Tensor, weight: Tensor, args: ConvArguments) -> tuple[int, int]:
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"{_NAME}: x must have H and W of at least 1, got {list(x.shape)}")
    if args.padding_mode == "reflect":
        left, right, top, bottom = args.padding
        if max(left, right) >= x.shape[3] or max(top, bottom) >= x.shape[2]:
            raise ValueError(
                f"{_NAME}: padding must be below H and W = {list(x.shape[2:])} when it reflects, got {args.padding}"
            )
    hw = args.output_size(x.shape[2:], weight.shape[2:])
    if hw[0] < 1 or hw[1] < 1:
        raise ValueError(
            f"{_NAME}: x must be large enough for a result of at least 1x1, got {list(x.shape)} with kernel "
            f"{list(weight.shape[2:])}, which gives {hw[0]}x{hw[1]}"
        )
    return hw


def _check_scale(name: str, scale: Tensor | None, n: int, c: int) -> None:
    if scale is not None and tuple(scale.shape) not in ((n, c), (1, c), (c,), (1, 1), ()):
        raise ValueError(
            f"{_NAME}: {name} must be [N, C] = {[n, c]}, {[1, c]}, {[c]}, [1, 1] or 0-dim, got {list(scale.shape)}"
        )


def kernel_tensors(
    x: Tensor, in_scale: Tensor | None, out_scale: Tensor | None, epilogue: Epilogue
) -> tuple[Tensor | None, ...]:
    """The checked tensors behind x and weight as kernels take them, in the order of the op's schema.

    Scales are [N or 1, C or 1], noise [N or 1, 1, H', W'], its strength 0-dim, bias [C_out], all contiguous and in the
    accumulation dtype; the residual has x's dtype.
    """
    wide = _check.accumulate_dtype(x.dtype)
    scales = (None if scale is None else _scale(scale, wide) for scale in (in_scale, out_scale))
    return (*scales, *epilogue_tensors(epilogue, x.dtype))


def _scale(scale: Tensor, wide: torch.dtype) -> Tensor:
    if scale.ndim < 2:
        scale = scale.reshape((1,) * (2 - scale.ndim) + tuple(scale.shape))
    return contiguous(scale, wide)
