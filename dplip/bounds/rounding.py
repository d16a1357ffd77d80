# SPDX-License-Identifier: Apache-2.0
"""How far floating-point evaluation can leave the real-number bounds.

Nothing here covers float16 or bfloat16. A value stored in them moves by ``u`` = 2^-11 or 2^-8 of its own magnitude, and
a stored gradient of a whole batch by ``u`` of the batch's sum, neither of which one example's bound knows. So private
training refuses autocast wherever it lowers a layer (:mod:`dplip.privacy.arithmetic`), and certificates refuse it
altogether. Selections alone would be safe: whichever coordinate a rounded distance credits, the row keeps its norm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dplip.bounds.graph import Graph
from dplip.bounds.propagate import node_shapes

__all__ = ["FLOOR", "growth", "unit_roundoff"]

FLOOR = {torch.float32: 1e-3, torch.float64: 1e-9}
"""Least relative slack added to sensitivities, which also covers the order of summation over a batch."""


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def growth(graph: Graph, values: dict[str, Tensor], dtype: torch.dtype) -> float:
    """``prod_l (1 + eta_l) - 1``: the worst relative growth of a norm through the network's rounding.

    A sum of ``n`` products errs by ``gamma_n = n u / (1 - n u)`` of its absolute value (Higham, Accuracy and
    Stability of Numerical Algorithms, theorem 3.5), hence ``||fl(Wx) - Wx||_2 <= gamma_n ||W||_F ||x||_2`` and with
    ``||W||_F <= sqrt(n) sigma`` each layer contributes ``eta_l = gamma_n sqrt(n)`` with ``n = fan_in``.
    """
    u = unit_roundoff(dtype)
    shapes = {name: tuple(v.shape[1:]) for name, v in values.items()}
    total = 1.0
    for node in graph.nodes:
        n = node.operation.fan_in(node_shapes(node, shapes))
        if n * u >= 0.5:
            return math.inf
        total *= 1 + n * u / (1 - n * u) * math.sqrt(n)
    return total - 1
