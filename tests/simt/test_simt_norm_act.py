"""norm_act's CUDA kernels, thread by thread on the CPU: values and gradients against float64, schedules, reads."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import simt_build
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgan.reference import norm_act as reference
from fastgan.reference.activation import ACTIVATIONS, resolve

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = ("instance", "batch", "given")
AFFINE = ("none", "channel", "adaptive", "mixed")
# Bytes of shared memory: what any GPU has, and so few that no plane is kept.
KEPT, SPLIT = 48 * 1024, 0
ONE_SCHEDULE = [("random", 3)]
TWO_SCHEDULES = [("reverse", 0), ("random", 1)]
# Errors beside eager torch's, which is measured; relative to the largest value of the result.
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


class Case(NamedTuple):
    """The arguments of one call; tensors in float64, which kernels get rounded."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    kind: str
    act: str
    alpha: float
    gain: float
    eps: float
    channels_last: bool
    shared: int
    # Elements that lie in front of each image in its storage.
    shift: int = 0

    @property
    def batch(self) -> bool:
        return self.kind != "instance"


def make(
    shape: tuple[int, int, int, int],
    kind: str = "instance",
    affine: str = "channel",
    dtype: torch.dtype = torch.float32,
    act: str = "tanh",
    *,
    alpha: float | None = None,
    channels_last: bool = False,
    shared: int = KEPT,
    shift: int = 0,
    centre: float = 3.0,
) -> Case:
    n, c = shape[:2]
    x = (torch.randn(shape, dtype=torch.float64) * 2 + centre).to(dtype).double()
    weight, bias = {
        "none": (None, None),
        "channel": (torch.randn(c), torch.randn(c)),
        "adaptive": (torch.randn(n, c), torch.randn(n, c)),
        "mixed": (torch.randn(n, c), torch.randn(c)),
    }[affine]
    mean, var = (torch.randn(c) + centre, torch.rand(c) + 0.5) if kind == "given" else (None, None)
    wide = [None if t is None else t.double() for t in (weight, bias, mean, var)]
    return Case(x, *wide, kind, act, *resolve(act, alpha, 1.3), 0.1, channels_last, shared, shift)


def flat(t: Tensor | None, dtype: torch.dtype, case: Case | None = None) -> np.ndarray:
    """The elements in memory's order, as NumPy has the dtype; read-only. None has none."""
    if t is None:
        t = torch.empty(0)
    elif case is not None:
        t = t.permute(0, 2, 3, 1) if case.channels_last else t
    values = t.to(dtype).contiguous().flatten()
    array = numpy_of(torch.cat([values.new_zeros(case.shift), values]) if case is not None else values)
    array.flags.writeable = False
    return array[case.shift :] if case is not None else array


def numpy_of(t: Tensor) -> np.ndarray:
    return (t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).numpy()


def image_of(array: np.ndarray, case: Case, dtype: torch.dtype) -> Tensor:
    n, c, h, w = case.x.shape
    t = torch.from_numpy(array).view(dtype)
    return t.view(n, h, w, c).permute(0, 3, 1, 2) if case.channels_last else t.view(n, c, h, w)


def empty_like(array: np.ndarray, shift: int) -> np.ndarray:
    return np.zeros(shift + array.size, array.dtype)[shift:]


def settings_of(case: Case) -> list:
    n, c, h, w = case.x.shape
    flags = [case.channels_last, case.batch, case.mean is not None]
    flags += [t is not None and t.ndim == 2 for t in (case.weight, case.bias)]
    act = list(ACTIVATIONS).index(case.act)
    return [[n, c, h * w], [int(f) for f in flags], act, case.alpha, case.gain, case.eps, case.shared]


def forward(case: Case, dtype: torch.dtype, schedules=simt_build.SCHEDULES):
    """y, mean, var [groups]; (name, bytes read, bytes written) of x, weight, bias, y."""
    kernels = simt_build.load(Path(__file__).parent / "norm_act.cpp")
    x = flat(case.x, dtype, case)
    n, c = case.x.shape[:2]
    y = empty_like(x, case.shift)
    if case.mean is None:
        mean, var = (np.zeros(c if case.batch else n * c) for _ in range(2))
    else:
        mean, var = (t.numpy().copy() for t in (case.mean, case.var))
    arguments = [x, flat(case.weight, torch.float32), flat(case.bias, torch.float32), *settings_of(case)]
    name = f"forward_{str(dtype).removeprefix('torch.')}"
    traffic = simt_build.run(kernels, name, *arguments, y, mean, var, schedules=schedules)
    return image_of(y, case, dtype), torch.from_numpy(mean), torch.from_numpy(var), traffic[:4]


