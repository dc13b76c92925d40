"""The GPU report: that it reads what is there, that it finds what it must find, and what it finds in our kernels."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import gpu_kernels
import pytest
import torch
import torch.nn.functional as F
from fastgan.kernels._launch import Launch
from torch import Tensor

from fastgan import cli
from fastgan._native import LibraryStatus
from fastgan.profile import gpu_layers, gpu_report
from fastgan.profile.compiled import Compiled, Failure, _compile, compile_all, compile_jobs, specialise, vector_bits
from fastgan.profile.cuda_cases import CASES, cuda_traffic
from fastgan.profile.devices import ARCHITECTURES, DEVICES, device
from fastgan.profile.gpu_checks import check
from fastgan.profile.gpu_layers import Layer, report_layers
from fastgan.profile.machine_code import parse, read
from fastgan.profile.traffic import count


def compiled(launch: Launch, arch: int = 80) -> Compiled:
    (found,) = compile_jobs([specialise(launch, arch)])
    assert isinstance(found, Compiled), found
    return found


def kinds(launch: Launch, result: Compiled | Failure) -> set[str]:
    return {finding.kind for finding in check("a launch", launch, result)}


# ----------------------------------------------------------------------------------------------------------------------
# What is compiled


@pytest.fixture
def jit_without_gpu(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Triton's JIT on a driver that claims an sm_80 device, stopped where it would compile: what it would compile."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    asked: list[dict] = []

    def hook(**facts: object) -> bool:
        asked.append(facts["compile"])
        return True

    fake = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 80, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(driver, "_active", fake)
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", hook)
    return asked


@pytest.mark.parametrize(
    "launch",
    [
        gpu_kernels.product(),
        gpu_kernels.product(m=1, n=255, k=17),
        gpu_kernels.copy(size=1000, offset=3),
        gpu_kernels.copy(size=1024, offset=8),
        gpu_kernels.product(dtype=torch.bfloat16, num_warps=8),
    ],
    ids=["aligned", "odd sizes", "odd address", "aligned slice", "bfloat16"],
)
def test_specialisation_is_that_of_a_launch(jit_without_gpu: list[dict], launch: Launch) -> None:
    storage = torch.empty(1 << 22, dtype=torch.uint8)
    storage = storage[-storage.data_ptr() % 512 :]
    real = {
        name: storage.view(x.dtype)[x.storage_offset() :][: x.numel()].view(x.shape) if isinstance(x, Tensor) else x
        for name, x in launch.arguments.items()
    }
    assert launch.kernel.warmup(
        **real, **launch.constants, grid=(1,), **launch.settings()
    ) is None  # fmt: skip
    (asked,) = jit_without_gpu
    job = specialise(launch, 80)
    assert job.signature == asked["signature"]
    assert job.constants == asked["constants"]
    assert [job.attributes] == asked["configs"]
    assert {name: job.options[name] for name in launch.settings()} == launch.settings()


def test_same_code_is_compiled_once() -> None:
    launches = [gpu_kernels.product(m=256), gpu_kernels.product(m=512), gpu_kernels.product(m=257)]
    jobs = [specialise(launch, 80) for launch in launches]
    assert jobs[0] == jobs[1] != jobs[2]
    assert specialise(launches[0], 90).key != jobs[0].key
    assert len(compile_all(jobs)) == 2


def test_registers_are_those_that_the_launch_allows() -> None:
    free = gpu_kernels.product()
    few = dataclasses.replace(free, max_registers=40)
    assert compiled(free).code.registers > 40
    assert compiled(few).code.registers <= 40
    assert specialise(few, 80).options["maxnreg"] == 40


def test_what_does_not_compile_is_a_finding_and_stops_nothing() -> None:
    launches = [gpu_kernels.broken(), gpu_kernels.copy()]
    jobs = [specialise(launch, 80) for launch in launches]
    broken, good = compile_all(jobs).values()
    assert isinstance(broken, Failure)
    (finding,) = check("a launch", launches[0], broken)
    assert finding.kind == "compile"
    assert "broken_kernel" in str(finding)
    assert not check("another", launches[1], good)


def test_only_plain_jitted_functions_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = dataclasses.replace(gpu_kernels.copy(), kernel=gpu_kernels.copy)
    with pytest.raises(TypeError, match=r"must be a @triton\.jit function, got function"):
        specialise(launch, 80)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset it"):
        specialise(gpu_kernels.copy(), 80)


# ----------------------------------------------------------------------------------------------------------------------
# What is read


@pytest.mark.parametrize(("arch", "tensor"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA"), (120, "HMMA")])
def test_product_is_read(arch: int, tensor: str) -> None:
    launch = gpu_kernels.product()
    found = compiled(launch, arch)
    assert set(found.code.tensor) == {tensor}
    assert found.code.spills == found.code.stack == 0
    assert 16 < found.code.registers <= 255
    # Of two stages one waits in shared memory: both operands' 64 × 32 halves.
    assert found.shared >= 2 * 64 * 32 * 2
    assert found.code.loads[128] >= 2
    assert found.code.stores == {128: found.code.stores[128]}
    assert found.products == {("f16", "tf32")}
    by_argument = {load.arguments: load for load in found.tiles}
    # One line of the helper reads both operands, so it names both.
    assert set(by_argument) == {("a_ptr",), ("b_ptr",), ("bias_ptr",)}
    assert by_argument[("a_ptr",)].widths == by_argument[("b_ptr",)].widths == (128,)
    assert by_argument[("a_ptr",)].elements == 64 * 32
    assert 0 < found.occupancy <= 1
    assert not check("a launch", launch, found)


def test_numbers_come_from_the_tools_words() -> None:
    usage = "Function f:\n  REG:58 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:592 TEXTURE:0"
    listing = """
        /*0000*/                   LDG.E.64.CONSTANT R2, desc[UR4][R2.64] ;
        /*0010*/              @!P0 LDG.E R4, desc[UR4][R2.64+0x40] ;
        /*0020*/              @UP1 LDGSTS.E.BYPASS.LTC128B.128 [R19], desc[UR22][R12.64], P3 ;
        /*0030*/                   LDG.E.U16 R4, [R2.64] ;
        /*0040*/                   STL.64 [R1], R2 ;
        /*0050*/                   LDL.LU R2, [R1] ;
        /*0060*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0070*/                   UTMALDG.2D [UR8], [UR4] ;
        /*0080*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0090*/                   DMMA.8x8x4 R4, R8, R12, R4 ;
    """
    code = parse(usage, listing)
    assert (code.registers, code.stack, code.static_shared, code.spills) == (58, 24, 1024, 2)
    assert code.loads == {64: 1, 32: 1, 128: 1, 16: 1, "TMA": 1}
    assert code.stores == {128: 1}
    assert code.tensor == {"HMMA": 1}
    assert code.widest_load == 128
    with pytest.raises(RuntimeError, match="cuobjdump printed no resource usage"):
        parse("", listing)
    with pytest.raises(RuntimeError, match="nvdisasm printed no instructions"):
        parse(usage, "")


def test_kernels_are_told_apart_where_they_are_read_together() -> None:
    launches = [gpu_kernels.product(), gpu_kernels.copy(step=0), gpu_kernels.copy(), gpu_kernels.product(block=128)]
    together = [kernel.asm["cubin"] for kernel in map(_compile, (specialise(launch, 90) for launch in launches))]
    found = read(together, 90)
    assert found == [code for cubin in together for code in read([cubin], 90)]
    assert [bool(code.tensor) for code in found] == [True, False, False, True]
    assert [set(code.loads) for code in found[1:3]] == [{16}, {128}]


def test_width_follows_the_data() -> None:
    def width(launch: Launch) -> tuple[int, ...]:
        (load,) = compiled(launch).tiles
        assert load.arguments == ("x_ptr",)
        return load.widths

    assert width(gpu_kernels.copy()) == (128,)
    assert width(gpu_kernels.copy(dtype=torch.float32)) == (128,)
    assert width(gpu_kernels.copy(size=1000)) == (16,)  # Triton knows no smaller divisor than 16
    assert width(gpu_kernels.copy(offset=3)) == (16,)


# ----------------------------------------------------------------------------------------------------------------------
# What must be found


def test_spill_is_found() -> None:
    launch = gpu_kernels.product(block=128, num_warps=1)  # 512 sums a thread
    assert "spill" in kinds(launch, compiled(launch))


def test_product_without_tensor_cores_is_found() -> None:
    launch = gpu_kernels.product()
    # Triton has no tensor cores on sm_75: this is real code of a half product without them.
    turing = compiled(launch, 75)
    assert not turing.code.tensor
    assert "tensor core" not in kinds(launch, turing)
    assert "tensor core" in kinds(launch, dataclasses.replace(turing, arch=80))
    tf32 = gpu_kernels.product(dtype=torch.float32)
    assert compiled(tf32).products == {("f32", "tf32")}
    assert compiled(tf32).code.tensor
    assert "tensor core" in kinds(tf32, dataclasses.replace(compiled(tf32, 75), arch=80))
    exact = dataclasses.replace(turing, arch=80, products=frozenset({("f32", "ieee")}))
    full = gpu_kernels.product(dtype=torch.float32)
    assert "tensor core" not in kinds(full, exact)


def test_product_spelt_out_is_found() -> None:
    launch = gpu_kernels.outer()
    assert "tensor core" in kinds(launch, compiled(launch))
    # So little arithmetic that memory is the bound: fine without tensor cores.
    assert not check("a launch", dataclasses.replace(launch, flops=launch.bytes), compiled(launch))


def test_scalar_load_is_found() -> None:
    launch = gpu_kernels.copy(step=0)
    assert kinds(launch, compiled(launch)) == {"scalar load"}
    # A table that is smaller than what is read of it is no stream.
    table = gpu_kernels.copy(step=0)
    arguments = {**table.arguments, "x_ptr": torch.empty(512, dtype=torch.float16, device="meta")}
    assert not check("a launch", dataclasses.replace(table, arguments=arguments), compiled(table))
    # The same code is right where the data allow no more.
    odd = gpu_kernels.copy(step=0, offset=3)
    assert not check("a launch", odd, compiled(odd))


@pytest.mark.parametrize(("arch", "tensor"), [(90, "HGMMA"), (100, "UTCHMMA")])
def test_operand_that_tf32_needs_turned_is_no_finding(arch: int, tensor: str) -> None:
    """Their TF32 products read a weight along C_in only, memory has it along C_out: no wide copy can turn it."""
    launch = dict(gpu_report.shipped_launches())["scaled_conv2d: U-Net-256 up3 tf32 NHWC"]
    found = compiled(launch, arch)
    assert set(found.code.tensor) == {tensor}
    by_argument = {load.arguments: load for load in found.tiles}
    assert by_argument[("w_ptr",)].turned
    assert by_argument[("w_ptr",)].widths == (32,)
    assert not by_argument[("x_ptr",)].turned
    assert by_argument[("x_ptr",)].widths == (128,)
    assert not check("a launch", launch, found)
    other = dataclasses.replace(found, code=dataclasses.replace(found.code, tensor={"HMMA": 1}))
    assert kinds(launch, other) == {"scalar load"}
    half = compiled(gpu_kernels.product(), arch)
    assert not any(load.turned and load.scalar for load in half.tiles)


def test_what_cannot_be_launched_is_found() -> None:
    launch = gpu_kernels.product()
    large = dataclasses.replace(compiled(launch, 89), shared=120_000)
    assert kinds(launch, large) == {"launch"}
    assert kinds(launch, dataclasses.replace(large, arch=80)) == set()


@pytest.mark.parametrize(
    ("shape", "dtype", "layout", "bits"),
    [
        ((2, 64, 8, 8), torch.float16, torch.channels_last, 128),
        ((2, 6, 8, 8), torch.float16, torch.channels_last, 32),
        ((2, 3, 8, 8), torch.float16, torch.channels_last, 16),
        ((2, 64, 8, 8), torch.float16, torch.contiguous_format, 16),
        ((64, 100), torch.float32, torch.contiguous_format, 128),
        ((64, 102), torch.float32, torch.contiguous_format, 64),
        ((), torch.float32, torch.contiguous_format, 32),
    ],
)
def test_vector_bits(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, bits: int) -> None:
    assert vector_bits(torch.empty(shape, dtype=dtype, device="meta").to(memory_format=layout)) == bits


# ----------------------------------------------------------------------------------------------------------------------
# Traffic


def test_traffic_of_plain_torch() -> None:
    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.conv2d(F.pad(x, (1, 1, 1, 1)), weight, bias)
        y.mul_(2)
        return F.leaky_relu(y.view(1, 4, 64) + bias[:1], 0.2).transpose(1, 2)

    def inputs() -> list[Tensor]:
        return [torch.randn(s, device="cuda", dtype=torch.float16) for s in ((1, 3, 8, 8), (4, 3, 3, 3), (4,))]

    kernels = [(k.name, k.bytes, k.flops) for k in count(layer, inputs)]
    x, padded, weight, y = 2 * 3 * 64, 2 * 3 * 100, 2 * 108, 2 * 4 * 64
    assert kernels == [
        ("fill_", padded, 0),
        ("copy_", 2 * x, 0),
        ("convolution", padded + weight + y, 2 * 64 * 108),
        ("add_", 2 * y + 8, 0),
        ("mul_", 2 * y, 0),
        ("add", 2 * y + 2, 0),
        ("leaky_relu", 2 * y, 0),
    ]


def test_broadcast_elements_count_once() -> None:
    (kernel,) = count(lambda x: x + 1, lambda: [torch.empty(1, 16, device="cuda").expand(8, 16)])
    assert kernel.bytes == 4 * (16 + 8 * 16)


def report_like(layer: Layer) -> gpu_report.LayerTraffic:
    (entry,) = gpu_report.layer_traffic([layer])
    return entry


def test_plain_layers_compute_what_the_fused_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    monkeypatch.setattr(gpu_layers, "_DEVICE", "cpu")
    monkeypatch.setattr(gpu_layers, "_map", random)
    monkeypatch.setattr(gpu_layers, "_vector", lambda *shape: random(torch.float32, *shape))
    dtype = torch.float64
    layers = [
        gpu_layers._synthesis(8, 3, 5, 1, 2, dtype),
        gpu_layers._synthesis(8, 3, 5, 2, 2, dtype),
        gpu_layers._rgb(8, 4, 2, dtype),
        gpu_layers._conv_layer("", gpu_layers._Conv(3, 4, 8, 2, False, "lrelu", False), 2, dtype, ()),
        gpu_layers._conv_layer("", gpu_layers._Conv(3, 4, 8, 2, True, "tanh", False), 2, dtype, None),
    ]
    for layer in layers:
        inputs = layer.inputs()
        torch.testing.assert_close(layer.fused(*inputs), layer.eager(*inputs), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("layer", report_layers(), ids=lambda layer: f"{layer.model} {layer.name}")
def test_layers_move_at_least_what_they_must(layer: Layer) -> None:
    entry = report_like(layer)
    assert entry.over_compulsory(entry.eager) > 0.99
    # Plain torch's pointwise operations are not counted, those of our demodulation are: at 4² a sixteenth of all.
    assert sum(k.flops for k in entry.eager) >= 0.9 * sum(k.flops for k in entry.fused) > 0


# ----------------------------------------------------------------------------------------------------------------------
# The report


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report of three layers and two kernels, one of which has something to find."""
    shipped = [("good", gpu_kernels.copy()), ("again", gpu_kernels.copy(2 << 20)), ("bad", gpu_kernels.copy(step=0))]
    monkeypatch.setattr(gpu_report, "shipped_launches", lambda: iter(shipped))
    monkeypatch.setattr(
        gpu_report, "report_layers", lambda: [gpu_layers.stylegan2()[1], *gpu_layers.patch_critic()[:2]]
    )
    library = LibraryStatus(Path(__file__), None)
    codes = [gpu_kernels.cuda_code(75, spills=3), gpu_kernels.cuda_code(90)]
    monkeypatch.setattr(gpu_report._native, "load", lambda: {"cuda": library})
    monkeypatch.setattr(gpu_report, "read_library", lambda path: codes)
    calls = [case for case in CASES if case.op == "spectral_sigma"]
    monkeypatch.setattr(gpu_report, "cuda_traffic", lambda: cuda_traffic(calls))


