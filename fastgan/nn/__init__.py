"""Layers that take the place of PyTorch's and of others', with their state-dict keys."""

from fastgan.nn.dense_block import ResidualDenseBlock
from fastgan.nn.equalized import EqualizedConv2d, EqualizedLinear
from fastgan.nn.fused_bias_act import FusedBiasAct
from fastgan.nn.modulated_conv2d import ModulatedConv2d, ToRGB
from fastgan.nn.patchgan_loss import PatchGANLoss
from fastgan.nn.spectral_group import SpectralGroup, group_spectral_norm
from fastgan.nn.spectral_norm import SpectralLayer, SpectralNormConv2d, SpectralNormConvTranspose2d, SpectralNormLinear

__all__ = [
    "EqualizedConv2d",
    "EqualizedLinear",
    "FusedBiasAct",
    "ModulatedConv2d",
    "PatchGANLoss",
    "ResidualDenseBlock",
    "SpectralGroup",
    "SpectralLayer",
    "SpectralNormConv2d",
    "SpectralNormConvTranspose2d",
    "SpectralNormLinear",
    "ToRGB",
    "group_spectral_norm",
]