def backward(case: Case, gy: Tensor, mean: Tensor, var: Tensor, dtype: torch.dtype, needs=(True, True, True), **kwargs):
    """The gradients, None where they are not wanted; (name, bytes read, bytes written) of gy and x."""
    kernels = simt_build.load(Path(__file__).parent / "norm_act.cpp")
    gy, x = flat(gy, dtype, case), flat(case.x, dtype, case)
    grad_x = empty_like(x, case.shift) if needs[0] else x[:0].copy()
    parameters = [
        np.zeros(t.numel() if t is not None and need else 0, np.float32)
        for t, need in zip((case.weight, case.bias), needs[1:], strict=True)
    ]
    arguments = [gy, x, flat(case.weight, torch.float32), flat(case.bias, torch.float32), *settings_of(case)]
    name = f"backward_{str(dtype).removeprefix('torch.')}"
    statistics = [t.numpy().copy() for t in (mean, var)]
    traffic = simt_build.run(kernels, name, *arguments, *statistics, grad_x, *parameters, **kwargs)
    gradients = [image_of(grad_x, case, dtype) if needs[0] else None]
    for array, t in zip(parameters, (case.weight, case.bias), strict=True):
        gradients.append(torch.from_numpy(array).view(t.shape) if array.size else None)
    return gradients, traffic[:2]


