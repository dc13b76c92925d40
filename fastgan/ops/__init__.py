"""The public ops. Each checks its arguments, chooses a backend and runs it; gradients are registered with torch."""

from fastgan.ops.patch_loss import PatchLoss, patch_loss
from fastgan.ops.scaled_conv2d import scaled_conv2d
from fastgan.ops.spectral_sigma import spectral_sigma
from fastgan.reference.epilogue import Epilogue

__all__ = ["Epilogue", "PatchLoss", "patch_loss", "scaled_conv2d", "spectral_sigma"]
