"""``fastgan doctor``: what it says about this machine, and what it advises where something is missing."""

from __future__ import annotations

import json
import platform
import re
import sys
from pathlib import Path

import pytest
import torch

import fastgan
from fastgan import _native, backends, cli, doctor


@pytest.fixture
def facts() -> dict:
    return doctor.examine()


def leave_out(monkeypatch: pytest.MonkeyPatch, info: dict | None, reason: str) -> None:
    """Make the loader report that the build ``info`` left both libraries out for ``reason``."""
    status = {name: _native.LibraryStatus(library.path, reason) for name, library in _native.load().items()}
    monkeypatch.setattr(_native, "read_build_info", lambda: info)
    monkeypatch.setattr(_native, "load", lambda: status)
    monkeypatch.setattr(
        backends, "available", lambda: {"reference": None, "cpp": reason, "triton": None, "cuda": reason}
    )


def test_facts_are_those_of_this_process(facts: dict) -> None:
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["python"] == platform.python_version()
    assert facts["versions"]["fastgan"] == fastgan.__version__
    assert facts["devices"]["cpu"]["torch threads"] == torch.get_num_threads()
    assert len(facts["devices"]["gpus"]) == torch.cuda.device_count()


def test_every_backend_is_available_or_has_a_reason_and_a_remedy(facts: dict) -> None:
    assert set(facts["backends"]) == {"reference", "cpp", "triton", "cuda"}
    assert facts["backends"]["reference"] == {"available": True, "reason": None, "remedy": None}
    for entry in facts["backends"].values():
        assert entry["available"] == (entry["reason"] is None) == (entry["remedy"] is None)


def test_loaded_library_is_proven_by_its_probe(facts: dict) -> None:
    info = _native.read_build_info()
    assert facts["libraries"]["cpu"]["loaded"] == bool(info and info["build_cpp"])
    assert facts["libraries"]["cpu"]["probe"] == ("right" if facts["libraries"]["cpu"]["loaded"] else None)
    if facts["libraries"]["cpu"]["loaded"]:
        assert re.match(r"x86-64-v[34] |baseline", facts["devices"]["cpu"]["simd of fastgan"])


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (lambda device: False, "computed wrong numbers"),
        (RuntimeError("no kernel image\nmore"), "failed: no kernel image"),
    ],
)
def test_failing_probe_makes_its_backend_unavailable(
    monkeypatch: pytest.MonkeyPatch, outcome: object, message: str
) -> None:
    def probe(device: str) -> bool:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome(device)

    loaded = {name: _native.LibraryStatus(library.path, None) for name, library in _native.load().items()}
    monkeypatch.setattr(_native, "load", lambda: loaded)
    monkeypatch.setattr(_native, "probe", probe)
    entry = doctor.backend_report(doctor.library_report())["cpp"]
    assert not entry["available"]
    assert entry["reason"].endswith(message)
    assert entry["remedy"] == f"rebuild here: {doctor.rebuild_command()}"


def test_checkout_never_built_is_told_how_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out(monkeypatch, None, "not built")
    facts = doctor.examine()
    assert facts["backends"]["cpp"]["remedy"].endswith("python setup.py build_ext --inplace")
    assert facts["devices"]["cpu"]["simd of fastgan"] is None
    assert "not loaded: not built" in doctor.render(facts)


def test_build_without_compiler_is_told_to_install_one(monkeypatch: pytest.MonkeyPatch) -> None:
    info = {"build_cpp": False, "build_cuda": False}
    leave_out(monkeypatch, info, "not built: FASTGAN_BUILD_CPP=0 was chosen, since no C++ compiler was found")
    report = doctor.backend_report(doctor.library_report())
    assert report["cpp"]["remedy"].startswith("install g++ (or set CXX), then ")
    assert "FASTGAN_BUILD_CPP=1 python setup.py build_ext --inplace" in report["cpp"]["remedy"]


def test_installed_package_is_told_to_reinstall(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fastgan, "__file__", str(tmp_path / "fastgan" / "__init__.py"))
    command = doctor.rebuild_command("FASTGAN_BUILD_CUDA=1 ")
    assert command.startswith("FASTGAN_BUILD_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps ")


@pytest.mark.parametrize(
    ("cuda", "advice"), [(None, "install a CUDA build of torch"), ("13.0", "needs an NVIDIA GPU and its driver")]
)
def test_gpu_backends_without_a_gpu(monkeypatch: pytest.MonkeyPatch, cuda: str | None, advice: str) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.remedy("cuda").startswith(advice)
    assert doctor.remedy("triton").startswith(advice)


def test_absent_extra_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, facts: dict) -> None:
    facts["extras"] = {"train": {"pillow": "13.0", "rich": None}}
    assert "train  pillow 13.0; absent: rich (pip install 'fastgan[train]')" in doctor.render(facts)


def test_text_is_aligned_and_complete(facts: dict) -> None:
    text = doctor.render(facts)
    for section in ("Versions", "Devices", "Backends", "Compiled libraries", "Optional extras"):
        lines = text.split(f"{section}\n", 1)[1].split("\n\n", 1)[0].splitlines()
        starts = {re.match(r"  (\S+( \S+)*)? +", line).end() for line in lines}
        assert len(starts) == 1, section
    for name in facts["backends"]:
        assert re.search(rf"^  {name} +(available|not available: .+)$", text, re.MULTILINE)


def test_json_is_the_same_facts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGAN_TEST_SWITCH", "1")
    assert cli.main(["doctor", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == doctor.examine()
    assert printed["environment"]["FASTGAN_TEST_SWITCH"] == "1"


def test_unknown_command_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["docter"])
    assert stop.value.code == 2
    assert "doctor" in capsys.readouterr().err


def test_only_the_named_subcommand_is_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "COMMANDS", {**cli.COMMANDS, "other": ("fastgan_module_that_is_not_there", "another one")})
    monkeypatch.setattr(sys, "argv", ["fastgan", "doctor"])
    assert cli.main() == 0
    assert capsys.readouterr().out.startswith("Versions\n")
    with pytest.raises(ModuleNotFoundError, match="fastgan_module_that_is_not_there"):
        cli.main(["other"])


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_subcommand_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: fastgan {command}")
