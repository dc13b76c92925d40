"""StyleGAN2's layers around a modulated convolution, with the parameters of whichever public code trained them.

    y = clamp(gain · lrelu(d[n, o] · Σ_i (a · weight[o, i]) ∗ (style[n, i] · x[n, i]) + strength · noise + bias))
    style = affine(w),    d[n, o] = rsqrt(Σ_i style[n, i]² · Σ_kk (a · weight[o, i])² + 1e-8)

The conventions differ in what they call the tensors, in a, and in where 1e-8 acts.

=====================  ======================  =========================  ==========================  ================
convention             "nvlabs"                "rosinality"               "basicsr"                   "basicsr_clean"
=====================  ======================  =========================  ==========================  ================
weight                 weight                  conv.weight                modulated_conv.weight       likewise
its shape              [O, I, k, k]            [1, O, I, k, k]            [1, O, I, k, k]             likewise
affine                 affine.*                conv.modulation.*          modulated_conv.modulation.* likewise
bias                   bias [O]                activate.bias [O]          activate.bias [O]           bias [1, O, 1, 1]
bias of ToRGB          bias [3]                bias [1, 3, 1, 1]          bias [1, 3, 1, 1]           likewise
noise strength         noise_strength []       noise.weight [1]           weight [1]                  weight [1]
constant noise         noise_const [R, R]      the caller's               the caller's                the caller's
filter                 resample_filter         conv.blur.kernel (· up²)   not stored                  bilinear instead
a                      1 (demodulated), else   1/√(I·k²)                  1/√(I·k²)                   1
                       1/√(I·k²)
gain                   √2 on lrelu             √2 on lrelu                √2 on lrelu                 √2 on the product
=====================  ======================  =========================  ==========================  ================

Source: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", 2020, section 2 and figure 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan import ops
from fastgan.nn._weight_energy import WeightEnergyCache
from fastgan.nn.equalized import EqualizedLinear, fir_filter
from fastgan.reference.activation import resolve
from fastgan.reference.modulated_conv2d import upsampling_padding

_SQRT2 = 2.0**0.5
_EPS = 1e-8


@dataclass(frozen=True)
class _Convention:
    """Where one public code keeps the parts of a layer, as paths of attributes, and how it scales them."""

    weight: str
    modulation: str
    bias: str
    noise_strength: str
    noise_const: str | None = None
    filter: str | None = None  # where every layer, or one that resamples, keeps its filter; None: not in the state dict
    filter_always: bool = False
    filter_has_gain: bool = False  # the stored filter of an upsampling layer sums to up², not to 1
    image_filter: str | None = None  # where ToRGB keeps the filter that upsamples the image so far
    per_sample_shapes: bool = True  # a leading 1 before the weight, [1, C, 1, 1] for biases of images
    scales_before_eps: bool = True  # the weight is scaled by 1/√(I·k²) also when demodulating, so that eps acts on less
    clean: bool = False  # nothing is scaled at run time; bilinear resampling; √2 before noise and bias


CONVENTIONS = {
    "nvlabs": _Convention(
        "weight",
        "affine",
        "bias",
        "noise_strength",
        noise_const="noise_const",
        filter="resample_filter",
        filter_always=True,
        per_sample_shapes=False,
        scales_before_eps=False,
    ),
    "rosinality": _Convention(
        "conv.weight",
        "conv.modulation",
        "activate.bias",
        "noise.weight",
        filter="conv.blur.kernel",
        filter_has_gain=True,
        image_filter="upsample.kernel",
    ),
    "basicsr": _Convention("modulated_conv.weight", "modulated_conv.modulation", "activate.bias", "weight"),
    "basicsr_clean": _Convention(
        "modulated_conv.weight", "modulated_conv.modulation", "bias", "weight", scales_before_eps=False, clean=True
    ),
}


class _Modulated(nn.Module):
    """What both layers share: the weight, the affine map from w to styles, the bias and the product; and in evaluation
    what demodulation needs of the weight."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        style_dim: int,
        convention: str,
        demodulate: bool,
        bias_path: str | None,
        clamp: float | None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if convention not in CONVENTIONS:
            raise ValueError(f"{name}: convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
        if min(in_channels, out_channels, style_dim) < 1:
            raise ValueError(
                f"{name}: channels and style_dim must be at least 1, got {in_channels}, {out_channels} and {style_dim}"
            )
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"{name}: kernel_size must be odd, got {kernel_size}")
        if clamp is not None and not clamp > 0:
            raise ValueError(f"{name}: clamp must be above 0 or None, got {clamp}")
        self.convention, self._keys = convention, CONVENTIONS[convention]
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.style_dim, self.demodulate, self.clamp = style_dim, demodulate, clamp
        # Of a rgb layer, the bias is an image's: [1, C, 1, 1] wherever weights have their leading 1.
        self._bias_path = self._keys.bias if bias_path is None else bias_path
        image_bias = self._keys.per_sample_shapes and (bias_path is not None or self._keys.clean)
        leading = (1,) if self._keys.per_sample_shapes else ()
        weight = torch.randn(*leading, out_channels, in_channels, kernel_size, kernel_size)
        if self._keys.clean:
            weight = weight * self._fan_in_scale
        _place(self, self._keys.weight, nn.Parameter(weight))
        _place(self, self._keys.modulation, self._make_affine())
        bias = torch.zeros(1, out_channels, 1, 1) if image_bias else torch.zeros(out_channels)
        _place(self, self._bias_path, nn.Parameter(bias))
        self._weight_energy = WeightEnergyCache()

    def train(self, mode: bool = True) -> _Modulated:
        """As every module's, for :meth:`eval` too; and the weight is looked at afresh."""
        self._weight_energy.drop()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Modulated:
        self._weight_energy.drop()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._weight_energy.drop()
        super()._load_from_state_dict(*args)

    @property
    def _fan_in_scale(self) -> float:
        return (self.in_channels * self.kernel_size**2) ** -0.5

    def _make_affine(self) -> nn.Module:
        if not self._keys.clean:
            return EqualizedLinear(self.style_dim, self.in_channels, bias_init=1.0)
        affine = nn.Linear(self.style_dim, self.in_channels)
        nn.init.ones_(affine.bias)
        return affine

    def _bias(self) -> Tensor:
        return attrgetter(self._bias_path)(self).reshape(-1)

    def _convolve(
        self, x: Tensor, w: Tensor, epilogue: ops.Epilogue, *, up: int = 1, down: int = 1, f: Tensor | None = None
    ) -> Tensor:
        """The modulated convolution of ``x`` [N, I, H, W] by the style that w [N, style_dim] gives."""
        if w.ndim != 2 or w.shape[1] != self.style_dim or len(w) != len(x):
            raise ValueError(
                f"{type(self).__name__}: w must be [N, style_dim] = [{len(x)}, {self.style_dim}], got {list(w.shape)}"
            )
        keys = self._keys
        weight, style = attrgetter(keys.weight)(self), attrgetter(keys.modulation)(self)(w)
        keep = self.demodulate and not self.training
        eps, input_gain = _EPS, None
        if keys.clean:
            input_gain = _SQRT2 if self.demodulate else None
        elif not self.demodulate:
            input_gain = self._fan_in_scale
        elif keys.scales_before_eps:
            # d · a = rsqrt(Σ (a·w·s)² + eps) · a = rsqrt(Σ (w·s)² + eps / a²): one product fewer.
            eps = _EPS / self._fan_in_scale**2
        return ops.modulated_conv2d(
            x,
            weight if weight.ndim == 4 else weight[0],
            style,
            demodulate=self.demodulate,
            up=up,
            down=down,
            padding=self.kernel_size // 2,
            resample_filter=f,
            eps=eps,
            input_gain=input_gain,
            # The other codes know no normalisation for half precision, and it would make their larger eps too large.
            prenormalize="auto" if self.convention == "nvlabs" else "none",
            epilogue=epilogue,
            weight_energy=self._weight_energy.get(weight) if keep else None,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, style_dim={self.style_dim}, "
            f"convention={self.convention}, demodulate={self.demodulate}, clamp={self.clamp}"
        )


