"""Saving an optimised generator, loading it without the code that made it, all ways in which a file can be wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from fastgan import infer
from fastgan.infer import files
from fastgan.models import StyleGAN2Generator


def block() -> nn.Module:
    """One of each kind: fused layers, a transposed matrix, torch's operators, one with text among its arguments."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 32, 3, padding=1)
            self.norm = nn.InstanceNorm2d(32)
            self.up = nn.ConvTranspose2d(64, 3, 4, 2, 1)
            self.style = nn.Linear(4, 32)

        def forward(self, x: Tensor, style: Tensor, scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
            y = self.norm(self.conv(x)) * self.style(style)[:, :, None, None]
            z = nn.functional.gelu(y, approximate="tanh")
            return self.up(torch.cat([y, z], 1)) * scale, {"style": torch.softmax(style, 1)}

    torch.manual_seed(0)
    return Model().eval()


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(1, 3, 32, 32), torch.randn(1, 4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[infer.FastGenerator, Path]:
    fast = infer.optimize(block(), inputs(), {"scale": 0.5})
    path = tmp_path_factory.mktemp("saved") / "block.safetensors"
    fast.save(path)
    return fast, path


def test_round_trip(saved: tuple[infer.FastGenerator, Path]) -> None:
    fast, path = saved
    again = infer.load(path)
    x, style = inputs()
    picture, others = fast(x, style, scale=0.5)
    loaded, loaded_others = again(x, style, scale=0.5)
    # Another address may make a library of torch's sum in another order, so not to the last bit.
    torch.testing.assert_close(loaded, picture, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded_others["style"], others["style"])
    assert str(again.report()) == str(fast.report())
    assert not list(path.parent.glob("*.partial"))
    with pytest.raises(ValueError, match=r"infer: argument 2 must be 0\.5 as in the example, got 1\.0"):
        again(x, style, scale=1.0)


def test_loads_without_the_models_code(saved: tuple[infer.FastGenerator, Path]) -> None:
    """In a process that has never seen the class."""
    code = (
        "import sys, torch; from fastgan import infer; fast = infer.load(sys.argv[1]); "
        "assert 'tests' not in sys.modules; y, _ = fast(torch.zeros(1, 3, 32, 32), torch.zeros(1, 4), scale=0.5); "
        "print(list(y.shape))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(saved[1])], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[1, 3, 64, 64]"


def test_choices_of_this_machine_are_kept_and_others_made_anew(
    saved: tuple[infer.FastGenerator, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = saved
    _, choices, _ = files.read(path)
    assert len(choices) == 2
    monkeypatch.setattr(files, "_machine", lambda: ["another", 64])
    assert files.read(path)[1] == {}


def test_stylegan(tmp_path: Path) -> None:
    """Constants that are shared, 0-dimensional or views of others."""
    generator = StyleGAN2Generator(16, 0, 16, 16, channel_base=256).eval()
    ws = torch.randn(1, generator.num_ws, 16)
    fast = infer.optimize(generator.synthesis, (ws,), {"noise_mode": "const"})
    fast.save(tmp_path / "style.safetensors")
    again = infer.load(tmp_path / "style.safetensors")
    torch.testing.assert_close(again(ws, noise_mode="const"), fast(ws, noise_mode="const"), rtol=1e-4, atol=1e-4)


def test_dropped_weights_cannot_be_saved(tmp_path: Path) -> None:
    fast = infer.optimize(nn.Conv2d(64, 64, 3, padding=1), (torch.randn(1, 64, 32, 32),))
    assert fast.drop_weights() > 0
    with pytest.raises(RuntimeError, match="save must come before drop_weights"):
        fast.save(tmp_path / "late.safetensors")


def test_weights_are_dropped_while_loading(tmp_path: Path) -> None:
    """Each of them behind its own layer: the next one is still there when the first is gone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 96, 3, padding=1))
    x = torch.randn(1, 64, 32, 32)
    infer.optimize(model, (x,)).save(tmp_path / "two.safetensors")
    fast = infer.load(tmp_path / "two.safetensors", drop_weights=True)
    whole = infer.load(tmp_path / "two.safetensors")
    torch.testing.assert_close(fast(x), whole(x), rtol=0, atol=0)
    dropped = fast.drop_weights()
    assert 0 < dropped == whole.drop_weights() <= (64 + 96) * 64 * 9 * 4
    assert fast.memory() == whole.memory()


def test_weights_are_dropped_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(3)))
    infer.optimize(model, (torch.randn(1, 64, 32, 32),)).save(tmp_path / "three.safetensors")
    kept: list[int] = []
    drop = infer.FastGenerator.drop_weights
    monkeypatch.setattr(infer.FastGenerator, "drop_weights", lambda self: kept.append(drop(self)))
    infer.load(tmp_path / "three.safetensors", drop_weights=True)
    assert len(kept) == 3 and 0 < kept[0] < kept[1] < kept[2]


# ----------------------------------------------------------------------------------------------------------------------
# Files that are wrong


def rewritten(path: Path, to: Path, **changes: Any) -> Path:
    """The file with other entries in its header, or with other tensors."""
    with safetensors.safe_open(str(path), framework="pt") as file:
        header = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, value in changes.items():
        header.update({name: value}) if name != "tensors" else tensors.update(value(tensors))
    safetensors.torch.save_file(tensors, str(to), header)
    return to


def test_missing_and_truncated_files(saved: tuple[infer.FastGenerator, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"infer\.load: path must be .* does not exist"):
        infer.load(tmp_path / "nothing.safetensors")
    whole = saved[1].read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path = tmp_path / "part.safetensors"
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="truncated or no safetensors file"):
            infer.load(path)


def test_foreign_and_other_versions(saved: tuple[infer.FastGenerator, Path], tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, str(foreign))
    with pytest.raises(ValueError, match="must be a file that save wrote"):
        infer.load(foreign)
    with pytest.raises(ValueError, match="must be of version 2, got version 3"):
        infer.load(rewritten(saved[1], tmp_path / "newer.safetensors", version="3"))


def test_tampering_is_seen(saved: tuple[infer.FastGenerator, Path], tmp_path: Path) -> None:
    """One bit of a tensor, one number of the graph."""

    def one_bit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        name = sorted(tensors)[0]
        value = tensors[name].clone()
        value.view(-1).view(torch.uint8)[0] ^= 1
        return {name: value}

    graph = files._opened(saved[1])[0]["graph"]
    changed = graph.replace('"alpha": 0.0', '"alpha": 0.5', 1)
    assert changed != graph
    for change in ({"tensors": one_bit}, {"graph": changed}):
        with pytest.raises(ValueError, match="was changed or damaged"):
            infer.load(rewritten(saved[1], tmp_path / "tampered.safetensors", **change))


@pytest.mark.parametrize(
    "name",
    [
        "aten::from_file.default",
        "aten::relu_.default",
        "aten::copy_.default",
        "aten::nothing.default",
        "fused::__import__",
        "os::system",
        "builtins::exec",
        "profiler::_record_function_enter.default",
    ],
)
def test_operators_that_do_more_than_compute_are_refused(
    saved: tuple[infer.FastGenerator, Path], tmp_path: Path, name: str
) -> None:
    """Though the digest fits: whoever writes a file can write that too."""
    header, tensors = files._opened(saved[1])
    facts = json.loads(header["graph"])
    record = next(r for r in facts["nodes"] if r.get("target") == "aten::gelu.default")
    record["target"] = name
    graph = json.dumps(facts)
    path = rewritten(saved[1], tmp_path / "evil.safetensors", graph=graph, digest=files._digest(graph, tensors))
    with pytest.raises(ValueError, match="is not allowed in a file"):
        infer.load(path)


def test_another_answer_on_this_machine_is_a_mismatch(saved: tuple[infer.FastGenerator, Path], tmp_path: Path) -> None:
    header, tensors = files._opened(saved[1])
    facts = json.loads(header["graph"])
    facts["sample"]["values"][0][3] += 1.0
    graph = json.dumps(facts)
    path = rewritten(saved[1], tmp_path / "other.safetensors", graph=graph, digest=files._digest(graph, tensors))
    with pytest.raises(infer.Mismatch, match="differs from what it computed when it was saved"):
        infer.load(path)
