# SPDX-License-Identifier: Apache-2.0
r"""Training with the local Lipschitz bound: what :mod:`dplip.certify.local_lipschitz` proves, made differentiable.

Only without privacy: an example's gradient passes through norms of matrices that its own masks select, and no bound on
it is proved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dplip.bounds import Graph, trace
from dplip.bounds.graph import Node
from dplip.bounds.lipschitz import INPUT_NORMS
from dplip.bounds.operations import Apply, Box
from dplip.certify.ball_box import ball_box_bound
from dplip.certify.head import AffineHead, find_head
from dplip.certify.masked_norm import linear_part
from dplip.certify.moves import Move, node_move
from dplip.certify.roundoff import vector_norms
from dplip.errors import ConfigError, DataError, NoRuleError, PlanError
from dplip.layers import Clamp, ClippedReLU, LipschitzLayer, Monotone
from dplip.losses import BoundedLoss
from dplip.norms import Norms

__all__ = ["LocalBounds", "LocalLipschitzLoss"]

_BISECTIONS = 12
KINDS = ("robust", "gloro")


@dataclass(frozen=True)
class LocalBounds:
    """What one forward pass proves, up to the rounding of its dtype. All differentiable.

    Attributes:
        logits: [B, C].
        worst: [B, C], upper bounds on ``z_j - z_y`` over the ball, 0 at ``j = y``.
        unsettled: [B], how far clipping neurons are from being constant on the ball.
    """

    logits: Tensor
    worst: Tensor
    unsettled: Tensor


class LocalLipschitzLoss(BoundedLoss):
    r"""``sum_b kappa CE(z, y) + (1 - kappa) (R + sparsity U)`` on the balls of radius ``eps``.

    ``R`` is, with worst-case margins ``m`` from the local bound (``m_y = 0``),

    * ``"robust"``: ``CE(m, y)``;
    * ``"gloro"``: ``CE((z, z_y + max_{j != y} m_j), y)``, one logit more, for "not robust here".

    ``U``, the sparsity term, is the mean over the neurons of each clipping layer of ``relu(u) + threshold relu(theta -
    l)``, summed over layers, with ``[l, u]`` the neuron's box: it pushes neurons towards one of their constant sides,
    where their rows and columns drop out of the norms. ReLUs have the first summand only.

    Assign ``eps`` and ``kappa`` to schedule them (:class:`dplip.recipes.EpsSchedule`: radius from 0 upwards, kappa
    from 1 downwards). Norms are Gram iterates, upper bounds at every iteration; masks and the dual's multiplier carry
    no gradient. Masks move with the weights, so the loss is piecewise smooth.

    Called with inputs instead of logits, as ``loss(x, labels)``. Never private: :meth:`logit_gradient` raises.

    Sources: Huang, Zhang, Shi, Kolter, Anandkumar, Training Certifiably Robust Neural Networks with Efficient Local
    Lipschitz Bounds, NeurIPS 2021, section 3 and the authors' code (sparsity term); Leino, Wang, Fredrikson,
    Globally-Robust Neural Networks, ICML 2021, section 3 ("gloro").

    Args:
        model: maps [B, *] to logits through affine, convolutional, elementwise, sorting, pooling and structural layers
            and an affine head; traced once, so its layers must stay the same objects.
        norm: of the perturbation, ``"l2"`` or ``"linf"``.
        kind: ``"robust"`` or ``"gloro"``.
        sparsity: weight of ``U``.
        threshold: weight of the upper side in ``U``.
        domain: ``(lower, upper)`` that attackers respect, or None.
        iterations: of Gram iteration; the norms are too large by a factor of at most ``rank^(1 / 2^(iterations+1))``.

    Raises:
        ConfigError: an argument is out of range.
        NoRuleError: the model has no affine head, or (at the first call) a layer has no local rule.
        PlanError: bounds for private training are asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        norm: str = "l2",
        kind: str = "robust",
        *,
        sparsity: float = 0.01,
        threshold: float = 1.0,
        domain: tuple[float, float] | None = None,
        iterations: int = 4,
    ) -> None:
        super().__init__()
        if norm not in INPUT_NORMS or kind not in KINDS or iterations < 1 or min(sparsity, threshold) < 0:
            raise ConfigError(
                f"LocalLipschitzLoss: expected norm in {INPUT_NORMS}, kind in {KINDS}, iterations >= 1, sparsity >= 0 "
                f"and threshold >= 0, got {norm!r}, {kind!r}, {iterations}, {sparsity} and {threshold}; fix them"
            )
        if domain is not None and not domain[0] <= domain[1]:
            raise ConfigError(f"LocalLipschitzLoss: expected a domain with lower <= upper, got {domain}; fix it")
        self.norm, self.kind, self.domain, self.iterations = norm, kind, domain, iterations
        self.sparsity, self.threshold = float(sparsity), float(threshold)
        self._graph: Graph = trace(model)
        self._head()  # refused here rather than at the first step
        self.eps, self.kappa = 0.0, 1.0

    @property
    def eps(self) -> float:
        """Radius trained for, >= 0."""
        return self._eps

    @eps.setter
    def eps(self, value: float) -> None:
        if not 0 <= value < math.inf:
            raise ConfigError(f"LocalLipschitzLoss: expected a finite eps >= 0, got {value}; fix it")
        self._eps = float(value)

    @property
    def kappa(self) -> float:
        """Weight of the plain cross-entropy, in [0, 1]."""
        return self._kappa

    @kappa.setter
    def kappa(self, value: float) -> None:
        if not 0 <= value <= 1:
            raise ConfigError(f"LocalLipschitzLoss: expected 0 <= kappa <= 1, got {value}; fix it")
        self._kappa = float(value)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        found = self.bounds(x, labels)
        plain = F.cross_entropy(found.logits, labels, reduction="sum")
        if self.kind == "robust":
            robust = F.cross_entropy(found.worst, labels, reduction="sum")
        else:
            others = found.worst.scatter(1, labels[:, None], -math.inf).amax(1, keepdim=True)
            extended = torch.cat([found.logits, found.logits.gather(1, labels[:, None]) + others], 1)
            robust = F.cross_entropy(extended, labels, reduction="sum")
        return self.kappa * plain + (1 - self.kappa) * (robust + self.sparsity * found.unsettled.sum())

    def logit_gradient(self, num_classes: int) -> Norms:
        raise PlanError(
            "LocalLipschitzLoss: expected a loss whose gradient is bounded example by example, got one that passes "
            "through norms that each example's own masks select, for which no sensitivity is proved; train privately "
            "with dplip.CrossEntropy (margin=...) and certify with method='local'"
        )

    def bounds(self, x: Tensor, labels: Tensor) -> LocalBounds:
        """Worst-case margins on the balls of radius ``eps`` around ``x`` [B, *].

        Raises:
            DataError: labels are not int64 [B].
            NoRuleError: a layer has no local rule.
        """
        if labels.shape != x.shape[:1] or labels.dtype != torch.int64:
            raise DataError(
                f"LocalLipschitzLoss: expected int64 labels [{len(x)}], got {labels.dtype} {tuple(labels.shape)}"
            )
        graph, values = self._graph, self._graph.evaluate(x)
        low, high = x - self.eps, x + self.eps
        if self.domain is not None:
            low, high = low.clamp_min(self.domain[0]), high.clamp_max(self.domain[1])
            low, high = torch.minimum(low, x), torch.maximum(high, x)
        boxes: dict[str, Box] = {graph.input: (low, high)}
        moves = {graph.input: self._start(torch.maximum(high - x, x - low))}
        unsettled = x.new_zeros(len(x))
        for node in graph.nodes:
            value, first = values[node.name], boxes[node.inputs[0]]
            low, high = node.operation.interval(*(boxes[i] for i in node.inputs))
            layer = node.operation.layer if isinstance(node.operation, Apply) else None
            linear = linear_part(layer, tuple(values[node.inputs[0]].shape[1:]), self.iterations)
            inputs, shape = [moves[i] for i in node.inputs], tuple(value.shape[1:])
            move = node_move(node, inputs, (first[0].detach(), first[1].detach()), shape, linear, None)
            move = move.capped(torch.maximum(high - value, value - low).clamp_min(0))
            unsettled = unsettled + self._unsettled(layer, first)
            boxes[node.name] = torch.maximum(low, value - move.size), torch.minimum(high, value + move.size)
            moves[node.name] = move
        return LocalBounds(values[graph.output], self._worst(values, boxes, moves, labels), unsettled)

    def _start(self, size: Tensor) -> Move:
        norms = vector_norms(size)
        if self.norm == "l2":
            norms = torch.stack([norms[0], norms[1].clamp_max(self.eps), norms[2]])
        return Move(size, norms)

    def _unsettled(self, layer: LipschitzLayer | None, box: Box) -> Tensor:
        below, above = box[0].flatten(1), box[1].flatten(1)
        if isinstance(layer, ClippedReLU):
            top = layer._thresholds(box[0]).expand_as(box[0]).flatten(1)
            return (above.relu() + self.threshold * (top - below).relu()).mean(1)
        if isinstance(layer, Clamp) and math.isfinite(layer.upper - layer.lower):
            return ((above - layer.lower).relu() + self.threshold * (layer.upper - below).relu()).mean(1)
        if isinstance(layer, Monotone) and layer.function is torch.relu:
            return above.relu().mean(1)
        return below.new_zeros(len(below))

    def _head(self) -> tuple[AffineHead, Node]:
        head = find_head(self._graph)
        if head is None:
            raise NoRuleError(
                "LocalLipschitzLoss: expected a model whose logits are an affine layer's, got another head; "
                "end it with nn.Linear or dplip.layers.NormalizedLinear"
            )
        return head, next(node for node in self._graph.nodes if node.name == head.chain[0])

    def _worst(
        self, values: dict[str, Tensor], boxes: dict[str, Box], moves: dict[str, Move], labels: Tensor
    ) -> Tensor:
        head, node = self._head()
        shape = tuple(values[head.source].shape[1:])
        affine = (
            linear_part(node.operation.layer, shape, self.iterations) if isinstance(node.operation, Apply) else None
        )
        if affine is None:
            raise NoRuleError("LocalLipschitzLoss: expected an affine head, got a layer without a linear part")
        (low, high), centre = boxes[head.source], values[head.source]
        right, radius = moves[head.source].ball
        scale = torch.where(right > 0, right, 1.0)
        c = head.factor * (affine.weight[None] - affine.weight[labels][:, None]) * right[:, None]
        lower, upper = (low - centre).clamp_max(0) / scale, (high - centre).clamp_min(0) / scale
        radii = radius[:, None].expand(c.shape[:2])
        grow = ball_box_bound(c, radii, lower[:, None], upper[:, None], _BISECTIONS)
        logits = values[self._graph.output]
        return (logits - logits.gather(1, labels[:, None]) + grow).scatter(1, labels[:, None], 0.0)
