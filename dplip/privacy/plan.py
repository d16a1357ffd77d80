# SPDX-License-Identifier: Apache-2.0
"""The frozen plan from which sampler, noise and accounting all derive, so that they cannot disagree."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from accountants import ACCOUNTANTS, Accountant, Neighbors, calibrate_noise_multiplier, calibrate_steps, make_accountant
from accountants.events import Event, Gaussian, PoissonSampled, Repeat, Sequence, TruncatedPoissonSampled
from dplip.errors import PlanError
from dplip.privacy.allocation import ALLOCATIONS
from dplip.privacy.schedule import NoiseTable, factor_at, noise_table, prefix

__all__ = ["SAMPLINGS", "PrivacyPlan"]

SAMPLINGS = ("poisson", "truncated_poisson")


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """Everything that fixes the privacy of a run. All of it is public configuration.

    Attributes:
        population: nominal number of examples, a public constant; it sets the divisor and, for truncated sampling,
            enters the proof. The data may hold fewer; more only under plain Poisson sampling.
        sampling_prob: probability ``q`` with which each example enters a step, independently.
        steps: number of noisy steps ``T`` that may be taken.
        delta: failure probability of the guarantee.
        noise_multiplier: noise standard deviation over the l_2 sensitivity of the sum to one example. 0 is no privacy.
        target_epsilon: what ``noise_multiplier`` was calibrated to, if it was.
        neighbors: which datasets count as neighbours. Under replace-one the accountant doubles the sensitivity.
        accountant: name in :data:`accountants.ACCOUNTANTS`.
        allocation: how noise is split over tensors, see :mod:`dplip.privacy.allocation`.
        sampling: ``"poisson"``, or ``"truncated_poisson"`` which drops a random excess over ``max_batch_size``.
        max_batch_size: largest batch under truncated sampling.
        noise_schedule: factors on ``noise_multiplier`` over the run, a function of the step or ``(factor, count)``
            pairs (:mod:`dplip.privacy.schedule`); stored as pairs. None: constant noise.

    Raises:
        PlanError: a value is out of range.
    """

    population: int
    sampling_prob: float
    steps: int
    delta: float
    noise_multiplier: float
    target_epsilon: float | None = None
    neighbors: str = Neighbors.ADD_OR_REMOVE_ONE.value
    accountant: str = "pld"
    allocation: str = "minimum_energy"
    sampling: str = "poisson"
    max_batch_size: int | None = None
    noise_schedule: NoiseTable | None = None

    def __post_init__(self) -> None:
        self._require(_is_int(self.population) and self.population >= 1, "population", "an integer >= 1")
        self._require(_is_number(self.sampling_prob) and 0 < self.sampling_prob <= 1, "sampling_prob", "0 < q <= 1")
        self._require(_is_int(self.steps) and self.steps >= 1, "steps", "an integer >= 1")
        self._require(_is_number(self.delta) and 0 < self.delta < 1, "delta", "0 < delta < 1")
        finite = _is_number(self.noise_multiplier) and 0 <= self.noise_multiplier < math.inf
        self._require(finite, "noise_multiplier", "a finite number >= 0")
        target = self.target_epsilon
        reachable = target is None or (_is_number(target) and 0 < target < math.inf)
        self._require(reachable, "target_epsilon", "0 < epsilon < inf, or none")
        choices = {
            "neighbors": [n.value for n in Neighbors],
            "accountant": sorted(ACCOUNTANTS),
            "allocation": sorted(ALLOCATIONS),
            "sampling": list(SAMPLINGS),
        }
        for name, known in choices.items():
            self._require(getattr(self, name) in known, name, known)
        truncated = self.sampling == "truncated_poisson"
        size = self.max_batch_size
        fits = _is_int(size) and size >= 1 if truncated else size is None
        self._require(fits, "max_batch_size", "an integer >= 1 with truncated_poisson, else none")
        object.__setattr__(self, "noise_schedule", noise_table(self.noise_schedule, self.steps))
        if self.noise_multiplier > 0 and not self.make_accountant().supports(self.step_event()):
            raise PlanError(
                f"plan: expected a combination with a theorem, got accountant {self.accountant!r} with "
                f"{self.sampling} sampling under {self.neighbors}; use accountant 'pld' or add_or_remove_one"
            )

    def _require(self, holds: bool, name: str, expected: Any) -> None:
        if not holds:
            raise PlanError(f"plan.{name}: expected {expected}, got {getattr(self, name)!r}; fix the configuration")

    @classmethod
    def calibrated(cls, *, target_epsilon: float, **settings: Any) -> PrivacyPlan:
        """The plan with the least noise whose proven epsilon is at most ``target_epsilon``.

        Takes every attribute but ``noise_multiplier``.

        Raises:
            PlanError: the target is not positive and finite, or no noise reaches it.
        """
        if not _is_number(target_epsilon) or not 0 < target_epsilon < math.inf:
            raise PlanError(
                f"plan.target_epsilon: expected 0 < epsilon < inf, got {target_epsilon!r}; fix the configuration"
            )
        draft = cls(target_epsilon=float(target_epsilon), noise_multiplier=1.0, **settings)
        try:
            z = calibrate_noise_multiplier(
                lambda z: Sequence(tuple(Repeat(e, n) for e, n in draft._events(z, draft.steps))),
                epsilon=target_epsilon,
                delta=draft.delta,
                accountant=draft.accountant,
                neighbors=Neighbors(draft.neighbors),
            )
        except ValueError as error:
            raise PlanError(f"plan: {error}") from error
        return cls(**(asdict(draft) | {"noise_multiplier": z}))

    @property
    def expected_batch_size(self) -> float:
        """The public divisor of the noisy sum, ``q * population``."""
        return self.sampling_prob * self.population

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every example is drawn once on average."""
        return max(1, round(1 / self.sampling_prob))

    def _event(self, noise_multiplier: float) -> Event:
        gaussian = Gaussian(noise_multiplier)
        if self.sampling == "truncated_poisson" and self.max_batch_size is not None:
            return TruncatedPoissonSampled(gaussian, self.sampling_prob, self.population, self.max_batch_size)
        return PoissonSampled(gaussian, self.sampling_prob)

    def _events(self, noise_multiplier: float, steps: int) -> list[tuple[Event, int]]:
        return [(self._event(noise_multiplier * factor), n) for factor, n in prefix(self.noise_schedule, steps)]

    def multiplier(self, step: int = 0) -> float:
        """The noise multiplier of the 0-based ``step``."""
        return self.noise_multiplier * factor_at(self.noise_schedule, step)

    def step_event(self, step: int = 0) -> Event:
        """What the 0-based ``step`` releases."""
        return self._event(self.multiplier(step))

    def ledger(self, steps: int) -> tuple[tuple[Event, int], ...]:
        """``(event, count)`` of the first ``steps`` steps, as an accountant that saw them one by one holds them."""
        merged: list[tuple[Event, int]] = []
        for event, count in self._events(self.noise_multiplier, steps) if self.noise_multiplier > 0 else ():
            if merged and merged[-1][0] == event:
                count += merged.pop()[1]
            merged.append((event, count))
        return tuple(merged)

    def make_accountant(self) -> Accountant:
        """An empty accountant of the plan's kind."""
        return make_accountant(self.accountant, Neighbors(self.neighbors))

    def epsilon(self, steps: int | None = None) -> float:
        """Proven epsilon at the plan's delta after ``steps`` (default: all) steps; ``inf`` without noise."""
        count = self.steps if steps is None else steps
        if not _is_int(count) or count < 0:
            raise PlanError(f"plan.epsilon: expected an integer number of steps >= 0, got {count!r}; fix it")
        if count == 0:
            return 0.0
        if self.noise_multiplier == 0:
            return math.inf
        if self.noise_schedule is not None and count > self.steps:
            raise PlanError(
                f"plan.epsilon: expected at most the {self.steps} steps of the noise schedule, got {count}; "
                "make a plan of more steps"
            )
        accountant = self.make_accountant()
        for event, times in self.ledger(count):
            accountant.compose(event, times)
        return accountant.epsilon(self.delta)

    def most_steps(self, epsilon: float | None = None) -> int:
        """The largest number of this plan's steps with a proven epsilon of at most ``epsilon`` (default: the target).

        Whatever else is released in a step, such as a clip quantile, is inside the step's event and so is counted.

        Raises:
            PlanError: no budget is given or it is out of range, or the plan has no noise or a noise schedule.
        """
        budget = self.target_epsilon if epsilon is None else epsilon
        if budget is None or self.noise_multiplier == 0:
            raise PlanError("plan.most_steps: expected a budget and noise, got none; give epsilon and noise_multiplier")
        if self.noise_schedule is not None:
            raise PlanError(
                "plan.most_steps: expected constant noise, got a schedule, which says nothing of steps after its end; "
                "compare plan.epsilon(steps) instead"
            )
        try:
            return calibrate_steps(
                self.step_event(),
                epsilon=budget,
                delta=self.delta,
                accountant=self.accountant,
                neighbors=Neighbors(self.neighbors),
            )
        except ValueError as error:
            raise PlanError(f"plan: {error}") from error

    def most_epochs(self, epsilon: float | None = None) -> int:
        """The whole epochs in :meth:`most_steps`."""
        return self.most_steps(epsilon) // self.steps_per_epoch

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form; :meth:`from_dict` restores it. Constant noise leaves ``noise_schedule`` out."""
        values = asdict(self)
        if self.noise_schedule is None:
            del values["noise_schedule"]
        else:
            values["noise_schedule"] = [[factor, count] for factor, count in self.noise_schedule]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PrivacyPlan:
        """The plan written by :meth:`to_dict`; unknown or missing keys raise :class:`PlanError`."""
        names = {f.name for f in fields(cls)}
        if set(values) | {"noise_schedule"} != names:
            raise PlanError(f"plan: expected the keys {sorted(names)}, got {sorted(values)}; restore the saved plan")
        return cls(**values)

    def digest(self) -> str:
        """A short hash of the whole plan, to recognise a changed one on resume."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
