"""Generators and critics on fused layers."""

from fastgan.models.patchgan import PatchGAN
from fastgan.models.unet import UNetGenerator

__all__ = ["PatchGAN", "UNetGenerator"]
