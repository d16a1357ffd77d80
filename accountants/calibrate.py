# SPDX-License-Identifier: Apache-2.0
"""Least noise, or most steps, within a privacy budget.

Both searches bracket the answer with a draft accountant, which is quick and never answers lower than the full
one, then close the bracket with the full accountant. The end returned is one whose epsilon the full
accountant proved to be within the budget.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import NamedTuple

from accountants.base import Neighbors, UnsupportedEvent
from accountants.events import Event
from accountants.registry import make_accountant

_LEAST_MULTIPLIER, _MOST_MULTIPLIER = 2.0**-10, 2.0**40
_MOST_STEPS = 2**40
_DRAFT_TOLERANCE = 1e-3


def calibrate_noise_multiplier(
    make_event: Callable[[float], Event],
    *,
    epsilon: float,
    delta: float,
    accountant: str = "pld",
    neighbors: Neighbors = Neighbors.ADD_OR_REMOVE_ONE,
    tolerance: float = 1e-4,
) -> float:
    """Smallest noise multiplier, to a relative ``tolerance``, with a proven epsilon within budget.

    Args:
        make_event: the whole run as an event, given the multiplier; more noise must not cost more.
        epsilon: the budget, > 0.
        delta: in (0, 1).
        accountant: a name in ``ACCOUNTANTS``.
        neighbors: the neighboring relation.
        tolerance: relative, in (0, 1): a multiplier smaller by this factor was seen to exceed the budget.

    Raises:
        ValueError: an argument out of range, or a budget that no multiplier up to 2^40 meets, or one that
        even a
            multiplier of 2^-10 meets (then ``make_event`` hardly depends on it).
        UnsupportedEvent: the accountant has no bound for the event.
    """
    target = _budget("calibrate_noise_multiplier", epsilon)
    if isinstance(tolerance, bool) or not 0.0 < tolerance < 1.0:
        raise ValueError(f"calibrate_noise_multiplier: expected tolerance in (0, 1), got {tolerance!r}")
    full = make_accountant(accountant, neighbors)

    def spent(multiplier: float, draft: bool) -> float:
        return full.empty(draft=draft).compose(make_event(multiplier)).epsilon(delta)

    draft = _bracket(lambda z: spent(z, True), target, delta)
    draft = _narrow(lambda z: spent(z, True), draft, target, max(tolerance, _DRAFT_TOLERANCE))
    return _settle(lambda z: spent(z, False), draft, target, delta, tolerance)


def calibrate_steps(
    step_event: Event,
    *,
    epsilon: float,
    delta: float,
    accountant: str = "pld",
    neighbors: Neighbors = Neighbors.ADD_OR_REMOVE_ONE,
) -> int:
    """Largest number of ``step_event`` with a proven epsilon within budget; 0 if one is too many.

    Raises:
        ValueError: an argument out of range, or 2^40 steps still fit (the step costs nothing).
        UnsupportedEvent: the accountant has no bound for the event.
    """
    target = _budget("calibrate_steps", epsilon)
    full = make_accountant(accountant, neighbors)
    if not full.supports(step_event):
        raise UnsupportedEvent(f"calibrate_steps: {accountant} has no bound for {step_event!r} under {neighbors.value}")

    def spent(steps: int, draft: bool) -> float:
        return full.empty(draft=draft).compose(step_event, steps).epsilon(delta) if steps else 0.0

    low, high = _gallop(lambda t: spent(t, True), 0, target)
    low, high = _narrow_count(lambda t: spent(t, True), low, high, target, 1 + high // 256)
    low, high = _gallop(lambda t: spent(t, False), low, target)
    return _narrow_count(lambda t: spent(t, False), low, high, target, 1)[0]


def _budget(where: str, epsilon: object) -> float:
    if isinstance(epsilon, bool) or not isinstance(epsilon, numbers.Real) or not 0.0 < float(epsilon) < math.inf:
        raise ValueError(f"{where}: expected a finite epsilon > 0, got {epsilon!r}")
    return float(epsilon)


def _too_easy(target: float, delta: float) -> str:
    return (
        f"calibrate_noise_multiplier: epsilon={target:g} at delta={delta:g} is met even with multiplier "
        f"{_LEAST_MULTIPLIER:g}; check that make_event uses its argument"
    )


def _too_hard(target: float, delta: float) -> str:
    return (
        f"calibrate_noise_multiplier: no multiplier up to {_MOST_MULTIPLIER:.0f} proves epsilon={target:g} "
        f"at delta={delta:g}; raise epsilon or delta, or take fewer steps"
    )


class _Bracket(NamedTuple):
    """Too little noise and enough noise, each with the epsilon seen there."""

    low: float
    at_low: float
    high: float
    at_high: float

    def slope(self) -> float:
        """How fast epsilon falls as the multiplier grows, both in logarithms; 1 when that cannot be told."""
        if not (self.low < self.high and 0.0 < self.at_high < self.at_low < math.inf):
            return 1.0
        return min(max(math.log(self.at_low / self.at_high) / math.log(self.high / self.low), 0.5), 8.0)


def _bracket(spent: Callable[[float], float], target: float, delta: float) -> _Bracket:
    """Around the smallest multiplier within budget, a factor of two apart."""
    low = high = 1.0
    at_low = at_high = spent(1.0)
    while at_high > target:
        if high > _MOST_MULTIPLIER:
            raise ValueError(_too_hard(target, delta))
        low, at_low, high = high, at_high, 2.0 * high
        at_high = spent(high)
    while at_low <= target:
        if low < _LEAST_MULTIPLIER:
            raise ValueError(_too_easy(target, delta))
        high, at_high, low = low, at_low, 0.5 * low
        at_low = spent(low)
    return _Bracket(low, at_low, high, at_high)


def _interpolate(low: float, at_low: float, high: float, at_high: float, target: float) -> float:
    """Where a power law through both points meets ``target``; else, the middle."""
    ends = (low, at_low, at_high)
    if not all(math.isfinite(x) and x > 0.0 for x in ends) or at_low == at_high:
        return math.sqrt(low * high) if low > 0.0 else 0.5 * high
    share = math.log(at_low / target) / math.log(at_low / at_high)
    return low * math.pow(high / low, min(max(share, 0.0), 1.0))


def _narrow(spent: Callable[[float], float], bracket: _Bracket, target: float, tolerance: float) -> _Bracket:
    """Shrinks a bracket, ``spent(low) > target >= spent(high)``, to ``high <= low * (1 + tolerance)``.

    Epsilon is close to a power of the multiplier, so interpolation in logarithms lands near the root. Probes
    go just beside it, on the safe side and then one tolerance below, which closes the bracket; every third is
    a bisection, so the number of probes is bounded.
    """
    low, at_low, high, at_high = bracket
    turn = 0
    while high > low * (1.0 + tolerance):
        turn += 1
        below = high / (1.0 + 0.999 * tolerance)
        root = _interpolate(low, at_low, high, at_high, target)
        probe = below if root > below else root * (1.0 + 0.5 * tolerance)
        if turn % 3 == 0 or not low < probe < high:
            probe = math.sqrt(low * high)
        value = spent(probe)
        if value > target:
            low, at_low = probe, value
        else:
            high, at_high = probe, value
    return _Bracket(low, at_low, high, at_high)


def _settle(spent: Callable[[float], float], draft: _Bracket, target: float, delta: float, tolerance: float) -> float:
    """The smallest multiplier near the draft's, to ``tolerance``, that is within budget under ``spent``."""
    high, at_high, stride = draft.high, spent(draft.high), tolerance
    while at_high > target:
        if high > 2.0 * _MOST_MULTIPLIER:
            raise ValueError(_too_hard(target, delta))
        high *= 1.0 + stride
        at_high, stride = spent(high), 2.0 * stride
    # The draft's slope tells where to look; what is found there decides.
    guess = high * max(at_high / target, 0.5) ** (1.0 / draft.slope()) * (1.0 + 0.5 * tolerance)
    if guess < high:
        at_guess = spent(guess)
        if at_guess > target:
            return _narrow(spent, _Bracket(guess, at_guess, high, at_high), target, tolerance).high
        high, at_high = guess, at_guess
    stride = 0.999 * tolerance
    low = high / (1.0 + stride)
    at_low = spent(low)
    while at_low <= target:
        if low < _LEAST_MULTIPLIER:
            raise ValueError(_too_easy(target, delta))
        high, at_high, stride = low, at_low, 2.0 * stride
        low = high / (1.0 + stride)
        at_low = spent(low)
    return _narrow(spent, _Bracket(low, at_low, high, at_high), target, tolerance).high


def _gallop(spent: Callable[[int], float], low: int, target: float) -> tuple[int, int]:
    """(fits, does not fit) around the largest count that fits, given that ``low`` does."""
    stride = max(1, low // 256)
    while spent(low + stride) <= target:
        low, stride = low + stride, 2 * stride
        if low > _MOST_STEPS:
            raise ValueError(f"calibrate_steps: more than {_MOST_STEPS} steps fit; the step costs nothing")
    return low, low + stride


def _narrow_count(spent: Callable[[int], float], low: int, high: int, target: float, width: int) -> tuple[int, int]:
    """Keeps ``spent(low) <= target < spent(high)`` while shrinking to ``high - low <= width``."""
    at_low, at_high, turn = 0.0, math.inf, 0
    while high - low > width:
        turn += 1
        root = math.floor(_interpolate(low, at_low, high, at_high, target))
        probe = (low + high) // 2 if turn % 3 == 0 else min(max(root, low + 1), high - 1)
        value = spent(probe)
        if value <= target:
            low, at_low = probe, value
        else:
            high, at_high = probe, value
    return low, high
