"""σ of all spectral-normalised layers of a model in one call, per forward or per weight update."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.nn.spectral_norm import SpectralLayer
from fastgan.ops import spectral_sigma
from fastgan.ops.spectral_sigma import advanced_sigma, known_sigma


def group_spectral_norm(model: nn.Module, per: str = "forward") -> SpectralGroup:
    """Let one call compute σ for all :class:`SpectralLayer` of ``model``, at its
    forward's start.

    The layers may have different shapes; those of one dtype, device and setting share a call. Layers that are added or
    removed later are noticed. The group lives in the model's forward hooks: deepcopy, pickle, state dicts, DDP and
    torch.compile treat it as part of the model, and a layer that is called outside of the model's forward iterates by
    itself as without a group. A model may be grouped again, to change ``per``; of nested groups the outermost works.

    Args:
        model: any module; only forwards through ``model(...)`` itself use the group.
        per: "forward" iterates at every forward in training, as torch does. "step" iterates when a weight has changed
            since the last forward in training (an optimiser's step, load_state_dict, any in-place operation on the
            parameter) and otherwise takes σ from before, with an autograd node of its own, so that several forwards per
            step cost one read of the weights. A write through ``parameter.data`` is not seen. In eval σ is read at
            every forward and nothing is iterated, in both.

    Returns:
        The group; its ``remove()`` takes it off the model again.

    Raises:
        ValueError: another ``per``, or a model without such layers.
    """
    if per not in ("forward", "step"):
        raise ValueError(f"group_spectral_norm: per must be one of forward, step, got {per!r}")
    if not any(isinstance(module, SpectralLayer) for module in model.modules()):
        raise ValueError("group_spectral_norm: model must have spectral-normalised fastgan layers, got none")
    previous = model.__dict__.get("_spectral_group")
    if previous is not None:
        previous.remove()
    return SpectralGroup(model, per)


class SpectralGroup:
    """The state of :func:`group_spectral_norm` on one model; a copy of the model gets a copy of its own."""

    def __init__(self, model: nn.Module, per: str) -> None:
        self.per = per
        self._handed: list[SpectralLayer] = []
        self._known: dict[tuple[Any, ...], _Known] = {}
        before = model.register_forward_pre_hook(self._before if per == "forward" else self._before_eagerly)
        # Also after a forward that raised: no layer keeps a σ, and with it a graph, of a forward that is over.
        after = model.register_forward_hook(self._after, always_call=True)
        self._handles = (before, after)
        model._spectral_group = self

    def remove(self) -> None:
        """Take the group off the model; the layers iterate by themselves again."""
        for handle in self._handles:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        # What is known holds for the very weights of this model, not for a copy's.
        return {**self.__dict__, "_handed": [], "_known": {}}

    # A weight's version is not a traced value: a compiled model would keep the first answer.
    @torch.compiler.disable
    def _before_eagerly(self, model: nn.Module, args: Any) -> None:
        self._before(model, args)

    def _before(self, model: nn.Module, args: Any) -> None:
        kinds: dict[tuple[Any, ...], list[SpectralLayer]] = {}
        for module in model.modules():
            # A layer that has its σ already is served by a group around this one.
            if isinstance(module, SpectralLayer) and module._inverse_sigma is None:
                weight = module.weight_original
                setting = (module.n_power_iterations, module.eps, module.order)
                kinds.setdefault((module.training, weight.device, weight.dtype, *setting), []).append(module)
        self._handed = []
        for kind, layers in kinds.items():
            self._hand_out(layers, self._sigma(kind, layers))

    def _after(self, model: nn.Module, args: Any, output: Any) -> None:
        for layer in self._handed:
            layer._inverse_sigma = None
        self._handed = []

    def _hand_out(self, layers: Sequence[SpectralLayer], sigma: Tensor) -> None:
        self._handed = [*self._handed, *layers]
        for layer, inverse in zip(layers, sigma.reciprocal().unbind(), strict=True):
            layer._inverse_sigma = inverse
            # Per forward a layer that is called twice iterates twice, as torch's does; without iterations there is no
            # difference.
            layer._keep_inverse_sigma = self.per == "step" or not layer.training

    def _sigma(self, kind: tuple[Any, ...], layers: list[SpectralLayer]) -> Tensor:
        weights = [layer.weight_original for layer in layers]
        dims = [layer._rows_dim for layer in layers]
        us, vs = map(list, zip(*(layer.power_vectors for layer in layers), strict=True))
        training, _, _, n_iter, eps, order = kind
        options = {"order": order, "eps": eps, "dims": dims}
        if not training:
            us, vs = _unit(us, eps), _unit(vs, eps)
            return spectral_sigma(weights, us, vs, n_iter=0, **options)
        if self.per == "forward":
            return spectral_sigma(weights, us, vs, n_iter=n_iter, **options)
        known = self._known.get(kind)
        if known is None or not known.holds_for(weights):
            known = self._known[kind] = _Known(weights, *advanced_sigma(weights, us, vs, n_iter=n_iter, **options))
        return known_sigma(weights, known.sigma, known.u, known.v, dims)


class _Known:
    """σ, u and v of weights as they were at one moment."""

    def __init__(self, weights: list[Tensor], sigma: Tensor, u: Tensor, v: Tensor) -> None:
        self.sigma, self.u, self.v = sigma, u, v
        # Not u and v: DDP writes rank 0's into them before every forward, where they are the same.
        self._weights = [(weakref.ref(weight), weight.data_ptr(), weight._version) for weight in weights]

    def holds_for(self, weights: list[Tensor]) -> bool:
        """Whether these are the same weights, unchanged since."""
        return len(weights) == len(self._weights) and all(
            reference() is weight and pointer == weight.data_ptr() and version == weight._version
            for weight, (reference, pointer, version) in zip(weights, self._weights, strict=True)
        )


def _unit(vectors: Sequence[Tensor], eps: float) -> list[Tensor]:
    return [torch.nn.functional.normalize(vector, dim=0, eps=eps) for vector in vectors]
