"""fastgan.precision: its sources, that it goes with a call to its gradients, and the errors that it bounds."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from helpers import max_error
from test_direct_conv import WINOGRAD, Call, run, square
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastgan
from fastgan import backends, ops
from fastgan._native import winograd_tile_calls

FP32, HIGH = 1e-5, 3.0
# Large enough for F(4, 3) where precision allows it, in the adjoint as well.
X, W = torch.randn(1, 256, 32, 32), torch.randn(256, 256, 3, 3) / 48


def tiles(function: Any, *args: Any, **kwargs: Any) -> set[tuple[int, int]]:
    """The tiles of Winograd's that ``function`` ran with."""
    before = winograd_tile_calls()
    function(*args, **kwargs)
    return {tile for tile, count in winograd_tile_calls().items() if count > before[tile]}


def convolve(x: Tensor = X, weight: Tensor = W, **options: Any) -> Tensor:
    return ops.scaled_conv2d(x, weight, padding=1, **options)


def test_order_of_the_sources() -> None:
    assert backends.precision_in_force() == "fp32"
    assert tiles(convolve) == {(4, 3)}
    with fastgan.precision("high"):
        assert tiles(convolve) == {(2, 3)}
        with fastgan.precision("fp32"), fastgan.backend("cpp"):
            assert tiles(convolve) == {(4, 3)}
        assert tiles(convolve) == {(2, 3)}
    assert tiles(convolve) == {(4, 3)}


def test_the_environment_variable() -> None:
    code = "import fastgan\nprint(fastgan.backends.precision_in_force())\n"
    code += "with fastgan.precision('fp32'): print(fastgan.backends.precision_in_force())"

    def started(value: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "FASTGAN_PRECISION": value}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    assert started("high").stdout.split() == ["high", "fp32"]
    assert "FASTGAN_PRECISION: precision must be one of fp32, high, got 'tf32'" in started("tf32").stderr


def test_it_belongs_to_its_thread_and_ends_with_an_error() -> None:
    seen: list[str] = []
    with fastgan.precision("high"):
        thread = threading.Thread(target=lambda: seen.append(backends.precision_in_force()))
        thread.start()
        thread.join()
    assert seen == ["fp32"]
    with pytest.raises(RuntimeError, match="boom"), fastgan.precision("high"):
        raise RuntimeError("boom")
    assert backends.precision_in_force() == "fp32"


def test_wrong_names() -> None:
    message = r"fastgan.precision: precision must be one of fp32, high, got 'low'"
    with pytest.raises(ValueError, match=message), fastgan.precision("low"):
        pass
    with pytest.raises(RuntimeError, match="precision must be one of fp32, high, got 'low'"):
        torch.ops.fastgan.scaled_conv2d_weight_grad.default(X, X, None, None, W.shape, (1, 1), (1, 1), (1, 1), 1, "low")


@pytest.mark.parametrize(("forward", "backward"), [("high", "fp32"), ("fp32", "high")])
def test_gradients_keep_the_precision_of_their_call(forward: str, backward: str) -> None:
    expected = {(2, 3)} if forward == "high" else {(4, 3)}
    x, weight, style = X.clone().requires_grad_(), W.clone().requires_grad_(), torch.rand(1, 256) + 0.5
    style.requires_grad_()
    with fastgan.precision(forward):
        y = convolve(x, weight, in_scale=style, epilogue=ops.Epilogue(act="swish"))
    with fastgan.precision(backward):
        grads: list[Tensor] = []
        leaves = (x, weight, style)
        assert tiles(lambda: grads.extend(torch.autograd.grad(y.sum(), leaves, create_graph=True))) == expected
        inner = sum(g.square().sum() for g in grads)
        assert tiles(lambda: torch.autograd.grad(inner, leaves)) == expected


