"""σ of all layers of a network in one call: power iteration of spectral normalisation, one read of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops import _check
from fastgan.ops._library import define
from fastgan.reference import spectral_sigma as reference

_NAME = "spectral_sigma"
_CAN_RUN = {
    "cuda": backends.cuda_can_run,
    "triton": backends.triton_can_run,
    "cpp": backends.cpp_can_run,
    "reference": backends.always,
}


def spectral_sigma(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    *,
    n_iter: int = 1,
    order: str = "parametrization",
    eps: float = 1e-12,
    dims: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Largest singular value of every weight, estimated by power iteration: σ = uᵀ W v.

    One iteration is u ← n(W v), v ← n(Wᵀ u) with ``order="parametrization"``
    (torch.nn.utils.parametrizations.spectral_norm) and v ← n(Wᵀ u), u ← n(W v) with ``order="hook"``
    (torch.nn.utils.spectral_norm); n(x) = x / max(‖x‖, eps). The weight's matrix W [rows, columns] has axis ``dim`` as
    rows and the other axes, in their order, as columns. The C++ backend reads each weight once per iteration, in the
    layout it has (contiguous, channels_last or strided: nothing is copied as a whole), and its results do not depend on
    the number of threads. The Triton backend does an iteration of all layers in one launch (kernels/spectral_sigma.py
    says what it copies); its results are the same bits at every call. So are those of the CUDA backend, which is chosen
    only by name (csrc/cuda/spectral_sigma.cuh).

    Args:
        weights: one tensor per layer, of any rank ≥ 2 and any shapes, all of one dtype (float64, float32, bfloat16,
            float16) on one device. ``order="hook"`` also takes rank 1 as a matrix [n, 1]; the parametrisation divides a
            vector by its norm instead, which needs no σ, so there rank 1 is an error.
        us: per layer [rows], float32 (float64 for float64 weights); advanced in place unless ``n_iter`` is 0.
        vs: per layer [columns], like ``us``.
        n_iter: power iterations, ≥ 0; 0 only reads.
        order: "parametrization" or "hook", see above.
        eps: smallest norm that is divided by.
        dims: per layer the axis of the rows, 0 for convolutions and linear layers (the default), 1 for transposed
            convolutions.
        backend: see :mod:`fastgan.backends`.

    Returns:
        σ [layers], float32 (float64 for float64 weights). An all-zero weight has σ = 0; a NaN stays in its layer. An
        empty list gives an empty tensor.

    Raises:
        TypeError, ValueError: naming the argument, what is expected and what was given.

    Gradients: to ``weights``, 1st and 2nd order; ∂σ/∂W = u vᵀ with u and v constants (their new values). Weights that
    need none cost nothing in backward.

    Source: Miyato et al., Spectral Normalization for GANs (2018), algorithm 1 and equation 11.
    """
    weights, us, vs = list(weights), list(us), list(vs)
    _check.one_of(_NAME, "order", order, ("parametrization", "hook"))
    if n_iter < 0:
        raise ValueError(f"{_NAME}: n_iter must be >= 0, got {n_iter}")
    dims = _checked_dims(weights, us, vs, dims)
    if not weights:
        return torch.zeros(0)
    rows, columns = _check_layers(weights, us, vs, dims, order)
    chosen = backends.choose(_NAME, backend, _CAN_RUN, weights[0].device, weights[0].dtype)
    if chosen == "reference":
        sigma, new_us, new_vs = reference.spectral_sigma(
            weights, us, vs, n_iter=n_iter, order=order, eps=eps, dims=dims
        )
    else:
        compute = _sigma_cuda if chosen == "cuda" else _sigma
        sigma, u, v = compute(weights, us, vs, n_iter, order == "hook", eps, dims)
        new_us, new_vs = u.split(rows), v.split(columns)
    if n_iter > 0:
        with torch.no_grad():
            torch._foreach_copy_([*us, *vs], [*new_us, *new_vs])
    _check.no_nan(_NAME, sigma)
    return sigma


def known_sigma(weights: Sequence[Tensor], sigma: Tensor, u: Tensor, v: Tensor, dims: Sequence[int]) -> Tensor:
    """σ that was computed before, as a fresh result with :func:`spectral_sigma`'s gradient; no weight is read.

    Args:
        weights, dims: as in :func:`spectral_sigma`; the values of the weights do not matter.
        sigma: [layers], without a gradient.
        u, v: the vectors that ``sigma`` was computed from, those of all layers behind each other: [Σ rows],
            [Σ columns].

    Gradients: to ``weights``, 1st and 2nd order; ∂σ/∂W = u vᵀ.
    """
    return _known(list(weights), sigma, u, v, list(dims))


