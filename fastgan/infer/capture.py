"""From a module to a functional graph: torch.export, parameters as its constants, nothing that does nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

aten = torch.ops.aten

# What export writes that computes nothing.
_CHECKS = {aten._assert_tensor_metadata.default, aten.promote_types.default, aten.sym_size.int}
_SAME = {
    *(
        aten.clone.default,
        aten.detach.default,
        aten.alias.default,
        aten.contiguous.default,
        aten.lift_fresh_copy.default,
    ),
    *(aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.native_dropout.default),
    *(aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.expand.default),
    *(aten.view.default, aten.reshape.default),
}


@dataclass
class Captured:
    """A graph whose placeholders are the tensors among the inputs, and what is around it.

    Attributes:
        module: the graph; parameters and buffers are its ``get_attr`` nodes.
        in_spec: how (args, kwargs) flatten.
        leaves: what they flattened to: a tensor's place holds None, a value that calls must repeat is a list of it.
        out_spec: how the results flatten.
    """

    module: fx.GraphModule
    in_spec: pytree.TreeSpec
    leaves: list[Any]
    out_spec: pytree.TreeSpec


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` in evaluation mode, and every module back in its own mode behind it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def apart(device_type: str) -> Iterator[None]:
    """Without gradients, and without the autocast and the inference mode that the caller may be in."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device_type, enabled=False):
        yield


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Captured:
    """The graph of ``model(*args, **kwargs)`` in evaluation; to be called within :func:`apart`.

    Raises:
        ValueError: the model cannot be written as one graph (its control flow depends on data), or it changes buffers.
    """
    with evaluating(model):
        try:
            exported = torch.export.export(model, tuple(args), dict(kwargs), strict=False)
            if not _replace_in_place(exported.graph_module.graph):
                exported = exported.run_decompositions({})
        except Exception as error:
            raise ValueError(
                f"infer.optimize: model must be one graph of tensor operations for these arguments, but torch.export "
                f"could not capture {type(model).__name__}: {_first_line(error)}. Control flow that depends on data "
                "cannot be captured: optimise the part of the model without it"
            ) from error
    signature = exported.graph_signature
    changed = {**signature.buffers_to_mutate, **getattr(signature, "user_inputs_to_mutate", {})}
    if changed:
        raise ValueError(
            f"infer.optimize: model must change nothing when it evaluates, but {type(model).__name__} writes to "
            f"{', '.join(sorted(changed.values()))}"
        )
    tensors = {**exported.state_dict, **exported.constants}
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    module = _with_constants(exported.graph_module, {name: tensors[of] for name, of in names.items()}, names)
    leaves, in_spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    _drop_scalar_inputs(module, leaves)
    name_origins(module.graph)
    _reshape_instead_of_view(module.graph)
    drop_noops(module)
    kept = [None if isinstance(leaf, Tensor) else [leaf] for leaf in leaves]
    return Captured(module, in_spec, kept, exported.call_spec.out_spec)


# Operators whose result is new memory, beside those that work element by element.
_NEW_MEMORY = {
    *(aten.conv2d.default, aten.conv_transpose2d.input, aten.batch_norm.default, aten.instance_norm.default),
    *(aten.cat.default, aten.linear.default, aten.addmm.default),
}


