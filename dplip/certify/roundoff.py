# SPDX-License-Identifier: Apache-2.0
r"""How far floating-point logits can be from the exact ones, per example and over a ball.

Let ``a_l`` be the exact value of node ``l`` and ``â_l`` the computed one. With ``f_l`` the node's exact map,

    ||â_l - a_l|| <= ||f_l(â_in) - f_l(a_in)|| + ||â_l - f_l(â_in)|| ,

where the first term is the node's Lipschitz bound, applied to the error so far, and the second is what the node
itself rounds. A node that adds up ``n`` terms errs in any order of summation by at most ``gamma_n = n u / (1 - n u)``
times the sum of their magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, 2002, sections 3.1 and 4.2),
plus one underflow per term; ``n + 1`` is used, because a constant written as a Python number is rounded too. The
vector of those sums is ``|W| |a|`` for a matrix; row and column l_1 norms and row l_2 norms do not see signs, so they
bound it as they bound ``W a``, and its l_2 norm follows by Riesz-Thorin, ``||V||_2^2 <= ||V||_1 ||V||_inf`` at
``V = |W|``. A node's constants are added.

This is a proof, given that each layer's ``fan_in`` counts its roundings. The certifier also measures the difference
between the deployed and the float64 logits and refuses to go on where it exceeds the bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dplip.bounds import Graph
from dplip.bounds.graph import Node
from dplip.bounds.operations import Apply
from dplip.bounds.propagate import node_shapes
from dplip.bounds.rounding import unit_roundoff
from dplip.layers import BallClip, LinearSpline, LipschitzLayer, ReferenceShift
from dplip.norms import Norms

__all__ = ["NodeRounding", "Roundoff", "vector_norms"]

_ORDERS = (1.0, 2.0, math.inf)


def vector_norms(x: Tensor) -> Tensor:
    """The l_1, l_2 and l_inf norm of every example of ``x`` [B, *]: [3, B]."""
    flat = x.flatten(1)
    if flat.shape[1] == 0 or len(flat) == 0:
        return x.new_zeros(3, len(flat))
    return torch.stack([torch.linalg.vector_norm(flat, p, dim=1) for p in _ORDERS])


def triple(n: Norms) -> list[float]:
    """``[l1, l2, linf]``."""
    return [n.l1, n.l2, n.linf]


def times(gain: Tensor, x: Tensor) -> Tensor:
    """Elementwise product in which a zero wins over an infinity (an unknown gain times no move)."""
    return torch.where((gain == 0) | (x == 0), 0.0, gain * x)


@dataclass(frozen=True)
class NodeRounding:
    """What one node does to errors.

    Attributes:
        gain: [3, 3], ``gain[a, b]`` bounds the output's norm ``b`` for inputs that move by at most 1 in norm ``a``.
        additions: rounded operations per output entry.
        constant: largest magnitude among the node's own constants.
        dim: entries of one example's output.
        clips: whether it is a :class:`BallClip`, whose output is nowhere longer than its input.
    """

    gain: Tensor
    additions: int
    constant: float
    dim: int
    clips: bool

    def push(self, norms: Tensor) -> Tensor:
        """The output's norms [3, B] for inputs that move by ``norms`` [3, B]."""
        return times(self.gain[:, :, None], norms[:, None, :]).amin(0)

    def local(self, magnitude: Tensor, dtype: torch.dtype) -> Tensor:
        """The node's own error [3, B] for inputs of norms ``magnitude`` [3, B]; inf where it may overflow."""
        if self.additions == 0:
            return torch.zeros_like(magnitude)
        info, n = torch.finfo(dtype), self.additions + 1
        u = unit_roundoff(dtype)
        if n * u >= 0.25:
            return torch.full_like(magnitude, math.inf)
        terms = self._terms(magnitude)
        # A layer may square its input, so underflow and overflow are met at the roots of the extreme numbers.
        underflow = (n + 1) * math.sqrt(info.tiny) * (1 + float(self.gain[2, 2].clamp_max(1e300)))
        error = n * u / (1 - n * u) * terms + underflow * self._spread(terms)
        large = torch.maximum(terms[2], magnitude[2]) > math.sqrt(info.max)
        return torch.where(large | torch.isnan(error), math.inf, error)

    def _spread(self, like: Tensor) -> Tensor:
        """Norms of the vector of ones: [3, 1]."""
        return like.new_tensor([self.dim, math.sqrt(self.dim), 1.0])[:, None]

    def _terms(self, magnitude: Tensor) -> Tensor:
        """Norms [3, B] of the vector of sums of magnitudes."""
        if self.clips:
            return magnitude
        constant = (1 + float(self.gain[2, 2])) * self.constant if self.constant > 0 else 0.0
        linf = times(self.gain[:, 2, None], magnitude).amin(0)
        spread, columns, rows = self._spread(magnitude), self.gain[0, 0], self.gain[2, 2]
        l1 = torch.minimum(spread[0] * linf, times(columns, magnitude[0]))
        l2 = torch.minimum(spread[1] * linf, times((columns * rows).sqrt(), magnitude[1]))
        return torch.stack([l1, l2, linf]) + constant * spread


