# SPDX-License-Identifier: Apache-2.0
r"""Certificates from Lipschitz constants that hold in a ball only.

Theorem. Let the boxes of :mod:`dplip.certify.interval` contain every node's values over the ball of radius ``eps``
around ``x``, and let ``d`` be the difference of a node's values at ``x'`` and at ``x``. Neurons that are constant on
their boxes drop out of the operator norms, so ``d`` is bounded by the moves of :mod:`dplip.certify.moves`. At an affine
head ``z = s W a + c``,

    (z_t - z_j)(x') >= (z_t - z_j)(x) - max { s (w_j - w_t) . d : d = diag(r) u, ||u||_2 <= rho, d in the box - a(x) }

where the maximum is bounded by duality (:mod:`dplip.certify.ball_box`). Elsewhere Hoelder on the logits' own move
applies. The class is constant if all the bounds are positive.

Balls and boxes are passed through the network together: a node's box is cut to ``a(x) +- d``, with rows ``||W_i
diag(r)||_2 rho`` at affine nodes, and a move is at most what its box allows. Every difference keeps the bounds of
:class:`dplip.certify.interval.IntervalCertifier`, so no radius is below a margin's.

Rounding: the boxes contain exact values, the norms are upper bounds, every product is raised, and what is left must
exceed the deployment's rounding over the ball.

Source: Huang, Zhang, Shi, Kolter, Anandkumar, Training Certifiably Robust Neural Networks with Efficient Local
Lipschitz Bounds, NeurIPS 2021, section 3 and appendix on the last layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dplip.bounds.lipschitz import INPUT_NORMS, lipschitz
from dplip.bounds.operations import Apply, Box
from dplip.certify.ball_box import ball_box_bound
from dplip.certify.interval import IntervalCertifier
from dplip.certify.margin import MarginCertifier
from dplip.certify.masked_norm import linear_part
from dplip.certify.moves import Move, node_move
from dplip.certify.roundoff import triple
from dplip.certify.subject import Point, Subject
from dplip.errors import ConfigError

__all__ = ["LocalCertifier", "local_lipschitz"]

_UP = 1 + 1e-12
_OUT = 1 + 2.0**-50


class LocalCertifier(IntervalCertifier):
    """Boxes and balls for one model, norm and attack model.

    Args:
        margins: the model, its constants and its rounding.
        domain: ``(lower, upper)`` in which every entry of an attacker's input lies, or None.
        values: every node's value for any batch (only shapes are read).
    """

    def __init__(self, margins: MarginCertifier, domain: tuple[float, float] | None, values: dict[str, Tensor]) -> None:
        super().__init__(margins, domain)
        self.shapes = {name: tuple(v.shape[1:]) for name, v in values.items()}
        self.linear = {
            node.name: linear_part(node.operation.layer, self.shapes[node.inputs[0]])
            for node in self.graph.nodes
            if isinstance(node.operation, Apply)
        }

    def _verified(self, point: Point, centres: dict[str, Box], rows: Tensor, eps: Tensor) -> Tensor:
        part = point.take(rows)
        near = {name: (low[rows], high[rows]) for name, (low, high) in centres.items()}
        boxes, moves = self.regions(part.x, eps, near)
        bound = torch.fmax(self._difference_bound(part, eps, boxes), self._local_bound(part, eps, boxes, moves, near))
        return self._holds(part, eps, bound)

    def regions(
        self, x: Tensor, eps: Tensor, near: dict[str, Box], pairs: bool = False
    ) -> tuple[dict[str, Box], dict[str, Move]]:
        """Every node's box over the balls of radius ``eps`` [B] around ``x``, and its move.

        Args:
            x: [B, *] centres.
            eps: [B].
            near: encloses every node's exact value at the centres.
            pairs: return moves for any two points of the region at distance 1, not for one against the centre.
        """
        low, high = self._input_box(x, eps)
        boxes: dict[str, Box] = {self.graph.input: (low, high)}
        moves = {self.graph.input: self._start(_displacement((low, high), (x, x)), eps)}
        units = {self.graph.input: self._start((high > low).to(x), torch.ones_like(eps))} if pairs else moves
        for node in self.graph.nodes:
            box = self._capped(self._through(node, boxes), near[node.name], eps * self.reach[node.name].linf)
            first = boxes[node.inputs[0]]
            linear, gain = self.linear.get(node.name), self.roundings[node.name]
            shape = self.shapes[node.name]
            move = node_move(node, [moves[i] for i in node.inputs], first, shape, linear, gain)
            move = move.capped(_displacement(box, near[node.name]))
            boxes[node.name], moves[node.name] = self._capped(box, near[node.name], move.size), move
            if pairs:
                units[node.name] = node_move(node, [units[i] for i in node.inputs], first, shape, linear, gain)
        return boxes, units

    def _start(self, size: Tensor, eps: Tensor) -> Move:
        """The input's move: within ``eps`` [B] in the norm of the attack and within ``size`` entry by entry."""
        eps = eps * _OUT
        unit = self.reach[self.graph.input]
        norms = size.new_tensor(triple(unit))[:, None] * eps * _UP
        return Move(torch.minimum(size, eps.view(-1, *[1] * (size.ndim - 1))), norms)

    def _local_bound(
        self, part: Point, eps: Tensor, boxes: dict[str, Box], moves: dict[str, Move], near: dict[str, Box]
    ) -> Tensor:
        """Lower bounds [B, C] on ``z_t - z_j``."""
        logits, top = part.values[self.graph.output], part.top[:, None]
        _, here = self.margins.slack(part, eps)
        margin = logits.gather(1, top) - logits - here[:, None]
        out = moves[self.graph.output].tight_norms()
        worst = torch.fmin(torch.fmin(2 * out[2], math.sqrt(2) * _UP * out[1]), out[0])[:, None].expand_as(logits)
        head = self.margins.head
        if head is not None:
            (low, high), (below, above) = boxes[head.source], near[head.source]
            right, radius = moves[head.source].ball
            # In u = d / right, whose box holds 0; entries that cannot move have right = 0 and coefficient 0.
            scale = torch.where(right > 0, right, 1.0) / _OUT / _OUT
            lower, upper = (low - above).clamp_max(0) / scale, (high - below).clamp_min(0) / scale
            worst = worst.clone()
            for t in sorted(set(part.top.tolist())):
                rows = part.top == t
                c = head.factor * (head.weight - head.weight[t])[None] * right[rows, None]
                ball = ball_box_bound(c, radius[rows, None].expand(c.shape[:2]), lower[rows, None], upper[rows, None])
                worst[rows] = torch.fmin(worst[rows], ball * _UP)
        return margin - worst * (1 + 2.0**-50) - 2.0**-50 * margin.abs()

    @staticmethod
    def _capped(box: Box, near: Box, move: Tensor) -> Box:
        """The box cut to ``near +- move``, for a move [B] or [B, *]."""
        low, high = box
        size = (move * _UP).view(-1, *[1] * (low.ndim - 1)) if move.ndim == 1 else move * _UP
        low, high = torch.fmax(low, near[0] - size), torch.fmin(high, near[1] + size)
        return low - low.abs() * 2.0**-52, high + high.abs() * 2.0**-52


