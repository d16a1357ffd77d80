# SPDX-License-Identifier: Apache-2.0
"""Noise schedules: how the noise multiplier moves over a run, frozen into the plan before the first step.

A schedule is a function from the 0-based step to a factor on the plan's noise multiplier. The plan stores its values as
``((factor, count), ...)``, so that calibration, ledger, epsilon and checkpoints are those of the whole schedule, and
nothing measured while training can change it: a multiplier chosen by looking at private data would itself be a release.

The same three shapes as ``opacus.schedulers``, where ``ExponentialNoise`` and ``StepNoise`` move once per epoch: give
``every=loader_steps_per_epoch`` for that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from dplip.errors import PlanError

__all__ = ["ExponentialNoise", "NoiseTable", "StepNoise", "factor_at", "noise_table", "prefix"]

NoiseTable = tuple[tuple[float, int], ...]
"""``(factor, count)``: the next ``count`` steps have noise ``factor`` times the plan's multiplier."""


@dataclass(frozen=True)
class ExponentialNoise:
    """``gamma ** (step // every)``.

    Raises:
        PlanError: ``gamma`` is not positive and finite, or ``every`` is below 1.
    """

    gamma: float
    every: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.gamma < math.inf or self.every < 1:
            raise PlanError(f"noise schedule: expected gamma > 0 and every >= 1, got {self}; fix the configuration")

    def __call__(self, step: int) -> float:
        return float(self.gamma ** (step // self.every))


@dataclass(frozen=True)
class StepNoise:
    """1 before ``milestones[0]``, then ``gamma`` times itself at each of the (increasing) ``milestones``.

    Raises:
        PlanError: ``gamma`` is not positive and finite, or the milestones do not increase from at least 1.
    """

    gamma: float
    milestones: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))
        rising = all(a < b for a, b in itertools.pairwise((0, *self.milestones)))
        if not 0 < self.gamma < math.inf or not rising:
            raise PlanError(
                f"noise schedule: expected gamma > 0 and increasing milestones >= 1, got {self}; fix the configuration"
            )

    def __call__(self, step: int) -> float:
        return float(self.gamma ** sum(step >= m for m in self.milestones))


def noise_table(schedule: Callable[[int], float] | Iterable[Any] | None, steps: int) -> NoiseTable | None:
    """The values of ``schedule`` over ``steps`` steps, equal neighbours merged; None for no schedule or all ones.

    Args:
        schedule: a function of the 0-based step (:class:`ExponentialNoise`, :class:`StepNoise`, a lambda), or the
            table itself as a list of pairs. It is called here and never again.
        steps: length of the run.

    Raises:
        PlanError: a factor is not positive and finite, or the table does not cover exactly ``steps``.
    """
    if schedule is None:
        return None
    if callable(schedule):
        pairs: list[tuple[Any, Any]] = [(schedule(step), 1) for step in range(steps)]
    else:
        try:
            pairs = [(factor, count) for factor, count in schedule]
        except (TypeError, ValueError) as error:
            raise PlanError(
                "plan.noise_schedule: expected a function of the step or (factor, count) pairs, "
                f"got {schedule!r}; fix the configuration"
            ) from error
    for factor, count in pairs:
        number = isinstance(factor, (int, float)) and not isinstance(factor, bool) and 0 < factor < math.inf
        if not number or type(count) is not int or count < 1:
            raise PlanError(
                "plan.noise_schedule: expected finite factors > 0 and counts >= 1, "
                f"got {factor!r} x {count!r}; fix the configuration"
            )
    if sum(count for _, count in pairs) != steps:
        raise PlanError(
            f"plan.noise_schedule: expected {steps} steps, got {sum(c for _, c in pairs)}; "
            "give the schedule as a function, or make the table as long as the run"
        )
    merged = tuple(
        (float(factor), sum(count for _, count in group)) for factor, group in itertools.groupby(pairs, lambda p: p[0])
    )
    return None if merged == ((1.0, steps),) else merged


def factor_at(table: NoiseTable | None, step: int) -> float:
    """The factor of the 0-based ``step``; past the end, that of the last step."""
    if table is None:
        return 1.0
    for factor, count in table:
        if step < count:
            return factor
        step -= count
    return table[-1][0]


def prefix(table: NoiseTable | None, steps: int) -> NoiseTable:
    """The table of the first ``steps`` steps."""
    if table is None:
        return ((1.0, steps),) if steps else ()
    kept: list[tuple[float, int]] = []
    for factor, count in table:
        if steps > 0:
            kept.append((factor, min(count, steps)))
        steps -= count
    return tuple(kept)
