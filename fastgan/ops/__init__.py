"""The public ops. Each checks its arguments, chooses a backend and runs it; gradients are registered with torch."""

from fastgan.ops.scaled_conv2d import scaled_conv2d
from fastgan.ops.spectral_sigma import spectral_sigma
from fastgan.reference.epilogue import Epilogue

__all__ = ["Epilogue", "scaled_conv2d", "spectral_sigma"]
