# SPDX-License-Identifier: Apache-2.0
"""What was released, in the fewest numbers that fix the privacy loss. Frozen; no algorithms.

``noise_multiplier`` always means: standard deviation of the noise divided by the l2 sensitivity of the
released SUM to adding or removing one example, that is, by the per-example bound. It does not depend on the
neighboring relation: when one example may be replaced by another the sum moves twice as far, and the
accountant, not the caller, takes care of that factor of two.
"""

from __future__ import annotations

import abc
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_MAX_DEPTH = 32


def _real(where: str, value: object, low: float, high: float) -> float:
    """Returns ``value`` as a float in [low, high]; NaN, infinities and booleans are refused."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{where}: expected a real number, got {value!r}; pass a float")
    number = float(value)
    if not math.isfinite(number) or not low <= number <= high:
        limits = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"finite and at least {low:g}"
        raise ValueError(f"{where}: expected a number {limits}, got {value!r}")
    return number


def _count(where: str, value: object) -> int:
    """Returns ``value`` as an int of at least 1; booleans and floats are refused."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{where}: expected a whole number of at least 1, got {value!r}")
    return int(value)


def _event(where: str, value: object) -> Event:
    if not isinstance(value, Event):
        raise ValueError(f"{where}: expected an Event, got {value!r}; wrap a noise multiplier in Gaussian(...)")
    return value


class Event(abc.ABC):
    """One release, or a tree of releases. Immutable, hashable and equal by value."""

    __slots__ = ()

    @abc.abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """JSON-safe description; ``event_from_dict`` is its inverse."""


