# SPDX-License-Identifier: Apache-2.0
r"""Interval certificates: boxes through the network, never wider than the Lipschitz constants allow.

Theorem. Let ``B_l`` be boxes with ``B_0`` containing every attacker's input ``x'`` and every node's box containing
the node's map of its inputs' boxes. Then ``a_l(x') in B_l``, and a class whose logit beats the others everywhere in
the last box is constant. The same holds after intersecting with any other box that contains ``a_l(x')``; here with
``a_l(x) +- eps R_l``, ``R_l`` the l_inf move of the node per unit move of the input. For ``norm = "l2"`` the input
box of half-width ``eps`` contains the l_2 ball and ``R_l`` is taken for l_2 moves: the claim is about the l_2 ball.

At an affine head, differences are bounded rather than logits (elision of the last layer):
``(z_t - z_j)(a) >= (z_t - z_j)(mid) - |s| |w_t - w_j| . rad``. Each difference also keeps its Lipschitz bound.

Source: Gowal, Dvijotham, Stanforth, Bunel, Qin, Uesato, Arandjelovic, Mann, Kohli, Scalable Verified Training for
Provably Robust Image Classification, ICCV 2019, section 3.

All boxes are computed in float64 and widened by each node's rounding; what is left must exceed the deployment's
rounding over the ball.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dplip.bounds.graph import Node
from dplip.bounds.operations import Box
from dplip.certify.margin import FARTHEST, MarginCertifier
from dplip.certify.roundoff import vector_norms
from dplip.certify.subject import Point

__all__ = ["IntervalCertifier"]

_DOUBLINGS, _BISECTIONS = 40, 10
_SEED = 1e-6  # first radius tried, relative to the input, where the margin gives none
_TRY = 1.001  # boxes that do not beat the margin by this factor are not worth bisecting
_INTERVAL_ROUNDINGS = 4.0  # centre and half-width, their sum and difference, each rounded like the map itself


class IntervalCertifier:
    """Boxes for one model, norm and attack model.

    Args:
        margins: the model, its constants and its rounding.
        domain: ``(lower, upper)`` in which every entry of an attacker's input lies, or None.
    """

    def __init__(self, margins: MarginCertifier, domain: tuple[float, float] | None) -> None:
        self.margins, self.domain = margins, domain
        self.graph, self.reach = margins.subject.graph, margins.reach
        self.roundings = margins.roundoff.nodes
        self.nodes = {node.name: node for node in self.graph.nodes}

    def probe(self, point: Point) -> None:
        """Raise :class:`NoRuleError` where a layer has no interval rule."""
        self.centres(point)

    def centres(self, point: Point) -> dict[str, Box]:
        """Boxes that contain the exact value of every node at the centres."""
        return self._enclose(point.x, point.x)

    def radius(self, point: Point, floor: Tensor, improve: bool) -> Tensor:
        """[B] float64: a radius at which the certificate was verified, 0 where none was.

        The search doubles and bisects; every radius returned has itself been verified, whether or not boxes are nested.

        Args:
            point: the batch.
            floor: [B], the margin's radii.
            improve: return at least ``floor``, and search only where the boxes beat it.
        """
        best = torch.zeros_like(floor)
        live = point.claimable.nonzero()[:, 0]
        if len(live) == 0:
            return best
        cap = FARTHEST
        if self.domain is not None and math.isfinite(self.domain[1] - self.domain[0]):
            cap = min(cap, self.domain[1] - self.domain[0])  # the box is the whole domain
        centres = self.centres(point)
        size = point.x.flatten(1).abs().amax(1) if point.x[0].numel() else torch.zeros_like(floor)
        trial = torch.where(floor > 0, floor * (_TRY if improve else 1.0), _SEED * (1 + size)).clamp_max(cap)
        failed = torch.full_like(floor, math.inf)
        for _ in range(_DOUBLINGS):
            holds = self._verified(point, centres, live, trial[live])
            best[live[holds]] = trial[live[holds]]
            failed[live[~holds]] = trial[live[~holds]]
            live = live[holds & (trial[live] < cap)]
            trial = (2 * trial).clamp_max(cap)
            if len(live) == 0:
                break
        worth = (best > 0) | (not improve)
        live = (point.claimable & worth & (failed < math.inf)).nonzero()[:, 0]
        for _ in range(_BISECTIONS if len(live) else 0):
            middle = (best[live] + failed[live]) / 2
            holds = self._verified(point, centres, live, middle)
            best[live[holds]] = middle[holds]
            failed[live[~holds]] = middle[~holds]
        return torch.maximum(best, floor) if improve else best

    def _verified(self, point: Point, centres: dict[str, Box], rows: Tensor, eps: Tensor) -> Tensor:
        """[len(rows)] bool: whether the class is constant on the balls of radius ``eps``."""
        part = point.take(rows)
        near = {name: (low[rows], high[rows]) for name, (low, high) in centres.items()}
        low, high = self._input_box(part.x, eps)
        return self._holds(part, eps, self._difference_bound(part, eps, self._enclose(low, high, near, eps)))

    def _holds(self, part: Point, eps: Tensor, bound: Tensor) -> Tensor:
        """Whether lower bounds [B, C] on ``z_t - z_j`` exceed the deployment's rounding; NaN does not."""
        deployed, _ = self.margins.slack(part, eps)
        return (bound > deployed[:, None]).scatter(1, part.top[:, None], True).all(1)

    def _difference_bound(self, part: Point, eps: Tensor, boxes: dict[str, Box]) -> Tensor:
        """Lower bounds [B, C] on ``z_t - z_j`` from the boxes and from the Lipschitz constants."""
        logits = part.values[self.graph.output]
        _, here = self.margins.slack(part, eps)
        top = part.top[:, None]
        below, above = boxes[self.graph.output]
        bound = below.gather(1, top) - above
        bound = bound - bound.abs() * 2.0**-52
        lipschitz = logits.gather(1, top) - logits - here[:, None]
        lipschitz = lipschitz - eps[:, None] * self.margins.constants[part.top] * (1 + 1e-12)
        bound = torch.fmax(bound, lipschitz)
        if self.margins.head is not None:
            bound = torch.fmax(bound, self._head_bound(part.top, boxes))
        return bound

    def _head_bound(self, top: Tensor, boxes: dict[str, Box]) -> Tensor:
        """Lower bounds [B, C] on ``z_t - z_j`` over the box that enters the affine head."""
        head = self.margins.head
        if head is None:
            raise ValueError("the model has no affine head")
        low, high = boxes[head.source]
        middle = (low + high) / 2
        half = torch.maximum(middle - low, high - middle) * (1 + 2.0**-51)
        at_middle = {head.source: (middle, middle)}
        for name in head.chain:
            at_middle[name] = self._through(self.nodes[name], at_middle)
        below, above = at_middle[head.chain[-1]]
        spread = torch.empty_like(below)
        for t in sorted(set(top.tolist())):
            rows = top == t
            spread[rows] = half[rows] @ (head.weight[t] - head.weight).abs().T
        spread = abs(head.factor) * spread * (1 + 4 * (half.shape[1] + 4) * 2.0**-53)
        rounded = 2.0**-50 * (below.abs() + above.abs() + spread).amax(1, keepdim=True)
        return below.gather(1, top[:, None]) - above - spread - rounded

    def _input_box(self, x: Tensor, eps: Tensor) -> Box:
        """The attacker's inputs; the domain is stretched to the centre itself, which may lie a rounding outside."""
        eps = eps.view(-1, *[1] * (x.ndim - 1))
        low = torch.nextafter(x - eps, torch.full_like(x, -math.inf))
        high = torch.nextafter(x + eps, torch.full_like(x, math.inf))
        if self.domain is not None:
            low = torch.maximum(low, x.clamp_max(self.domain[0]))
            high = torch.minimum(high, x.clamp_min(self.domain[1]))
        return low, high

    def _enclose(
        self, low: Tensor, high: Tensor, near: dict[str, Box] | None = None, eps: Tensor | None = None
    ) -> dict[str, Box]:
        """A box for every node. ``near`` encloses the exact values at the centres, ``eps`` [B] is the ball's radius."""
        boxes = {self.graph.input: (low, high)}
        for node in self.graph.nodes:
            low, high = self._through(node, boxes)
            reach = self.reach[node.name].linf
            if near is not None and eps is not None and math.isfinite(reach):
                move = (eps * reach * (1 + 1e-12)).view(-1, *[1] * (low.ndim - 1))
                low = torch.maximum(low, near[node.name][0] - move)
                high = torch.minimum(high, near[node.name][1] + move)
                # Rounding of the cap itself.
                low, high = low - low.abs() * 2.0**-52, high + high.abs() * 2.0**-52
            boxes[node.name] = low, high
        return boxes

    def _through(self, node: Node, boxes: dict[str, Box]) -> Box:
        """The node's interval rule, widened by its rounding; whatever is undefined becomes unbounded."""
        inputs = [boxes[i] for i in node.inputs]
        low, high = node.operation.interval(*inputs)
        rounding = self.roundings[node.name]
        if rounding.additions:
            sizes = [vector_norms(torch.maximum(below.abs(), above.abs())) for below, above in inputs]
            error = _INTERVAL_ROUNDINGS * rounding.local(torch.stack(sizes).amax(0), torch.float64)[2]
            error = error.view(-1, *[1] * (low.ndim - 1))
            low, high = low - error, high + error
        low = torch.where(torch.isnan(low), -math.inf, low)
        return low, torch.where(torch.isnan(high), math.inf, high)