class ModulatedConv2d(_Modulated):
    """A synthesis layer: modulated convolution with resampling, noise, bias and activation.

    The equation and what the conventions differ in stand at the head of this file; with one of them, the layer has
    the state dict and computes the numbers of NVlabs' ``SynthesisLayer``, rosinality's and BasicSR's ``StyledConv`` /
    ``StyleConv``.

    Args:
        in_channels, out_channels, kernel_size: I, O and k (odd); padding keeps the size but for up and down.
        style_dim: size of w.
        convention: "nvlabs", "rosinality", "basicsr" (also GFPGAN's full one) or "basicsr_clean" (GFPGAN's clean one).
        resolution: side of the (square) result, for nvlabs' constant noise, which needs it; None elsewhere.
        demodulate: whether to normalise by d.
        up, down: factors ≥ 1, not both above 1. Resampling is by the filter, in basicsr_clean bilinear and before the
            convolution.
        resample_filter: the taps of the separable filter, scaled to sum to 1; basicsr_clean has none.
        noise: whether there is a strength to add noise with.
        act: the activation, at its default gain (at 1 in basicsr_clean).
        clamp: bound on the activation's magnitude, > 0 (NVlabs' conv_clamp); None for none.

    In evaluation with gradients disabled, what demodulation needs of the weight (:func:`fastgan.ops.weight_energy`) is
    kept between forward passes: it costs no read of the weight then, and on a GPU no launch. It follows every change
    that torch counts or that moves the weight (optimizers, ``copy_``, ``load_state_dict``, ``.to``). A write through
    ``weight.data`` between two forward passes is not seen: call ``eval()``, or ``train()``, after it, which forgets
    what was kept, as codes do that average weights so and sample from the average.

    Raises:
        ValueError: sizes below 1, an even kernel, an unknown convention; in ``forward``, a noise that the layer does
            not have, and what :func:`fastgan.ops.modulated_conv2d` raises.

    Gradients: x, w, every parameter and the noise, 1st and 2nd order.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        style_dim: int = 512,
        convention: str = "nvlabs",
        resolution: int | None = None,
        demodulate: bool = True,
        up: int = 1,
        down: int = 1,
        resample_filter: Sequence[float] | None = (1, 3, 3, 1),
        noise: bool = True,
        act: str = "lrelu",
        clamp: float | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            style_dim=style_dim,
            convention=convention,
            demodulate=demodulate,
            bias_path=None,
            clamp=clamp,
        )
        # Not self.noise: rosinality's layer has a module of that name.
        self.up, self.down, self.has_noise, self.act, keys = up, down, noise, act, self._keys
        if noise:
            shape = () if keys.noise_const else (1,)
            _place(self, keys.noise_strength, nn.Parameter(torch.zeros(shape)))
        if noise and keys.noise_const:
            if resolution is None:
                raise ValueError("ModulatedConv2d: resolution must be given for nvlabs' constant noise, got None")
            self.register_buffer(keys.noise_const, torch.randn(resolution, resolution))
        resampled = max(up, down) > 1
        self._filter_path = None
        if not keys.clean and (resampled or keys.filter_always):
            self._filter_path = keys.filter or "resample_filter"
            f = fir_filter(resample_filter) * (up**2 if keys.filter_has_gain else 1)
            _place(self, self._filter_path, f, persistent=keys.filter is not None)

    def forward(
        self,
        x: Tensor,
        w: Tensor,
        noise: Tensor | str = "random",
        *,
        gain: float = 1.0,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Apply the layer.

        Args:
            x: [N, I, H, W], floating point.
            w: [N, style_dim], the dtype of the affine map.
            noise: "random" (drawn anew for each sample and pixel), "const" (nvlabs' own), "none", or what to add: [H',
                W'], [1, 1, H', W'] or [N, 1, H', W'].
            gain: a further factor on the activation, and on its clamp.
            residual: [N, O, H', W'], added at the end.

        Returns:
            [N, O, H·up // down, W·up // down], ``x``'s dtype (autocast's, under autocast).
        """
        keys, f = self._keys, None
        if self._filter_path is not None:
            f = attrgetter(self._filter_path)(self)
            f = f / self.up**2 if keys.filter_has_gain and self.up > 1 else f
        height, width = (side * self.up // self.down for side in x.shape[2:])
        noise = self._find_noise(noise, (x.shape[0], 1, height, width), w)
        epilogue = ops.Epilogue(
            noise=noise,
            noise_strength=None if noise is None else attrgetter(keys.noise_strength)(self),
            bias=self._bias(),
            act=self.act,
            gain=gain * (1.0 if keys.clean else resolve(self.act, None, None)[1]),
            clamp=None if self.clamp is None else self.clamp * gain,
            residual=residual,
        )
        if not keys.clean:
            return self._convolve(x, w, epilogue, up=self.up, down=self.down, f=f)
        if (height, width) != tuple(x.shape[2:]):
            x = F.interpolate(x, (height, width), mode="bilinear", align_corners=False)
        return self._convolve(x, w, epilogue)

    def _find_noise(self, noise: Tensor | str, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
        if isinstance(noise, Tensor):
            if not self.has_noise:
                raise ValueError(f"ModulatedConv2d: noise must be 'none' without a strength, got {list(noise.shape)}")
            return noise[0, 0] if noise.ndim == 4 and noise.shape[0] == 1 else noise
        if noise not in ("random", "const", "none"):
            raise ValueError(f"ModulatedConv2d: noise must be a Tensor or one of random, const, none, got {noise!r}")
        if noise == "none" or not self.has_noise:
            return None
        if noise == "random":
            return torch.randn(shape, device=like.device, dtype=like.dtype)
        if not self._keys.noise_const:
            raise ValueError(f"ModulatedConv2d: noise must not be 'const' with {self.convention}, which keeps none")
        return attrgetter(self._keys.noise_const)(self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, up={self.up}, down={self.down}, noise={self.has_noise}, act={self.act}"


class ToRGB(_Modulated):
    """From features to an image, added to the image of the layers before: a 1×1 convolution modulated without
    demodulation.

        y = clamp(Σ_i (a · weight[o, i]) · style[n, i] · x[n, i] + bias) + upsampled image

    State dict and numbers are those of the layer of the same name in each convention.

    Args:
        in_channels, out_channels, style_dim, convention, clamp: as :class:`ModulatedConv2d`'s.
        up: the factor by which ``forward`` upsamples the image before adding it, ≥ 1. NVlabs' layer does not, the
            block around it does, so there is no state for it.
        resample_filter: the taps of the filter of that upsampling; basicsr_clean is bilinear and has none.

    Raises:
        ValueError: sizes below 1, an unknown convention; in ``forward``, what :func:`fastgan.ops.modulated_conv2d`
            raises.

    Gradients: x, w, the image and every parameter, 1st and 2nd order.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 3,
        *,
        style_dim: int = 512,
        convention: str = "nvlabs",
        up: int = 1,
        resample_filter: Sequence[float] | None = (1, 3, 3, 1),
        clamp: float | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            1,
            style_dim=style_dim,
            convention=convention,
            demodulate=False,
            bias_path="bias",
            clamp=clamp,
        )
        self.up, keys = up, self._keys
        self._filter_path = None
        if up > 1 and not keys.clean:
            self._filter_path = keys.image_filter or "resample_filter"
            f = fir_filter(resample_filter) * (up**2 if keys.filter_has_gain else 1)
            _place(self, self._filter_path, f, persistent=keys.image_filter is not None)

    def forward(self, x: Tensor, w: Tensor, image: Tensor | None = None) -> Tensor:
        """Apply the layer.

        Args:
            x: [N, I, H, W], floating point.
            w: [N, style_dim], the dtype of the affine map.
            image: [N, O, H/up, W/up]; None for none.

        Returns:
            [N, O, H, W]: ``x``'s dtype, or that of an ``image`` of a wider one, in which it is then summed.
        """
        if image is not None and self.up > 1:
            image = self._upsample(image)
        epilogue = ops.Epilogue(bias=self._bias(), clamp=self.clamp)
        if image is None or image.dtype == x.dtype:
            epilogue.residual = image
            return self._convolve(x, w, epilogue)
        return image + self._convolve(x, w, epilogue)

    def _upsample(self, image: Tensor) -> Tensor:
        if self._filter_path is None:
            return F.interpolate(image, scale_factor=float(self.up), mode="bilinear", align_corners=False)
        f = attrgetter(self._filter_path)(self)
        return upsample_image(image, f, self.up, gain=1.0 if self._keys.filter_has_gain else float(self.up**2))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, up={self.up}"


def upsample_image(image: Tensor, f: Tensor, up: int = 2, gain: float | None = None) -> Tensor:
    """[N, C, H, W] -> [N, C, H·up, W·up] by the filter ``f`` [fh, fw], centred; gain None is up², for an f of sum 1."""
    sides = upsampling_padding((0, 0, 0, 0), (f.shape[1], f.shape[0]), up)
    return ops.upfirdn2d(image, f, up=up, padding=sides, gain=up**2 if gain is None else gain)


def _place(root: nn.Module, path: str, value: nn.Parameter | nn.Module | Tensor, persistent: bool = True) -> None:
    """Register ``value`` under root at a dotted path, with empty modules on the way."""
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    if isinstance(value, nn.Parameter):
        root.register_parameter(name, value)
    elif isinstance(value, nn.Module):
        root.add_module(name, value)
    else:
        root.register_buffer(name, value, persistent=persistent)
