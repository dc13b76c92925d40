"""What nn.ModulatedConv2d keeps of its weight in evaluation: used once it is there, and never of another weight."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastgan import ops
from fastgan.models import StyleGAN2Generator
from fastgan.nn import ModulatedConv2d, ToRGB
from tests.helpers import CountOps

pytestmark = pytest.mark.usefixtures("one_thread")

IN, OUT, W_DIM, SIZE = 5, 4, 6, 8
CONVENTIONS = ("nvlabs", "rosinality", "basicsr", "basicsr_clean")


def layer(convention: str = "nvlabs", **options: object) -> ModulatedConv2d:
    torch.manual_seed(0)
    if convention == "nvlabs":
        options["resolution"] = SIZE * options.get("up", 1)
    return ModulatedConv2d(IN, OUT, style_dim=W_DIM, convention=convention, **options).eval()


def weight_of(module: nn.Module) -> nn.Parameter:
    (weight,) = [p for name, p in module.named_parameters() if p.ndim >= 4 and name.endswith("weight")]
    return weight


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, IN, SIZE, SIZE), (2, W_DIM))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


@torch.no_grad()
def sample(module: ModulatedConv2d, dtype: torch.dtype = torch.float32) -> tuple[Tensor, int]:
    """The result, and how often the weight was read for demodulation."""
    with CountOps() as mode:
        y = module(*inputs(dtype), "none")
    return y, mode.calls["fastgan.demodulation"]


def plain(module: ModulatedConv2d, dtype: torch.dtype = torch.float32) -> Tensor:
    """The result without anything that was kept: gradients are enabled."""
    return module(*inputs(dtype), "none").detach()


def check(module: ModulatedConv2d, reads: int, dtype: torch.dtype = torch.float32) -> None:
    got, found = sample(module, dtype)
    torch.testing.assert_close(got, plain(module, dtype), rtol=1e-5, atol=1e-5)
    assert found == reads


@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_the_second_forward_reads_no_weight_for_demodulation(convention: str, up: int) -> None:
    module = layer(convention, up=up)
    for reads in (1, 0, 0):
        check(module, reads)


def test_not_in_training_and_not_where_gradients_are_enabled() -> None:
    module = layer().train()
    for _ in range(2):
        check(module, 1)
    module.eval()
    for _ in range(2):
        with CountOps() as mode:
            module(*inputs(), "none").sum().backward()
        assert mode.calls["fastgan.demodulation"] == 1


def step(module: ModulatedConv2d) -> None:
    optimizer = torch.optim.Adam(module.parameters(), lr=0.5)
    module(*inputs(), "none").square().sum().backward()
    optimizer.step()


def write_through_data(module: ModulatedConv2d) -> None:
    """As code that averages weights does, which then calls eval()."""
    weight_of(module).data.mul_(0.1).add_(1.0)
    module.eval()


def new_data(module: ModulatedConv2d) -> None:
    weight_of(module).data = weight_of(module).data * 0.1 + 1


def copy_into(module: ModulatedConv2d) -> None:
    with torch.no_grad():
        weight_of(module).copy_(weight_of(module) * 0.1 + 1)


def load(module: ModulatedConv2d, assign: bool = False) -> None:
    state = {key: value * 0.1 + 1 for key, value in module.state_dict().items()}
    module.load_state_dict(state, assign=assign)


CHANGES = {
    "optimizer": step,
    "copy_": copy_into,
    "written through .data": write_through_data,
    "another .data": new_data,
    "load_state_dict": load,
    "load_state_dict, assign": lambda module: load(module, assign=True),
    "swapped": lambda module: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(module.parameters()).detach() * 0.1 + 1, module.parameters()
    ),
}


@pytest.mark.parametrize("convention", ["nvlabs", "rosinality"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_weight_is_seen(change: Callable[[ModulatedConv2d], None], convention: str) -> None:
    module = layer(convention)
    before = sample(module)[0]
    change(module)
    check(module, 1)
    check(module, 0)
    assert not torch.allclose(sample(module)[0], before)


def test_another_dtype_and_back() -> None:
    module = layer()
    sample(module)
    check(module.double(), 1, torch.float64)
    # Exact: what was kept of the float32 weight is gone.
    got, want = sample(module, torch.float64)[0], plain(module, torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    check(module.float(), 1)
    check(module.to(memory_format=torch.channels_last), 1)


def test_memory_that_another_weight_gets() -> None:
    """The allocator gives memory out again; a weight there is not the one before, though its version is."""
    module = layer()
    for factor in range(1, 6):
        weight_of(module).data = torch.full((OUT, IN, 3, 3), float(factor)) + torch.arange(3)
        check(module, 1)


def test_functional_call_with_other_weights() -> None:
    module, (x, w) = layer(), inputs()
    sample(module)
    for factor in (2.0, 0.0):
        other = {"weight": weight_of(module).detach() * factor + 1}
        with torch.no_grad():
            got = torch.func.functional_call(module, other, (x, w, "none"))
        want = torch.func.functional_call(module, other, (x, w, "none")).detach()
        torch.testing.assert_close(got, want)
    check(module, 0)


def test_inference_mode() -> None:
    """An ordinary weight is kept, and serves calls outside too; an inference tensor has no version."""
    module = layer()
    with torch.inference_mode():
        sample(module)
    check(module, 0)
    with torch.inference_mode():
        made_inside = layer()
        made_inside.weight.mul_(2)
        first, reads = sample(made_inside)
        made_inside.weight.mul_(0.1).add_(1)
        second, again = sample(made_inside)
    assert (reads, again) == (1, 1)
    assert not torch.allclose(first, second)


def test_copies_and_files_hold_nothing_of_it() -> None:
    module = layer()
    keys = set(module.state_dict())
    saved = len(pickle.dumps(module))
    sample(module)
    assert set(module.state_dict()) == keys
    assert len(pickle.dumps(module)) == saved
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)):
        # A write that is not seen, if what was kept came along.
        weight_of(other).data.mul_(0.1).add_(1.0)
        check(other, 1)
    check(module, 0)


def test_two_threads() -> None:
    """Both ask at once, just after the weight has changed."""
    module, results = layer(), []
    for factor in (1.0, 0.2, 3.0):
        with torch.no_grad():
            weight_of(module).copy_(weight_of(module) * factor + factor)
        want, barrier = plain(module), threading.Barrier(2)
        results.clear()

        def run(barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            results.extend(sample(module)[0] for _ in range(20))

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 40
        for got in results:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        check(module, 0)


def test_a_layer_without_demodulation_keeps_nothing() -> None:
    x, w = inputs()
    with CountOps() as mode, torch.no_grad():
        ToRGB(IN, 3, style_dim=W_DIM).eval()(x, w)
    assert mode.calls["fastgan.demodulation"] == mode.calls["fastgan.demodulated_conv2d"] == 0


def test_compiled_without_breaks() -> None:
    module = layer()
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs(), "none"), sample(module)[0], rtol=1e-5, atol=1e-5)


def test_generator() -> None:
    torch.manual_seed(0)
    generator = StyleGAN2Generator(8, 0, 8, 16, channel_base=128, channel_max=16, num_fp16_res=1).eval()
    z = torch.randn(2, 8)
    layers = sum(isinstance(module, ModulatedConv2d) for module in generator.modules())
    want = generator(z, noise_mode="const").detach()
    for reads in (layers, 0):
        with CountOps() as mode, torch.no_grad():
            got = generator(z, noise_mode="const")
        assert mode.calls["fastgan.demodulation"] == reads
        torch.testing.assert_close(got, want, rtol=0, atol=2e-3 * want.abs().max().item())


def test_another_energy_would_show() -> None:
    """The tests above can tell: demodulation by another weight's energies gives other numbers."""
    module, (x, w) = layer(), inputs()
    with torch.no_grad():
        style, weight = module.affine(w), module.weight
        right, wrong = (
            ops.modulated_conv2d(x, weight, style, padding=1, weight_energy=ops.weight_energy(other))
            for other in (weight, weight * 0.1 + 1)
        )
    assert not torch.allclose(right, wrong)
