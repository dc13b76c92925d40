"""The choice of a backend: its four sources, its errors, what it logs, and that it is the same inside torch.compile."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading

import pytest
import torch

import fastgan
from fastgan import backends, ops

X, W = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)


def chosen(**kwargs) -> str:
    return fastgan.explain(ops.scaled_conv2d, X, W, **kwargs).backend


def test_order_of_the_sources():
    assert chosen() == "cpp"
    with fastgan.backend("reference"):
        assert chosen() == "reference"
        assert chosen(backend="cpp") == "cpp"
        with fastgan.backend("cpp"):
            assert chosen() == "cpp"
        assert chosen() == "reference"
    assert chosen() == "cpp"


def test_the_environment_variable():
    code = (
        "import torch, fastgan\nprint(fastgan.explain('scaled_conv2d', torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "FASTGAN_BACKEND": "reference"}, capture_output=True, text=True
    )
    assert run.stdout.startswith("scaled_conv2d runs on reference (FASTGAN_BACKEND)"), run.stderr
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "FASTGAN_BACKEND": "fast"}, capture_output=True, text=True
    )
    assert "FASTGAN_BACKEND: backend must be one of reference, cpp, triton, cuda, got 'fast'" in run.stderr


def test_an_override_belongs_to_its_thread_and_ends_with_an_error():
    seen = []
    with fastgan.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
    assert seen == ["cpp"]
    with pytest.raises(RuntimeError, match="boom"), fastgan.backend("reference"):
        raise RuntimeError("boom")
    assert chosen() == "cpp"


def test_wrong_names():
    with (
        pytest.raises(ValueError, match=r"fastgan.backend: backend must be one of .* got 'gpu'"),
        fastgan.backend("gpu"),
    ):
        pass
    with pytest.raises(ValueError, match=r"explain: op must be one of fastgan.ops, got 'conv'"):
        fastgan.explain("conv", X, W)


def test_an_explicit_choice_that_cannot_run_says_why():
    with pytest.raises(ValueError, match=r"scaled_conv2d: backend 'cpp' .* it runs on cpu tensors, got meta"):
        ops.scaled_conv2d(X.to("meta"), W.to("meta"), backend="cpp")


def test_automatic_choice_falls_back_and_logs_once(caplog):
    backends._logged.clear()
    with caplog.at_level(logging.INFO, logger="fastgan"):
        for _ in range(3):
            ops.scaled_conv2d(X.to("meta"), W.to("meta"))
    assert [record.getMessage() for record in caplog.records] == [
        "scaled_conv2d: triton cannot run (it runs on cuda tensors, got meta; TRITON_INTERPRET=1 runs it on cpu "
        "tensors, slowly); trying the next backend",
        "scaled_conv2d: cpp cannot run (it runs on cpu tensors, got meta); trying the next backend",
    ]


def test_explain_prints_every_backend():
    text = str(fastgan.explain("scaled_conv2d", X, W, backend="reference"))
    assert text.splitlines()[0] == "scaled_conv2d runs on reference (backend= argument)"
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["cuda", "triton", "cpp", "reference"]


def test_explain_computes_nothing_and_checks_arguments():
    with pytest.raises(ValueError, match="weight must be"):
        fastgan.explain("scaled_conv2d", X, W[:, :1])
    assert ops.scaled_conv2d(X, W).shape == (1, 4, 6, 6), "explain must not leave its recording behind"


def test_a_kernel_that_has_not_won_yet_serves_only_where_it_is_named():
    can_run = {"cuda": fastgan.backends.always, "triton": lambda: "not here", "reference": fastgan.backends.always}
    assert fastgan.backends.choose("spectral_sigma", None, can_run) == "reference"
    assert fastgan.backends.choose("spectral_sigma", "cuda", can_run) == "cuda"
    decision = fastgan.backends.Decision("spectral_sigma", "reference", "default order", {"cuda": None})
    assert "  cuda      can run, where it is named" in str(decision)


def test_the_cuda_kernel_of_spectral_sigma_says_why_it_cannot_run():
    arguments = [torch.ones(2, 3)], [torch.ones(2)], [torch.ones(3)]
    with pytest.raises(ValueError, match=r"spectral_sigma: backend 'cuda' .* it runs on cuda tensors, got cpu"):
        ops.spectral_sigma(*arguments, backend="cuda")
    decision = fastgan.explain("spectral_sigma", *arguments)
    assert decision.backend != "cuda"
    assert decision.reasons["cuda"] == "it runs on cuda tensors, got cpu"


def test_available_names_all_backends():
    assert list(fastgan.backends.available()) == ["reference", "cpp", "triton", "cuda"]
    assert fastgan.backends.available()["reference"] is None


def test_the_choice_holds_inside_torch_compile():
    """A compiled graph calls the op that was chosen when it was traced."""
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def function(x, w):
        return ops.scaled_conv2d(x, w)

    torch.compile(function, fullgraph=True, backend=keep)(X, W)
    with fastgan.backend("reference"):
        torch._dynamo.reset()
        torch.compile(function, fullgraph=True, backend=keep)(X, W)
    assert ["fastgan" in graph.code for graph in graphs] == [True, False]
