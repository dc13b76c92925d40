"""The checks of scaled_conv2d, once and in one place: what a caller may pass, turned into what kernels take."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastgan.ops import _check
from fastgan.reference.activation import ACTIVATIONS
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

    @classmethod
    def resolve(cls, *options: object) -> ConvArguments:
        """From the public function's arguments, in the order of the fields; raises ValueError for wrong ones.

        A model asks the same few questions over and over, and to answer costs as much as a small layer: answers are
        kept.
        """
        hashable = (tuple(option) if isinstance(option, list) else option for option in options)
        return (_resolve if torch.compiler.is_compiling() else _resolve_once)(*hashable)

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


def _resolve(stride, padding, output_padding, dilation, padding_mode, transposed, groups) -> ConvArguments:
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


_resolve_once = functools.lru_cache(maxsize=1024)(_resolve)


class CheckedCall(NamedTuple):
    """Tensors as kernels take them: scales [N or 1, C or 1], noise [N or 1, 1, H', W'], strength 0-dim, bias [C_out];
    all in the accumulation dtype but the residual, which has x's."""

    in_scale: Tensor | None
    out_scale: Tensor | None
    noise: Tensor | None
    noise_strength: Tensor | None
    bias: Tensor | None
    residual: Tensor | None


def check_call(
    x: Tensor,
    weight: Tensor,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    args: ConvArguments,
    epilogue: Epilogue,
) -> CheckedCall:
    """Check everything that depends on the tensors; raises ValueError with what was expected and what came."""
    others = (
        ("weight", weight),
        ("in_scale", in_scale),
        ("out_scale", out_scale),
        ("epilogue.noise", epilogue.noise),
        ("epilogue.noise_strength", epilogue.noise_strength if isinstance(epilogue.noise_strength, Tensor) else None),
        ("epilogue.bias", epilogue.bias),
        ("epilogue.residual", epilogue.residual),
    )
    for name, value in others:
        if value is not None:
            _check.tensor(_NAME, name, value)
            if value.device != x.device:
                _check.same_device(_NAME, x=x, **{name: value})
    if weight.dtype != x.dtype:
        _check.same_dtype(_NAME, x=x, weight=weight)
    c_in, c_out = _channels(x, weight, args)
    hw = _spatial(x, weight, args)
    _check_epilogue_options(epilogue)
    wide = _check.accumulate_dtype(x.dtype)
    n = x.shape[0]
    return CheckedCall(
        _scale("in_scale", in_scale, n, c_in, wide),
        _scale("out_scale", out_scale, n, c_out, wide),
        _noise(epilogue.noise, n, hw, wide),
        _noise_strength(epilogue, wide),
        _bias(epilogue.bias, c_out, wide),
        _residual(epilogue.residual, (n, c_out, *hw), x.dtype),
    )


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


def _check_epilogue_options(epilogue: Epilogue) -> None:
    _check.one_of(_NAME, "epilogue.act", epilogue.act, tuple(ACTIVATIONS))
    if epilogue.clamp is not None and not epilogue.clamp > 0:
        raise ValueError(f"{_NAME}: epilogue.clamp must be positive or None, got {epilogue.clamp}")
    if epilogue.noise is None and epilogue.noise_strength is not None:
        raise ValueError(f"{_NAME}: epilogue.noise_strength must be None without noise, got {epilogue.noise_strength}")


def _contiguous(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t`` in ``dtype``, contiguous; without a call into torch where it is both already."""
    t = t if t.dtype == dtype else t.to(dtype)
    return t if t.is_contiguous() else t.contiguous()


def _scale(name: str, scale: Tensor | None, n: int, c: int, wide: torch.dtype) -> Tensor | None:
    if scale is None:
        return None
    shape = tuple(scale.shape)
    if shape not in ((n, c), (1, c), (c,), (1, 1), ()):
        raise ValueError(
            f"{_NAME}: {name} must be [N, C] = {[n, c]}, {[1, c]}, {[c]}, [1, 1] or 0-dim, got {list(shape)}"
        )
    if scale.ndim < 2:
        scale = scale.reshape((1,) * (2 - scale.ndim) + shape)
    return _contiguous(scale, wide)


def _noise(noise: Tensor | None, n: int, hw: tuple[int, int], wide: torch.dtype) -> Tensor | None:
    if noise is None:
        return None
    if tuple(noise.shape) not in (hw, (n, 1, *hw)):
        raise ValueError(
            f"{_NAME}: epilogue.noise must be [H, W] = {list(hw)} or [N, 1, H, W] = {[n, 1, *hw]}, "
            f"got {list(noise.shape)}"
        )
    return noise.to(wide).reshape(-1 if noise.ndim == 4 and n else 1, 1, *hw).contiguous()


def _noise_strength(epilogue: Epilogue, wide: torch.dtype) -> Tensor | None:
    strength = epilogue.noise_strength
    if epilogue.noise is None or strength is None:
        return None
    if not isinstance(strength, Tensor):
        return torch.full((), float(strength), dtype=wide, device=epilogue.noise.device)
    if strength.numel() != 1:
        raise ValueError(f"{_NAME}: epilogue.noise_strength must have one element, got {list(strength.shape)}")
    return strength.to(wide).reshape(())


def _bias(bias: Tensor | None, c: int, wide: torch.dtype) -> Tensor | None:
    if bias is not None and tuple(bias.shape) != (c,):
        raise ValueError(f"{_NAME}: epilogue.bias must be [C_out] = {[c]}, got {list(bias.shape)}")
    return None if bias is None else _contiguous(bias, wide)


def _residual(residual: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(
            f"{_NAME}: epilogue.residual must be [N, C_out, H, W] = {list(shape)}, got {list(residual.shape)}"
        )
    return None if residual is None else residual.to(dtype)
