# SPDX-License-Identifier: Apache-2.0
"""Losses made for Lipschitz networks: KR, HKR, one-vs-all hinge, K-cosine and MAE, with proved logit gradients.

Write ``t_c = +1`` for the true class and -1 for the others (a single logit: +1 for label 1), and ``w_c`` for a weight
that depends on the class and on the sign of ``t_c`` through *fixed public priors* ``pi``: ``w_c = 1 / (2 pi_c)`` where
``t_c = 1`` and ``1 / (2 (1 - pi_c))`` elsewhere; 1 without priors. Weighting by the class counts of the batch, as
common implementations do, would let one example's gradient grow with the batch size and tell the counts.

Every loss is a sum over the batch (see :mod:`dplip.losses`) and a mean over the C classes.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dplip.errors import ConfigError, DataError
from dplip.losses import BoundedLoss
from dplip.norms import Norms

__all__ = ["HKR", "KR", "Cosine", "MeanAbsoluteError", "OneVersusAllHinge"]


class _OneVersusAll(BoundedLoss):
    """``sum_b mean_c w_c f(t_c z_c)`` for an ``f`` with slopes in [-slope, 0].

    Bounds: entry c of one example's gradient is at most ``slope w_c / C`` in magnitude, so for label y the norms are
    those of the vector ``slope w(y) / C``; the largest over the labels is claimed.
    """

    def __init__(self, slope: float, priors: Sequence[float] | None) -> None:
        super().__init__()
        name = type(self).__name__
        if priors is not None and not (len(priors) and all(0 < p < 1 for p in priors)):
            raise ConfigError(
                f"{name}: expected priors between 0 and 1, got {priors}; give one public number per class"
            )
        if priors is not None and len(priors) > 1 and abs(sum(priors) - 1) > 1e-6:
            raise ConfigError(f"{name}: expected priors that sum to 1, got {sum(priors):g}; normalise them")
        self.slope, self.priors = slope, None if priors is None else tuple(float(p) for p in priors)

    def _weights(self, num_classes: int) -> tuple[Tensor, Tensor]:
        """Weights [C] at ``t = 1`` and at ``t = -1``, in float64."""
        if self.priors is None:
            ones = torch.ones(num_classes, dtype=torch.float64)
            return ones, ones
        if len(self.priors) != num_classes:
            raise ConfigError(
                f"{type(self).__name__}: expected {num_classes} priors for {num_classes} logits, got "
                f"{len(self.priors)}; give one per logit"
            )
        p = torch.tensor(self.priors, dtype=torch.float64)
        return 0.5 / p, 0.5 / (1 - p)

    @abc.abstractmethod
    def _terms(self, signed: Tensor) -> Tensor:
        """``f`` of the signed logits, entry by entry."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        t = _signs(type(self).__name__, logits, labels)
        at_true, elsewhere = (w.to(logits) for w in self._weights(logits.shape[1]))
        return (torch.where(t > 0, at_true, elsewhere) * self._terms(t * logits)).sum() / logits.shape[1]

    def logit_gradient(self, num_classes: int) -> Norms:
        at_true, elsewhere = self._weights(num_classes)
        if num_classes == 1:
            rows = torch.stack([at_true, elsewhere])
        else:
            rows = torch.where(torch.eye(num_classes, dtype=torch.bool), at_true, elsewhere)
        rows = rows * (self.slope / num_classes)
        l1, l2, linf = (float(torch.linalg.vector_norm(rows, p, dim=1).amax()) for p in (1.0, 2.0, math.inf))
        return Norms(num_classes, l1=l1, l2=l2, linf=linf)

    def extra_repr(self) -> str:
        return f"slope={self.slope:g}, priors={self.priors}"


class KR(_OneVersusAll):
    """``-sum_b mean_c w_c t_c z_c``: the Kantorovich-Rubinstein dual of a Wasserstein-1 distance, one class against
    all.

    Bounds: without priors (1, 1/sqrt(C), 1/C), attained everywhere since the loss is linear.

    Source: Serrurier, Mamalet, Gonzalez-Sanz, Boissin, Loubes, del Barrio, Achieving Robustness in Classification Using
    Optimal Transport with Hinge Regularization, CVPR 2021.

    Raises:
        ConfigError: a prior outside (0, 1), or priors that do not sum to 1.
    """

    def __init__(self, priors: Sequence[float] | None = None) -> None:
        super().__init__(1.0, priors)

    def _terms(self, signed: Tensor) -> Tensor:
        return -signed


class OneVersusAllHinge(_OneVersusAll):
    """``sum_b mean_c w_c max(0, margin - t_c z_c)``. Bounds: without priors (1, 1/sqrt(C), 1/C).

    Raises:
        ConfigError: ``margin`` is not positive and finite, or see :class:`KR`.
    """

    def __init__(self, margin: float = 1.0, priors: Sequence[float] | None = None) -> None:
        super().__init__(1.0, priors)
        self.margin = _positive(self, "margin", margin)

    def _terms(self, signed: Tensor) -> Tensor:
        return (self.margin - signed).clamp_min(0)