def _replace_in_place(graph: fx.Graph) -> bool:
    """Make activations and sums in place ordinary ones, which all that reads their memory later reads; whether the
    graph is functional then. What works in place on a view or on an input is left to torch, to which a whole graph is
    four times as much work."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        x, target = node.args[0], _functional(node.target)
        # Of two dtypes the result would have the wider one, where in place it keeps its own.
        dtypes = {i.meta["val"].dtype for i in node.all_input_nodes}
        if target is None or not _is_new_memory(x) or len(dtypes) > 1:
            return False
        if any(position[user] < position[node] and not _is_new_memory(user) for user in x.users):
            return False
        for user in list(x.users):
            if position[user] > position[node]:
                user.replace_input_with(x, node)
        node.target = target
    return True


def _functional(target: Any) -> Any:
    """The operator that computes what one like ``aten::relu_`` leaves in its first argument; None for others."""
    name, written = target._schema.name, [a for a in target._schema.arguments if a.alias_info and a.alias_info.is_write]
    if not name.startswith("aten::") or not name.endswith("_") or written != target._schema.arguments[:1]:
        return None
    packet = getattr(aten, name.removeprefix("aten::")[:-1], None)
    found = getattr(packet, target._overloadname, None)
    return found if found is not None and torch.Tag.pointwise in found.tags else None


def _is_new_memory(node: Any) -> bool:
    """Whether a node is a call whose result is memory of its own."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    functional = torch.Tag.pointwise in getattr(node.target, "tags", ()) and not node.target._schema.is_mutable
    return functional or node.target in _NEW_MEMORY


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _with_constants(source: fx.GraphModule, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> fx.GraphModule:
    """The graph with each placeholder of a parameter replaced by a constant."""
    module = fx.GraphModule({}, source.graph)
    for node in list(module.graph.nodes):
        if node.op != "placeholder" or node.name not in tensors:
            continue
        constant = add_constant(module, tensors[node.name].detach(), node)
        constant.meta["parameter"] = names[node.name]
        node.replace_all_uses_with(constant)
        module.graph.erase_node(node)
    return module


def _drop_scalar_inputs(module: fx.GraphModule, leaves: list[Any]) -> None:
    """Inputs that are no tensors were written into the graph as values: their placeholders have no users."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node, leaf in zip(placeholders, leaves, strict=True):
        if not isinstance(leaf, Tensor):
            module.graph.erase_node(node)


def add_constant(module: fx.GraphModule, tensor: Tensor, before: fx.Node) -> fx.Node:
    """A new constant of the graph, its node in front of ``before``."""
    number = getattr(module, "_constants", 0)
    module._constants = number + 1
    name = f"constant_{number}"
    module.register_buffer(name, tensor, persistent=False)
    with module.graph.inserting_before(before):
        node = module.graph.get_attr(name)
    node.meta["val"] = torch.empty_like(tensor, device="meta")
    return node


def constant_of(node: Any) -> Tensor | None:
    """The value of a constant's node; None for any other."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    return getattr(node.graph.owning_module, node.target)


def name_origins(graph: fx.Graph) -> None:
    """Tell each node where in the model it comes from: ``meta["origin"]``, "path: operator"; and ``meta["twin"]``, the
    name of the node in the captured graph that has the same value, which later passes hand on."""
    for node in graph.nodes:
        node.meta["twin"] = node.name
        if node.op != "call_function":
            continue
        stack = node.meta.get("nn_module_stack") or {}
        path = next((entry[0] for entry in reversed(stack.values())), "")
        operation = getattr(node.target, "_opname", getattr(node.target, "__name__", str(node.target)))
        node.meta["origin"] = f"{path or 'model'}: {operation}"


def _reshape_instead_of_view(graph: fx.Graph) -> None:
    """A view that fits the strides of the model's own tensors need not fit those of ours."""
    for node in graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default


def drop_noops(module: fx.GraphModule) -> None:
    """Remove checks, copies and conversions that change nothing."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.target in _CHECKS and not node.users:
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _SAME:
            continue
        if node.target is aten.native_dropout.default or not isinstance(node.args[0], fx.Node):
            continue
        before, after = node.args[0].meta.get("val"), node.meta.get("val")
        same = isinstance(before, Tensor) and isinstance(after, Tensor)
        if (
            same
            and before.dtype == after.dtype
            and before.device.type == after.device.type
            and before.shape == after.shape
        ):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    eliminate_dead(graph)


def eliminate_dead(graph: fx.Graph) -> None:
    """Remove what nobody reads. Inputs stay: calls pass them all the same."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)


def outputs_of(graph: fx.Graph) -> list[Any]:
    (output,) = [node for node in graph.nodes if node.op == "output"]
    return list(output.args[0])