def test_json(small: None, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["gpu-report", "--arch", "80", "90", "--json"]) == 1
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["archs"] == [80, 90]
    assert "not measured" in report["note"]
    shipped = [row for row in report["code"] if row["kernel"] == "copy_kernel"]
    assert [(row["label"], row["arch"]) for row in shipped] == [("good", 80), ("bad", 80), ("good", 90), ("bad", 90)]
    assert shipped[0]["loads"] == {"128": 1}
    assert shipped[0]["spills"] == 0
    found = {(f["label"], f["kernel"], f["kind"]) for f in report["findings"]}
    assert found == {("bad", "copy_kernel", "scalar load"), ("csrc/cuda", "some_kernel<float>", "spill")}
    assert [(code["arch"], code["shared"]) for code in report["cuda_code"]] == [(75, 2048), (90, 1024)]
    first = report["cuda_calls"][0]
    assert first["cuda"]["kernels"] == ["spectral_sigma_cuda"] and first["triton"]["kernels"] == ["sigma_kernel"]
    assert first["cuda"]["modelled_bytes"] < first["reference"]["modelled_bytes"]
    assert len(report["layers"]) == 3
    layer = report["layers"][1]
    assert layer["eager"]["modelled_bytes"] > layer["compulsory_bytes"]
    assert set(layer["fused"]["predicted_us"]) == {d.name for d in DEVICES}
    h100 = device("H100")
    floor = layer["eager"]["modelled_bytes"] / h100.bandwidth
    assert layer["eager"]["predicted_us"]["H100"] >= floor * 1e6 * 0.999
    assert "gpu-report: bad: copy_kernel on sm_80: scalar load" in printed.err


