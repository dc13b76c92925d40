"""From torch's operators to the nodes of :mod:`fastgan.infer.nodes`, one by one; nothing is fused yet.

What has no counterpart stays torch's, with the reason in ``meta["reason"]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fastgan.infer import nodes
from fastgan.infer.capture import add_constant, aten, constant_of, eliminate_dead
from fastgan.infer.nodes import is_image, shape_of
from fastgan.ops.demodulation import weight_energy
from fastgan.reference.activation import ACTIVATIONS

_fastgan = torch.ops.fastgan
Lowered = tuple[Callable[..., Any], dict[str, Any]]
Rule = Callable[[fx.GraphModule, fx.Node, dict[str, Any]], Lowered | str]
_RULES: dict[Any, Rule] = {}


def lower(module: fx.GraphModule) -> None:
    """Replace what there are nodes for, where the images are float32."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        target = node
        # Of an operator with several results the first is the one; its node is the item's.
        if node.target in _FIRST_OF:
            items = list(node.users)
            if any(item.args[1] != 0 for item in items if item.users):
                node.meta["reason"] = "more than its first result is used"
                continue
            live = [item for item in items if item.users]
            if len(live) != 1:
                continue
            target = live[0]
        rule = _RULES.get(node.target)
        if rule is None or not is_image(target):
            continue
        lowered = rule(module, node, _arguments(node))
        if isinstance(lowered, str):
            node.meta["reason"] = lowered
            continue
        function, kwargs = lowered
        replace(target, function, {name: value for name, value in kwargs.items() if value is not None}, node)
    eliminate_dead(graph)


def use_energies(module: fx.GraphModule) -> None:
    """Demodulation by constant weights reads what is left of them, their energies, instead of the weights."""
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not _fastgan.demodulation.default:
            continue
        weight, style, prenormalize, eps, _ = node.args
        items = {item.args[1]: item for item in node.users if item.users}
        tensor = constant_of(weight)
        # Prenormalised scales are others, though their product is the same.
        if tensor is None or prenormalize != "none" or not items or set(items) - {0, 1}:
            continue
        if 0 in items:
            items[0].replace_all_uses_with(style)
        if 1 in items:
            energies = [add_constant(module, value, node) for value in weight_energy(tensor)]
            with module.graph.inserting_before(node):
                args = (style, *energies, tensor[0, 0].numel(), prenormalize, eps)
                factor = module.graph.call_function(_fastgan.demodulation_factor.default, args)
            factor.meta.update(val=items[1].meta["val"], origin=nodes.name_of(node), twin=items[1].meta["twin"])
            items[1].replace_all_uses_with(factor)
    eliminate_dead(module.graph)


def replace(
    node: fx.Node, function: Callable[..., Any], kwargs: dict[str, Any], named: fx.Node | None = None
) -> fx.Node:
    """A node of its own in the place of ``node``, whose value it computes; it goes by the name of ``named``."""
    graph = node.graph
    with graph.inserting_before(node):
        new = graph.call_function(function, kwargs=kwargs)
    new.meta["val"] = node.meta["val"]
    named = node if named is None else named
    new.meta.update(origin=nodes.name_of(named), twin=node.meta.get("twin"), fused=list(named.meta.get("fused", [])))
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


def _arguments(node: fx.Node) -> dict[str, Any]:
    """An operator's arguments by their names in its schema, defaults included."""
    schema = node.target._schema.arguments
    values = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    values.update(zip((argument.name for argument in schema), node.args, strict=False))
    return {**values, **node.kwargs}


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(targets, rule))
        return rule

    return register


def _pair(value: Any) -> tuple[int, int]:
    values = [value] * 2 if isinstance(value, int) else list(value)
    return (values[0], values[-1])


# ----------------------------------------------------------------------------------------------------------------------
# Convolutions


def _weight_reason(x: fx.Node, weight: Any) -> str | None:
    if not is_image(x):
        return "its input is no float32 image"
    tensor = constant_of(weight)
    if tensor is None:
        return "its weight is computed from the inputs"
    return (
        None
        if tensor.ndim == 4 and tensor.dtype == torch.float32
        else "its weight is no float32 kernel of 4 dimensions"
    )


