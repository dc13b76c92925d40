"""An optimised generator in one file: safetensors, whose header carries the graph as JSON. Nothing in it is executable:
nodes are fused layers by name, or torch's operators by name, of those that only compute tensors from tensors."""

from __future__ import annotations

import hashlib
import json
import operator
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fastgan import _native
from fastgan.infer.capture import Captured, constant_of
from fastgan.infer.nodes import FUSED, is_a
from fastgan.infer.plan import Choice, Program

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT, VERSION = "fastgan.infer", 2

# Operators that take text and still only compute.
_WITH_TEXT = {
    *("aten::pad", "aten::div.Tensor_mode", "aten::div.Scalar_mode", "aten::gelu", "fastgan::bias_act"),
    *("fastgan::demodulation", "fastgan::demodulation_factor", "fastgan::filtered_lrelu", "fastgan::norm_act"),
    *("fastgan::scaled_conv2d", "fastgan::upfirdn2d", "fastgan::dense_block"),
}
_KINDS = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def save(path: Path, captured: Captured, program: Program, facts: Mapping[str, Any]) -> None:
    """Write a graph, its constants, the choices of its program and ``facts`` (JSON); all or nothing.

    Raises:
        ValueError: a value that JSON cannot carry.
    """
    from_safetensors = _safetensors()
    graph = captured.module.graph
    numbers = {node: i for i, node in enumerate(graph.nodes)}
    choices = {step.node: asdict(step.choice) for step in program.steps if step.choice is not None}
    tensors: dict[str, Tensor] = {}
    described = []
    for node in graph.nodes:
        record = _described(node, numbers, choices)
        if node.op == "get_attr":
            value = constant_of(node)
            record["transposed"] = value.ndim == 2 and not value.is_contiguous() and value.t().is_contiguous()
            stored = value.t() if record["transposed"] else value
            record["storage"] = node.meta.get("storage", "fp32")
            tensors[node.target] = _stored(stored.contiguous(), record["storage"])
        described.append(record)
    text = json.dumps(
        {
            "nodes": described,
            "in_spec": pytree.treespec_dumps(captured.in_spec),
            "out_spec": pytree.treespec_dumps(captured.out_spec),
            "leaves": [_encoded(leaf, {}) for leaf in captured.leaves],
            "machine": _machine(),
            **facts,
        }
    )
    header = {"format": FORMAT, "version": str(VERSION), "graph": text, "digest": _digest(text, tensors)}
    partial = path.with_name(path.name + ".partial")
    from_safetensors.torch.save_file(tensors, str(partial), header)
    os.replace(partial, path)


def _stored(value: Tensor, storage: str) -> Tensor:
    """Memory of its own; of values that bfloat16 has, half as much."""
    return value.bfloat16() if storage == "bf16" else value.clone()


def read(path: Path) -> tuple[Captured, dict[fx.Node, Choice], dict[str, Any]]:
    """(graph, the choices that were made for this kind of machine, facts) of a file that :func:`save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is none of ours, truncated, changed, or of another version; an operator that is not
            allowed in one.
    """
    header, tensors = _opened(path)
    if header.get("format") != FORMAT:
        raise ValueError(
            f"infer.load: path must be a file that save wrote, got {path}, which says {header or 'nothing'}"
        )
    if header.get("version") != str(VERSION):
        raise ValueError(f"infer.load: {path} must be of version {VERSION}, got version {header.get('version')}")
    if header.get("digest") != _digest(header["graph"], tensors):
        raise ValueError(f"infer.load: {path} was changed or damaged since it was saved: its digest does not fit")
    facts = json.loads(header["graph"])
    module, choices = _graph(facts.pop("nodes"), tensors)
    captured = Captured(
        module,
        pytree.treespec_loads(facts.pop("in_spec")),
        [_decoded(leaf, []) for leaf in facts.pop("leaves")],
        pytree.treespec_loads(facts.pop("out_spec")),
    )
    return captured, choices if facts.pop("machine") == _machine() else {}, facts


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError('infer: saving and loading need safetensors: pip install "fastgan[infer]"') from error
    return safetensors


