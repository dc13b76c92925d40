"""Other engines on the same generators: each takes a model and an example, and gives a function of the image.

ONNX Runtime and OpenVINO get torch's own export to ONNX (of OpenVINO's ways in it is the fastest or as fast as another
on all of the generators, measured), all their optimisations, and as many threads as torch has. They are in the extra
``peers`` and are imported when they are asked for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Run = Callable[[Tensor], Tensor]
Make = Callable[[nn.Module, Tensor], Run]

# Of the largest value of eager's picture: float32 sums in another order; networks of 350 layers add them up.
MAX_ERROR = 1e-3
# Below this an int8 picture is another picture, and its time means nothing.
MIN_PSNR = 20.0


def require(module: str, package: str) -> ModuleType:
    """Import a peer.

    Raises:
        ModuleNotFoundError: it is not installed; the message names the extra that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'bench.peers: {package} is not installed: pip install "fastgan[peers]"', name=error.name
        ) from error


def export(model: nn.Module, example: Tensor, folder: str) -> str:
    """The path of the model as ONNX, exported by torch.export."""
    require("onnxscript", "onnxscript")
    path = str(Path(folder) / "model.onnx")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.onnx.export(model, (example,), path, dynamo=True, verbose=False, external_data=False)
    return path


def onnx_runtime(model: nn.Module, example: Tensor) -> Run:
    ort = require("onnxruntime", "onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Its threads would go on spinning after a call, on the cores of whoever is timed next; within a call they still do.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        session = ort.InferenceSession(export(model, example, folder), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _read_openvino(model: nn.Module, example: Tensor) -> Any:
    openvino = require("openvino", "openvino")
    with tempfile.TemporaryDirectory() as folder:
        return openvino.convert_model(export(model, example, folder))


def _compile_openvino(model: Any) -> Run:
    openvino = require("openvino", "openvino")
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    options |= {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    # The result is the request's own memory: the next call overwrites it, and nothing is copied.
    return lambda x: torch.from_numpy(request.infer([x.numpy()], share_inputs=True, share_outputs=True)[0])


def openvino_f32(model: nn.Module, example: Tensor) -> Run:
    return _compile_openvino(_read_openvino(model, example))


def openvino_int8(model: nn.Module, example: Tensor, calibration: Sequence[Tensor]) -> Run:
    """Post-training quantisation by NNCF; what it leaves in floating point is float32.

    Weights are given 7 bits and maps a zero point where they need one. By NNCF's defaults the U-Net's picture has 18 dB
    on a CPU without VNNI, whose 16-bit sums of two products saturate; so it has 35 dB, and is as fast.
    """
    nncf = require("nncf", "nncf")
    found = _read_openvino(model, example)
    images = nncf.Dataset([image.numpy() for image in calibration])
    seven_bits = nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE)
    quantised = nncf.quantize(
        found,
        images,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(calibration),
        advanced_parameters=seven_bits,
    )
    return _compile_openvino(quantised)


def torch_frozen(model: nn.Module, example: Tensor) -> Run:
    """torch.compile with weights as constants: batch norm folded, weights laid out for oneDNN ahead."""
    from torch._inductor import config

    fold_transposed(model)
    # All models here that are nn.Sequential share one forward, whose compilations are limited to a few.
    torch._dynamo.reset()
    compiled = torch.compile(model)
    with torch.no_grad(), config.patch(freezing=True):
        compiled(example)
    return compiled


def fold_transposed(model: nn.Module) -> None:
    """Fold each batch norm that follows a transposed convolution in an nn.Sequential, in place.

    Frozen, torch 2.14 folds it only where C_in = C_out, and there scales the weight [C_in, C_out, kH, kW] along C_in:
    the U-Net's picture is off by a quarter of its range. Folded before, the picture is right, and no slower.
    """
    for sequence in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        for (name, convolution), (after, norm) in pairwise(list(sequence.named_children())):
            if isinstance(convolution, nn.ConvTranspose2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(sequence, name, fuse_conv_bn_eval(convolution, norm, transpose=True))
                setattr(sequence, after, nn.Identity())


def eager(model: nn.Module, example: Tensor) -> Run:
    return model


def eager_nhwc(model: nn.Module, example: Tensor) -> Run:
    """Maps and weights in channels_last; ``model`` is changed."""
    model.to(memory_format=torch.channels_last)
    return lambda x: model(x.to(memory_format=torch.channels_last))


FLOAT32_PEERS: dict[str, Make] = {
    "eager NCHW": eager,
    "eager NHWC": eager_nhwc,
    "torch.compile, freezing": torch_frozen,
    "ONNX Runtime": onnx_runtime,
    "OpenVINO f32": openvino_f32,
}
# What candidates of these names need besides torch.
PACKAGES: dict[str, tuple[str, ...]] = {
    "ONNX Runtime": ("onnxruntime",),
    "OpenVINO f32": ("openvino",),
    "OpenVINO int8": ("openvino", "nncf"),
}


def versions(candidate: str) -> dict[str, str]:
    """The releases of the packages that a candidate of this name runs in, besides torch."""
    return {package: importlib.metadata.version(package) for package in PACKAGES.get(candidate, ())}


def psnr(picture: Tensor, reference: Tensor) -> float:
    """Decibels, of a peak that is the span of ``reference``; infinite where the two are equal."""
    error = (picture.double() - reference.double()).square().mean().sqrt().item()
    span = (reference.max() - reference.min()).item()
    return 20 * math.log10(span / error) if error > 0 else math.inf
