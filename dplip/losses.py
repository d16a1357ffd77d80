# SPDX-License-Identifier: Apache-2.0
"""Losses with proved bounds on one example's logit gradient.

Every loss returns the SUM over the batch: the sum is what noise is calibrated to, and the optimizer divides by the
*public* expected batch size. Write ``z`` for the logits [B, C] and ``g`` for one example's gradient in its row of
``z``.
"""

from __future__ import annotations

import abc
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dplip.errors import ConfigError, DataError, PlanError
from dplip.norms import Norms

__all__ = [
    "BinaryCrossEntropy",
    "BoundedLoss",
    "CrossEntropy",
    "LogitGradientClip",
    "MulticlassMargin",
    "bounded",
]


class BoundedLoss(nn.Module, abc.ABC):
    """``forward(logits, targets)`` -> the scalar sum over the batch; :meth:`logit_gradient` bounds one example's
    share."""

    @abc.abstractmethod
    def logit_gradient(self, num_classes: int) -> Norms:
        """Bounds on ``||g||`` in l_1, l_2 and l_inf, over all logits and all valid targets."""

    @property
    def clipping(self) -> dict[str, float | str] | None:
        """Recorded in reports: None unless logit gradients are clipped."""
        return None

    @property
    def copies(self) -> int:
        """Rows of the logits that belong to one example; each then has a gradient within ``1 / copies`` of the
        bounds."""
        return 1


def _check_labels(where: str, logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise DataError(
            f"{where}: expected logits [B, C] and int64 labels [B], got {tuple(logits.shape)} and "
            f"{labels.dtype} {tuple(labels.shape)}; pass class indices"
        )
    if labels.numel() and not (0 <= int(labels.min()) and int(labels.max()) < logits.shape[1]):
        raise DataError(
            f"{where}: expected labels in [0, {logits.shape[1]}), got {int(labels.min())} to {int(labels.max())}; "
            "renumber the classes"
        )


class CrossEntropy(BoundedLoss):
    r"""``sum_b CE(tau (z_b - margin e_y), y) / tau``, softmax cross-entropy with temperature and margin.

    Bounds: ``g = softmax - e_y`` has ``||g||_1 = 2 (1 - p_y) <= 2``, ``||g||_2 <= sqrt(2) (1 - p_y)``,
    ``||g||_inf <= 1``. Lowering the true logit by a constant moves the point of evaluation only. ``tau`` is the dial
    between accuracy and certified radius: a small ``tau`` keeps pushing examples that are already right.

    Args:
        temperature: ``tau > 0``.
        margin: amount by which the true logit is lowered; ``2 eps`` asks an l_inf 1-Lipschitz network for radius
            ``eps``.

    Raises:
        ConfigError: ``temperature`` is not positive or ``margin`` is not finite.
    """

    def __init__(self, temperature: float = 1.0, margin: float = 0.0) -> None:
        super().__init__()
        if not 0 < temperature < math.inf or not math.isfinite(margin):
            raise ConfigError(
                f"CrossEntropy: expected temperature > 0 and a finite margin, got {temperature} and {margin}; fix them"
            )
        self.temperature, self.margin = float(temperature), float(margin)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        _check_labels("CrossEntropy", logits, labels)
        lowered = logits - self.margin * F.one_hot(labels, logits.shape[1]).to(logits.dtype)
        return F.cross_entropy(self.temperature * lowered, labels, reduction="sum") / self.temperature

    def logit_gradient(self, num_classes: int) -> Norms:
        return Norms(num_classes, l1=2.0, l2=math.sqrt(2), linf=1.0)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}, margin={self.margin:g}"


class MulticlassMargin(BoundedLoss):
    """``sum_b max(0, margin + max_{j != y} z_j - z_y)`` (Crammer and Singer, JMLR 2001).

    Bounds: ``g`` is ``e_j - e_y`` for one runner-up ``j``, or 0: norms (2, sqrt(2), 1).

    Raises:
        ConfigError: ``margin`` is not positive.
    """

    def __init__(self, margin: float = 1.0) -> None:
        super().__init__()
        if not 0 < margin < math.inf:
            raise ConfigError(f"MulticlassMargin: expected margin > 0, got {margin}; fix it")
        self.margin = float(margin)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        _check_labels("MulticlassMargin", logits, labels)
        if logits.shape[1] < 2:
            raise DataError("MulticlassMargin: expected two or more classes, got one; use BinaryCrossEntropy")
        true = logits.gather(1, labels[:, None]).squeeze(1)
        others = logits.scatter(1, labels[:, None], -math.inf)
        # max(dim) credits one index at a tie; amax would spread the gradient, which is sound too but not this bound
        return (self.margin + others.max(1)[0] - true).clamp_min(0).sum()

    def logit_gradient(self, num_classes: int) -> Norms:
        return Norms(num_classes, l1=2.0, l2=math.sqrt(2), linf=1.0)

    def extra_repr(self) -> str:
        return f"margin={self.margin:g}"