def _machine() -> list[Any]:
    """What choices of algorithms depend on."""
    level = None if _native.cpu_library() is None else _native.simd_level()
    return [level, torch.get_num_threads()]


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _opened(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    library = _safetensors()
    if not path.exists():
        raise FileNotFoundError(f"infer.load: path must be a file that save wrote, and {path} does not exist")
    try:
        with library.safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except library.SafetensorError as error:
        raise ValueError(f"infer.load: {path} is truncated or no safetensors file: {error}") from error


# ----------------------------------------------------------------------------------------------------------------------
# Nodes


def _described(node: fx.Node, numbers: dict[fx.Node, int], choices: dict[fx.Node, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {"op": node.op, "name": node.name}
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        record["value"] = [list(value.shape), str(value.dtype).removeprefix("torch.")]
    if node.op == "get_attr":
        return {**record, "target": node.target}
    if node.op == "call_function":
        record["target"] = _target_name(node)
        record["kwargs"] = {name: _encoded(item, numbers) for name, item in node.kwargs.items()}
        record["choice"] = choices.get(node)
        record["meta"] = {key: node.meta[key] for key in ("origin", "fused", "reason") if key in node.meta}
    record["args"] = [_encoded(item, numbers) for item in node.args] if node.op != "placeholder" else []
    return record


def _target_name(node: fx.Node) -> str:
    if is_a(node, *FUSED.values()):
        return f"fused::{node.target.__name__}"
    if node.target is operator.getitem:
        return "item"
    return f"{node.target._schema.name}.{node.target._overloadname}"


def _encoded(value: Any, numbers: dict[fx.Node, int]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, fx.Node):
        return {"node": numbers[value]}
    if isinstance(value, (list, tuple)):
        return [_encoded(item, numbers) for item in value]
    for kind, of in _KINDS.items():
        if isinstance(value, of):
            return {kind: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    raise ValueError(f"infer: save takes numbers, text and tensors, got {value!r} of {type(value).__name__}")


def _decoded(value: Any, nodes: list[fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    return torch.device(content) if kind == "device" else getattr(torch, content)


def _graph(
    records: list[dict[str, Any]], tensors: Mapping[str, Tensor]
) -> tuple[fx.GraphModule, dict[fx.Node, Choice]]:
    module, graph = fx.GraphModule({}, fx.Graph()), fx.Graph()
    nodes: list[fx.Node] = []
    choices: dict[fx.Node, Choice] = {}
    for record in records:
        args = _decoded(record.get("args", []), nodes)
        if record["op"] == "placeholder":
            node = graph.placeholder(record["name"])
        elif record["op"] == "get_attr":
            narrow = record["storage"] == "bf16"
            value = tensors[record["target"]].float() if narrow else tensors[record["target"]]
            module.register_buffer(record["target"], value.t() if record["transposed"] else value, persistent=False)
            node = graph.get_attr(record["target"])
            node.meta["storage"] = record["storage"]
        elif record["op"] == "output":
            node = graph.output(tuple(args[0]))
        else:
            kwargs = {name: _decoded(item, nodes) for name, item in record["kwargs"].items()}
            node = graph.call_function(_target(record["target"]), tuple(args), kwargs)
            node.meta.update(record["meta"])
            if record["choice"] is not None:
                choices[node] = Choice(**record["choice"])
        if "value" in record:
            shape, dtype = record["value"]
            node.meta["val"] = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        nodes.append(node)
    module.graph = graph
    # A module copies the graph that it is given.
    own = dict(zip(graph.nodes, module.graph.nodes, strict=True))
    return module, {own[node]: choice for node, choice in choices.items()}


def _target(name: str) -> Any:
    """The function of a node; raises ValueError for one that may do more than compute."""
    if name == "item":
        return operator.getitem
    namespace, _, rest = name.partition("::")
    if namespace == "fused" and rest in FUSED:
        return FUSED[rest]
    operation, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, namespace), operation, None) if namespace in ("aten", "fastgan") else None
    target = getattr(packet, overload or "default", None)
    if target is None or not _only_computes(target):
        raise ValueError(f"infer.load: {name} is not allowed in a file")
    return target


def _only_computes(target: Any) -> bool:
    schema = target._schema
    has_text = any("str" in str(argument.type) for argument in schema.arguments)
    allowed = schema.name in _WITH_TEXT or f"{schema.name}.{schema.overload_name}" in _WITH_TEXT
    return not schema.is_mutable and (allowed or not has_text)
