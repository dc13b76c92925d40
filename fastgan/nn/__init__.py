"""Layers that take the place of PyTorch's and of others', with their state-dict keys."""

from fastgan.nn.spectral_norm import SpectralNormConv2d, SpectralNormLinear

__all__ = ["SpectralNormConv2d", "SpectralNormLinear"]
