"""The public ops. Each checks its arguments, chooses a backend and runs it; gradients are registered with torch."""

from fastgan.ops.bias_act import bias_act
from fastgan.ops.demodulation import WeightEnergy, weight_energy
from fastgan.ops.dense_block import dense_block
from fastgan.ops.feature_matching_loss import feature_matching_loss
from fastgan.ops.filtered_lrelu import filtered_lrelu
from fastgan.ops.minibatch_stddev import minibatch_stddev
from fastgan.ops.modulated_conv2d import modulated_conv2d
from fastgan.ops.norm_act import norm_act
from fastgan.ops.patch_loss import PatchLoss, patch_loss
from fastgan.ops.pixel_norm import pixel_norm
from fastgan.ops.scaled_conv2d import scaled_conv2d
from fastgan.ops.spectral_sigma import spectral_sigma
from fastgan.ops.upfirdn2d import upfirdn2d
from fastgan.reference.epilogue import Epilogue

__all__ = [
    "Epilogue",
    "PatchLoss",
    "WeightEnergy",
    "bias_act",
    "dense_block",
    "feature_matching_loss",
    "filtered_lrelu",
    "minibatch_stddev",
    "modulated_conv2d",
    "norm_act",
    "patch_loss",
    "pixel_norm",
    "scaled_conv2d",
    "spectral_sigma",
    "upfirdn2d",
    "weight_energy",
]
