# SPDX-License-Identifier: Apache-2.0
"""The few kinds of node a traced model consists of."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor

from dplip.layers.base import LipschitzLayer, Shapes
from dplip.norms import Norms

__all__ = ["Add", "Apply", "Box", "Concat", "Operation"]

Box = tuple[Tensor, Tensor]


class Operation(abc.ABC):
    """A node: how values, perturbations, cotangents and boxes pass through it."""

    @abc.abstractmethod
    def __call__(self, *inputs: Tensor) -> Tensor:
        """The value."""

    @abc.abstractmethod
    def output_bound(self, inputs: Sequence[Norms], shapes: Sequence[Shapes]) -> Norms:
        """Bounds on the output's perturbation given bounds on each input's."""

    @abc.abstractmethod
    def cotangent_bounds(self, g: Norms, shapes: Sequence[Shapes]) -> list[Norms]:
        """Bounds on the cotangent sent to each input."""

    @abc.abstractmethod
    def interval(self, *inputs: Box) -> Box:
        """Elementwise bounds over a product of boxes."""

    def range_bound(self, shapes: Sequence[Shapes]) -> Norms | None:
        """Bounds on the output over all inputs, if there are any."""
        return None

    def fan_in(self, shapes: Sequence[Shapes]) -> int:
        """Rounded additions per output entry."""
        return 0


class Apply(Operation):
    """One Lipschitz layer on one input."""

    def __init__(self, layer: LipschitzLayer) -> None:
        self.layer = layer

    def __call__(self, *inputs: Tensor) -> Tensor:
        value: Tensor = self.layer(inputs[0])
        return value

    def output_bound(self, inputs: Sequence[Norms], shapes: Sequence[Shapes]) -> Norms:
        return self.layer.output_bound(inputs[0], shapes[0])

    def cotangent_bounds(self, g: Norms, shapes: Sequence[Shapes]) -> list[Norms]:
        return [self.layer.cotangent_bound(g, shapes[0])]

    def interval(self, *inputs: Box) -> Box:
        return self.layer.interval(*inputs[0])

    def range_bound(self, shapes: Sequence[Shapes]) -> Norms | None:
        return self.layer.range_bound(shapes[0])

    def fan_in(self, shapes: Sequence[Shapes]) -> int:
        return self.layer.fan_in(shapes[0])


class Add(Operation):
    """``sum_k sign_k x_k`` of tensors of one shape: perturbations add up, each input gets the whole cotangent."""

    def __init__(self, signs: Sequence[int]) -> None:
        self.signs = tuple(signs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        total = inputs[0] if self.signs[0] > 0 else -inputs[0]
        for sign, x in zip(self.signs[1:], inputs[1:], strict=True):
            total = total + x if sign > 0 else total - x
        return total

    def output_bound(self, inputs: Sequence[Norms], shapes: Sequence[Shapes]) -> Norms:
        total = inputs[0]
        for x in inputs[1:]:
            total = total + x
        return total

    def cotangent_bounds(self, g: Norms, shapes: Sequence[Shapes]) -> list[Norms]:
        return [g for _ in self.signs]

    def interval(self, *inputs: Box) -> Box:
        parts = [box if sign > 0 else (-box[1], -box[0]) for sign, box in zip(self.signs, inputs, strict=True)]
        low, high = parts[0]
        for below, above in parts[1:]:
            low, high = low + below, high + above
        return low, high

    def fan_in(self, shapes: Sequence[Shapes]) -> int:
        return len(self.signs)


class Concat(Operation):
    """Concatenation of one example's tensors along axis ``dim >= 1``: each piece sees at most the whole cotangent."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def __call__(self, *inputs: Tensor) -> Tensor:
        return torch.cat(inputs, self.dim)

    def output_bound(self, inputs: Sequence[Norms], shapes: Sequence[Shapes]) -> Norms:
        total = inputs[0]
        for x in inputs[1:]:
            total = total.concat(x)
        return total

    def cotangent_bounds(self, g: Norms, shapes: Sequence[Shapes]) -> list[Norms]:
        return [Norms(s.in_dim, g.l1, g.l2, g.linf) for s in shapes]

    def interval(self, *inputs: Box) -> Box:
        lows, highs = zip(*inputs, strict=True)
        return torch.cat(lows, self.dim), torch.cat(highs, self.dim)
