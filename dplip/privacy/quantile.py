# SPDX-License-Identifier: Apache-2.0
"""Logit-gradient clipping whose bound follows a private quantile, inside the step's own Gaussian release."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dplip.errors import ConfigError, PlanError
from dplip.losses import BoundedLoss
from dplip.norms import Norms
from dplip.privacy.noise import NoiseSource

__all__ = ["AdaptiveLogitClip"]

SENSITIVITY = 0.5
"""Of ``sum_b (fraction of example b's rows within the bound - 1/2)`` to one example."""


class _ClipAndCount(torch.autograd.Function):
    """Identity forward; backward clips every row and notes how many were within the bound."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, clip: AdaptiveLogitClip) -> Tensor:
        ctx.clip = clip
        return z.view_as(z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        clip: AdaptiveLogitClip = ctx.clip
        row_bound = clip.bound / clip.copies
        norm = torch.linalg.vector_norm(g, {"l1": 1.0, "l2": 2.0}[clip.norm], dim=1, keepdim=True)
        clip.observe(int((norm <= row_bound).sum()), len(g))
        return g * (row_bound / norm.clamp_min(row_bound)), None


class AdaptiveLogitClip(BoundedLoss):
    r"""Another loss with logit gradients clipped to a bound ``C`` that tracks a quantile of their norms.

    After step ``t``: ``b = 1/2 + (sum_i (1[||g_i|| <= C_t] - 1/2) + N(0, (z_b / 2)^2)) / (q N)`` and
    ``C_{t+1} = C_t exp(-rate (b - quantile))``, kept in [``least``, ``most``].

    Guarantee. The centred sum has sensitivity 1/2 under adding or removing one example. It is one more coordinate of
    the step's Gaussian mechanism: the gradient is released with ``z_g``, ``1/z_g^2 + 1/z_b^2 = 1/z^2``
    (:meth:`gradient_multiplier`), so the step as a whole is what the plan says and the ledger needs no entry of its
    own, however often the bound is refreshed. ``C_t`` is released before step ``t`` starts, hence the noise of step
    ``t`` may follow it: a lower bound buys less noise.

    Source: Andrew, Thakkar, McMahan, Ramaswamy, Differentially Private Learning with Adaptive Clipping, NeurIPS 2021,
    algorithm 1; here for gradients at the logits, as Bethune et al., ICLR 2024.

    Args:
        loss: the loss to clip.
        bound: first ``C``, public.
        quantile: share of examples that should be left unclipped.
        norm: ``"l1"`` or ``"l2"``.
        noise_multiplier: ``z_b``; must exceed the plan's.
        rate: speed of adaptation.
        least, most: public limits of ``C``.
        every: refresh on steps 0, ``every``, 2 ``every``, ...; the others spend everything on the gradient.

    Raises:
        ConfigError: an option is out of range.
        PlanError: a second backward pass before the step, or ``noise_multiplier`` not above the plan's.
    """

    _bound: Tensor

    def __init__(
        self,
        loss: BoundedLoss,
        bound: float,
        *,
        quantile: float = 0.9,
        norm: str = "l2",
        noise_multiplier: float = 20.0,
        rate: float = 0.2,
        least: float = 1e-3,
        most: float = 1e3,
        every: int = 1,
    ) -> None:
        super().__init__()
        sizes = 0 < least <= bound <= most < math.inf and 0 < noise_multiplier < math.inf and 0 < rate < math.inf
        if not sizes or not 0 < quantile < 1 or norm not in ("l1", "l2") or every < 1:
            raise ConfigError(
                "AdaptiveLogitClip: expected 0 < least <= bound <= most, noise_multiplier and rate > 0, "
                f"0 < quantile < 1, norm 'l1' or 'l2' and every >= 1, got {least}, {bound}, {most}, "
                f"{noise_multiplier}, {rate}, {quantile}, {norm!r} and {every}; fix them"
            )
        self.loss, self.norm, self.quantile, self.rate = loss, norm, float(quantile), float(rate)
        self.noise_multiplier, self.every = float(noise_multiplier), every
        self.least, self.most = float(least), float(most)
        self.register_buffer("_bound", torch.tensor(float(bound), dtype=torch.float64))
        self._seen: tuple[int, int] | None = None
        self._expects_part = False
        self.refreshes = 0

    @property
    def bound(self) -> float:
        """The current ``C``: released, so public."""
        return float(self._bound)

    @property
    def copies(self) -> int:
        return self.loss.copies

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        value: Tensor = self.loss(_ClipAndCount.apply(logits, self), targets)
        return value

    def logit_gradient(self, num_classes: int) -> Norms:
        clipped = Norms(num_classes, **{self.norm: self.bound})
        return clipped.meet(self.loss.logit_gradient(num_classes))

    @property
    def clipping(self) -> dict[str, float | str] | None:
        return {
            "bound": self.bound,
            "norm": self.norm,
            "quantile": self.quantile,
            "quantile_noise_multiplier": self.noise_multiplier,
        }

    def observe(self, within: int, rows: int) -> None:
        """Note a backward pass: ``within`` of ``rows`` rows were not clipped. Private until released."""
        if self._seen is not None and not self._expects_part:
            raise PlanError(
                "AdaptiveLogitClip: expected one backward pass per step, got another; call optimizer.step() "
                "after each, so no example is counted twice"
            )
        before = self._seen or (0, 0)
        self._seen = (before[0] + within, before[1] + rows)
        self._expects_part = False

    def expect_part(self) -> None:
        """The next backward pass is on further examples of the same draw, whose counts add up."""
        self._expects_part = True

    def forget(self) -> None:
        """Drop what was observed since the last step, unreleased."""
        self._seen = None
        self._expects_part = False

    def due(self, step: int) -> bool:
        """Whether the 0-based ``step`` refreshes the bound."""
        return step % self.every == 0

    def gradient_multiplier(self, noise_multiplier: float, step: int) -> float:
        """``z_g`` for the gradient of ``step``, such that both releases together are one of ``noise_multiplier``."""
        if noise_multiplier == 0 or not self.due(step):
            return noise_multiplier
        if self.noise_multiplier <= noise_multiplier:
            raise PlanError(
                f"AdaptiveLogitClip: expected noise_multiplier above the plan's {noise_multiplier:g}, got "
                f"{self.noise_multiplier:g}; the quantile alone would overspend, raise it"
            )
        return 1 / math.sqrt(noise_multiplier**-2 - self.noise_multiplier**-2)

    def release(self, step: int, expected_batch_size: float, noise: NoiseSource, private: bool = True) -> None:
        """Release the quantile statistic of ``step`` and move the bound; ``private=False`` adds no noise."""
        within, rows = self._seen or (0, 0)
        self._seen = None
        if not self.due(step):
            return
        centred = torch.tensor([(within - rows / 2) / self.copies], dtype=torch.float64)
        noise_std = SENSITIVITY * self.noise_multiplier if private else 0.0
        share = 0.5 + float(noise.add_(centred.to(noise.device), noise_std)) / expected_batch_size
        factor = math.exp(min(max(-self.rate * (share - self.quantile), -50.0), 50.0))
        self._bound.fill_(min(max(self.bound * factor, self.least), self.most))
        self.refreshes += 1

    def extra_repr(self) -> str:
        return f"bound={self.bound:g}, norm={self.norm!r}, quantile={self.quantile:g}"
