# SPDX-License-Identifier: Apache-2.0
"""From any ``nn.Module`` built of known layers to a list of nodes with bounds, through torch.fx."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from dplip.bounds.operations import Add, Apply, Concat, Operation
from dplip.bounds.rules import function_layer, mixes_examples, module_layer
from dplip.bounds.tracer import record
from dplip.errors import MixesExamplesError, NoRuleError
from dplip.layers import LipschitzLayer, Reshape, Scale, Shift

__all__ = ["Graph", "Node", "trace"]

_ADD = {operator.add, torch.add, "add", "__add__", "__radd__"}
_SUB = {operator.sub, torch.sub, "sub", "__sub__", "__rsub__"}
_MUL = {operator.mul, torch.mul, "mul", "__mul__", "__rmul__"}
_DIV = {operator.truediv, torch.div, "div", "__truediv__"}
_RESHAPE = {torch.reshape, "reshape", "view"}
_CONSTANTS = (int, float, Tensor)
_REDUCTIONS = frozenset(
    "mean sum std var amax amin max min median cumsum sort norm softmax log_softmax roll flip prod logsumexp".split()
)


@dataclass(frozen=True)
class Node:
    """One operation; ``parameters`` maps the layer's parameter names to those of the whole model."""

    name: str
    operation: Operation
    inputs: tuple[str, ...]
    parameters: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """Nodes in the order of execution, with the names of the input and of the output."""

    nodes: tuple[Node, ...]
    input: str
    output: str

    def layers(self) -> list[LipschitzLayer]:
        """The layers of the graph, in order."""
        return [n.operation.layer for n in self.nodes if isinstance(n.operation, Apply)]

    def evaluate(self, x: Tensor) -> dict[str, Tensor]:
        """Every node's value for the batch ``x``."""
        values = {self.input: x}
        for node in self.nodes:
            values[node.name] = _evaluate(node, [values[i] for i in node.inputs])
        return values


def _evaluate(node: Node, inputs: list[Tensor]) -> Tensor:
    """The node's value; shapes are part of the rules, so whatever does not fit is refused by name."""
    operation, shapes = node.operation, [tuple(v.shape) for v in inputs]
    if isinstance(operation, Add) and len(set(shapes)) > 1:
        # Broadcasting repeats entries, or, where the ranks differ, pairs every example with every other.
        kind = NoRuleError if len({len(s) for s in shapes}) == 1 else MixesExamplesError
        raise kind(
            f"bounds: node '{node.name}' adds tensors of shapes {shapes}; broadcasting has no rule, "
            "reshape them to one shape"
        )
    try:
        value = operation(*inputs)
    except (RuntimeError, ValueError) as error:
        resized = isinstance(operation, Apply) and isinstance(operation.layer, Reshape)
        kind = MixesExamplesError if resized else NoRuleError
        remedy = "keep the batch axis and the number of entries" if resized else "make the shapes fit"
        raise kind(f"bounds: node '{node.name}': {str(error).splitlines()[0]}; {remedy}") from error
    return value


class _BatchSize:
    """Stands for ``x.shape[0]`` in the arguments of a reshape."""


class _Shape:
    """Stands for ``x.shape``."""


_OPERANDS = (Tensor, str, fx.Node, _BatchSize, _Shape)


def trace(model: nn.Module) -> Graph:
    """Express ``model`` as operations with bound rules.

    Modules may nest, branch and meet again (``x + f(x)``, ``torch.cat``), and call the functions of
    :mod:`dplip.bounds.rules`. The model takes one tensor [B, *] and returns one.

    Raises:
        NoRuleError: a module, function, constant or control flow has no rule; the message names the node.
        MixesExamplesError: a node makes examples depend on one another.
    """
    parameters = {id(p): name for name, p in model.named_parameters(remove_duplicate=True)}
    if (remedy := mixes_examples(model)) is not None:
        raise _mixes("model", model, remedy)
    layer = module_layer(model)
    if layer is not None:
        return Graph((_layer_node("model", layer, "input", parameters),), "input", "model")
    return _Builder(model, parameters).build(record(model))


def _mixes(where: str, module: nn.Module, remedy: str) -> MixesExamplesError:
    return MixesExamplesError(
        f"bounds: node '{where}' ({type(module).__name__}) mixes examples, so no per-example sensitivity "
        f"exists; {remedy}"
    )


