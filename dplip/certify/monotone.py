# SPDX-License-Identifier: Apache-2.0
r"""Certificates of monotonicity: proved intervals for the slope of every output in every input.

Theorem. Let two bounds travel through the traced model for each input ``i``: intervals that contain the secant slopes
of every node in direction ``e_i`` (:mod:`dplip.certify.slopes`), and norms of that move, pushed by the operator norms
of :mod:`dplip.norms` from a unit vector (``L_{1->b}`` of the model up to the node). Either is valid at every node, so
their intersection is. If the output's interval is ``[a, b]`` with ``a >= 0`` (``b <= 0``), the output never falls
(rises) when ``x_i`` alone rises. For ``f(x) + sum_i strength_i s_i x_i`` the interval is within ``[strength_i - B_i,
strength_i + B_i]`` where ``B_i`` is the smaller of the column sums of ``|W_L| ... |W_1|`` and ``L_{1->inf}``.

Without a box this holds in all of space. With one it holds for ``x`` and ``x + t e_i`` in the box, and pieces of the
model that the box cannot reach (dead neurons, settled orders) drop out.

The claim is about the exact function with the stored weights; the deployed one follows it up to its own rounding.
Interval arithmetic is in float64, rounded outwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dplip.bounds.graph import Graph, Node
from dplip.bounds.operations import Add, Apply, Concat
from dplip.certify.roundoff import Roundoff, vector_norms
from dplip.certify.slopes import Box, layer_secants
from dplip.certify.subject import Subject
from dplip.errors import ConfigError, DataError, NoRuleError, UnsoundCertificate

__all__ = ["MonotoneCertificate", "certify_monotone", "slope_bounds"]

_ROUND_UP = 1 + 1e-12
_CHUNK = 64


@dataclass(frozen=True, eq=False)
class MonotoneCertificate:
    """Every secant slope of output j in input i lies in ``[lower, upper][..., j, i]``.

    Attributes:
        lower, upper: [C, d] over all of space, or [B, C, d] over B boxes; float64, -inf and inf where nothing is known.
        directions: [C, d] in {-1, 0, 1}, what was asked.
    """

    lower: Tensor
    upper: Tensor
    directions: Tensor

    @property
    def holds(self) -> Tensor:
        """Where the direction asked is proved; True where none is asked. Shaped like ``lower``."""
        rising, falling = self.lower >= 0, self.upper <= 0  # NaN proves nothing
        free = self.directions == 0
        return free | torch.where(self.directions > 0, rising, falling)

    @property
    def features(self) -> Tensor:
        """[d] or [B, d]: inputs with a direction in some output, and proved in every output that asks for one."""
        asked = (self.directions != 0).any(-2)
        return asked & self.holds.all(-2)


@torch.no_grad()
def certify_monotone(
    model: nn.Module, directions: Tensor, *, lower: Tensor | None = None, upper: Tensor | None = None
) -> MonotoneCertificate:
    """Prove in which directions ``model`` is monotone.

    Args:
        model: in evaluation mode, of layers with bound rules; maps [B, d] to [B, C].
        directions: [d], the same for every output, or [C, d]; 1 for never falling, -1 for never rising, 0 for free.
        lower, upper: boxes [B, d] in which to prove it (both or neither); by default all of space.

    Raises:
        UnsoundCertificate: training mode, or a layer that is not the deployed function.
        NoRuleError, MixesExamplesError: see :func:`dplip.bounds.trace`.
        ConfigError: ``directions`` has another shape or other values, or only one end of the box is given.
        DataError: boxes are not [B, d], not finite, or empty (``lower > upper``).
    """
    signs = torch.as_tensor(directions).double()
    if signs.ndim not in (1, 2) or not bool(torch.isin(signs, torch.tensor([-1.0, 0.0, 1.0]).double()).all()):
        raise ConfigError(
            f"certify_monotone: expected directions [d] or [C, d] in -1, 0, 1, got shape {tuple(signs.shape)}; fix them"
        )
    low, high = slope_bounds(model, signs.shape[-1], lower=lower, upper=upper)
    if signs.ndim == 2 and signs.shape[0] != low.shape[-2]:
        raise ConfigError(
            f"certify_monotone: expected directions for {low.shape[-2]} outputs, got {signs.shape[0]}; "
            "give one row per output"
        )
    return MonotoneCertificate(low, high, signs.expand(low.shape[-2:]).to(low.device))


@torch.no_grad()
def slope_bounds(
    model: nn.Module, in_features: int, *, lower: Tensor | None = None, upper: Tensor | None = None
) -> Box:
    """The bounds behind :func:`certify_monotone`: [C, d] over all of space, [B, C, d] over boxes."""
    subject = Subject(model, torch.float64)
    origin = torch.zeros(1, in_features, dtype=torch.float64, device=subject.device)
    values = subject.graph.evaluate(origin)
    if values[subject.graph.output].ndim != 2:
        raise UnsoundCertificate(
            f"certify_monotone: expected outputs [B, C], got {tuple(values[subject.graph.output].shape)}; flatten them"
        )
    propagate = _Propagation(subject.graph, values)
    if lower is None and upper is None:
        low, high = propagate(None, origin)
        return low[0], high[0]
    if lower is None or upper is None:
        raise ConfigError("certify_monotone: expected both ends of the boxes or neither, got one; pass lower and upper")
    if lower.ndim != 2 or lower.shape != upper.shape or lower.shape[1] != in_features:
        raise DataError(
            f"certify_monotone: expected boxes [B, {in_features}], got {tuple(lower.shape)} and {tuple(upper.shape)}; "
            "reshape them"
        )
    if not bool((torch.isfinite(lower) & torch.isfinite(upper) & (lower <= upper)).all()):
        raise DataError("certify_monotone: expected finite boxes with lower <= upper, got others; clean them")
    rows = [slice(k, k + _CHUNK) for k in range(0, len(lower), _CHUNK)]
    parts = [propagate((lower[r].to(origin), upper[r].to(origin)), origin) for r in rows]
    if not parts:
        size = (0, values[subject.graph.output].shape[1], in_features)
        return origin.new_zeros(size), origin.new_zeros(size)
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


class _Propagation:
    """One pass over the graph; slopes are [B, *shape, d], column norms [3, B * d]."""

    def __init__(self, graph: Graph, values: dict[str, Tensor]) -> None:
        self.graph, self.values = graph, values
        self.rounding = Roundoff(graph, values).nodes

    def __call__(self, box: Box | None, origin: Tensor) -> Box:
        d, count = origin.shape[1], 1 if box is None else len(box[0])
        eye = torch.eye(d, dtype=torch.float64, device=origin.device).expand(count, d, d)
        slopes: dict[str, Box] = {self.graph.input: (eye, eye)}
        columns = {self.graph.input: eye.new_ones(3, count * d)}
        boxes: dict[str, Box | None] = {self.graph.input: box}
        for node in self.graph.nodes:
            boxes[node.name] = self._box(node, [boxes[i] for i in node.inputs])
            norms = self._columns(node, [columns[i] for i in node.inputs]) * _ROUND_UP
            ends = self._secants(node, [slopes[i] for i in node.inputs], boxes[node.inputs[0]])
            shape = tuple(self.values[node.name].shape[1:])
            cap = norms[2].view(count, *[1] * len(shape), d).expand(count, *shape, d)
            low, high = (-cap, cap) if ends is None else (torch.maximum(ends[0], -cap), torch.minimum(ends[1], cap))
            low, high = low.nan_to_num(-torch.inf), high.nan_to_num(torch.inf)
            largest = torch.maximum(low.abs(), high.abs()).movedim(-1, 1).reshape(count * d, -1)
            slopes[node.name] = (low, high)
            columns[node.name] = torch.minimum(norms, vector_norms(largest) * _ROUND_UP)
        return slopes[self.graph.output]

    def _secants(self, node: Node, inputs: list[Box], box: Box | None) -> Box | None:
        operation = node.operation
        if isinstance(operation, Apply):
            return layer_secants(operation.layer, *inputs[0], box)
        if isinstance(operation, Add):
            signed = [e if s > 0 else (-e[1], -e[0]) for s, e in zip(operation.signs, inputs, strict=True)]
            low, high = (torch.stack([e[i] for e in signed]) for i in (0, 1))
            slack = 2.0**-53 * len(signed) * torch.maximum(low.abs(), high.abs()).sum(0)
            return low.sum(0) - slack, high.sum(0) + slack
        if isinstance(operation, Concat):
            return torch.cat([e[0] for e in inputs], operation.dim), torch.cat([e[1] for e in inputs], operation.dim)
        return None

    def _columns(self, node: Node, inputs: list[Tensor]) -> Tensor:
        if isinstance(node.operation, Apply):
            return self.rounding[node.name].push(inputs[0])
        if isinstance(node.operation, Concat):
            stacked = torch.stack(inputs)
            return torch.stack(
                [stacked[:, 0].sum(0), torch.linalg.vector_norm(stacked[:, 1], dim=0), stacked[:, 2].amax(0)]
            )
        if isinstance(node.operation, Add):
            return torch.stack(inputs).sum(0)
        return self.rounding[node.name].push(torch.stack(inputs).amax(0))

    def _box(self, node: Node, inputs: list[Box | None]) -> Box | None:
        """The node's box, widened by what its interval rule rounds; None (all of space) where there is no rule."""
        known = [box for box in inputs if box is not None]
        if len(known) < len(inputs):
            return None
        try:
            low, high = node.operation.interval(*known)
        except NoRuleError:
            return None
        sizes = torch.stack([vector_norms(torch.maximum(a.abs(), b.abs())) for a, b in known]).amax(0)
        slack = 2 * self.rounding[node.name].local(sizes, torch.float64)[2]
        slack = slack.view(-1, *[1] * (low.ndim - 1))
        return low - slack, high + slack