@dataclass(frozen=True, slots=True)
class Gaussian(Event):
    """A sum plus ``N(0, (noise_multiplier * s)^2 I)``; no example moves the sum by more than ``s`` in l2.

    A multiplier of 0 is allowed and means no noise: every accountant then answers an infinite epsilon.

    Raises:
        ValueError: the multiplier is not a finite number of at least 0.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        value = _real("Gaussian.noise_multiplier", self.noise_multiplier, 0.0, math.inf)
        object.__setattr__(self, "noise_multiplier", value)

    @classmethod
    def joint(cls, *multipliers: float) -> Gaussian:
        """One Gaussian as private as several, released together on the SAME batch: ``1/z^2 = sum_k 1/z_k^2``.

        Exact: scale release k by its noise and stack. The likelihood ratio of the stacked vector depends on
        it only through its component along the mean shift, whose l2 norm is at most ``sqrt(sum_k 1/z_k^2)``.
        Under Poisson sampling this must happen inside the sampled event; composing K independently sampled
        releases instead under-reports, because the same example takes part in all of them.

        Raises:
            ValueError: no multiplier was given, or one is not a finite number of at least 0.
        """
        if not multipliers:
            raise ValueError("Gaussian.joint: expected at least one noise multiplier, got none")
        values = [cls(m).noise_multiplier for m in multipliers]
        if min(values) == 0.0:
            return cls(0.0)
        smallest = min(values)
        return cls(smallest / math.sqrt(math.fsum((smallest / v) ** 2 for v in values)))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "gaussian", "noise_multiplier": self.noise_multiplier}


@dataclass(frozen=True, slots=True)
class PoissonSampled(Event):
    """``event`` on a batch that holds each example independently with probability ``sampling_prob``.

    Raises:
        ValueError: ``event`` is not an Event, or the probability is not in [0, 1].
    """

    event: Event
    sampling_prob: float

    def __post_init__(self) -> None:
        _event("PoissonSampled.event", self.event)
        value = _real("PoissonSampled.sampling_prob", self.sampling_prob, 0.0, 1.0)
        object.__setattr__(self, "sampling_prob", value)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "poisson_sampled",
            "event": self.event.to_dict(),
            "sampling_prob": self.sampling_prob,
        }


@dataclass(frozen=True, slots=True)
class TruncatedPoissonSampled(Event):
    """Poisson sampling, then a uniformly random subset of ``max_batch_size`` when the draw is larger.

    ``dataset_size`` is a public constant: the guarantee covers every pair of neighboring data sets that both
    have at most that many examples. It is never read from the data.

    Raises:
        ValueError: a probability outside [0, 1], or a size below 1.
    """

    event: Event
    sampling_prob: float
    dataset_size: int
    max_batch_size: int

    def __post_init__(self) -> None:
        where = "TruncatedPoissonSampled"
        _event(f"{where}.event", self.event)
        object.__setattr__(self, "sampling_prob", _real(f"{where}.sampling_prob", self.sampling_prob, 0.0, 1.0))
        object.__setattr__(self, "dataset_size", _count(f"{where}.dataset_size", self.dataset_size))
        object.__setattr__(self, "max_batch_size", _count(f"{where}.max_batch_size", self.max_batch_size))

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "truncated_poisson_sampled",
            "event": self.event.to_dict(),
            "sampling_prob": self.sampling_prob,
            "dataset_size": self.dataset_size,
            "max_batch_size": self.max_batch_size,
        }


@dataclass(frozen=True, slots=True)
class Repeat(Event):
    """``event``, ``count`` times, adaptively and with fresh randomness each time.

    Raises:
        ValueError: ``event`` is not an Event, or the count is not a whole number of at least 1.
    """

    event: Event
    count: int

    def __post_init__(self) -> None:
        _event("Repeat.event", self.event)
        object.__setattr__(self, "count", _count("Repeat.count", self.count))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "repeat", "event": self.event.to_dict(), "count": self.count}


@dataclass(frozen=True, slots=True)
class Sequence(Event):
    """``events`` one after the other, adaptively and with fresh randomness each time.

    Raises:
        ValueError: an element is not an Event.
    """

    events: tuple[Event, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.events, Iterable):
            raise ValueError(f"Sequence.events: expected a tuple of Events, got {self.events!r}")
        object.__setattr__(self, "events", tuple(_event("Sequence.events", e) for e in self.events))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "sequence", "events": [e.to_dict() for e in self.events]}


_KINDS: dict[str, tuple[type[Event], frozenset[str]]] = {
    "gaussian": (Gaussian, frozenset({"noise_multiplier"})),
    "poisson_sampled": (PoissonSampled, frozenset({"event", "sampling_prob"})),
    "truncated_poisson_sampled": (
        TruncatedPoissonSampled,
        frozenset({"event", "sampling_prob", "dataset_size", "max_batch_size"}),
    ),
    "repeat": (Repeat, frozenset({"event", "count"})),
    "sequence": (Sequence, frozenset({"events"})),
}


def event_from_dict(d: Mapping[str, Any]) -> Event:
    """The event that ``to_dict`` described.

    Raises:
        ValueError: an unknown kind, a missing or unknown key, or a value the event itself refuses.
    """
    return _parse(d, 0)


def _parse(d: object, depth: int) -> Event:
    if depth > _MAX_DEPTH:
        raise ValueError(f"event_from_dict: expected at most {_MAX_DEPTH} nested events, got more")
    if not isinstance(d, Mapping):
        raise ValueError(f"event_from_dict: expected a mapping with a 'kind', got {d!r}")
    kind = d.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"event_from_dict: expected kind to be one of {sorted(_KINDS)}, got {kind!r}")
    cls, fields = _KINDS[kind]
    got = frozenset(d) - {"kind"}
    if got != fields:
        raise ValueError(f"event_from_dict: {kind} expects keys {sorted(fields)}, got {sorted(map(str, got))}")
    values: dict[str, Any] = {k: d[k] for k in fields}
    if "event" in values:
        values["event"] = _parse(values["event"], depth + 1)
    if "events" in values:
        if not isinstance(values["events"], list | tuple):
            raise ValueError(f"event_from_dict: sequence expects a list of events, got {values['events']!r}")
        values["events"] = tuple(_parse(e, depth + 1) for e in values["events"])
    return cls(**values)
