# SPDX-License-Identifier: Apache-2.0
r"""How far the values of a network move inside a region: the same calculus as everywhere, per example.

For two inputs of one region, with boxes that contain every node's values there, write ``d`` for the difference of a
node's two values:

* affine: ``d_out = W d_in``;
* elementwise: ``d_out = S d_in`` with ``S`` diagonal, ``|S| <= D``, ``D`` the largest slope on each entry's box: 0
  where the map is constant on it;
* sorting: ``d_out = P d_in``, ``P`` an average of permutations that agree with the orders which the boxes allow.

A :class:`Move` bounds ``d`` entry by entry, in three norms, as ``d = diag(right) u`` with ``||u||_2 <= radius``, and in
any weighted norm ``||diag(l) d||_2``. Weights travel backwards: ``||diag(l) S d|| <= ||diag(l D) d||``, and a sorted
entry hands its weight to every entry that can take its place, until an affine layer answers with ``||diag(l) W
diag(right)||_2 radius`` (:mod:`dplip.certify.masked_norm`). Splitting ``S = D^(1/2) T D^(1/2)`` with ``||T||_2 <= 1``,
the chain is the product of ``||D_l^(1/2) W_l D_{l-1}^(1/2)||``. For masks of 0 and 1 the root changes nothing and this
is the product of the source, ``||D_l W_l D_{l-1}||``; for other slopes, using ``D`` on both sides would count it twice.

Source: Huang, Zhang, Shi, Kolter, Anandkumar, Training Certifiably Robust Neural Networks with Efficient Local
Lipschitz Bounds, NeurIPS 2021, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dplip.bounds.graph import Node
from dplip.bounds.operations import Add, Apply, Box, Concat
from dplip.certify.masked_norm import LinearPart, root
from dplip.certify.roundoff import NodeRounding, vector_norms
from dplip.certify.slopes import certain_ranks, elementwise_slopes
from dplip.errors import NoRuleError
from dplip.layers import AveragePool2d, GroupSort, LipschitzLayer, MaxPool2d, Reshape
from dplip.layers.base import Shapes

__all__ = ["Move", "node_move", "scaled_move"]

_UP = 1 + 1e-12

Weighted = Callable[[Tensor], Tensor]
Ball = Callable[[], tuple[Tensor, Tensor]]


class Move:
    """Bounds on the difference ``d`` of two values of one node.

    Args:
        size: [B, *shape], bounds on ``|d|``.
        norms: [3, B], bounds on its l_1, l_2 and l_inf norm.
        weighted: maps weights ``l >= 0`` [B, *shape] to bounds [B] on ``||diag(l) d||_2``; None: ``max l`` times the
            l_2 norm.
        ball: ``(right, radius)``, computed when first asked for; None: ones, and ``weighted`` of them.
    """

    def __init__(
        self, size: Tensor, norms: Tensor | None = None, weighted: Weighted | None = None, ball: Ball | None = None
    ) -> None:
        own = vector_norms(size) * _UP
        self.size = size
        self.norms = own if norms is None else torch.minimum(own, norms)
        self._weighted, self._ball = weighted, ball
        self._known: tuple[Tensor, Tensor] | None = None

    def capped(self, width: Tensor) -> Move:
        """The same move, known to stay within ``width`` [B, *shape] entry by entry."""
        return Move(_least(self.size, width), self.norms, self._weighted, self._ball)

    def weighted(self, left: Tensor) -> Tensor:
        """[B], bounds on ``||diag(left) d||_2``."""
        entries = vector_norms(_times(left, self.size))[1] * _UP
        whole = _times(left.flatten(1).amax(1), self.norms[1]) * _UP
        bound = _least(entries, whole)
        return bound if self._weighted is None else _least(bound, self._weighted(left))

    @property
    def ball(self) -> tuple[Tensor, Tensor]:
        """``right`` [B, *shape] and ``radius`` [B]: ``d = diag(right) u`` for some ``||u||_2 <= radius``."""
        if self._known is None:
            alive = (self.size != 0).to(self.size)  # NaN is not 0
            right, radius = (alive, self.weighted(alive)) if self._ball is None else self._ball()
            right = right * alive
            inverse = torch.where(right > 0, 1 / torch.where(right > 0, right, 1.0), 0.0)
            self._known = right, _least(radius, vector_norms(_times(inverse, self.size))[1] * _UP)
        return self._known

    def tight_norms(self) -> Tensor:
        """``norms`` [3, B] with the ball's l_2 norm."""
        right, radius = self.ball
        l2 = _times(right.flatten(1).amax(1), radius) * _UP
        return torch.stack([self.norms[0], _least(self.norms[1], l2), _least(self.norms[2], l2)])


