# SPDX-License-Identifier: Apache-2.0
"""Several augmented copies of each example in one step, at the price of one.

The copies of an example are neighbouring rows of the batch: ``augmented`` makes [B K, ...] out of [B, ...], the model
sees B K rows, and :class:`AugmentationMultiplicity` gives each row the weight ``1 / K``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dplip.errors import ConfigError, DataError
from dplip.losses import BoundedLoss
from dplip.norms import Norms

__all__ = ["AugmentationMultiplicity", "augmented"]


class _ScaleGradient(torch.autograd.Function):
    """Identity forward; backward multiplies by ``factor``."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return z.view_as(z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g * ctx.factor, None


class AugmentationMultiplicity(BoundedLoss):
    """``sum_b (1 / K) sum_k loss(z_bk, y_b)`` for logits [B K, C] whose K copies of an example are adjacent.

    Guarantee. Row ``k`` of an example has a logit gradient within ``1/K`` of ``loss``'s bounds, so its gradient in a
    tensor is at most ``s / K`` (every rule is linear in the cotangent), and the K of them add up to at most ``s``: the
    sensitivity of one copy, at no privacy cost. The copies must be functions of the example alone (no mixup) and lie
    in the input domain.

    The factor is applied to the gradient after ``loss`` has clipped it, if it does.

    Source: De, Berrada, Hayes, Smith, Balle, Unlocking High-Accuracy Differentially Private Image Classification
    through Scale, arXiv 2204.13650, section 3.

    Raises:
        ConfigError: ``copies`` is below 1.
        DataError: the number of rows is not K times the number of targets.
    """

    def __init__(self, loss: BoundedLoss, copies: int) -> None:
        super().__init__()
        if copies < 1:
            raise ConfigError(f"AugmentationMultiplicity: expected copies >= 1, got {copies}; fix it")
        self.loss, self.per_example = loss, int(copies)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        if len(logits) != self.copies * len(targets):
            raise DataError(
                f"AugmentationMultiplicity: expected {self.copies} rows per example, got {len(logits)} rows for "
                f"{len(targets)} targets; make the batch with dplip.multiplicity.augmented"
            )
        rows = _ScaleGradient.apply(logits, 1 / self.per_example)
        total: Tensor = self.loss(rows, targets.repeat_interleave(self.per_example, 0))
        return total + (total / self.per_example - total).detach()

    def logit_gradient(self, num_classes: int) -> Norms:
        return self.loss.logit_gradient(num_classes)

    @property
    def copies(self) -> int:
        return self.per_example * self.loss.copies

    @property
    def clipping(self) -> dict[str, float | str] | None:
        return self.loss.clipping

    def extra_repr(self) -> str:
        return f"copies={self.per_example}"


def augmented(x: Tensor, copies: int, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """``copies`` independent transforms of every example, adjacent: [B, ...] -> [B copies, ...].

    Args:
        x: the batch.
        copies: K.
        transform: a random map of a batch to one of the same shape that treats every example by itself.

    Raises:
        ConfigError: ``copies`` is below 1.
        DataError: ``transform`` changed the number of examples.
    """
    if copies < 1:
        raise ConfigError(f"augmented: expected copies >= 1, got {copies}; fix it")
    made = [transform(x) for _ in range(copies)]
    if any(len(part) != len(x) for part in made):
        raise DataError(f"augmented: expected {len(x)} examples from the transform, got another number; fix it")
    return torch.stack(made, 1).flatten(0, 1)
