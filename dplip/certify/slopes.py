# SPDX-License-Identifier: Apache-2.0
r"""Rules that carry intervals of secant slopes through single layers.

A secant slope of ``f`` in direction ``e_i`` is ``(f(x + t e_i) - f(x)) / t``. If those of a layer's input lie in
``[low, high]`` entry by entry, a rule returns such bounds for its output, in exact arithmetic:

* affine ``W x + b``: ``W_+ low + W_- high`` and ``W_+ high + W_- low``;
* elementwise maps with slopes in [s, S]: the extremes of the four products;
* sorting: order statistics are monotone and commute with constants, so each moves by a value between the least and
  the largest move of the entries that can take its place;
* reflections across a line: between the moves of the two linear pieces.

Given a box of inputs, a rule uses only the pieces that meet it. Secants rather than derivatives: nothing has to be
said about kinks. All rules return float64 bounds that are rounded outwards.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dplip.layers import (
    Abs,
    Clamp,
    ClippedReLU,
    GroupSort,
    Householder,
    LearnedScale,
    LinearSpline,
    LipschitzLayer,
    Monotone,
    NormalizedLinear,
    PositionBias,
    Ramp,
    ReferenceShift,
    Reshape,
    Scale,
    Share,
    Shift,
)
from dplip.layers.affine import Affine

__all__ = ["Box", "Secants", "certain_ranks", "elementwise_slopes", "layer_secants", "secants", "slope_range"]

Box = tuple[Tensor, Tensor]
Secants = tuple[Tensor, Tensor]
_Rule = Callable[..., Any]
_UNIT = 2.0**-53


@functools.singledispatch
def slope_range(layer: LipschitzLayer, box: Box | None, shape: tuple[int, ...]) -> Secants | None:
    """Bounds [B, *shape] on the slope of an elementwise ``layer`` at every entry; None for a layer of another kind.

    Register a rule for a layer of your own with ``@slope_range.register``.

    Args:
        layer: the layer, in float64.
        box: lower and upper ends [B, *shape] of its input; None: all of space (then B is 1).
        shape: of one example.
    """
    return None


def _constant(low: float, high: float, shape: tuple[int, ...]) -> Secants:
    return torch.full((1, *shape), low, dtype=torch.float64), torch.full((1, *shape), high, dtype=torch.float64)


def _pieces(low: Tensor, high: Tensor, inner: float) -> Secants:
    """``inner`` for boxes within [low, high] (given as two booleans), 0 outside, anything between them otherwise."""
    one, zero = torch.full_like(low, inner, dtype=torch.float64), torch.zeros_like(low, dtype=torch.float64)
    return torch.where(low, one, zero), torch.where(high, zero, one)


_DERIVATIVES: dict[Any, Callable[[Tensor], Tensor]] = {
    torch.tanh: lambda x: 1 - torch.tanh(x).square(),
    torch.sigmoid: lambda x: torch.sigmoid(x) * torch.sigmoid(-x),
}


@slope_range.register
def _(layer: Monotone, box: Box | None, shape: tuple[int, ...]) -> Secants:
    if box is None or (layer.function is not torch.relu and layer.function not in _DERIVATIVES):
        return _constant(0.0, layer.lipschitz, shape)
    lower, upper = box
    if layer.function is torch.relu:
        return _pieces(lower >= 0, upper <= 0, 1.0)
    slope = _DERIVATIVES[layer.function]  # largest at 0, falling to both sides
    nearest = slope(torch.minimum(torch.maximum(lower, torch.zeros_like(lower)), upper))
    farthest = torch.minimum(slope(lower), slope(upper))
    low, high = (farthest - 1e-15).clamp_min(0), (nearest + 1e-15).clamp_max(layer.lipschitz)
    return low.nan_to_num(0.0), high.nan_to_num(layer.lipschitz)


@slope_range.register
def _(layer: Clamp, box: Box | None, shape: tuple[int, ...]) -> Secants:
    if box is None:
        return _constant(0.0, 1.0, shape)
    lower, upper = box
    inside = (lower >= layer.lower) & (upper <= layer.upper)
    return _pieces(inside, ((lower >= layer.upper) | (upper <= layer.lower)) & ~inside, 1.0)


@slope_range.register
def _(layer: ClippedReLU, box: Box | None, shape: tuple[int, ...]) -> Secants:
    if box is None:
        return _constant(0.0, 1.0, shape)
    lower, upper = box
    theta = layer._thresholds(lower).detach()
    inside = (lower >= 0) & (upper <= theta) & (theta > 0)
    return _pieces(inside, ((upper <= 0) | (lower >= theta) | (theta <= 0)) & ~inside, 1.0)


@slope_range.register
def _(layer: Abs, box: Box | None, shape: tuple[int, ...]) -> Secants:
    if box is None:
        return _constant(-1.0, 1.0, shape)
    one = torch.ones_like(box[0], dtype=torch.float64)
    return torch.where(box[0] >= 0, one, -one), torch.where(box[1] <= 0, -one, one)


@slope_range.register
def _(layer: LinearSpline, box: Box | None, shape: tuple[int, ...]) -> Secants:
    size = (1, layer.channels) + (1,) * (len(shape) - 1)
    slopes, ends = layer.slopes().detach(), layer.end_slopes  # those of phi(a x) / a are those of phi
    beyond = slopes.new_zeros(layer.channels, 2) if ends is None else ends
    pieces = torch.cat([beyond[:, :1], slopes, beyond[:, 1:]], 1)
    error = 8 * _UNIT * (1 + float(layer.coefficients.detach().abs().amax()) / layer.step)
    if box is None:
        low, high = pieces.amin(1).view(size).expand(1, *shape), pieces.amax(1).view(size).expand(1, *shape)
        return low - error, high + error
    factor = layer._factor()
    a = torch.ones(size, dtype=torch.float64) if factor is None else factor.detach().view(size)
    lower, upper = a * box[0], a * box[1]
    low, high = torch.full_like(lower, math.inf), torch.full_like(lower, -math.inf)
    for k in range(layer.intervals + 2):  # piece k lies between knots k - 1 and k, the first and the last are unbounded
        left = (k - 1) * layer.step - layer.reach if k > 0 else -math.inf
        right = k * layer.step - layer.reach if k <= layer.intervals else math.inf
        hair = 1e-12 * layer.reach
        meets = ~((lower > right + hair) | (upper < left - hair))  # NaN meets every piece
        slope = pieces[:, k].view(size)
        low = torch.where(meets, torch.minimum(low, slope), low)
        high = torch.where(meets, torch.maximum(high, slope), high)
    return low - error, high + error


def _factor(value: float, shape: tuple[int, ...]) -> Secants:
    slack = abs(value) * 4 * _UNIT
    return _constant(value - slack, value + slack, shape)


@slope_range.register
def _(layer: Scale, box: Box | None, shape: tuple[int, ...]) -> Secants:
    return _factor(layer.factor, shape)


@slope_range.register
def _(layer: LearnedScale, box: Box | None, shape: tuple[int, ...]) -> Secants:
    return _factor(float(layer.scale.detach()), shape)


@slope_range.register
def _(layer: Share, box: Box | None, shape: tuple[int, ...]) -> Secants:
    return _factor(float(layer._factor().detach()), shape)


@slope_range.register(Shift)
@slope_range.register(PositionBias)
def _(layer: Shift | PositionBias, box: Box | None, shape: tuple[int, ...]) -> Secants:
    return _constant(1.0, 1.0, shape)


def _linear_secants(low: Tensor, high: Tensor, weight: Tensor) -> Secants:
    """Slopes [B, O, d] behind ``x -> weight x`` given those before it, [B, I, d]; widened by the rounding of the
    sums."""
    positive, negative = weight.clamp_min(0), weight.clamp_max(0)
    below, above = positive @ low + negative @ high, positive @ high + negative @ low
    slack = (2 * weight.shape[1] + 16) * _UNIT * (weight.abs() @ torch.maximum(low.abs(), high.abs()))
    return below - slack, above + slack


@functools.singledispatch
def secants(layer: LipschitzLayer, low: Tensor, high: Tensor, box: Box | None) -> Secants | None:
    """Bounds on the output's secant slopes given those of the input, [B, *shape, d]; None without a rule.

    Layers that :func:`slope_range` knows need no rule here.
    """
    slopes = elementwise_slopes(layer, box, tuple(low.shape[1:-1]))
    if slopes is None:
        return None
    products = torch.stack([s.to(low).unsqueeze(-1) * v for s in slopes for v in (low, high)])
    below, above = products.amin(0), products.amax(0)
    return below - 2 * _UNIT * below.abs(), above + 2 * _UNIT * above.abs()


def _rule(dispatcher: Any, layer: LipschitzLayer) -> _Rule:
    """The rule for ``layer``'s class, or the default where a subclass computes something else than the class of the
    rule."""
    known = next(kind for kind in type(layer).__mro__ if kind in dispatcher.registry)
    same = getattr(known, "forward", None) is type(layer).forward
    rule: _Rule = dispatcher.dispatch(known if same else object)
    return rule


def elementwise_slopes(layer: LipschitzLayer, box: Box | None, shape: tuple[int, ...]) -> Secants | None:
    """:func:`slope_range` of a rule that was written for this very ``forward``."""
    found: Secants | None = _rule(slope_range, layer)(layer, box, shape)
    return found


def layer_secants(layer: LipschitzLayer, low: Tensor, high: Tensor, box: Box | None) -> Secants | None:
    """:func:`secants` of a rule that was written for this very ``forward``."""
    found: Secants | None = _rule(secants, layer)(layer, low, high, box)
    return found


@secants.register(NormalizedLinear)
@secants.register(Affine)
def _(layer: NormalizedLinear | Affine, low: Tensor, high: Tensor, box: Box | None) -> Secants:
    return _linear_secants(low, high, layer.weight.detach())


@secants.register
def _(layer: Ramp, low: Tensor, high: Tensor, box: Box | None) -> Secants:
    return _linear_secants(low, high, layer.matrix().detach())


@secants.register
def _(layer: Reshape, low: Tensor, high: Tensor, box: Box | None) -> Secants:
    size = layer(low[..., 0]).shape
    return low.reshape(*size, -1), high.reshape(*size, -1)


@secants.register
def _(layer: ReferenceShift, low: Tensor, high: Tensor, box: Box | None) -> Secants | None:
    return layer_secants(layer.layer, low, high, box)


def certain_ranks(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """How many entries along axis 2 are below, and how many above, each entry wherever in the box they all are."""
    smaller = (upper.unsqueeze(3) < lower.unsqueeze(2)).sum(2)
    return smaller, (lower.unsqueeze(3) > upper.unsqueeze(2)).sum(2)


@secants.register
def _(layer: GroupSort, low: Tensor, high: Tensor, box: Box | None) -> Secants:
    size = layer.group_size or low.shape[1]
    grouped = [v.reshape(v.shape[0], -1, size, *v.shape[2:]) for v in (low, high)]
    if box is None:
        ends = grouped[0].amin(2, keepdim=True), grouped[1].amax(2, keepdim=True)
        return tuple(e.expand_as(v).reshape(low.shape) for e, v in zip(ends, grouped, strict=True))  # type: ignore[return-value]
    lower, upper = (v.reshape(v.shape[0], -1, size, *v.shape[2:]) for v in box)
    smaller, larger = certain_ranks(lower, upper)
    places = []
    for rank in range(size):
        fits = ((smaller <= rank) & (rank <= size - 1 - larger)).unsqueeze(-1)
        below = torch.where(fits, grouped[0], math.inf).amin(2)
        places.append((below, torch.where(fits, grouped[1], -math.inf).amax(2)))
    return tuple(torch.stack([p[i] for p in places], 2).reshape(low.shape) for i in (0, 1))  # type: ignore[return-value]


@secants.register
def _(layer: Householder, low: Tensor, high: Tensor, box: Box | None) -> Secants:
    size = (low.shape[1] // 2, 2, math.prod(low.shape[2:-1]))
    pairs = [v.reshape(v.shape[0], *size, v.shape[-1]).movedim(2, 0) for v in (low, high)]  # [2, B, K, S, d]
    v = layer._normal().detach().unsqueeze(-1)
    eye = torch.eye(2, dtype=v.dtype)
    mirrored = []
    for i in (0, 1):
        row = torch.stack([eye[i, j] - 2 * v[i] * v[j] for j in (0, 1)])
        ends = torch.stack([row * pairs[0], row * pairs[1]])
        slack = 16 * _UNIT * (pairs[0].abs() + pairs[1].abs()).sum(0)
        mirrored.append((ends.amin(0).sum(0) - slack, ends.amax(0).sum(0) + slack))
    image = torch.stack([m[0] for m in mirrored]), torch.stack([m[1] for m in mirrored])
    kept = flipped = torch.zeros((), dtype=torch.bool)
    if box is not None:
        depths = [v.squeeze(-1) * e.reshape(e.shape[0], *size).movedim(2, 0) for e in box]
        slack = 1e-14 * (depths[0].abs() + depths[1].abs()).sum(0)
        kept = (torch.minimum(*depths).sum(0) > slack).unsqueeze(-1)
        flipped = (torch.maximum(*depths).sum(0) < -slack).unsqueeze(-1)
    below = torch.where(kept, pairs[0], torch.where(flipped, image[0], torch.minimum(pairs[0], image[0])))
    above = torch.where(kept, pairs[1], torch.where(flipped, image[1], torch.maximum(pairs[1], image[1])))
    return below.movedim(0, 2).reshape(low.shape), above.movedim(0, 2).reshape(low.shape)
