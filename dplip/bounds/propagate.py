# SPDX-License-Identifier: Apache-2.0
"""Forward and backward passes of the norm calculus: from a traced model to per-tensor sensitivities.

Forward, every node carries a centre (the exact value at one public reference input), a radius (how far any input
of the domain can move it) and a magnitude (its norm). Backward, every node carries bounds on one example's cotangent.
Both use the same operator norms. Bounds that depend on the current weights are functions of weights that have been
released with noise already, so recomputing them at every step is post-processing and costs no privacy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dplip.bounds.domain import InputDomain
from dplip.bounds.graph import Graph, Node
from dplip.bounds.operations import Apply
from dplip.errors import BoundViolation, UnboundedInputError
from dplip.layers.base import Shapes
from dplip.norms import Norms

__all__ = ["State", "backward", "forward", "input_like", "node_shapes", "sensitivities"]


@dataclass(frozen=True)
class State:
    """What is known of one activation ``a(x)`` over the whole input domain.

    Attributes:
        centre: ``a(reference)``, [1, *shape].
        radius: bounds on ``||a(x) - a(reference)||``.
        magnitude: bounds on ``||a(x)||``.
    """

    centre: Tensor
    radius: Norms
    magnitude: Norms

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.centre.shape[1:])


def input_like(model: nn.Module, domain: InputDomain) -> Tensor:
    """The reference input in the dtype and on the device of the model's parameters."""
    owned = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    tensor = owned[0] if owned else torch.empty(0)
    return domain.centre(tensor.dtype, tensor.device)


def node_shapes(node: Node, shapes: dict[str, tuple[int, ...]]) -> list[Shapes]:
    """Input and output shape of ``node`` for each of its inputs."""
    return [Shapes(shapes[i], shapes[node.name]) for i in node.inputs]


def _norms_of(value: Tensor) -> Norms:
    size = value.detach().double().flatten().abs()
    total = float(size.sum())
    if not math.isfinite(total):  # NaN, infinity, or beyond what a float holds
        return Norms(size.numel())
    return Norms(size.numel(), total, float(torch.linalg.vector_norm(size)), float(size.amax()))


@torch.no_grad()
def forward(graph: Graph, domain: InputDomain, reference: Tensor) -> dict[str, State]:
    """The state of every node; ``reference`` is the domain's centre as a batch of one."""
    values = graph.evaluate(reference)
    shapes = {name: tuple(v.shape[1:]) for name, v in values.items()}
    states = {graph.input: State(reference, domain.radius(), domain.magnitude())}
    for node in graph.nodes:
        around = node_shapes(node, shapes)
        centre = values[node.name]
        at_centre = _norms_of(centre)
        radius = node.operation.output_bound([states[i].radius for i in node.inputs], around)
        reach = node.operation.range_bound(around)
        magnitude = at_centre + radius
        if reach is not None:
            radius, magnitude = radius.meet(at_centre + reach), magnitude.meet(reach)
        states[node.name] = State(centre, radius, magnitude)
    return states


def backward(graph: Graph, shapes: dict[str, tuple[int, ...]], g: Norms) -> dict[str, Norms]:
    """Bounds on one example's cotangent at every node, given bounds ``g`` at the output.

    Where a value is used more than once its cotangents add up.
    """
    cotangents: dict[str, Norms] = {graph.output: g}
    for node in reversed(graph.nodes):
        arriving = cotangents.get(node.name)
        if arriving is None:  # computed but not used by the output
            continue
        parts = node.operation.cotangent_bounds(arriving, node_shapes(node, shapes))
        for source, part in zip(node.inputs, parts, strict=True):
            cotangents[source] = cotangents[source] + part if source in cotangents else part
    return cotangents


def sensitivities(graph: Graph, states: dict[str, State], g: Norms) -> dict[str, float]:
    """For each parameter reached, a bound on the l_2 norm of one example's gradient.

    Args:
        graph: the traced model.
        states: the result of :func:`forward`.
        g: bounds on one example's cotangent at the output: the loss's bounds on its logit gradient.

    Returns:
        ``{parameter name: bound}`` in exact arithmetic, for the current parameters. A tensor that is used in
        several places gets the sum of its bounds (triangle inequality).

    Raises:
        UnboundedInputError: a gradient grows with an activation that has no finite bound.
        BoundViolation: a layer's rule does not name exactly its parameters.
    """
    shapes = {name: state.shape for name, state in states.items()}
    cotangents = backward(graph, shapes, g)
    total: dict[str, float] = {}
    for node in graph.nodes:
        if not node.parameters or node.name not in cotangents or not isinstance(node.operation, Apply):
            continue
        around = node_shapes(node, shapes)[0]
        rules = node.operation.layer.param_sensitivity(states[node.inputs[0]].magnitude, cotangents[node.name], around)
        if set(rules) != set(node.parameters):
            raise BoundViolation(
                f"bounds: node '{node.name}': expected param_sensitivity for {sorted(node.parameters)}, "
                f"got {sorted(rules)}; fix the layer's rule"
            )
        for local, bound in rules.items():
            if not math.isfinite(bound):
                raise UnboundedInputError(
                    f"bounds: node '{node.name}': expected a finite bound for parameter '{node.parameters[local]}', "
                    f"got {bound}; bound the input (InputDomain, dplip.layers.Clamp or BallClip) or use layers "
                    "whose gradient does not grow with it (LinfDistance, SortLinear)"
                )
            name = node.parameters[local]
            total[name] = total.get(name, 0.0) + bound
    return total