@_rule(aten.conv2d.default, aten.conv_transpose2d.input, aten.convolution.default)
def _convolution(module: fx.GraphModule, node: fx.Node, a: dict[str, Any]) -> Lowered | str:
    x, weight, bias = a["input"], a["weight"], a["bias"]
    reason = _weight_reason(x, weight)
    if reason is not None:
        return reason
    if bias is not None and constant_of(bias) is None:
        return "its bias is computed from the inputs"
    transposed = a.get("transposed", node.target is aten.conv_transpose2d.input)
    settings = {
        **{name: _pair(a[name]) for name in ("stride", "padding", "dilation")},
        "output_padding": _pair(a.get("output_padding", 0)),
        "transposed": transposed,
        "groups": a["groups"],
        "reflect": False,
    }
    return nodes.convolution, {"x": x, "weight": weight, "bias": bias, **settings}


@_rule(aten.conv2d.padding)
def _named_padding(module: fx.GraphModule, node: fx.Node, a: dict[str, Any]) -> Lowered | str:
    dilation, kernel = _pair(a["dilation"]), shape_of(a["weight"])[2:]
    spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if a["padding"] == "same" and any(span % 2 for span in spans):
        return "its padding is not symmetric"
    padding = (0, 0) if a["padding"] == "valid" else (spans[0] // 2, spans[1] // 2)
    return _convolution(module, node, {**a, "padding": padding})


@_rule(_fastgan.scaled_conv2d.default)
def _scaled_convolution(module: fx.GraphModule, node: fx.Node, a: dict[str, Any]) -> Lowered | str:
    reason = _weight_reason(a["x"], a["weight"])
    if reason is not None:
        return reason
    if a["save_conv"]:
        return "it returns the convolution before its epilogue"
    pairs = {name: _pair(a[name]) for name in ("stride", "padding", "output_padding", "dilation")}
    return nodes.convolution, {**_without(a, "save_conv", "precision"), **pairs, "reflect": False}


@_rule(_fastgan.dense_block.default)
def _dense_block(module: fx.GraphModule, node: fx.Node, a: dict[str, Any]) -> Lowered | str:
    if any(constant_of(tensor) is None for tensor in [*a["weights"], *a["biases"]]):
        return "its weights are computed from the inputs"
    return nodes.dense_block, _without(a, "precision")


@_rule(_fastgan.upfirdn2d.default)
def _fir(module: fx.GraphModule, node: fx.Node, a: dict[str, Any]) -> Lowered | str:
    return (nodes.fir, a) if is_image(a["x"]) else "its input is no float32 image"


def _without(a: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in a.items() if name not in names}


# ----------------------------------------------------------------------------------------------------------------------
# Norms


@_rule(aten.instance_norm.default)
def _instance_norm(module: fx.GraphModule, node: fx.Node, a: dict[str, Any]) -> Lowered | str:
    if not a["use_input_stats"]:
        return _fixed_norm(module, node, a)
    if math.prod(shape_of(a["input"])[2:]) == 1:
        return "one pixel has no variance"
    return nodes.instance_norm, {"x": a["input"], "weight": a["weight"], "bias": a["bias"], "eps": a["eps"]}


@_rule(aten.batch_norm.default)
def _batch_norm(module: fx.GraphModule, node: fx.Node, a: dict[str, Any]) -> Lowered | str:
    if a["training"] or a["running_mean"] is None:
        return "its statistics are those of the batch"
    return _fixed_norm(module, node, a)


@_rule(aten._native_batch_norm_legit_no_training.default)
def _fixed_norm(module: fx.GraphModule, node: fx.Node, a: dict[str, Any]) -> Lowered | str:
    """weight · (x − mean) / √(var + eps) + bias as one factor and one shift per channel, made in float64."""
    mean, var = constant_of(a["running_mean"]), constant_of(a["running_var"])
    weight, bias = constant_of(a["weight"]), constant_of(a["bias"])
    if any(a[name] is not None and constant_of(a[name]) is None for name in ("weight", "bias")):
        return "its weight or bias is computed from the inputs"
    if mean is None or var is None:
        return "its statistics are computed from the inputs"
    factor = (var.double() + a["eps"]).rsqrt() * (1.0 if weight is None else weight.double())
    shift = (0.0 if bias is None else bias.double()) - mean.double() * factor
    return nodes.pointwise, {
        "x": a["input"],
        "out_scale": add_constant(module, factor.float()[None], node),
        "bias": add_constant(module, shift.float(), node),
    }


@_rule(_fastgan.norm_act.default)
def _norm_act(module: fx.GraphModule, node: fx.Node, a: dict[str, Any]) -> Lowered | str:
    if a["batch"] or a["mean"] is not None:
        return "its statistics are those of the batch, or given"
    if not is_image(a["x"]):
        return "its input is no float32 image"
    return nodes.instance_norm, _without(a, "batch", "mean", "var")


# ----------------------------------------------------------------------------------------------------------------------
# Activations, factors, sums


def _activation(act: str, **alpha_from: str) -> Rule:
    def rule(module: fx.GraphModule, node: fx.Node, a: dict[str, Any]) -> Lowered | str:
        x = a.get("self", a.get("input"))
        alpha = a[alpha_from["alpha"]] if alpha_from else ACTIVATIONS[act].alpha
        for name, value in _AS_DEFINED.get(act, {}).items():
            if a.get(name, value) != value:
                return f"its {name} is not {value}"
        if a.get("threshold", 20) < 20:
            return "it is linear where softplus is not yet"
        return nodes.pointwise, {"x": x, "act": act, "alpha": float(alpha)}

    return rule


# Arguments of torch's activations that ours have not.
_AS_DEFINED = {"elu": {"alpha": 1, "scale": 1, "input_scale": 1}, "softplus": {"beta": 1}}

for _target, _act in (
    (aten.relu.default, "relu"),
    (aten.tanh.default, "tanh"),
    (aten.sigmoid.default, "sigmoid"),
    (aten.elu.default, "elu"),
    (aten.selu.default, "selu"),
    (aten.softplus.default, "softplus"),
    (aten.silu.default, "swish"),
):
    _RULES[_target] = _activation(_act)
_RULES[aten.leaky_relu.default] = _activation("lrelu", alpha="negative_slope")


@_rule(aten.prelu.default)
def _prelu(module: fx.GraphModule, node: fx.Node, a: dict[str, Any]) -> Lowered | str:
    slope = constant_of(a["weight"])
    if slope is None or slope.numel() != 1:
        return "its slope differs between channels"
    return nodes.pointwise, {"x": a["self"], "act": "lrelu", "alpha": float(slope)}


@_rule(aten.hardtanh.default, aten.clamp.default)
def _clamp(module: fx.GraphModule, node: fx.Node, a: dict[str, Any]) -> Lowered | str:
    low, high = a.get("min_val", a.get("min")), a.get("max_val", a.get("max"))
    if not isinstance(low, (int, float)) or not isinstance(high, (int, float)) or low != -high or high <= 0:
        return "its bounds are not symmetric"
    return nodes.pointwise, {"x": a["self"], "clamp": float(high)}


@_rule(_fastgan.bias_act.default)
def _bias_act(module: fx.GraphModule, node: fx.Node, a: dict[str, Any]) -> Lowered | str:
    if a["b"] is not None and a["dim"] != 1:
        return "its bias is not along the channels"
    names = {"x": a["x"], "bias": a["b"], "clamp": a["clamp"]}
    return nodes.pointwise, {**names, "act": a["act"], "alpha": a["alpha"], "gain": a["gain"]}


def _per_channel(module: fx.GraphModule, value: Any, channels: int, before: fx.Node) -> Tensor | None:
    """A number or a constant that broadcasts over an image by channels, as [C]."""
    if isinstance(value, (int, float)):
        return torch.full((channels,), float(value), dtype=torch.float32)
    tensor = constant_of(value)
    if tensor is None or tensor.dtype != torch.float32:
        return None
    if tensor.numel() == 1:
        return tensor.reshape(1).expand(channels).contiguous()
    shape = (1,) * (4 - tensor.ndim) + tuple(tensor.shape)
    return tensor.reshape(channels).contiguous() if shape == (1, channels, 1, 1) else None


@_rule(aten.mul.Tensor, aten.div.Tensor)
def _product(module: fx.GraphModule, node: fx.Node, a: dict[str, Any]) -> Lowered | str:
    x, factor = a["self"], a["other"]
    divides = node.target is aten.div.Tensor
    if not divides and not (is_image(x) and constant_of(x) is None):
        x, factor = factor, x
    if not is_image(x) or shape_of(x) != shape_of(node):
        return "it multiplies no image by a factor"
    if isinstance(factor, (int, float)):
        if divides and factor == 0:
            return "it divides by zero"
        return nodes.pointwise, {"x": x, "gain": 1.0 / factor if divides else float(factor)}
    values = _per_channel(module, factor, shape_of(x)[1], node)
    if values is None:
        return "its factor is not one per channel"
    values = values.double().reciprocal().float() if divides else values
    return nodes.pointwise, {"x": x, "out_scale": add_constant(module, values[None], node)}


@_rule(aten.add.Tensor, aten.sub.Tensor)
def _sum(module: fx.GraphModule, node: fx.Node, a: dict[str, Any]) -> Lowered | str:
    x, other = a["self"], a["other"]
    sign = float(a["alpha"]) * (-1.0 if node.target is aten.sub.Tensor else 1.0)
    if sign == 1.0 and not (is_image(x) and constant_of(x) is None):
        x, other = other, x
    if not is_image(x) or shape_of(x) != shape_of(node):
        return "it adds to no image"
    if is_image(other) and shape_of(other) == shape_of(x):
        return nodes.pointwise, {"x": x, "residual": other, "residual_gain": sign}
    values = _per_channel(module, other, shape_of(x)[1], node)
    if values is None:
        return "what it adds is neither an image of the same size nor one value per channel"
    return nodes.pointwise, {"x": x, "bias": add_constant(module, sign * values, node)}


# ----------------------------------------------------------------------------------------------------------------------
# What moves values


@_rule(aten.cat.default)
def _concatenate(module: fx.GraphModule, node: fx.Node, a: dict[str, Any]) -> Lowered | str:
    images = list(a["tensors"])
    if a["dim"] not in (1, -3) or not all(is_image(image) for image in images):
        return "it does not put the channels of images side by side"
    return nodes.concatenate, {"tensors": images}


@_rule(aten.pad.default, aten.constant_pad_nd.default)
def _pad(module: fx.GraphModule, node: fx.Node, a: dict[str, Any]) -> Lowered | str:
    mode, padding = a.get("mode", "constant"), list(a["pad"])
    value = a.get("value") or 0.0
    if mode not in ("constant", "reflect", "replicate") or (mode == "constant" and value != 0):
        return f"it pads by {mode} {value if mode == 'constant' else ''}".rstrip()
    if len(padding) > 4 or min(padding) < 0:
        return "it pads more than rows and columns, or cuts"
    padding += [0] * (4 - len(padding))
    return nodes.pad, {"x": a["self"], "padding": tuple(padding), "mode": "zeros" if mode == "constant" else mode}


@_rule(aten.reflection_pad2d.default, aten.replication_pad2d.default)
def _border_pad(module: fx.GraphModule, node: fx.Node, a: dict[str, Any]) -> Lowered | str:
    mode = "reflect" if node.target is aten.reflection_pad2d.default else "replicate"
    return _pad(module, node, {"self": a["self"], "pad": a["padding"], "mode": mode})


_FIRST_OF = {
    *(aten._native_batch_norm_legit_no_training.default, _fastgan.scaled_conv2d.default, _fastgan.norm_act.default)
}