def test_markdown(small: None, tmp_path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "docs" / "report.md"
    assert cli.main(["gpu-report", "--arch", "75", "--out", str(out)]) == 0  # below sm_80 findings are listed only
    assert "findings, in" in capsys.readouterr().out
    text = out.read_text()
    parts = ("predicted, not measured", "**modelled**", "scalar load", "sm_75", "T4", "datasheet", "good", "| bad |")
    for part in (*parts, "## Summary", "gpu_kernels.copy_kernel"):
        assert part in text, part
    assert "again" not in text  # the same code as good
    assert "| `some_kernel<float>` | 256 | 40 / 2.0 / 100, **3 spills** | 40 / 1.0 / 75 | – | 128: 2 | 32: 1 |" in text
    assert re.search(r"^\| spectral_sigma \| patch critic, float32 \| cuda \| 1 \| 10\.68 \|", text, re.MULTILINE)
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


def test_report_refuses_what_it_cannot_do(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["gpu-report", "--arch", "70"]) == 2
    assert "arch must be among 75, 80" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cli.main(["gpu-report", "--arch", "80"]) == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(gpu_report.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["gpu-report", "--arch", "80"]) == 2
    assert "triton is not installed" in capsys.readouterr().err


def test_without_tensor_cores_other_launches_are_planned() -> None:
    layers = [gpu_layers.stylegan2()[-2]]
    tf32 = dataclasses.replace(gpu_kernels.copy(), constants={"PRECISION": "tf32"})
    with_cores, without = [gpu_report._plan(layers, [("tf32", tf32)], cores) for cores in (True, False)]
    (layer, extra), (ordinary,) = with_cores, without
    assert extra == ("tf32", tf32)
    assert layer[1].constants["BLOCK_N"] == 2 * ordinary[1].constants["BLOCK_N"]
    assert layer[1].bytes == ordinary[1].bytes


def test_modelled_traffic_is_within_budget() -> None:
    """up = 1: one launch and 1.15 × the compulsory bytes at most; up = 2: three and 2.7 ×."""
    over = []
    for entry in gpu_report.layer_traffic(report_layers()):
        launches, factor = (3, 2.7) if entry.layer.up == 2 else (1, 1.15)
        ratio = entry.over_compulsory(entry.fused)
        if len(entry.fused) > launches or ratio > factor:
            over.append(f"{entry.layer.model} {entry.layer.name}: {[k.name for k in entry.fused]}, {ratio:.2f} ×")
    assert not over, "\n".join(over)


def test_architectures_take_turns() -> None:
    launches = [gpu_kernels.product(m=m) for m in (256, 512, 257, 258)] + [gpu_kernels.copy()]
    turns = list(gpu_report.in_turn(((str(i), launch) for i, launch in enumerate(launches)), (80, 90)))
    # The first two run the same code; so do the next two: Triton knows no smaller divisor than 16.
    assert [(label, arch) for label, _, arch in turns] == [
        ("0", 80), ("1", 80), ("2", 90), ("3", 90), ("4", 80), ("4", 90)
    ]  # fmt: skip


def test_launches_of_a_kind_differ_in_sizes_alone() -> None:
    product, copy = gpu_kernels.product, gpu_kernels.copy
    launches = {
        "first": product(),
        "other sizes": product(m=1, n=255, k=17),
        "bfloat16": product(dtype=torch.bfloat16),
        "warps": product(num_warps=8),
        "tile": product(block=32),
        "registers": dataclasses.replace(product(), max_registers=255),
        "kernel": copy(),
        "odd address": copy(offset=3),
    }
    tiles = [{"BLOCK_H": 2, "BLOCK_W": 8}, {"BLOCK_H": 4, "BLOCK_W": 4}, {"BLOCK_H": 4, "BLOCK_W": 8}]
    launches |= {f"{t}": dataclasses.replace(copy(), constants=copy().constants | t) for t in tiles}
    strides = [(1, 64), (1, 32), (64, 1)]
    launches |= {f"{s}": dataclasses.replace(copy(), arguments=copy().arguments | {"x_strides": s}) for s in strides}
    launches["none"] = dataclasses.replace(product(), arguments=product().arguments | {"bias_ptr": None})
    left_out = set(launches) - {label for label, _ in gpu_report.one_of_each(launches.items())}
    assert left_out == {"other sizes", "odd address", f"{tiles[1]}", f"{strides[1]}"}


def test_what_we_ship_has_nothing_to_find() -> None:
    """No spill, tensor cores wherever half types are multiplied, wide loads where the data allow them.

    Of the shipped configurations and the layers of the report one of each kind, on the architectures of CI in turn:
    each on one of them, each kernel on both. Left out is what differs from a kind's first launch in sizes alone, as
    gpu_report.one_of_each says: a third of the codes. ``make gpu-report`` compiles all of them for every architecture,
    and the next test holds what it found. What was compiled before comes from Triton's cache, whose keys hold the
    source of the kernel and of what it calls, the types, constants and options, and the versions; so nothing stale is
    read.
    """
    archs = gpu_report.CI_ARCHITECTURES
    layers = gpu_report.planned_launches(gpu_report.layer_traffic(report_layers()))
    launches = gpu_report.one_of_each([*layers, *gpu_report.shipped_launches()])
    code, findings = gpu_report.compile_launches(gpu_report.in_turn(launches, archs))
    kernels = {launch.kernel for _, launch, _, _ in code}
    assert {(launch.kernel, arch) for _, launch, arch, _ in code} == {(k, arch) for k in kernels for arch in archs}
    assert not findings, "\n".join(map(str, findings))


def test_committed_report_has_nothing_to_find_where_findings_fail() -> None:
    text = (Path(__file__).parents[1] / "docs" / "gpu-report.md").read_text()
    summary = re.findall(r"^\| sm_(\d+) \| \d+ \| (\d+) \| (\d+) \| \d+ \| (\d+) \|$", text, re.MULTILINE)
    assert [int(arch) for arch, *_ in summary] == list(ARCHITECTURES)
    assert {tuple(counts) for arch, *counts in summary if int(arch) >= gpu_report.GATED_FROM} == {("0", "0", "0")}
