"""Keeps what demodulation needs of a weight between the forward passes of a network that only samples."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgan import ops


class _Kept(NamedTuple):
    weight: Tensor
    version: int
    stream: int
    energy: ops.WeightEnergy


class WeightEnergyCache:
    """The :class:`fastgan.ops.WeightEnergy` of one parameter, made anew when the parameter has changed.

    A change is seen by the parameter's version (optimizers, ``copy_``, ``load_state_dict``) and by its memory, dtype
    and device (``.to``, ``.data = ...``). A write *through* ``.data``, or another alias that autograd does not watch,
    changes neither: :meth:`drop` forgets. The cache belongs to its module: copies of that, and what is pickled, begin
    empty. Two threads may ask at once; each gets an answer that is right.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightEnergyCache:
        return WeightEnergyCache()

    def __reduce__(self) -> tuple[type[WeightEnergyCache], tuple[()]]:
        return WeightEnergyCache, ()

    def drop(self) -> None:
        """Forget."""
        self._kept = None

    def get(self, weight: Tensor) -> ops.WeightEnergy | None:
        """Of ``weight`` [O, I, k, k] or [1, O, I, k, k] as it is now; None where it cannot be kept: gradients are
        enabled, the weight is none of the module's parameters proper (an inference tensor, which has no version, a
        subclass, what torch.func or torch.compile puts in its place), or a CUDA graph is recorded, whose replays would
        see this weight for ever."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(weight) is not nn.Parameter:
            return None
        if weight.is_inference() or torch._C._are_functorch_transforms_active():
            return None
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        # Another stream would have to wait for the one that makes them.
        stream = torch.cuda.current_stream(weight.device).cuda_stream if weight.is_cuda else 0
        kept, version = self._kept, weight._version
        if kept is None or (kept.version, kept.stream) != (version, stream) or not _same_memory(kept.weight, weight):
            # Under inference_mode the results would be inference tensors, of no use to later calls outside it.
            with torch.inference_mode(False), torch.no_grad():
                energy = ops.weight_energy(weight if weight.ndim == 4 else weight[0])
                # The alias keeps the memory from being given to another weight, which would look like this one.
                kept = _Kept(weight.detach(), version, stream, energy)
            self._kept = kept
        return kept.energy


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.dtype, a.device, a.shape) == (b.data_ptr(), b.dtype, b.device, b.shape)
