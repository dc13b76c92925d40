"""Spectral-normalised layers: y = act((W x) / σ(W) + bias), where W/σ is never written and σ costs one read of W.

Parameters and buffers are named as torch.nn.utils.parametrizations.spectral_norm names them, so a state dict, an
optimiser's order of parameters and DDP's buckets are the same as for the layers that these replace.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.ops import Epilogue, scaled_conv2d, spectral_sigma

# torch.nn.utils.parametrizations.spectral_norm: 15, and one when register_parametrization tries the layer in training
# mode.
_INITIAL_ITERATIONS = 16
_HOOK_KEYS = {"weight_orig": "original", "weight_u": "0._u", "weight_v": "0._v"}


class _PowerVectors(nn.Module):
    """The vectors u [rows] and v [columns], kept in float32 (float64) whatever half type the weight is cast to."""

    def __init__(self, u: Tensor, v: Tensor) -> None:
        super().__init__()
        self.register_buffer("_u", u)
        self.register_buffer("_v", v)

    def _apply(self, fn: Any, recurse: bool = True) -> _PowerVectors:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, new in self._buffers.items():
            if new.dtype in (torch.float16, torch.bfloat16):
                # half() would round them; the conversion starts again from what they were.
                source = new if before[name].is_meta else before[name]
                self._buffers[name] = source.to(device=new.device, dtype=torch.float32)
        return self


class _Original(nn.Module):
    def __init__(self, original: nn.Parameter, vectors: _PowerVectors) -> None:
        super().__init__()
        self.original = original
        self.add_module("0", vectors)


class _Parametrizations(nn.Module):
    # A plain module: as a ModuleDict, torch.nn.utils.parametrize would take the layer for one of its own and edit its
    # class.
    def __init__(self, weight: _Original) -> None:
        super().__init__()
        self.weight = weight


class SpectralLayer(nn.Module):
    """W, u, v, σ and state dicts of a spectral-normalised layer: a mixin before a torch layer that has a ``weight``."""

    _rows_dim = 0

    def _normalise_weight(self, n_power_iterations: int, eps: float, order: str) -> None:
        """Move the constructed layer's ``weight`` to where torch's parametrisation keeps it, and draw u and v."""
        if n_power_iterations < 1:
            raise ValueError(f"{type(self).__name__}: n_power_iterations must be >= 1, got {n_power_iterations}")
        if order not in ("parametrization", "hook"):
            raise ValueError(f"{type(self).__name__}: order must be one of parametrization, hook, got {order!r}")
        self.n_power_iterations, self.eps, self.order = n_power_iterations, eps, order
        # 1/σ of the forward under way, put here by a SpectralGroup; kept for the layer's further calls in it, or not.
        self._inverse_sigma: Tensor | None = None
        self._keep_inverse_sigma = False
        weight = self._parameters.pop("weight")
        rows = weight.shape[self._rows_dim]
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        u, v = (torch.empty(n, dtype=dtype, device=weight.device) for n in (rows, weight.numel() // rows))
        self.parametrizations = _Parametrizations(_Original(weight, _PowerVectors(u, v)))
        self.reset_vectors()

    @property
    def weight_original(self) -> nn.Parameter:
        """W, before it is divided by σ."""
        return self.parametrizations.weight.original

    @property
    def power_vectors(self) -> tuple[Tensor, Tensor]:
        """(u [rows], v [columns]), the buffers themselves."""
        vectors = getattr(self.parametrizations.weight, "0")
        return vectors._u, vectors._v

    @property
    def weight(self) -> Tensor:
        """W/σ from the stored u and v, differentiable and without iterating: for export and inspection."""
        # While torch's constructor runs there are no parametrizations yet: the AttributeError sends the lookup on to
        # its parameters.
        original = self.weight_original
        return (original * self._read_inverse_sigma()).to(original.dtype)

    @torch.no_grad()
    def reset_vectors(self) -> None:
        """Draw u and v anew and iterate as torch does at the start; call it after setting W by hand."""
        u, v = self.power_vectors
        for vector in (u, v):
            vector.normal_(0, 1)
            vector.copy_(F.normalize(vector, dim=0, eps=self.eps))
        if self.order == "parametrization":
            self._iterate(self.weight_original, u, v, _INITIAL_ITERATIONS)

    def _iterate(self, weight: Tensor, u: Tensor, v: Tensor, n_iter: int) -> Tensor:
        options = {"order": self.order, "eps": self.eps, "dims": [self._rows_dim]}
        return spectral_sigma([weight], [u], [v], n_iter=n_iter, **options)

    def _read_inverse_sigma(self) -> Tensor:
        """1/σ [1] without iterating."""
        # An average of unit vectors (an EMA over buffers) is shorter than 1 and would shrink σ.
        u, v = (F.normalize(vector, dim=0, eps=self.eps) for vector in self.power_vectors)
        return self._iterate(self.weight_original, u, v, 0).reciprocal()

    def inverse_sigma(self) -> Tensor:
        """1/σ, 0-dim, for one forward: from the model's group, else from the layer's own iteration (none in eval)."""
        handed = self._inverse_sigma
        if handed is not None:
            if not self._keep_inverse_sigma:
                self._inverse_sigma = None
            return handed
        if not self.training:
            return self._read_inverse_sigma().reshape(())
        return (
            self._iterate(self.weight_original, *self.power_vectors, self.n_power_iterations).reciprocal().reshape(())
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._modernise(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def _modernise(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Rename what torch's older hook or a plain layer wrote, in place; a plain layer's u and v are computed."""
        modern = f"{prefix}parametrizations.weight."
        if f"{prefix}weight_orig" in state_dict:
            state_dict.pop(f"{prefix}weight", None)  # the hook's first version also stored W/σ
            for old, new in _HOOK_KEYS.items():
                if prefix + old in state_dict:
                    state_dict[modern + new] = state_dict.pop(prefix + old)
        elif f"{prefix}weight" in state_dict:
            state_dict[f"{modern}original"] = state_dict.pop(f"{prefix}weight")
        original = state_dict.get(f"{modern}original")
        # A weight of another shape is left for load_state_dict to report.
        if original is None or original.shape != self.weight_original.shape:
            return
        if f"{modern}0._u" not in state_dict:
            u, v = self._unit_vectors(original)
            self._iterate(original, u, v, _INITIAL_ITERATIONS)
            state_dict[f"{modern}0._u"], state_dict[f"{modern}0._v"] = u, v
        elif f"{modern}0._v" not in state_dict:
            # The hook's first version has no v either.
            _, v = self._unit_vectors(original)
            u = state_dict[f"{modern}0._u"].to(v)
            spectral_sigma([original], [u.clone()], [v], order="hook", eps=self.eps, dims=[self._rows_dim])
            state_dict[f"{modern}0._v"] = v

    def _unit_vectors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        # A generator of its own: loading a file neither depends on the global one nor moves it.
        generator = torch.Generator().manual_seed(0)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        u, v = (
            F.normalize(torch.randn(vector.shape, generator=generator, dtype=dtype), dim=0).to(weight.device)
            for vector in self.power_vectors
        )
        return u, v


