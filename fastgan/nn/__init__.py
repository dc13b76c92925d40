"""Layers that take the place of PyTorch's and of others', with their state-dict keys."""

from fastgan.nn.fused_bias_act import FusedBiasAct
from fastgan.nn.patchgan_loss import PatchGANLoss
from fastgan.nn.spectral_group import SpectralGroup, group_spectral_norm
from fastgan.nn.spectral_norm import SpectralLayer, SpectralNormConv2d, SpectralNormConvTranspose2d, SpectralNormLinear

__all__ = [
    "FusedBiasAct",
    "PatchGANLoss",
    "SpectralGroup",
    "SpectralLayer",
    "SpectralNormConv2d",
    "SpectralNormConvTranspose2d",
    "SpectralNormLinear",
    "group_spectral_norm",
]
