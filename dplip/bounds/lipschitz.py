# SPDX-License-Identifier: Apache-2.0
"""Global Lipschitz constants, from the same forward pass that bounds activations."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from dplip.bounds.graph import Graph
from dplip.bounds.propagate import node_shapes
from dplip.norms import Norms

__all__ = ["INPUT_NORMS", "Lipschitz", "lipschitz", "unit_radii"]

INPUT_NORMS = ("linf", "l2")
_ROUND_UP = 1 + 1e-12  # products of at most a few thousand float64 constants


@dataclass(frozen=True)
class Lipschitz:
    """``||f(x) - f(x')||_p <= constant ||x - x'||_p`` for p = inf (``linf``) and p = 2 (``l2``)."""

    linf: float
    l2: float


def unit_radii(graph: Graph, values: dict[str, Tensor], norm: str) -> dict[str, Norms]:
    """How far every node moves, in three norms, when the input moves by at most 1 in ``norm``.

    All rules are homogeneous, so these are Lipschitz constants: multiply by the size of the move. Caps such
    as the width of a box hold for one move only and would not scale; a layer that adds them in
    ``output_bound`` only lowers its answer when they bind, so the pass uses ``operator_norms`` through a move that is
    small enough for no cap to bind.

    Args:
        graph: the traced model.
        values: every node's value for some batch (only the shapes are read).
        norm: ``"linf"`` or ``"l2"``.
    """
    if norm not in INPUT_NORMS:
        raise ValueError(f"lipschitz: expected norm in {INPUT_NORMS}, got {norm!r}")
    shapes = {name: tuple(v.shape[1:]) for name, v in values.items()}
    small = 2.0**-200  # exact scaling; no width of a box is this small
    start = Norms(math.prod(shapes[graph.input]), **{norm: small})
    radii = {graph.input: start}
    for node in graph.nodes:
        radii[node.name] = node.operation.output_bound([radii[i] for i in node.inputs], node_shapes(node, shapes))
    return {name: radius * (_ROUND_UP / small) for name, radius in radii.items()}


def lipschitz(graph: Graph, values: dict[str, Tensor]) -> Lipschitz:
    """Global constants of the whole model in l_inf and l_2, rounded up."""
    return Lipschitz(
        linf=unit_radii(graph, values, "linf")[graph.output].linf,
        l2=unit_radii(graph, values, "l2")[graph.output].l2,
    )