def _layer_node(name: str, layer: LipschitzLayer, source: str, parameters: dict[int, str]) -> Node:
    names = {local: parameters[id(p)] for local, p in layer.named_parameters() if id(p) in parameters}
    return Node(name, Apply(layer), (source,), names)


class _Builder:
    """Walks an fx graph once; ``values`` maps fx nodes to a node name, a constant or a size."""

    def __init__(self, model: nn.Module, parameters: dict[int, str]) -> None:
        self.model, self.parameters = model, parameters
        self.nodes: list[Node] = []
        self.values: dict[fx.Node, Any] = {}

    def build(self, graph: fx.Graph) -> Graph:
        inputs = [n for n in graph.nodes if n.op == "placeholder"]
        if len(inputs) != 1:
            raise NoRuleError(
                f"bounds: expected a model of one input, got {[n.name for n in inputs]}; bind the others before tracing"
            )
        source, output = inputs[0].name, None
        self.values[inputs[0]] = source
        steps: dict[str, Callable[[fx.Node], Any]] = {
            "call_module": self._module,
            "call_function": self._function,
            "call_method": self._function,
            "get_attr": self._constant,
        }
        for node in graph.nodes:
            if node.op == "output":
                output = self._value(node.args[0])
            elif node.op != "placeholder":
                self.values[node] = steps[node.op](node)
        if not isinstance(output, str):
            raise NoRuleError("bounds: expected the model to return one tensor, got something else; return the logits")
        return Graph(tuple(self.nodes), source, output)

    def _value(self, argument: Any) -> Any:
        return self.values[argument] if isinstance(argument, fx.Node) else argument

    def _append(self, name: str, operation: Operation, *inputs: str) -> str:
        self.nodes.append(Node(name, operation, inputs))
        return name

    def _module(self, node: fx.Node) -> str:
        module = self.model.get_submodule(str(node.target))
        if (remedy := mixes_examples(module)) is not None:
            raise _mixes(str(node.target), module, remedy)
        layer = module_layer(module)
        if layer is None:
            raise NoRuleError(
                f"bounds: node '{node.target}' ({type(module).__name__}) has no rule; use a layer of dplip.layers, "
                "subclass LipschitzLayer, or call dplip.bounds.register_rule"
            )
        if len(node.args) != 1 or node.kwargs or not isinstance(self._value(node.args[0]), str):
            raise NoRuleError(
                f"bounds: node '{node.target}': expected one tensor argument, got {node.args}; pass only x"
            )
        self.nodes.append(_layer_node(node.name, layer, self._value(node.args[0]), self.parameters))
        return node.name

    def _constant(self, node: fx.Node) -> Tensor:
        value: Any = self.model
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if not isinstance(value, Tensor) or (isinstance(value, nn.Parameter) and value.requires_grad):
            raise NoRuleError(
                f"bounds: '{node.target}' is a trainable parameter used outside a layer, so its gradient has no bound; "
                "move it into a LipschitzLayer"
            )
        return value.detach()

    def _function(self, node: fx.Node) -> Any:
        target = node.target
        args = tuple(self._value(a) for a in node.args)
        if target is getattr and args[1:] == ("shape",):
            return _Shape()
        if target == "size":
            return _Shape() if len(args) == 1 else self._size(node, args[1])
        if target is operator.getitem and isinstance(args[0], _Shape):
            return self._size(node, args[1])
        if target in _ADD or target in _SUB:
            return self._sum(node, args, minus=target in _SUB)
        if target in _MUL or target in _DIV:
            return self._product(node, args, inverse=target in _DIV)
        if target in (torch.cat, torch.concat, torch.concatenate):
            return self._concat(node)
        if target in _RESHAPE:
            return self._reshape(node, args)
        layer = None
        others = (*args[1:], *node.kwargs.values())
        if args and isinstance(args[0], str) and not any(isinstance(a, _OPERANDS) for a in others):
            layer = function_layer(target, args[1:], node.kwargs)
        if layer is None:
            raise self._unknown(node)
        return self._append(node.name, Apply(layer), args[0])

    def _unknown(self, node: fx.Node) -> Exception:
        name = getattr(node.target, "__name__", str(node.target))
        if name in _REDUCTIONS:
            dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
            if dim is None or 0 in (dim if isinstance(dim, (tuple, list)) else (dim,)):
                return MixesExamplesError(
                    f"bounds: node '{node.name}' ({name} over the batch axis) mixes examples, so no per-example "
                    "sensitivity exists; use dplip.layers.ReferenceShift or drop it"
                )
        return NoRuleError(
            f"bounds: node '{node.name}' ({name}) has no rule; use a layer of dplip.layers, "
            "subclass LipschitzLayer, or call dplip.bounds.register_rule"
        )

    def _size(self, node: fx.Node, axis: Any) -> _BatchSize:
        if axis != 0:
            raise NoRuleError(
                f"bounds: node '{node.name}' reads size {axis}; write the number, or use dplip.layers.Reshape"
            )
        return _BatchSize()

    def _sum(self, node: fx.Node, args: tuple[Any, ...], minus: bool) -> str:
        if len(args) != 2 or node.kwargs:
            raise self._unknown(node)
        left, right = reversed(args) if node.target == "__rsub__" else args
        if not any(isinstance(a, str) for a in args) or not all(isinstance(a, (str, *_CONSTANTS)) for a in args):
            raise self._unknown(node)
        if isinstance(left, str) and isinstance(right, str):
            return self._append(node.name, Add((1, -1 if minus else 1)), left, right)
        if isinstance(left, str):
            return self._append(node.name, Apply(self._shift(node, right if minus else -right)), left)
        if minus:  # constant - x
            right = self._append(f"{node.name}.neg", Apply(Scale(-1.0)), right)
        return self._append(node.name, Apply(self._shift(node, -left)), right)

    def _shift(self, node: fx.Node, offset: Any) -> Shift:
        if isinstance(offset, Tensor) and offset.ndim > 1 and offset.shape[0] != 1:
            raise MixesExamplesError(
                f"bounds: node '{node.name}' adds a constant with a batch axis of {offset.shape[0]}, which depends on "
                "an example's place in the batch; give it one example's shape"
            )
        if isinstance(offset, Tensor) and offset.ndim > 1:
            offset = offset.squeeze(0)
        shift = Shift(0.0)
        exact = torch.as_tensor(offset, dtype=offset.dtype if isinstance(offset, Tensor) else torch.float64)
        if not bool(torch.isfinite(exact).all()):
            raise NoRuleError(f"bounds: node '{node.name}' adds a constant that is not finite; fix the constant")
        shift.offset = exact.detach().clone()
        return shift

    def _product(self, node: fx.Node, args: tuple[Any, ...], inverse: bool) -> str:
        left, right = args[:2]
        if not inverse and isinstance(left, (int, float)):
            left, right = right, left
        if node.kwargs or not isinstance(left, str) or not isinstance(right, (int, float)):
            raise self._unknown(node)
        if inverse and right == 0:
            raise NoRuleError(f"bounds: node '{node.name}' divides by zero; fix the constant")
        return self._append(node.name, Apply(Scale(1 / right if inverse else right)), left)

    def _concat(self, node: fx.Node) -> str:
        given = {**dict(zip(("tensors", "dim"), node.args, strict=False)), **node.kwargs}
        dim, tensors = given.get("dim", given.get("axis", 0)), given.get("tensors")
        if not isinstance(tensors, (list, tuple)) or not given.keys() <= {"tensors", "dim", "axis"}:
            raise self._unknown(node)
        pieces = [self._value(a) for a in tensors]
        if not all(isinstance(p, str) for p in pieces):
            raise self._unknown(node)
        if not isinstance(dim, int) or dim < 1:
            raise MixesExamplesError(
                f"bounds: node '{node.name}' concatenates along axis {dim}; examples live on axis 0, name an axis >= 1"
            )
        return self._append(node.name, Concat(dim), *pieces)

    def _reshape(self, node: fx.Node, args: tuple[Any, ...]) -> str:
        size = tuple(args[1]) if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
        size = tuple(self._value(s) for s in size)
        rest = size[1:]
        if (
            not size
            or not (isinstance(size[0], _BatchSize) or size[0] == -1)
            or not all(type(s) is int for s in rest)
            or size == (-1,)
        ):
            raise MixesExamplesError(
                f"bounds: node '{node.name}' must keep the batch axis; write x.reshape(x.shape[0], ...) with numbers, "
                "or use dplip.layers.Reshape"
            )
        return self._append(node.name, Apply(Reshape(*rest)), args[0])