class Precisions(TorchDispatchMode):
    """The precisions that the convolution ops inside its ``with`` block were called with."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "str precision" in str(func._schema):
            self.found |= {arg for arg in args if isinstance(arg, str) and arg in backends.PRECISIONS}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{"padding": 1}, {"up": 2, "padding": 1}, {"down": 2, "padding": 1}], ids=str)
@pytest.mark.parametrize("energy", [False, True], ids=["", "energy"])
def test_modulated_convolutions_pass_it_on(options: dict[str, Any], energy: bool) -> None:
    x, style, weight = torch.randn(2, 6, 8, 8), torch.rand(2, 6) + 0.5, nn.Parameter(torch.randn(5, 6, 3, 3))
    call = {**options, "resample_filter": torch.ones(4) / 4}
    call["weight_energy"] = ops.weight_energy(weight) if energy else None
    for precision in backends.PRECISIONS:
        with torch.set_grad_enabled(not energy), fastgan.precision(precision), Precisions() as precisions:
            y = ops.modulated_conv2d(x, weight, style, **call)
        if y.requires_grad:
            with precisions:
                y.sum().backward()
        assert precisions.found == {precision}


def test_it_is_part_of_a_compiled_graph() -> None:
    """As an argument of the op; a graph made for one precision does not serve the other."""
    codes = []

    def keep(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        codes.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(convolve, fullgraph=True, backend=keep)
    assert tiles(compiled) == {(4, 3)}
    with fastgan.precision("high"):
        assert tiles(compiled) == {(2, 3)}
    assert tiles(compiled) == {(4, 3)}
    first, second, *more = ["'high'" in code for code in codes]
    # Another graph for the third call is not wrong: what watches the ops (tests/ops_table.py) is guarded on as well.
    assert (first, second, *more) == (False, True, *[False] * len(more))


def test_a_graph_compiled_first_knows_of_a_setting_made_later() -> None:
    """In a process of its own: the settings of a thread that has had none yet."""
    code = """
import torch, fastgan
from fastgan._native import winograd_tile_calls as calls
x, weight = torch.randn(1, 128, 32, 33), torch.randn(128, 128, 3, 3)
compiled = torch.compile(lambda: fastgan.ops.scaled_conv2d(x, weight, padding=1), backend="eager", fullgraph=True)
compiled()
with fastgan.precision("high"):
    compiled()
assert calls()[2, 3] == calls()[4, 3] == 1, calls()
with fastgan.backend("reference"):
    compiled()
assert sum(calls().values()) == 2, calls()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", WINOGRAD)
def test_high_takes_small_tiles_alone(name: str) -> None:
    call, inputs = WINOGRAD[name], WINOGRAD[name].inputs()
    with fastgan.precision("high"):
        assert {m for m, _ in tiles(run, call, inputs)} <= {2, 3}


# StyleGAN2's, the U-Net's and the critic's, with maps that Winograd takes.
LAYERS = {
    "StyleGAN2 512→512 3x3": square(1, 512, 512, 32, 3, 1, 1),
    "StyleGAN2 512→512 3x3, small": square(1, 512, 512, 8, 3, 1, 1),
    "StyleGAN2 128→128 3x3": square(1, 128, 128, 64, 3, 1, 1),
    "StyleGAN2 512→256 transposed 3x3": square(1, 512, 256, 32, 3, 2, 0, transposed=True),
    "StyleGAN2 512→3 1x1": square(1, 512, 3, 32, 1, 1, 0),
    "U-Net 256→512 4x4": square(1, 256, 512, 64, 4, 2, 1),
    "U-Net 512→512 4x4, few pixels": square(1, 512, 512, 4, 4, 2, 1),
    "U-Net 512→128 transposed 4x4": square(1, 512, 128, 32, 4, 2, 1, transposed=True),
    "critic 256→512 4x4": square(1, 256, 512, 32, 4, 1, 1),
    "512→512 5x5 stride 2": square(1, 512, 512, 32, 5, 2, 2),
}


@pytest.mark.parametrize("precision", backends.PRECISIONS)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", LAYERS)
def test_errors(name: str, seed: int, precision: str) -> None:
    """With scales that spread by 10x: fp32 within 1e-5, high within 3 times torch's, of values and gradients;
    and of what a network that only infers computes with weights that are kept."""
    call: Call = LAYERS[name]
    inputs = call.inputs(seed)
    cotangent = torch.randn(call.n, call.c_out, *call.sizes(), generator=torch.Generator().manual_seed(seed))

    def evaluate(dtype: torch.dtype, backend: str) -> list[Tensor]:
        leaves = {key: t.to(dtype).requires_grad_() for key, t in inputs.items()}
        y = run(call, leaves, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, [leaves["x"], leaves["weight"]], cotangent.to(dtype))]

    exact, eager = evaluate(torch.float64, "reference"), evaluate(torch.float32, "reference")
    with fastgan.precision(precision):
        ours = evaluate(torch.float32, "cpp")
        with torch.no_grad():
            kept = run(call, inputs | {"weight": nn.Parameter(inputs["weight"])})
    compared = zip(
        ("value", "grad x", "grad weight", "kept"), [*ours, kept], [*eager, eager[0]], [*exact, exact[0]], strict=True
    )
    for what, got, plain, reference in compared:
        error = max_error(got, reference)
        allowed = FP32 if precision == "fp32" else HIGH * max_error(plain, reference)
        assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"