class SpectralNormConv2d(SpectralLayer, nn.Conv2d):
    """torch.nn.Conv2d under torch.nn.utils.parametrizations.spectral_norm; σ, bias and activation in one pass.

        y = clamp(gain · act(conv(x, W) / σ(W) + bias))

    In training every forward iterates u and v ``n_power_iterations`` times first, under no_grad as well (as torch
    does); eval never does. In a model under :func:`group_spectral_norm` σ comes from one call for all layers.

    Args:
        in_channels ... dtype: as torch.nn.Conv2d's; padding may be "same" or "valid", padding_mode zeros, reflect,
            replicate or circular.
        n_power_iterations, eps: as torch's spectral_norm.
        order: "parametrization", or "hook" for the order and the start of torch.nn.utils.spectral_norm.
        act, alpha, gain, clamp: the activation, as in :class:`fastgan.ops.Epilogue`, but gain is 1 unless given.

    ``load_state_dict`` takes the keys of torch's parametrisation (which are written), of its older hook (``weight_orig,
    weight_u, weight_v``) and of a plain layer (``weight``; u and v are then iterated 16 times from a fixed start).

    Gradients: x, W and bias, 1st and 2nd order, with u and v as constants.

    Source: Miyato et al., Spectral Normalization for Generative Adversarial Networks, 2018.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        n_power_iterations: int = 1,
        eps: float = 1e-12,
        order: str = "parametrization",
        act: str = "linear",
        alpha: float | None = None,
        gain: float | None = 1.0,
        clamp: float | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        self._normalise_weight(n_power_iterations, eps, order)
        self.act, self.alpha, self.gain, self.clamp = act, alpha, gain, clamp

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] or [C_in, H, W] → [N, C_out, H', W'] or [C_out, H', W']."""
        # torch's own order for F.pad: (left, right, top, bottom), "same" and "valid" resolved.
        padding, mode = tuple(self._reversed_padding_repeated_twice), self.padding_mode
        batch = x if x.ndim == 4 else x.unsqueeze(0)
        if mode == "circular":
            batch, padding, mode = F.pad(batch, padding, mode="circular"), 0, "zeros"
        y = scaled_conv2d(
            batch,
            self.weight_original,
            out_scale=self.inverse_sigma(),
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            padding_mode=mode,
            groups=self.groups,
            epilogue=Epilogue(bias=self.bias, act=self.act, alpha=self.alpha, gain=self.gain, clamp=self.clamp),
        )
        return y if x.ndim == 4 else y.squeeze(0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act}"


