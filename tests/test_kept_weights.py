"""What the CPU's convolutions keep of weights between calls: used only while it is right, and freed with the weight."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import max_error
from torch import Tensor, nn

from fastgan._native import winograd_tile_calls
from fastgan.ops import _kept_weights, scaled_conv2d
from fastgan.ops._kept_weights import kept_bytes

WINOGRAD_BOUND = 1e-5


@pytest.fixture(autouse=True, scope="module")
def what_other_tests_left() -> None:
    gc.collect()


@pytest.fixture(autouse=True)
def nothing_stays(what_other_tests_left) -> Iterator[None]:
    """Every test leaves as much kept, and known, as it found."""

    def state() -> tuple[int, int]:
        return kept_bytes(), len(_kept_weights._kept)

    before = state()
    yield
    if state() != before:  # collecting takes longer than most tests
        gc.collect()
    assert state() == before


@dataclass(frozen=True)
class Layer:
    """x, a weight's sizes, and scaled_conv2d's keywords."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def input(self) -> Tensor:
        return torch.randn(self.x, generator=torch.Generator().manual_seed(1))

    def parameter(self, seed: int = 0) -> nn.Parameter:
        values = torch.randn(self.weight, generator=torch.Generator().manual_seed(seed))
        return nn.Parameter(values / (values.numel() / min(self.weight[:2])) ** 0.5)

    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        return scaled_conv2d(x, weight, **self.options, backend="cpp")

    def unkept(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.run(x, weight.detach().clone())

    def exact(self, x: Tensor, weight: Tensor) -> Tensor:
        return scaled_conv2d(x.double(), weight.detach().double(), **self.options, backend="reference")


# Winograd serves these with the same tiles whether their weight is kept or not.
LAYER = Layer((2, 128, 19, 20), (128, 128, 3, 3), {"padding": 1})
SAME = {
    "3x3": LAYER,
    "3x3, few channels more": Layer((2, 131, 23, 24), (130, 131, 3, 3), {"padding": 1}),
    "3x3, many weights and few tiles": Layer((1, 330, 24, 24), (520, 330, 3, 3), {"padding": 1}),
    "2x2": Layer((2, 128, 32, 33), (128, 128, 2, 2)),
    "4x4 stride 2 transposed": Layer((2, 128, 33, 34), (128, 128, 4, 4), {"stride": 2, "transposed": True}),
    "3x3 stride 2 transposed, many weights": Layer(
        (1, 330, 20, 20), (330, 520, 3, 3), {"stride": 2, "transposed": True}
    ),
    "6x6 stride 2": Layer((2, 67, 48, 49), (129, 67, 6, 6), {"stride": 2, "padding": 2}),
}
# A kept weight pays for larger tiles.
OTHER = Layer((1, 512, 16, 17), (512, 512, 3, 3), {"padding": 1})


def tiles_of(call: Callable[[], Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
    """What ``call`` gives, and Winograd's tiles that it ran with."""
    before = winograd_tile_calls()
    y = call()
    return y, [tile for tile, calls in winograd_tile_calls().items() if calls > before[tile]]


@pytest.mark.parametrize("name", SAME)
@torch.no_grad()
def test_the_result_is_that_of_a_weight_that_is_not_kept(name):
    layer = SAME[name]
    x, weight, before = layer.input(), layer.parameter(), kept_bytes()
    want, tiles = tiles_of(lambda: layer.unkept(x, weight))
    assert len(tiles) == 1
    assert kept_bytes() == before
    sizes = []
    for _ in range(3):
        y, same = tiles_of(lambda: layer.run(x, weight))
        assert same == tiles
        assert torch.equal(y, want)
        sizes.append(kept_bytes())
    assert before + weight.nbytes < sizes[0] == sizes[1] == sizes[2] < before + 10 * weight.nbytes


@torch.no_grad()
def test_larger_tiles_where_they_cost_nothing_more():
    x, weight = OTHER.input(), OTHER.parameter()
    _, unkept = tiles_of(lambda: OTHER.unkept(x, weight))
    for _ in range(2):
        y, kept = tiles_of(lambda: OTHER.run(x, weight))
        assert (unkept, kept) == ([(2, 3)], [(4, 3)])
        assert max_error(y, OTHER.exact(x, weight)) <= WINOGRAD_BOUND


def optimizer_step(weight: nn.Parameter) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], 0.1).step()


def write_two(operation: Callable[[Tensor], Tensor], distance: int) -> Callable[[nn.Parameter], None]:
    """Writes to two values so far apart, in one lane of the hash or in two, in one block or in two."""

    def write(weight: nn.Parameter) -> None:
        values = weight.data.view(-1)[5 : 6 + distance : distance]
        assert values.numel() == 2
        values.copy_(operation(values))

    return write


def write_numpy(weight: nn.Parameter) -> None:
    weight.detach().numpy()[3, 4] *= 2


def write_under_no_grad(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight += 0.1


# Most leave the version of the tensor as it is, and many might undo themselves in a weak hash: signs are single bits,
# powers of two change the highest ones only, sets of values stay the same.
WRITES: dict[str, Callable[[nn.Parameter], Any]] = {
    "optimizer": optimizer_step,
    "copy_": lambda weight: weight.data.copy_(LAYER.parameter(7)),
    "mul_": lambda weight: weight.data.mul_(0.5),
    "one value": lambda weight: weight.data.view(-1)[1234:1235].fill_(0.25),
    "last value": lambda weight: weight.data.view(-1)[-1:].mul_(-1),
    "numpy": write_numpy,
    "in place": write_under_no_grad,
    "neg_": lambda weight: weight.data.neg_(),
    "rows negated": lambda weight: weight.data[:64].neg_(),
    "rolled by a block": lambda weight: weight.data.copy_(weight.data.view(-1).roll(1 << 14).view_as(weight)),
    "halves exchanged": lambda weight: weight.data.copy_(weight.data.roll(64, 0)),
    "zero_": lambda weight: weight.data.zero_(),
}
for _distance in (1, 64, 128, 1 << 14):
    WRITES[f"two negated, {_distance} apart"] = write_two(torch.neg, _distance)
    WRITES[f"two doubled, {_distance} apart"] = write_two(lambda values: 2 * values, _distance)
    WRITES[f"two exchanged, {_distance} apart"] = write_two(lambda values: values.flip(0), _distance)


@pytest.mark.parametrize("mode", ["no_grad", "grad"])
@pytest.mark.parametrize("name", WRITES)
def test_a_write_is_seen(name, mode):
    x, weight = LAYER.input(), LAYER.parameter()
    with torch.no_grad():
        old, before = LAYER.run(x, weight), kept_bytes()
    WRITES[name](weight)
    for _ in range(3):
        with torch.no_grad() if mode == "no_grad" else nullcontext():
            y = LAYER.run(x, weight).detach()
        want = LAYER.unkept(x, weight)
        assert not torch.equal(want, old)
        assert torch.equal(y, want)
    # Kept again by a network that infers; not by one that trains.
    assert (kept_bytes() == before) == (mode == "no_grad")


@torch.no_grad()
def test_a_weight_whose_memory_is_another():
    x, weight = LAYER.input(), LAYER.parameter()
    LAYER.run(x, weight)
    before = kept_bytes()
    for seed in range(1, 51):
        weight.data = LAYER.parameter(seed).data
        if seed % 10 == 0:
            assert torch.equal(LAYER.run(x, weight), LAYER.unkept(x, weight))
        else:
            LAYER.run(x, weight)
        assert kept_bytes() == before


@torch.no_grad()
def test_what_is_kept_goes_with_the_parameter():
    x, start = LAYER.input(), kept_bytes()
    for round_ in range(50):
        layer = nn.Conv2d(128, 128, 3)
        LAYER.run(x, layer.weight)
        if round_ % 10 == 0:
            layer.itself = [layer]  # a cycle, which only the collector frees
        del layer
        if round_ % 10 == 0:
            gc.collect()
        assert kept_bytes() == start


@torch.no_grad()
def test_copies_know_nothing_of_it():
    x, layer = LAYER.input(), nn.Conv2d(128, 128, 3)
    pickled, start = pickle.dumps(layer), kept_bytes()
    want = LAYER.run(x, layer.weight)
    kept = kept_bytes() - start
    assert kept > 0
    assert pickle.dumps(layer) == pickled
    assert layer.state_dict().keys() == {"weight", "bias"}
    twin = copy.deepcopy(layer)
    assert kept_bytes() == start + kept
    assert torch.equal(LAYER.run(x, twin.weight), want)
    assert kept_bytes() == start + 2 * kept
    twin.weight.mul_(2)
    assert torch.equal(LAYER.run(x, twin.weight), 2 * want)
    assert torch.equal(LAYER.run(x, layer.weight), want)
    del twin
    assert kept_bytes() == start + kept


@pytest.mark.parametrize("seed", range(3))
def test_threads_at_once(seed):
    """On one weight; beside them, weights that come and go."""
    x, shared, start = LAYER.input(), LAYER.parameter(seed), kept_bytes()
    want, failures, gate = LAYER.unkept(x, shared), [], threading.Barrier(4)

    @torch.no_grad()
    def work(own: bool) -> None:
        gate.wait()
        for _ in range(8):
            weight = nn.Parameter(shared.detach().clone()) if own else shared
            if not torch.equal(LAYER.run(x, weight), want):
                failures.append(own)

    workers = [threading.Thread(target=work, args=(own,)) for own in (False, False, True, True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    one = kept_bytes() - start
    assert 0 < one < 10 * shared.nbytes


def test_training_keeps_nothing():
    x, weight, start = LAYER.input(), LAYER.parameter(), kept_bytes()
    optimizer = torch.optim.Adam([weight])

    def train() -> None:
        LAYER.run(x, weight).square().mean().backward()
        optimizer.step()

    train()
    assert kept_bytes() == start
    with torch.no_grad():
        LAYER.run(x, weight)
    assert kept_bytes() > start
    # The first step still has the weight that was sampled with.
    for _ in range(2):
        train()
    assert kept_bytes() == start


@torch.no_grad()
def test_only_parameters_are_kept():
    x, weight, start = LAYER.input(), LAYER.parameter(), kept_bytes()
    LAYER.run(x, weight.detach().clone())
    LAYER.run(x, weight * 1)
    LAYER.run(x.double(), nn.Parameter(weight.double()))
    LAYER.run(x.bfloat16(), nn.Parameter(weight.bfloat16()))
    assert kept_bytes() == start
    LAYER.run(x, weight.requires_grad_(False))
    assert kept_bytes() > start


@torch.no_grad()
def test_views_of_a_parameter():
    """One weight of a stack, and all of them: each is kept, one beside the others."""
    x, start = LAYER.input(), kept_bytes()
    weight = LAYER.parameter()
    LAYER.run(x, weight)
    one = kept_bytes() - start
    del weight
    stack = nn.Parameter(torch.stack([LAYER.parameter(seed).data for seed in range(3)]))
    single = nn.Parameter(stack.data[:1].clone())
    assert torch.equal(LAYER.run(x, single[0]), LAYER.unkept(x, single[0]))
    assert kept_bytes() == start + one
    for _ in range(2):
        for i in range(3):
            assert torch.equal(LAYER.run(x, stack[i]), LAYER.unkept(x, stack[i]))
    assert kept_bytes() == start + 4 * one
    stack.data[1] *= -1
    assert torch.equal(LAYER.run(x, stack[1]), LAYER.unkept(x, stack[1]))
    assert kept_bytes() == start + 3 * one
    del stack
    assert kept_bytes() == start + one


@torch.no_grad()
def test_parameters_of_one_storage():
    """As flattened parameters are: each its own, whatever it is written through."""
    x, size = LAYER.input(), LAYER.parameter().numel()
    flat = torch.cat([LAYER.parameter(seed).data.view(-1) for seed in range(2)])
    weights = [nn.Parameter(part.view(LAYER.weight)) for part in flat.split(size)]
    same = nn.Parameter(weights[0].data)
    for scale in (1, -1, 3):
        flat.mul_(scale)
        for _ in range(2):
            for weight in (*weights, same):
                assert torch.equal(LAYER.run(x, weight), LAYER.unkept(x, weight))
    # Two parameters of the same values: what the first leaves behind, the other takes along.
    del same, weight
    LAYER.run(x, weights[0])


@torch.no_grad()
def test_the_transposed_view():
    """What modulated_conv2d passes for up = 2: a weight seen through transpose(0, 1)."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4, 256, 31, 31, generator=g), nn.Parameter(torch.randn(256, 256, 4, 4, generator=g))
    up, start = {"stride": 2, "padding": 1, "transposed": True}, kept_bytes()
    exact = scaled_conv2d(x.double(), weight.double().transpose(0, 1), **up, backend="reference")
    for _ in range(2):
        y, tiles = tiles_of(lambda: scaled_conv2d(x, weight.transpose(0, 1), **up, backend="cpp"))
        assert len(tiles) == 1
        assert max_error(y, exact) <= WINOGRAD_BOUND
        assert kept_bytes() > start
    # The same values as another convolution's weight: another transform.
    straight = {"stride": 2, "padding": 1}
    error = max_error(
        scaled_conv2d(x, weight, **straight, backend="cpp"),
        scaled_conv2d(x.double(), weight.double(), **straight, backend="reference"),
    )
    assert error <= WINOGRAD_BOUND


def test_inference_mode():
    x, outside, start = LAYER.input(), LAYER.parameter(), kept_bytes()
    want = LAYER.unkept(x, outside)
    with torch.inference_mode():
        inside = LAYER.parameter()
        stack = nn.Parameter(torch.stack([outside]))
        for weight in (outside, inside, outside.view_as(outside), stack[0]):
            assert torch.equal(LAYER.run(x, weight), want)
            assert kept_bytes() > start
        inside.mul_(-1)
        assert torch.equal(LAYER.run(x, inside), -want)
    # Written to where it is seen again only under inference mode.
    with torch.no_grad():
        outside.neg_()
    with torch.inference_mode():
        assert torch.equal(LAYER.run(x, outside), -want)


@torch.no_grad()
def test_a_line_and_a_column():
    """Results of one line have the phases of one line, those of one column others: never one for the other's."""
    options = {"stride": 2, "padding": 2, "output_padding": 1, "transposed": True}
    layer = Layer((16, 128, 1, 60), (128, 256, 4, 4), options)
    x, weight = layer.input(), layer.parameter()
    for _ in range(2):
        for image in (x, x.transpose(2, 3).contiguous()):
            y, tiles = tiles_of(lambda image=image: layer.run(image, weight))
            assert len(tiles) == 1
            assert 1 in y.shape[2:]
            assert max_error(y, layer.exact(image, weight)) <= WINOGRAD_BOUND


@torch.no_grad()
def test_several_uses_of_one_weight():
    """Paddings, directions, sizes and numbers of threads that ask for different transforms, in turn."""
    weight, threads = LAYER.parameter(), torch.get_num_threads()
    try:
        for _ in range(2):
            for count, n, options in (
                (1, 2, {"padding": 1}),
                (3, 3, {"padding": 1}),
                (1, 2, {"padding": 2}),
                (2, 2, {"padding": 1, "transposed": True}),
                (1, 9, {"padding": 0}),
            ):
                torch.set_num_threads(count)
                layer = Layer((n, 128, 19, 20), LAYER.weight, options)
                x = layer.input()
                assert torch.equal(layer.run(x, weight), layer.unkept(x, weight))
    finally:
        torch.set_num_threads(threads)


def in_a_process(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys, torch; sys.path[:0] = ['tests']\n"
        "import test_kept_weights as t; x, weight = t.LAYER.input(), t.LAYER.parameter()\n"
        "with torch.no_grad(): y = t.LAYER.run(x, weight)\n"
    ) + code
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_switched_off():
    done = in_a_process("print(t.kept_bytes(), torch.equal(y, t.LAYER.unkept(x, weight)))", FASTGAN_KEEP_WEIGHTS="0")
    assert (done.stdout, done.stderr) == ("0 True\n", "")


def test_a_wrong_value_of_the_switch(monkeypatch):
    """Which import asks for."""
    monkeypatch.setenv("FASTGAN_KEEP_WEIGHTS", "yes")
    with pytest.raises(ValueError, match=r"^FASTGAN_KEEP_WEIGHTS must be 0 or 1, got 'yes'$"):
        _kept_weights._enabled()


def test_the_end_of_a_process():
    """With weights that are kept, and an end without a word."""
    done = in_a_process("print(t.kept_bytes() > 0)", FASTGAN_KEEP_WEIGHTS="1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