def _displacement(box: Box, near: Box) -> Tensor:
    """How far a value in ``box`` can be from one in ``near``, entry by entry, rounded up."""
    return torch.maximum(box[1] - near[0], near[1] - box[0]).clamp_min(0) * _OUT


@torch.no_grad()
def local_lipschitz(
    model: nn.Module,
    x: Tensor,
    eps: float,
    norm: str = "linf",
    *,
    domain: tuple[float, float] | None = None,
    batch_size: int = 256,
) -> Tensor:
    """For each example, ``L`` with ``||z(x') - z(x'')|| <= L ||x' - x''||`` for all ``x', x''`` in the ball.

    Both sides are measured in ``norm``. Never above the global constant of :func:`dplip.bounds.lipschitz`.

    Args:
        model, x, norm, domain, batch_size: as for :func:`dplip.certify.certify`.
        eps: the ball's radius.

    Returns:
        [B] float64 on the device of ``x``; NaN where the input or a logit is not finite.

    Raises:
        ConfigError: ``eps`` is negative or not finite, or ``norm`` is unknown.
        NoRuleError: a layer has no interval rule.
        UnsoundCertificate, MixesExamplesError: as for :func:`dplip.certify.certify`.
    """
    if norm not in INPUT_NORMS or not 0 <= eps < math.inf:
        raise ConfigError(
            f"local_lipschitz: expected norm in {INPUT_NORMS} and a finite eps >= 0, got {norm!r} and {eps}; fix them"
        )
    subject = Subject(model, x.dtype)
    values = subject.at(x[:1]).values
    local = LocalCertifier(MarginCertifier(subject, norm, values), domain, values)
    whole = getattr(lipschitz(subject.graph, values), norm)
    parts = []
    for start in range(0, max(len(x), 1), batch_size):
        point = subject.at(x[start : start + batch_size])
        size = torch.full((len(point.x),), eps, dtype=torch.float64, device=point.x.device)
        _, units = local.regions(point.x, size, local.centres(point), pairs=True)
        found = units[subject.graph.output].tight_norms()[2 if norm == "linf" else 1]
        sane = torch.isfinite(x[start : start + batch_size].flatten(1)).all(1).to(point.x.device)
        sane &= torch.isfinite(point.deployed).all(1)
        parts.append(torch.where(sane, found.clamp_max(whole), math.nan).to(x.device))
    return torch.cat(parts)
