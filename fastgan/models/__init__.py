"""Generators and critics on fused layers."""

from fastgan.models.patchgan import PatchGAN
from fastgan.models.stylegan2_discriminator import StyleGAN2Discriminator
from fastgan.models.stylegan2_generator import StyleGAN2Generator
from fastgan.models.unet import UNetGenerator

__all__ = ["PatchGAN", "StyleGAN2Discriminator", "StyleGAN2Generator", "UNetGenerator"]