def torch_results(case: Case, gy: Tensor, dtype: torch.dtype) -> list[Tensor | None]:
    """y and the gradients of the reference in ``dtype``, parameters in float32 beside half types."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = case.x.to(dtype, copy=True).requires_grad_()
    weight, bias = (None if t is None else t.to(wide, copy=True).requires_grad_() for t in (case.weight, case.bias))
    running = None if case.mean is None else (case.mean.to(wide), case.var.to(wide))
    y = reference.norm_act(
        x,
        kind="batch" if case.batch else "instance",
        weight=weight,
        bias=bias,
        running=running,
        eps=case.eps,
        act=case.act,
        alpha=case.alpha,
        gain=case.gain,
    )
    leaves = [t for t in (x, weight, bias) if t is not None]
    found = iter(torch.autograd.grad(y, leaves, gy.to(dtype)))
    return [y.detach(), *(None if t is None else next(found) for t in (x, weight, bias))]


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30))


def check(case: Case, dtype: torch.dtype, schedules=TWO_SCHEDULES) -> tuple[list, list]:
    """Statistics, y and all gradients by the rule of accuracy; returns the traffic of both calls."""
    gy = torch.randn(case.x.shape, dtype=torch.float64).to(dtype).double()
    exact, eager = torch_results(case, gy, torch.float64), torch_results(case, gy, dtype)
    y, mean, var, forward_traffic = forward(case, dtype, schedules)
    if case.mean is None:
        dims = (0, 2, 3) if case.batch else (2, 3)
        torch.testing.assert_close(mean, case.x.mean(dims).flatten(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(var, case.x.var(dims, correction=0).flatten(), rtol=3e-6, atol=1e-6)
    gradients, backward_traffic = backward(case, gy, mean, var, dtype, schedules=schedules)
    for name, got, want, plain in zip(["y", "x", "weight", "bias"], [y, *gradients], exact, eager, strict=True):
        assert (got is None) == (want is None), name
        if got is not None:
            floor = FLOOR[dtype] if name in ("y", "x") else FLOOR[torch.float32]
            assert error(got, want) <= 2 * error(plain, want) + floor, (name, error(got, want), error(plain, want))
    return forward_traffic, backward_traffic


# Planes of a few values, of a warp, of a block; odd sizes, which are read by elements.
SHAPES = [(2, 3, 4, 4), (3, 5, 5, 7), (1, 2, 24, 24), (2, 2, 31, 31)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_planes_kept_in_shared_memory(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    (x, _, _, y), traffic = check(make(shape, kind, dtype=dtype), dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    assert x[1] == y[2] == size
    assert [entry[1] for entry in traffic] == [size, size]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("channels_last", [False, True])
def test_parameters(kind: str, affine: str, channels_last: bool) -> None:
    torch.manual_seed(1)
    # Ten samples: more than a block has warps to put their sums together.
    for shape in ((2, 3, 5, 6), (10, 3, 2, 2)):
        check(make(shape, kind, affine, channels_last=channels_last), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 7), (2, 8, 3, 3), (1, 40, 9, 11), (1, 136, 2, 2), (2, 16, 24, 24)], ids=str
)
def test_channels_last(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    (x, _, _, y), traffic = check(make(shape, kind, dtype=dtype, channels_last=True), dtype, ONE_SCHEDULE)
    size = int(np.prod(shape)) * dtype.itemsize
    assert y[2] == size
    if kind == "given":
        assert x[1] == size
    else:
        # And the first pixel of each sample, by all who measure from it.
        assert 2 * size <= x[1] <= 3 * size
    assert [entry[1] for entry in traffic] == [2 * size, 2 * size]


@pytest.mark.parametrize(("shape", "dtype"), [((1, 2, 67, 64), torch.float32), ((1, 2, 131, 129), torch.bfloat16)])
@pytest.mark.parametrize("kind", KINDS)
def test_planes_in_slices(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    (x, _, _, y), traffic = check(make(shape, kind, dtype=dtype, shared=SPLIT), dtype, ONE_SCHEDULE)
    size, once = int(np.prod(shape)) * dtype.itemsize, kind == "given"
    assert (x[1], y[2]) == (size if once else 2 * size, size)
    assert [entry[1] for entry in traffic] == [size if once else 2 * size] * 2


@pytest.mark.parametrize("affine", AFFINE)
def test_a_batch_in_slices_of_several_samples(affine: str) -> None:
    torch.manual_seed(4)
    check(make((3, 2, 40, 36), "batch", affine, shared=SPLIT), torch.float32, ONE_SCHEDULE)
    check(make((3, 2, 5, 5), "batch", affine, shared=SPLIT), torch.float32)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_activation(act: str, channels_last: bool) -> None:
    torch.manual_seed(5)
    check(make((2, 3, 4, 5), act=act, channels_last=channels_last), torch.float32, ONE_SCHEDULE)
    if act == "lrelu":
        case = make((2, 3, 4, 5), act=act, alpha=-0.3, channels_last=channels_last)
        check(case, torch.float32, ONE_SCHEDULE)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shared", [KEPT, SPLIT])
def test_a_large_mean_costs_nothing(channels_last: bool, shared: int) -> None:
    torch.manual_seed(6)
    case = make((1, 4, 8, 8), "instance", "none", act="linear", channels_last=channels_last, shared=shared)
    near, far = case, case._replace(x=(case.x + 4096).float().double())
    for moved in (near, far):
        y, mean, _, _ = forward(moved, torch.float32, ONE_SCHEDULE)
        want = torch_results(moved, moved.x, torch.float64)[0]
        assert error(y, want) < 1e-6
        torch.testing.assert_close(mean, moved.x.mean((2, 3)).flatten(), rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shared", [KEPT, SPLIT])
def test_what_is_not_finite_stays_in_its_plane(bad: float, channels_last: bool, shared: int) -> None:
    torch.manual_seed(7)
    case = make((2, 3, 5, 5), act="relu", channels_last=channels_last, shared=shared)
    case.x[0, 1, 2, 2] = bad
    y, mean, var, _ = forward(case, torch.float32)
    gradients, _ = backward(case, torch.randn(case.x.shape), mean, var, torch.float32)
    for image in (y, gradients[0]):
        assert image[0, 1].isnan().all()
        assert image[0, [0, 2]].isfinite().all()
        assert image[1].isfinite().all()


@pytest.mark.parametrize("channels_last", [False, True])
def test_only_what_is_asked_for(channels_last: bool) -> None:
    torch.manual_seed(8)
    for kind in KINDS:
        case = make((2, 3, 4, 5), kind, channels_last=channels_last)
        gy = torch.randn(case.x.shape, dtype=torch.float64)
        want = torch_results(case, gy, torch.float64)[1:]
        _, mean, var, _ = forward(case, torch.float32, ONE_SCHEDULE)
        for needs in [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]:
            got, _ = backward(case, gy.float(), mean, var, torch.float32, needs, schedules=ONE_SCHEDULE)
            for need, ours, theirs in zip(needs, got, want, strict=True):
                assert (ours is not None) == need
                assert not need or error(ours, theirs) < 4e-6


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_storage_that_begins_at_an_odd_place(channels_last: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(9)
    check(make((1, 8, 4, 6), dtype=dtype, channels_last=channels_last, shift=1), dtype)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 12), st.integers(1, 12)),
    kind=st.sampled_from(KINDS),
    affine=st.sampled_from(AFFINE),
    dtype=st.sampled_from(DTYPES),
    act=st.sampled_from(["linear", "tanh", "softplus"]),
    channels_last=st.booleans(),
    shared=st.sampled_from([KEPT, SPLIT]),
    shift=st.sampled_from([0, 0, 1, 4]),
    seed=st.integers(0, 99),
)
def test_drawn_calls(shape, kind, affine, dtype, act, channels_last, shared, shift, seed) -> None:
    torch.manual_seed(seed)
    values = shape[2] * shape[3] * (1 if kind == "instance" else shape[0])
    if values == 1 and kind != "given":
        return
    case = make(shape, kind, affine, dtype, act, channels_last=channels_last, shared=shared, shift=shift)
    check(case, dtype, [("forward", 0), ("random", seed)])


class Plan(NamedTuple):
    samples: int
    pixels: int
    wide: int
    team: int
    threads: int
    chunks: int
    slice: int
    slices: int
    units: int
    tiles: int
    slice_bytes: int
    blocks: int


def plan(sizes: tuple[int, int, int], item: int, *, last: bool, sliced: bool, batch: bool, aligned: bool) -> Plan:
    """How a call of that size is divided, whose tensors nobody could hold here."""
    kernels, fields = simt_build.load(Path(__file__).parent / "norm_act.cpp"), np.zeros(12, np.int64)
    simt_build.run(kernels, "plan", list(sizes), last, sliced, batch, aligned, item, fields, schedules=ONE_SCHEDULE)
    return Plan(*fields.tolist())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    # Up to 2^31 values of a plane, 2^43 of an image.
    sizes=st.tuples(*(st.integers(0, most).map(lambda e: 2**e) for most in (6, 12, 31))),
    odd=st.sampled_from([0, 1, 7]),
    item=st.sampled_from([2, 4]),
    last=st.booleans(),
    sliced=st.booleans(),
    batch=st.booleans(),
    aligned=st.booleans(),
)
def test_plans_cover_images_of_any_size(sizes, odd, item, last, sliced, batch, aligned) -> None:
    n, c, pixels = sizes[0], sizes[1], sizes[2] + odd
    p = plan((n, c, pixels), item, last=last, sliced=sliced, batch=batch, aligned=aligned)
    vector = 16 // item
    assert p.samples * p.pixels == n * pixels
    assert p.team & (p.team - 1) == 0
    assert p.threads % max(p.team, 32) == 0
    assert (p.slices - 1) * p.slice < p.pixels <= p.slices * p.slice
    assert p.wide == (aligned and (c if last else pixels) % vector == 0)
    if last:
        assert p.team <= 32
        assert p.threads == 256
        assert p.tiles * p.team * vector >= c > (p.tiles - 1) * p.team * vector
        assert p.units == p.blocks == p.samples * p.slices
    else:
        assert p.team <= 32 or p.team == p.threads <= (256 if sliced else 512)
        assert p.units == p.samples * c * p.slices
        assert p.blocks * (p.threads // p.team) >= p.units > (p.blocks - 1) * (p.threads // p.team)
        # What does not fit into any GPU's shared memory need not be counted exactly, and must still not fit.
        assert p.chunks * p.team * vector >= p.slice or p.slice_bytes > 2**29
        assert p.slice_bytes == p.chunks * p.threads * 16 < 2**30
        assert not sliced or p.slice_bytes <= 16384