class HKR(_OneVersusAll):
    """KR plus ``alpha`` times the hinge (Serrurier et al., CVPR 2021). Bounds: ``1 + alpha`` times those of
    :class:`KR`.

    Raises:
        ConfigError: ``alpha`` or ``margin`` is not positive and finite, or see :class:`KR`.
    """

    def __init__(self, alpha: float = 10.0, margin: float = 1.0, priors: Sequence[float] | None = None) -> None:
        super().__init__(1.0 + _positive(self, "alpha", alpha), priors)
        self.alpha, self.margin = float(alpha), _positive(self, "margin", margin)

    def _terms(self, signed: Tensor) -> Tensor:
        return self.alpha * (self.margin - signed).clamp_min(0) - signed


class Cosine(BoundedLoss):
    """``-sum_b z_y / max(||z||_2, K)``: cosine similarity with the true class, smoothed below norm ``K``.

    Bounds: with ``u = z / ||z||``, ``g = -(e_y - u_y u) / ||z||`` where ``||z|| >= K`` and ``-e_y / K`` elsewhere. The
    first has l_2 norm ``sqrt(1 - u_y^2) / ||z||`` and l_1 norm at most ``(1 - u_y^2 + |u_y| sqrt((1 - u_y^2)(C - 1))) /
    ||z||``, whose maximum is ``(1 + sqrt(C)) / 2 / ||z||``. Hence ``((1 + sqrt(C)) / 2, 1, 1) / K``: the Lipschitz
    constant is ``1 / K``, also for ``K > 1`` (not ``1 / K^2``).

    Raises:
        ConfigError: ``minimum_norm`` is not positive and finite.
    """

    def __init__(self, minimum_norm: float = 1.0) -> None:
        super().__init__()
        self.minimum_norm = _positive(self, "minimum_norm", minimum_norm)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        _signs("Cosine", logits, labels)
        if logits.shape[1] < 2:
            raise DataError("Cosine: expected two or more classes, got one; use KR or BinaryCrossEntropy")
        norm = torch.linalg.vector_norm(logits, dim=1).clamp_min(self.minimum_norm)
        similarity: Tensor = (logits.gather(1, labels[:, None]).squeeze(1) / norm).sum()
        return -similarity

    def logit_gradient(self, num_classes: int) -> Norms:
        k = self.minimum_norm
        return Norms(num_classes, l1=(1 + math.sqrt(num_classes)) / 2 / k, l2=1 / k, linf=1 / k)

    def extra_repr(self) -> str:
        return f"minimum_norm={self.minimum_norm:g}"


class MeanAbsoluteError(BoundedLoss):
    """``sum_b mean_c |z_c - t_c|`` for finite float targets shaped like the logits ([B] stands for [B, 1]).

    Bounds: every entry of ``g`` is at most ``1 / C`` in magnitude: (1, 1/sqrt(C), 1/C).
    """

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        if targets.ndim == logits.ndim - 1 and logits.shape[-1] == 1:
            targets = targets.unsqueeze(-1)
        if logits.ndim != 2 or targets.shape != logits.shape or not targets.dtype.is_floating_point:
            raise DataError(
                f"MeanAbsoluteError: expected logits [B, C] and float targets of that shape, got "
                f"{tuple(logits.shape)} and "
                f"{targets.dtype} {tuple(targets.shape)}; one-hot encode class indices"
            )
        return (logits - targets.to(logits.dtype)).abs().sum() / logits.shape[1]

    def logit_gradient(self, num_classes: int) -> Norms:
        return Norms(num_classes, linf=1 / num_classes)


def _positive(loss: BoundedLoss, name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ConfigError(f"{type(loss).__name__}: expected {name} > 0 and finite, got {value}; fix it")
    return float(value)


def _signs(where: str, logits: Tensor, labels: Tensor) -> Tensor:
    """+1 at the true class, -1 elsewhere, [B, C]; a single logit takes labels 0 and 1."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise DataError(
            f"{where}: expected logits [B, C] and int64 labels [B], got {tuple(logits.shape)} and "
            f"{labels.dtype} {tuple(labels.shape)}; pass class indices"
        )
    classes = max(2, logits.shape[1])
    if labels.numel() and not bool(((labels >= 0) & (labels < classes)).all()):
        raise DataError(f"{where}: expected labels in 0..{classes - 1}, got others; correct them")
    hot = labels[:, None] if logits.shape[1] == 1 else F.one_hot(labels, classes)
    return (2 * hot - 1).to(logits.dtype)