class SpectralNormConvTranspose2d(SpectralLayer, nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d under torch.nn.utils.parametrizations.spectral_norm; σ, bias and activation in one pass.

    Rows of the matrix are the output channels (axis 1 of the weight), as in torch. Arguments, iteration, state dicts
    and gradients as :class:`SpectralNormConv2d`.
    """

    _rows_dim = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, int] = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        n_power_iterations: int = 1,
        eps: float = 1e-12,
        order: str = "parametrization",
        act: str = "linear",
        alpha: float | None = None,
        gain: float | None = 1.0,
        clamp: float | None = None,
    ) -> None:
        geometry = (in_channels, out_channels, kernel_size, stride, padding, output_padding)
        super().__init__(*geometry, groups, bias, dilation, padding_mode, device=device, dtype=dtype)
        self._normalise_weight(n_power_iterations, eps, order)
        self.act, self.alpha, self.gain, self.clamp = act, alpha, gain, clamp

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """[N, C_in, H, W] or [C_in, H, W] → [N, C_out, H', W'] or [C_out, H', W']; ``output_size`` as in torch."""
        batch = x if x.ndim == 4 else x.unsqueeze(0)
        extra = self._output_padding(x, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation)
        y = scaled_conv2d(
            batch,
            self.weight_original,
            out_scale=self.inverse_sigma(),
            stride=self.stride,
            padding=self.padding,
            output_padding=tuple(extra),
            dilation=self.dilation,
            transposed=True,
            groups=self.groups,
            epilogue=Epilogue(bias=self.bias, act=self.act, alpha=self.alpha, gain=self.gain, clamp=self.clamp),
        )
        return y if x.ndim == 4 else y.squeeze(0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act}"


class SpectralNormLinear(SpectralLayer, nn.Linear):
    """torch.nn.Linear under torch.nn.utils.parametrizations.spectral_norm: y = clamp(gain · act(W x / σ(W) + bias)).

    Arguments, iteration, state dicts and gradients as :class:`SpectralNormConv2d`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        n_power_iterations: int = 1,
        eps: float = 1e-12,
        order: str = "parametrization",
        act: str = "linear",
        alpha: float | None = None,
        gain: float | None = 1.0,
        clamp: float | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._normalise_weight(n_power_iterations, eps, order)
        self.act, self.alpha, self.gain, self.clamp = act, alpha, gain, clamp

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] → [..., out_features]."""
        # A 1×1 convolution of 1×1 images: the same matrix product, with scale, bias and activation behind it in one
        # pass and, in half types, no unscaled product that could overflow.
        y = scaled_conv2d(
            x.reshape(-1, self.in_features, 1, 1),
            self.weight_original[:, :, None, None],
            out_scale=self.inverse_sigma(),
            epilogue=Epilogue(bias=self.bias, act=self.act, alpha=self.alpha, gain=self.gain, clamp=self.clamp),
        )
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act}"