class BinaryCrossEntropy(BoundedLoss):
    """``sum_b sum_c BCE(tau z_bc, t_bc) / tau`` for targets in [0, 1], shaped like the logits ([B] stands for [B, 1]).

    Bounds: every entry of ``g`` is ``sigmoid - t``, in [-1, 1]: norms (C, sqrt(C), 1).

    Raises:
        ConfigError: ``temperature`` is not positive.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ConfigError(f"BinaryCrossEntropy: expected temperature > 0, got {temperature}; fix it")
        self.temperature = float(temperature)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        if targets.ndim == logits.ndim - 1 and logits.shape[-1] == 1:
            targets = targets.unsqueeze(-1)
        if targets.shape != logits.shape:
            raise DataError(
                f"BinaryCrossEntropy: expected targets shaped like the logits {tuple(logits.shape)}, "
                f"got {tuple(targets.shape)}; one-hot encode class indices"
            )
        targets = targets.to(logits.dtype)
        if targets.numel() and not bool(((targets >= 0) & (targets <= 1)).all()):
            raise DataError("BinaryCrossEntropy: expected targets in [0, 1], got others; rescale them")
        z = self.temperature * logits
        return F.binary_cross_entropy_with_logits(z, targets, reduction="sum") / self.temperature

    def logit_gradient(self, num_classes: int) -> Norms:
        return Norms(num_classes, linf=1.0)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}"


class _ClipRows(torch.autograd.Function):
    """Identity forward; backward scales every row of the gradient to norm at most ``bound``."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, bound: float, p: float) -> Tensor:
        ctx.bound, ctx.p = bound, p
        return z.view_as(z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        norm = torch.linalg.vector_norm(g, ctx.p, dim=1, keepdim=True)
        return g * (ctx.bound / norm.clamp_min(ctx.bound)), None, None


class LogitGradientClip(BoundedLoss):
    """Another loss with every example's logit gradient clipped to ``||g|| <= bound`` in ``norm``; costs O(B C).

    The one place where dplip clips anything, only when asked, and every report says so. ``norm="l1"`` suits l_inf
    networks, ``"l2"`` suits l_2 networks. Clipping scales an example's gradient and keeps its direction.

    ``loss`` may be any module that sums one term per example; terms that mix examples are not made private by it.

    Source: logit-gradient clipping of Bethune et al., DP-SGD Without Clipping: The Lipschitz Neural Network Way,
    ICLR 2024, section 4.2.

    Raises:
        ConfigError: ``bound`` is not positive, ``norm`` is unknown, or ``loss`` is averaged over the batch.
    """

    def __init__(self, loss: nn.Module, bound: float, norm: str = "l2") -> None:
        super().__init__()
        if getattr(loss, "reduction", "sum") != "sum":
            raise ConfigError(
                f"LogitGradientClip: expected a loss with reduction='sum', got {loss.reduction!r}; "
                "the optimizer divides the noisy sum by the public expected batch size"
            )
        if not 0 < bound < math.inf or norm not in ("l1", "l2"):
            raise ConfigError(
                f"LogitGradientClip: expected bound > 0 and norm 'l1' or 'l2', got {bound} and {norm!r}; fix them"
            )
        self.loss, self.bound, self.norm = loss, float(bound), norm

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        row_bound = self.bound / self.copies
        value: Tensor = self.loss(_ClipRows.apply(logits, row_bound, {"l1": 1.0, "l2": 2.0}[self.norm]), targets)
        return value

    @property
    def copies(self) -> int:
        return self.loss.copies if isinstance(self.loss, BoundedLoss) else 1

    def logit_gradient(self, num_classes: int) -> Norms:
        clipped = Norms(num_classes, **{self.norm: self.bound})
        return clipped.meet(self.loss.logit_gradient(num_classes)) if isinstance(self.loss, BoundedLoss) else clipped

    @property
    def clipping(self) -> dict[str, float | str] | None:
        return {"bound": self.bound, "norm": self.norm}


class _Summed(BoundedLoss):
    """A torch loss whose bounds are those of one of ours."""

    def __init__(self, loss: nn.Module, bounds: BoundedLoss) -> None:
        super().__init__()
        self.loss, self.bounds = loss, bounds

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        value: Tensor = self.loss(logits, targets)
        return value

    def logit_gradient(self, num_classes: int) -> Norms:
        return self.bounds.logit_gradient(num_classes)


def bounded(loss: nn.Module) -> BoundedLoss:
    """``loss`` itself, or bounds for a torch loss that has proved ones.

    Accepts ``nn.CrossEntropyLoss`` and ``nn.BCEWithLogitsLoss`` with ``reduction="sum"`` and no weights (label
    smoothing keeps the bounds: the gradient is a difference of two distributions).

    Raises:
        PlanError: no bound is known for ``loss`` as configured.
    """
    if isinstance(loss, BoundedLoss):
        return loss
    kinds: dict[type[nn.Module], BoundedLoss] = {
        nn.CrossEntropyLoss: CrossEntropy(),
        nn.BCEWithLogitsLoss: BinaryCrossEntropy(),
    }
    bounds = kinds.get(type(loss))
    if bounds is None:
        raise PlanError(
            f"loss: expected a loss of dplip.losses, got {type(loss).__name__}; use one, "
            "subclass BoundedLoss, or wrap it in LogitGradientClip"
        )
    if getattr(loss, "weight", None) is not None or getattr(loss, "pos_weight", None) is not None:
        raise PlanError(f"loss: expected {type(loss).__name__} without weights, got weights; drop them")
    if loss.reduction != "sum":
        raise PlanError(
            f"loss: expected {type(loss).__name__}(reduction='sum'), got {loss.reduction!r}; "
            "the optimizer divides the noisy sum by the public expected batch size"
        )
    return _Summed(loss, bounds)
