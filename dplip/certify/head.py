# SPDX-License-Identifier: Apache-2.0
"""The affine head of a model, whose logit differences are bounded pair by pair."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dplip.bounds import Graph
from dplip.bounds.graph import Node
from dplip.bounds.operations import Apply
from dplip.layers import (
    Flatten,
    LearnedScale,
    LipschitzLayer,
    NormalizedLinear,
    PositionBias,
    ReferenceShift,
    Reshape,
    Scale,
    Shift,
)
from dplip.layers.affine import Affine
from dplip.norms import Norms

__all__ = ["AffineHead", "find_head"]


@dataclass(frozen=True)
class AffineHead:
    """The logits are ``factor * W a + constant`` for the node value ``a = source``.

    Attributes:
        source: name of the node that enters the head.
        weight: ``W`` [C, D].
        factor: product of the scales behind the head.
        chain: names of the nodes from the affine layer to the output.
    """

    source: str
    weight: Tensor
    factor: float
    chain: tuple[str, ...]

    def pair_constants(self, reach: Norms) -> Tensor:
        """Bounds [C, C] on ``|d(z_i - z_j)|`` where ``a`` moves by at most ``reach``.

        Hoelder: ``|<w_i - w_j, da>|`` is at most ``||w_i - w_j||_1 ||da||_inf``, ``||.||_2 ||da||_2`` and
        ``||.||_inf ||da||_1``.
        """
        rows = [self._pair_norms(w, reach) for w in self.weight]
        return abs(self.factor) * (1 + 1e-12) * torch.stack(rows)

    def _pair_norms(self, row: Tensor, reach: Norms) -> Tensor:
        difference = self.weight - row
        bounds = []
        for order, move in ((1, reach.linf), (2, reach.l2), (float("inf"), reach.l1)):
            size = torch.linalg.vector_norm(difference, order, dim=1)
            bounds.append(torch.where(size == 0, 0.0, size * (move * (1 + 4e-16 * self.weight.shape[1]))))
        return torch.stack(bounds).amin(0)


def find_head(graph: Graph) -> AffineHead | None:
    """The affine layer that the output is a scaled, shifted, reshaped copy of, or None where there is none."""
    nodes = {node.name: node for node in graph.nodes}
    name, factor, chain = graph.output, 1.0, [graph.output]
    while name in nodes:
        layer = _layer(nodes[name])
        weight = None if layer is None else _weight(layer)
        if weight is not None:
            return AffineHead(nodes[name].inputs[0], weight, factor, tuple(reversed(chain)))
        if isinstance(layer, Scale) and type(layer) is Scale:
            factor *= layer.factor
        elif isinstance(layer, LearnedScale) and type(layer) is LearnedScale:
            factor *= float(layer.scale.detach())
        elif type(layer) not in (Shift, PositionBias, Reshape, Flatten):
            return None
        name = nodes[name].inputs[0]
        chain.append(name)
    return None


def _layer(node: Node) -> LipschitzLayer | None:
    layer = node.operation.layer if isinstance(node.operation, Apply) else None
    return layer.layer if isinstance(layer, ReferenceShift) and type(layer) is ReferenceShift else layer


def _weight(layer: LipschitzLayer) -> Tensor | None:
    # Exact classes: a subclass may compute something else.
    if isinstance(layer, (NormalizedLinear, Affine)) and type(layer) in (NormalizedLinear, Affine):
        return layer.weight.detach()
    return None
