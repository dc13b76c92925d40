"""Layers that take the place of PyTorch's and of others', with their state-dict keys."""

from fastgan.nn.fused_bias_act import FusedBiasAct
from fastgan.nn.spectral_norm import SpectralNormConv2d, SpectralNormLinear

__all__ = ["FusedBiasAct", "SpectralNormConv2d", "SpectralNormLinear"]