def advanced_sigma(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    *,
    n_iter: int,
    order: str,
    eps: float,
    dims: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`spectral_sigma` computes, without gradient, and the vectors that :func:`known_sigma` needs.

    Returns:
        (sigma, u, v), u and v those of all layers behind each other; ``us`` and ``vs`` have advanced in place.
    """
    with torch.no_grad():
        sigma = spectral_sigma(weights, us, vs, n_iter=n_iter, order=order, eps=eps, dims=dims)
        return sigma, torch.cat(list(us)), torch.cat(list(vs))


def _checked_dims(weights: list[Tensor], us: list[Tensor], vs: list[Tensor], dims: Sequence[int] | None) -> list[int]:
    for name, vectors in (("us", us), ("vs", vs)):
        if len(vectors) != len(weights):
            raise ValueError(f"{_NAME}: {name} must have one tensor per weight = {len(weights)}, got {len(vectors)}")
    if dims is None:
        return [0] * len(weights)
    if len(dims) != len(weights):
        raise ValueError(f"{_NAME}: dims must have one axis per weight = {len(weights)}, got {len(dims)}")
    return list(dims)


def _check_layers(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], dims: list[int], order: str
) -> tuple[list[int], list[int]]:
    """Check every layer against the first; returns the rows and columns of each. Makes ``dims`` positive in place."""
    rows, columns = [], []
    first = _check.tensor(_NAME, "weights[0]", weights[0])
    device, dtype, vector_dtype = first.device, first.dtype, _check.accumulate_dtype(first.dtype)
    for i, (weight, u, v) in enumerate(zip(weights, us, vs, strict=True)):
        _check.tensor(_NAME, f"weights[{i}]", weight)
        shape = weight.shape
        if len(shape) < (1 if order == "hook" else 2):
            hint = ": the parametrisation divides a vector by its norm" if len(shape) == 1 else ""
            raise ValueError(f"{_NAME}: weights[{i}] must have at least 2 dimensions, got {list(shape)}{hint}")
        if not -len(shape) <= dims[i] < len(shape):
            raise ValueError(f"{_NAME}: dims[{i}] must be an axis of weights[{i}] {list(shape)}, got {dims[i]}")
        dims[i] %= len(shape)
        count = weight.numel()
        if count == 0:
            raise ValueError(f"{_NAME}: weights[{i}] must not be empty, got {list(shape)}")
        if weight.dtype != dtype:
            raise ValueError(f"{_NAME}: weights[{i}] must be {dtype} like weights[0], got {weight.dtype}")
        rows.append(shape[dims[i]])
        columns.append(count // rows[-1])
        for name, vector, size in (("us", u, rows[-1]), ("vs", v, columns[-1])):
            if vector.shape != (size,):
                raise ValueError(f"{_NAME}: {name}[{i}] must be [{size}], got {list(vector.shape)}")
            if vector.dtype != vector_dtype:
                raise ValueError(f"{_NAME}: {name}[{i}] must be {vector_dtype}, got {vector.dtype}")
        if not (weight.device == u.device == v.device == device):
            devices = ", ".join(str(t.device) for t in (weight, u, v))
            raise ValueError(f"{_NAME}: weights[{i}], us[{i}], vs[{i}] must be on {device}, got {devices}")
    return rows, columns


def _fallback(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], n_iter: int, hook: bool, eps: float, dims: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    order = "hook" if hook else "parametrization"
    sigma, new_us, new_vs = reference.spectral_sigma(weights, us, vs, n_iter=n_iter, order=order, eps=eps, dims=dims)
    return sigma, torch.cat(new_us), torch.cat(new_vs)


def _fake(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], n_iter: int, hook: bool, eps: float, dims: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return us[0].new_empty(len(us)), us[0].new_empty(sum(map(len, us))), us[0].new_empty(sum(map(len, vs)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, u, v = output
    ctx.set_materialize_grads(False)
    _save(ctx, inputs[0], u, v, inputs[-1])


def _save(ctx: Any, weights: list[Tensor], u: Tensor, v: Tensor, dims: list[int]) -> None:
    # Not the weights: their values are not needed, and an optimiser may have stepped before backward.
    ctx.save_for_backward(u, v)
    ctx.shapes = [weight.shape for weight in weights]
    ctx.dims = dims
    ctx.dtype = weights[0].dtype


def _backward(ctx: Any, grad_sigma: Tensor | None) -> tuple[Any, ...]:
    return _weight_grads(ctx, grad_sigma), None, None, None, None, None, None


def _weight_grads(ctx: Any, grad_sigma: Tensor | None) -> list[Tensor | None]:
    count = len(ctx.shapes)
    grads: list[Tensor | None] = [None] * count
    if grad_sigma is not None:
        u, v = ctx.saved_tensors
        needed = [i for i in range(count) if ctx.needs_input_grad[0][i]]
        blocks = [extent for shape, dim in zip(ctx.shapes, ctx.dims, strict=True) for extent in _block(shape, dim)]
        for i, grad in zip(needed, _sigma_bwd(grad_sigma, u, v, blocks, needed, ctx.dtype), strict=True):
            grads[i] = grad.view(ctx.shapes[i])
    return grads


def _known_fallback(weights: list[Tensor], sigma: Tensor, u: Tensor, v: Tensor, dims: list[int]) -> Tensor:
    return sigma.clone()


def _known_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, _, u, v, dims = inputs
    _save(ctx, weights, u, v, dims)


def _known_backward(ctx: Any, grad_sigma: Tensor | None) -> tuple[Any, ...]:
    return _weight_grads(ctx, grad_sigma), None, None, None, None


def _block(shape: Sequence[int], dim: int) -> tuple[int, int, int]:
    """[outer, rows, inner] such that a contiguous weight of ``shape`` viewed so has its rows on axis 1."""
    outer, inner = 1, 1
    for axis, extent in enumerate(shape):
        if axis < dim:
            outer *= extent
        elif axis > dim:
            inner *= extent
    return outer, shape[dim], inner


def _split(u: Tensor, v: Tensor, blocks: list[int]) -> list[tuple[Tensor, Tensor]]:
    rows = blocks[1::3]
    columns = [outer * inner for outer, inner in zip(blocks[0::3], blocks[2::3], strict=True)]
    return list(zip(u.split(rows), v.split(columns), strict=True))


def _bwd_fallback(
    grad_sigma: Tensor, u: Tensor, v: Tensor, blocks: list[int], needed: list[int], dtype: torch.dtype
) -> list[Tensor]:
    vectors = _split(u, v, blocks)
    grads = []
    for i in needed:
        outer, _, inner = blocks[3 * i : 3 * i + 3]
        row, column = vectors[i]
        grads.append((grad_sigma[i] * row[None, :, None] * column.view(outer, 1, inner)).to(dtype))
    return grads


def _bwd_fake(
    grad_sigma: Tensor, u: Tensor, v: Tensor, blocks: list[int], needed: list[int], dtype: torch.dtype
) -> list[Tensor]:
    return [u.new_empty(blocks[3 * i : 3 * i + 3], dtype=dtype) for i in needed]


def _bwd_setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad_sigma, u, v, blocks, needed, _ = inputs
    ctx.save_for_backward(u, v)
    ctx.blocks, ctx.needed, ctx.count = blocks, needed, grad_sigma.shape[0]


def _bwd_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    """The map g ↦ (g_l u_l v_lᵀ) is linear; its transpose is (G_l) ↦ u_lᵀ G_l v_l, which is σ without iterating."""
    vectors = _split(*ctx.saved_tensors, ctx.blocks)
    us, vs = zip(*(vectors[i] for i in ctx.needed), strict=True)
    sigma, _, _ = _sigma([grad.contiguous() for grad in grads], list(us), list(vs), 0, False, 0.0, [1] * len(us))
    index = torch.tensor(ctx.needed, device=sigma.device)
    return sigma.new_zeros(ctx.count).index_add(0, index, sigma), None, None, None, None, None


_sigma_bwd = define(
    "spectral_sigma_bwd",
    "(Tensor grad_sigma, Tensor u, Tensor v, SymInt[] blocks, int[] needed, ScalarType dtype) -> Tensor[]",
    fallback=_bwd_fallback,
    fake=_bwd_fake,
    setup_context=_bwd_setup_context,
    backward=_bwd_backward,
    triton="spectral_sigma.spectral_sigma_bwd",
)
_SCHEMA = (
    "(Tensor[] weights, Tensor[] us, Tensor[] vs, int n_iter, bool hook, float eps, int[] dims)"
    " -> (Tensor sigma, Tensor u, Tensor v)"
)
_sigma = define(
    "spectral_sigma",
    _SCHEMA,
    fallback=_fallback,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    triton="spectral_sigma.spectral_sigma",
)
# The same op on CUDA C++: Triton's kernel has the other one's place on the GPU.
_sigma_cuda = define(
    "spectral_sigma_cuda",
    _SCHEMA,
    fallback=_fallback,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_known = define(
    "spectral_sigma_known",
    "(Tensor[] weights, Tensor sigma, Tensor u, Tensor v, int[] dims) -> Tensor",
    fallback=_known_fallback,
    fake=_known_fallback,
    setup_context=_known_setup_context,
    backward=_known_backward,
)
