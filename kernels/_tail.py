"""The epilogue of the convolution and of upfirdn2d as their launchers take it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Tail:
    """The epilogue in the order of the ops' schemas; tensors as :func:`fastgan.ops._epilogue.epilogue_tensors` gives
    them."""

    noise: Tensor | None = None
    noise_strength: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    act: str = "linear"
    alpha: float = 0.0
    gain: float = 1.0
    clamp: float | None = None
    residual_gain: float = 1.0

    @property
    def noise_stride_n(self) -> int:
        """From one sample's noise to the next, in elements; 0 where all samples share it."""
        return 0 if self.noise is None or self.noise.shape[0] == 1 else self.noise.stride(0)

    def numbers(self) -> dict[str, float | None]:
        """The kernels' run-time numbers."""
        gains = {"gain": self.gain, "residual_gain": self.residual_gain}
        return {"alpha": self.alpha, "clamp": self.clamp, "noise_stride_n": self.noise_stride_n, **gains}
