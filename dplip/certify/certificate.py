# SPDX-License-Identifier: Apache-2.0
"""What a certifier claims, and how claims are counted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dplip.errors import UnsoundCertificate

__all__ = ["Certificate"]


@dataclass(frozen=True, eq=False)
class Certificate:
    """For each example: the predicted class is the same at every input closer than ``radius`` in ``norm``.

    Attributes:
        predicted: [B] int64, the class the deployed model returns.
        radius: [B] float64, >= 0; 0 where nothing is claimed. Units of the input.
        norm: ``"linf"`` or ``"l2"``, the norm of the input in which ``radius`` is measured.
        method: how it was proved, and the inputs it is restricted to if it is.

    Raises:
        UnsoundCertificate: a shape or dtype is wrong, a radius is NaN, infinite or negative, or the norm is unknown.
    """

    predicted: Tensor
    radius: Tensor
    norm: str
    method: str

    def __post_init__(self) -> None:
        p, r = self.predicted, self.radius
        if p.ndim != 1 or r.shape != p.shape or p.dtype != torch.int64 or r.dtype != torch.float64:
            raise UnsoundCertificate(
                "Certificate: expected predicted int64 [B] and radius float64 [B], "
                f"got {p.dtype} {tuple(p.shape)} and {r.dtype} {tuple(r.shape)}; convert them"
            )
        if self.norm not in ("linf", "l2"):
            raise UnsoundCertificate(
                f"Certificate: expected norm 'linf' or 'l2', got {self.norm!r}; choose one of them"
            )
        if not bool(((r >= 0) & torch.isfinite(r)).all()):
            raise UnsoundCertificate(
                "Certificate: expected finite radii >= 0, got others; use 0 where nothing is claimed"
            )

    def __len__(self) -> int:
        return len(self.predicted)

    def certified_accuracy(self, labels: Tensor, eps: float) -> float:
        """Share of the examples that are predicted right *and* certified beyond ``eps`` (strictly).

        At ``eps = 0`` an example that is right but within rounding of a tie does not count. NaN where there are no
        examples.

        Raises:
            ValueError: ``labels`` is not shaped like ``predicted``, or ``eps`` is negative or NaN.
        """
        if labels.shape != self.predicted.shape or not eps >= 0:
            raise ValueError(
                f"certified_accuracy: expected labels {tuple(self.predicted.shape)} and eps >= 0, "
                f"got {tuple(labels.shape)} and {eps}"
            )
        if len(self) == 0:
            return math.nan
        right = self.predicted == labels.to(self.predicted.device)
        return float((right & (self.radius > eps)).double().mean())

    @staticmethod
    def best(certificates: Iterable[Certificate]) -> Certificate:
        """The largest radius of each example. Sound, because each claim is true by itself.

        Raises:
            UnsoundCertificate: there are none, or they differ in norm or in what they predict.
        """
        first, *rest = _of_one_norm("best", certificates)
        if any(not torch.equal(c.predicted, first.predicted) for c in rest):
            raise UnsoundCertificate(
                "Certificate.best: expected certificates of one prediction per example, got different ones; "
                "certify one model on one batch"
            )
        radius = torch.stack([c.radius for c in (first, *rest)]).amax(0)
        return Certificate(first.predicted, radius, first.norm, _methods((first, *rest)))

    @staticmethod
    def concat(certificates: Iterable[Certificate]) -> Certificate:
        """The certificates of several batches, in order, as one.

        Raises:
            UnsoundCertificate: there are none, or they differ in norm.
        """
        parts = _of_one_norm("concat", certificates)
        return Certificate(
            torch.cat([c.predicted for c in parts]),
            torch.cat([c.radius for c in parts]),
            parts[0].norm,
            _methods(parts),
        )


def _methods(parts: Sequence[Certificate]) -> str:
    return " | ".join(dict.fromkeys(c.method for c in parts))


def _of_one_norm(where: str, certificates: Iterable[Certificate]) -> list[Certificate]:
    parts = list(certificates)
    if not parts or len({c.norm for c in parts}) > 1:
        raise UnsoundCertificate(
            f"Certificate.{where}: expected one or more certificates of one norm, "
            f"got norms {[c.norm for c in parts]}; keep norms apart"
        )
    return parts