def node_move(
    node: Node,
    inputs: Sequence[Move],
    box: Box,
    shape: tuple[int, ...],
    linear: LinearPart | None,
    gain: NodeRounding | None,
) -> Move:
    """The node's move given those of its inputs.

    Args:
        node: one operation.
        inputs: of its inputs.
        box: of its first input.
        shape: of one example of its output.
        linear: its linear part, if it is affine.
        gain: its global operator norms, which bound whatever has no rule here; None refuses such nodes.

    Raises:
        NoRuleError: no rule, and ``gain`` is None.
    """
    operation, first = node.operation, inputs[0]
    if isinstance(operation, Add):
        return _sum(inputs)
    if isinstance(operation, Concat):
        return _concatenation(inputs, operation.dim)
    layer = operation.layer if isinstance(operation, Apply) else None
    if linear is not None:
        return _affine(first, linear)
    if isinstance(layer, Reshape):
        return _reshaped(first, shape)
    if type(layer) in (AveragePool2d, MaxPool2d) and isinstance(layer, LipschitzLayer):
        return _pooled(first, layer, Shapes(tuple(first.size.shape[1:]), shape))
    if isinstance(layer, GroupSort):
        return _sorted(first, layer.group_size or shape[0], box)
    slopes = None if layer is None else elementwise_slopes(layer, box, shape)
    if slopes is not None:
        steepest = torch.maximum(slopes[0].abs(), slopes[1].abs()).nan_to_num(math.inf, math.inf)
        return scaled_move(first, steepest.to(first.size).expand_as(first.size))
    if gain is None:
        raise NoRuleError(
            f"local Lipschitz: node '{node.name}' ({type(layer or operation).__name__}) has no local rule; use affine, "
            "elementwise, sorting, pooling and structural layers"
        )
    norms = gain.push(torch.stack([move.tight_norms() for move in inputs]).amax(0)) * _UP
    return Move(norms[2].view(-1, *[1] * len(shape)).expand(-1, *shape), norms)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """Product in which a zero wins over an infinity."""
    return torch.where((a == 0) | (b == 0), 0.0, a * b)


def _least(a: Tensor, b: Tensor) -> Tensor:
    """The smaller of two bounds; an undefined one says nothing."""
    return torch.fmin(a, b)


def _wide(v: Tensor, like: Tensor) -> Tensor:
    return v.view(-1, *[1] * (like.ndim - 1))


def _affine(move: Move, linear: LinearPart) -> Move:
    right, radius = move.ball
    rows = linear.rows(right)
    size = _least(linear.absolute(move.size), _times(rows, _wide(radius, rows)) * _UP)
    return Move(size, weighted=lambda left: _times(linear.norm(left, right), radius) * _UP)


def scaled_move(move: Move, slope: Tensor) -> Move:
    """The move behind an elementwise map whose slopes are at most ``slope`` [B, *shape] in magnitude."""
    half = root(slope)
    return Move(
        _times(slope, move.size) * _UP,
        _times(slope.flatten(1).amax(1), move.norms) * _UP,
        lambda left: move.weighted(left * slope * _UP),
        lambda: (half * _UP, move.weighted(half * _UP)),
    )


def _reshaped(move: Move, shape: tuple[int, ...]) -> Move:
    def ball() -> tuple[Tensor, Tensor]:
        right, radius = move.ball
        return right.reshape(-1, *shape), radius

    return Move(
        move.size.reshape(-1, *shape),
        move.norms,
        lambda left: move.weighted(left.reshape(move.size.shape)),
        ball,
    )


def _sorted(move: Move, group: int, box: Box) -> Move:
    """Ascending sort of groups of ``group`` channels."""

    def grouped(v: Tensor) -> Tensor:
        return v.reshape(v.shape[0], -1, group, *v.shape[2:])

    smaller, larger = certain_ranks(grouped(box[0]), grouped(box[1]))

    def moved(values: Tensor, forward: bool) -> Tensor:
        """The largest value among those that can come to (forward) or go from a place."""
        found, best = grouped(values), []
        for rank in range(group):
            fits = (smaller <= rank) & (rank <= group - 1 - larger)
            best.append(torch.where(fits, found if forward else found[:, :, rank : rank + 1], 0.0))
        places = torch.stack(best, 2)  # [B, G, rank, entry, *]
        return places.amax(3 if forward else 2).reshape(values.shape)

    def ball() -> tuple[Tensor, Tensor]:
        right, radius = move.ball
        return moved(right, True), radius

    return Move(moved(move.size, True), move.norms, lambda left: move.weighted(moved(left, False)), ball)


def _pooled(move: Move, layer: LipschitzLayer, shapes: Shapes) -> Move:
    """Behind averages or maxima of windows, whose own norms hold no parameter."""
    norms = layer.operator_norms(shapes)
    gains = move.norms.new_tensor([norms.one_one, norms.two_two, norms.inf_inf])[:, None]
    return Move(layer(move.size) * _UP, _times(gains, move.tight_norms()) * _UP)


def _sum(inputs: Sequence[Move]) -> Move:
    size = torch.stack([m.size for m in inputs]).sum(0) * _UP
    norms = torch.stack([m.norms for m in inputs]).sum(0) * _UP
    return Move(size, norms, lambda left: torch.stack([m.weighted(left) for m in inputs]).sum(0) * _UP)


def _concatenation(inputs: Sequence[Move], dim: int) -> Move:
    parts = [m.size.shape[dim] for m in inputs]

    def length(radii: list[Tensor]) -> Tensor:
        return vector_norms(torch.stack(radii, 1))[1] * _UP

    def weighted(left: Tensor) -> Tensor:
        return length([m.weighted(piece) for m, piece in zip(inputs, left.split(parts, dim), strict=True)])

    def ball() -> tuple[Tensor, Tensor]:
        balls = [m.ball for m in inputs]
        return torch.cat([right for right, _ in balls], dim), length([radius for _, radius in balls])

    stacked = torch.stack([m.norms for m in inputs], 1)  # [3, inputs, B]
    norms = torch.stack([stacked[0].sum(0), torch.linalg.vector_norm(stacked[1], dim=0), stacked[2].amax(0)])
    return Move(torch.cat([m.size for m in inputs], dim), norms * _UP, weighted, ball)