class Roundoff:
    """Rounding of a traced model, whose graph holds the stored weights in float64."""

    def __init__(self, graph: Graph, values: dict[str, Tensor]) -> None:
        self.graph = graph
        shapes = {name: tuple(v.shape[1:]) for name, v in values.items()}
        like = values[graph.input]
        self.nodes = {node.name: _rounding(node, shapes, like) for node in graph.nodes}

    def logit_errors(
        self, values: dict[str, Tensor], reach: dict[str, Norms], radius: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """For each example, a bound [B] on ``|(ẑ_i - ẑ_j) - (z_i - z_j)|`` over all pairs and all inputs in the ball.

        Args:
            values: every node's value at the centres, [B, *] each.
            reach: how far every node moves per unit of the input's move, from :func:`dplip.bounds.unit_radii`.
            radius: [B], the ball's.
            dtype: of the arithmetic.
        """
        x = values[self.graph.input]
        errors = {self.graph.input: x.new_zeros(3, len(x))}
        for node in self.graph.nodes:
            rounding = self.nodes[node.name]
            arriving = torch.stack([errors[i] for i in node.inputs]).amax(0)
            error = rounding.push(arriving)
            if rounding.additions:
                moves = [times(x.new_tensor(triple(reach[i]))[:, None], radius) for i in node.inputs]
                sizes = [vector_norms(values[i]) + move for i, move in zip(node.inputs, moves, strict=True)]
                # The computed input is within one error of the exact one, and so is the centre's value.
                magnitude = torch.stack(sizes).amax(0) + 2 * arriving
                error = error + rounding.local(magnitude, dtype)
            errors[node.name] = error
        l1, l2, linf = errors[self.graph.output]
        return torch.minimum(torch.minimum(l1, math.sqrt(2) * l2), 2 * linf) * (1 + 1e-9)


def _rounding(node: Node, shapes: dict[str, tuple[int, ...]], like: Tensor) -> NodeRounding:
    around = node_shapes(node, shapes)
    small = 2.0**-200  # exact scaling, and small enough for no cap to bind
    gain = []
    for key in ("l1", "l2", "linf"):
        start = [Norms(s.in_dim, **{key: small}) for s in around]
        gain.append([v * (1 + 1e-12) / small for v in triple(node.operation.output_bound(start, around))])
    layer = node.operation.layer if isinstance(node.operation, Apply) else None
    return NodeRounding(
        gain=like.new_tensor(gain),
        additions=node.operation.fan_in(around),
        constant=0.0 if layer is None else _constant(layer, around[0].input, like),
        dim=math.prod(shapes[node.name]),
        clips=type(layer) is BallClip,
    )


def _constant(layer: LipschitzLayer, shape: tuple[int, ...], like: Tensor) -> float:
    """Bounds every number a layer adds to its input's image: parameters, buffers, its value at 0, a spline's grid."""
    inner = layer.layer if isinstance(layer, ReferenceShift) else layer
    held = [*layer.parameters(), *layer.buffers(), inner(like.new_zeros(1, *shape))]
    largest = max(float(t.detach().abs().amax()) if t.numel() else 0.0 for t in held)
    if isinstance(inner, LinearSpline):
        largest = max(largest, inner.reach) / (1.0 if inner.scale is None else inner.scale_range[0])
    return 2 * largest if math.isfinite(largest) else math.inf
