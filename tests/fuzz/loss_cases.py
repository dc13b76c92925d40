"""Calls of the ops over lists of tensors: patch_loss, feature_matching_loss, spectral_sigma."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from layer_cases import common
from oracle import Case, Named, check, random
from pointwise import DTYPES, HALF, X_LAYOUTS, around, laid_out, wide
from torch import Tensor

from fastgan import ops

__all__ = ["MatchingCase", "PatchCase", "SigmaCase", "check", "torch"]

Shapes = tuple[tuple[int, ...], ...]


def make_maps(name: str, shapes: Shapes, layout: str, dtype: torch.dtype, seed: int) -> Named:
    """name0, name1, …: logits or features of a spread of 2."""
    found = {}
    for i, shape in enumerate(shapes):
        x = (random(shape, seed + i) * 2).to(dtype)
        found[f"{name}{i}"] = laid_out(x, layout) if x.ndim == 4 else x
    return found


def of(tensors: Named, name: str) -> list[Tensor]:
    """The maps of one side."""
    return [t for key, t in tensors.items() if key.rstrip("0123456789") == name]


@st.composite
def map_shapes(draw: Any, n: int) -> Shapes:
    """One to four maps of n samples: patch maps, vectors, and runs around a tile of 512 (csrc/cpu/tile.h)."""
    side = st.integers(1, 20)
    image = st.tuples(st.just(n), st.integers(1, 4), side, side)
    run = st.tuples(st.just(n), around(512, 1024, 16384))
    return tuple(draw(st.lists(st.one_of(image, image, st.tuples(st.just(n), side), run), min_size=1, max_size=4)))


@dataclass(frozen=True, kw_only=True)
class PatchCase(Case):
    """patch_loss over maps of the given shapes."""

    shapes: Shapes
    options: dict[str, Any]
    critics: str = "both"  # the critic's sides: both, real or fake
    sample_weight: bool = False
    x_layout: str = "contiguous"

    def inputs(self) -> Named:
        found: Named = {}
        generator = self.options["side"] == "generator" and not self.options["paired"]
        for name, seed in (("real", 10), ("fake", 20)):
            if (name == "real" and generator) or self.critics not in ("both", name):
                continue
            found |= make_maps(name, self.shapes, self.x_layout, self.dtype, self.seed + seed)
        return found

    def call(self, tensors: Named, backend: str) -> tuple[Tensor, ...]:
        weight = random([self.shapes[0][0]], self.seed + 30).abs() if self.sample_weight else None
        sides = (of(tensors, "real") or None, of(tensors, "fake") or None)
        found = ops.patch_loss(*sides, **self.options, sample_weight=weight, backend=backend)
        return tuple(t for t in found if t is not None)

    def kinks(self, tensors: Named) -> list[Tensor]:
        if self.options["mode"] != "hinge" or not self.options["paired"]:
            return []
        pairs = zip(of(tensors, "real"), of(tensors, "fake"), strict=True)
        return [1 - (r - f if self.options["side"] == "critic" else f - r) for r, f in pairs]


@st.composite
def patch_cases(draw: Any) -> PatchCase:
    dtype, shapes = draw(DTYPES), draw(map_shapes(draw(st.integers(0, 16))))
    side, paired = draw(st.sampled_from(["critic", "generator"])), draw(st.booleans())
    return PatchCase(
        shapes=shapes,
        options={
            "mode": draw(st.sampled_from(["vanilla", "lsgan", "wgan", "hinge"])),
            "side": side,
            "paired": paired,
            "over_maps": draw(st.sampled_from(["mean", "sum"])),
            "real_target": draw(st.sampled_from([1.0, 0.9])),
            "fake_target": draw(st.sampled_from([0.0, 0.125])),
            "map_weight": draw(st.sampled_from([None, [0.5, 2.0, 1.5, 0.25][: len(shapes)]])),
        },
        critics=draw(st.sampled_from(["both", "real", "fake"])) if side == "critic" and not paired else "both",
        sample_weight=draw(st.booleans()),
        x_layout=draw(X_LAYOUTS),
        **common(draw, dtype),
    )


@dataclass(frozen=True, kw_only=True)
class MatchingCase(Case):
    """feature_matching_loss over maps of the given shapes."""

    shapes: Shapes
    kind: str
    map_weight: list[float] | None
    mask: torch.dtype | None
    layouts: tuple[str, str] = ("contiguous", "contiguous")  # of fake and real

    def inputs(self) -> Named:
        found = make_maps("fake", self.shapes, self.layouts[0], self.dtype, self.seed + 10)
        return found | make_maps("real", self.shapes, self.layouts[1], self.dtype, self.seed + 20)

    def call(self, tensors: Named, backend: str) -> Tensor:
        mask = None
        if self.mask is not None:
            sizes = [(shape[0], 1, *shape[2:]) for shape in self.shapes]
            mask = [(random(size, self.seed + 30) > -0.5).to(self.mask) for size in sizes]
        return ops.feature_matching_loss(
            of(tensors, "fake"),
            of(tensors, "real"),
            kind=self.kind,
            map_weight=self.map_weight,
            mask=mask,
            backend=backend,
        )


@st.composite
def matching_cases(draw: Any) -> MatchingCase:
    dtype, shapes = draw(DTYPES), draw(map_shapes(draw(st.integers(0, 16))))
    return MatchingCase(
        shapes=shapes,
        kind=draw(st.sampled_from(["l1", "l2"])),
        map_weight=draw(st.sampled_from([None, [0.5, 2.0, 1.5, 0.25][: len(shapes)]])),
        mask=draw(st.sampled_from([None, None, torch.float32, torch.bool, torch.float64])),
        layouts=(draw(X_LAYOUTS), draw(X_LAYOUTS)),
        **common(draw, dtype),
    )


@dataclass(frozen=True, kw_only=True)
class SigmaCase(Case):
    """spectral_sigma of weights of the given shapes, rows along dims."""

    shapes: Shapes
    dims: tuple[int, ...]
    order_of_steps: str
    n_iter: int
    weight_layout: str = "contiguous"

    def inputs(self) -> Named:
        found = {}
        for i, shape in enumerate(self.shapes):
            weight = random(shape, self.seed + i).to(self.dtype)
            found[f"weight{i}"] = laid_out(weight, self.weight_layout) if weight.ndim == 4 else weight
        return found

    def call(self, tensors: Named, backend: str) -> tuple[Tensor, ...]:
        weights = list(tensors.values())
        dtype, rows = wide(weights[0].dtype), [w.shape[d] for w, d in zip(weights, self.dims, strict=True)]
        columns = [w.numel() // r for w, r in zip(weights, rows, strict=True)]
        us, vs = (
            [F.normalize(random([size], self.seed + seed + i), dim=0).float().to(dtype) for i, size in enumerate(sizes)]
            for sizes, seed in ((rows, 40), (columns, 60))
        )
        options = {"n_iter": self.n_iter, "order": self.order_of_steps, "dims": list(self.dims)}
        return (ops.spectral_sigma(weights, us, vs, **options, backend=backend), *us, *vs)


@st.composite
def sigma_cases(draw: Any) -> SigmaCase:
    size = st.one_of(st.integers(1, 40), around(64, 128))
    shape = st.one_of(
        st.tuples(size, size),
        st.tuples(size, st.integers(1, 40), st.integers(1, 5)),
        st.tuples(size, st.integers(1, 40), st.integers(1, 4), st.integers(1, 4)),
    )
    shapes = tuple(draw(st.lists(shape, min_size=1, max_size=4)))
    case = SigmaCase(
        shapes=shapes,
        dims=tuple(draw(st.integers(0, 1)) for _ in shapes),
        order_of_steps=draw(st.sampled_from(["parametrization", "hook"])),
        n_iter=draw(st.integers(0, 2)),
        weight_layout=draw(X_LAYOUTS),
        **common(draw, draw(DTYPES)),
    )
    # Of a matrix of one number or one line, float16's or bfloat16's u and v are 1 or -1: nothing is lost by leaving it.
    assume(case.dtype not in HALF or all(min(shape[:2]) > 1 for shape in shapes))
    return case
