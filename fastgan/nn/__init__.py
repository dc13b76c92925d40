"""Layers that take the place of PyTorch's and of others', with their state-dict keys."""

from fastgan.nn.fused_bias_act import FusedBiasAct

__all__ = ["FusedBiasAct"]
