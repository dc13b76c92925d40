"""Layers with equalised learning rate: the weight is stored at unit scale and its factor rides in the convolution.

Parameters and buffers are named as the layers of the public StyleGAN2 code name them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastgan import ops
from fastgan.reference.activation import resolve
from fastgan.reference.modulated_conv2d import downsampling_padding


def fir_filter(taps: Sequence[float] | None) -> Tensor:
    """The outer product [taps, taps] of a filter with itself, summing to 1, float32; None is one tap of 1."""
    row = torch.tensor([1.0] if taps is None else list(taps), dtype=torch.float64)
    return (torch.outer(row, row) / row.sum() ** 2).float()


class EqualizedLinear(nn.Module):
    """y = gain · act(lr/√in · W x + lr · b): one call of :func:`fastgan.ops.scaled_conv2d`, or of a matrix product.

    With its factor at run time, every weight has the same scale and so learns at the same rate. State dict: ``weight``
    [out, in], drawn from N(0, 1/lr²), and ``bias`` [out].

    Args:
        in_features, out_features: sizes of the last dimension.
        bias: whether there is a bias.
        act: the activation, with its default gain: linear, lrelu, ...
        lr_multiplier: lr, a further factor on the learning rate of weight and bias.
        bias_init: what the stored bias starts from.

    Raises:
        ValueError: fewer than one feature; in ``forward``, an input of another size.

    Gradients: x, weight and bias, 1st and 2nd order.

    Source: Karras et al., "Progressive Growing of GANs", 2018, section 4.1; lr: "A Style-Based Generator Architecture
    for Generative Adversarial Networks", 2019, appendix C.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        act: str = "linear",
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(f"EqualizedLinear: features must be at least 1, got {in_features} and {out_features}")
        self.in_features, self.out_features = in_features, out_features
        self.act, self.lr_multiplier = act, lr_multiplier
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.register_parameter("bias", nn.Parameter(torch.full((out_features,), bias_init)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] → [..., out_features], the dtype of ``x`` and the weight."""
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"EqualizedLinear: x must be [..., {self.in_features}], got {list(x.shape)}")
        if self.act == "linear" and self._is_one_gemm(x):
            y = torch.addmm(
                self.bias,
                x.reshape(-1, self.in_features),
                self.weight.t(),
                beta=self.lr_multiplier,
                alpha=self.lr_multiplier / self.in_features**0.5,
            )
            return y.reshape(*x.shape[:-1], self.out_features)
        bias = self.bias
        if bias is not None and self.lr_multiplier != 1.0:
            bias = bias * self.lr_multiplier
        y = ops.scaled_conv2d(
            x.reshape(-1, self.in_features, 1, 1),
            self.weight[:, :, None, None],
            out_scale=_constant(self.lr_multiplier / self.in_features**0.5, self.weight),
            epilogue=ops.Epilogue(bias=bias, act=self.act),
        )
        return y.reshape(*x.shape[:-1], self.out_features)

    def _is_one_gemm(self, x: Tensor) -> bool:
        """Whether BLAS's α·A·B + β·C is all of it: a style per layer is made so often that calls count, not products.

        A half type has its factors rounded with its result, and autocast would round the bias.
        """
        full = x.dtype == self.weight.dtype and x.dtype in (torch.float32, torch.float64)
        return full and self.bias is not None and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, act={self.act}, "
            f"lr_multiplier={self.lr_multiplier:g}"
        )


class EqualizedConv2d(nn.Module):
    """y = clamp(gain · act(1/√(in·k²) · conv(x, W) + b), ±clamp) + residual, with downsampling before or inside.

    down = 2 filters and then convolves with stride 2; a 1×1 kernel convolves at the smaller size. Padding keeps the
    size but for ``down``. State dict: ``weight`` [out, in, k, k], drawn from N(0, 1), ``bias`` [out], and the constant
    ``resample_filter`` [taps, taps].

    Args:
        in_channels, out_channels: of the images.
        kernel_size: k, odd.
        bias: whether there is a bias.
        act: the activation, with its default gain.
        down: the factor by which the image shrinks, ≥ 1.
        resample_filter: the taps of the separable low-pass filter before downsampling, scaled to sum to 1.
        clamp: bound on the activation's magnitude at gain 1, > 0; None for none.

    Raises:
        ValueError: sizes below 1, an even kernel; in ``forward``, what :func:`fastgan.ops.scaled_conv2d` raises.

    Gradients: x, weight, bias and residual, 1st and 2nd order.

    Source: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", 2020, section 4.1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        bias: bool = True,
        *,
        act: str = "linear",
        down: int = 1,
        resample_filter: Sequence[float] | None = (1, 3, 3, 1),
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        if min(in_channels, out_channels, down) < 1:
            raise ValueError(
                f"EqualizedConv2d: channels and down must be at least 1, got {in_channels}, {out_channels} and {down}"
            )
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"EqualizedConv2d: kernel_size must be odd, got {kernel_size}")
        self.act, self.down, self.clamp = act, down, clamp
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_channels)) if bias else None)
        self.register_buffer("resample_filter", fir_filter(resample_filter))

    def forward(self, x: Tensor, gain: float = 1.0, residual: Tensor | None = None) -> Tensor:
        """Convolve.

        Args:
            x: [N, in, H, W]; a half type computes with the weight cast to it.
            gain: a further factor on the activation, and on its clamp.
            residual: [N, out, H/down, W/down], added at the end.

        Returns:
            [N, out, H/down, W/down], ``x``'s dtype.
        """
        weight = self.weight.to(x.dtype)
        kernel = weight.shape[2]
        padding, stride = kernel // 2, 1
        if self.down > 1:
            taps = (self.resample_filter.shape[1], self.resample_filter.shape[0])
            sides = downsampling_padding((padding,) * 4, taps, self.down)
            before, stride = (self.down, 1) if kernel == 1 else (1, self.down)
            x, padding = ops.upfirdn2d(x, self.resample_filter, down=before, padding=sides), 0
        epilogue = ops.Epilogue(
            bias=self.bias,
            act=self.act,
            gain=gain * resolve(self.act, None, None)[1],
            clamp=None if self.clamp is None else self.clamp * gain,
            residual=residual,
        )
        scale = _constant(weight[0].numel() ** -0.5, self.weight)
        return ops.scaled_conv2d(x, weight, out_scale=scale, stride=stride, padding=padding, epilogue=epilogue)

    def extra_repr(self) -> str:
        out_channels, in_channels, kernel, _ = self.weight.shape
        return (
            f"{in_channels}, {out_channels}, kernel_size={kernel}, bias={self.bias is not None}, act={self.act}, "
            f"down={self.down}, clamp={self.clamp}"
        )


def _constant(value: float, like: Tensor) -> Tensor:
    """``value`` as a 0-dim scale. Not a buffer: a float32 one is wrong in its eighth digit after ``double()``."""
    return like.new_full((), value, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)
