# SPDX-License-Identifier: Apache-2.0
"""The accountant interface: compose events, ask for epsilon."""

from __future__ import annotations

import abc
import enum
import math
import numbers
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

from accountants.events import Event, event_from_dict

_STATE_FORMAT = 1
_STATE_KEYS = frozenset({"format", "accountant", "neighbors", "steps", "ledger"})


class Neighbors(enum.Enum):
    """Which pairs of data sets must be indistinguishable.

    ``ADD_OR_REMOVE_ONE``: one has one example more; a sum moves by at most the per-example bound.
    ``REPLACE_ONE``: same size, one example differs; a sum moves by at most twice that. The same multiplier
    costs more here; accountants do the doubling, callers never.
    """

    ADD_OR_REMOVE_ONE = "add_or_remove_one"
    REPLACE_ONE = "replace_one"


class UnsupportedEvent(TypeError):
    """The accountant has no proof for this event; it refuses rather than guesses."""


class Accountant(abc.ABC):
    """Upper bounds on epsilon for a growing ledger of events.

    Contract: ``epsilon`` and ``delta`` are upper bounds, never estimates; they do not decrease under
    ``compose`` (up to floating-point rounding); and they are functions of ``ledger`` and ``neighbors`` alone,
    so saving the ledger saves the state. Composition is adaptive: an event may be chosen after seeing earlier
    releases.
    """

    name: ClassVar[str]

    def __init__(self, neighbors: Neighbors = Neighbors.ADD_OR_REMOVE_ONE) -> None:
        if not isinstance(neighbors, Neighbors):
            raise ValueError(f"{type(self).__name__}: expected neighbors to be a Neighbors, got {neighbors!r}")
        self._neighbors = neighbors
        self._ledger: list[tuple[Event, int]] = []

    @property
    def neighbors(self) -> Neighbors:
        """The neighboring relation; fixed for the life of the accountant."""
        return self._neighbors

    @property
    def ledger(self) -> tuple[tuple[Event, int], ...]:
        """``(event, count)`` in the order composed; equal consecutive events share one entry."""
        return tuple(self._ledger)

    @property
    def steps(self) -> int:
        """How many events were composed, counts included."""
        return sum(count for _, count in self._ledger)

    @abc.abstractmethod
    def supports(self, event: Event) -> bool:
        """Whether this accountant has a theorem for ``event`` under ``neighbors``."""

    @abc.abstractmethod
    def _epsilon(self, delta: float) -> float:
        """``epsilon`` for a non-empty ledger and a validated delta."""

    @abc.abstractmethod
    def _delta(self, epsilon: float) -> float:
        """``delta`` for a non-empty ledger and a validated epsilon."""

    def compose(self, event: Event, count: int = 1) -> Self:
        """Adds ``count`` releases of ``event`` and returns the accountant itself.

        Raises:
            UnsupportedEvent: no theorem covers the event; the ledger is left as it was.
            ValueError: ``count`` is not a whole number of at least 1.
        """
        count = self._checked(event, count)
        if self._ledger and self._ledger[-1][0] == event:
            self._ledger[-1] = (event, self._ledger[-1][1] + count)
        else:
            self._ledger.append((event, count))
        return self

    def _checked(self, event: Event, count: object) -> int:
        if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 1:
            raise ValueError(f"{self.name} compose: expected count to be a whole number >= 1, got {count!r}")
        if not isinstance(event, Event) or not self.supports(event):
            raise UnsupportedEvent(
                f"{type(self).__name__} has no bound for {event!r} under {self._neighbors.value}; "
                "use another accountant or relation, or describe the release with supported events"
            )
        return int(count)

    def epsilon(self, delta: float) -> float:
        """Smallest epsilon proven at ``delta`` in (0, 1): 0 for an empty ledger, inf when nothing is proven.

        Raises:
            ValueError: ``delta`` is not in (0, 1).
        """
        if isinstance(delta, bool) or not isinstance(delta, numbers.Real) or not 0.0 < delta < 1.0:
            raise ValueError(f"{self.name} epsilon: expected delta in the open interval (0, 1), got {delta!r}")
        return self._epsilon(float(delta)) if self._ledger else 0.0

    def delta(self, epsilon: float) -> float:
        """Smallest delta proven at ``epsilon`` >= 0: 0 for an empty ledger, 1 when nothing is proven.

        Raises:
            ValueError: ``epsilon`` is negative or not a finite number.
        """
        if isinstance(epsilon, bool) or not isinstance(epsilon, numbers.Real) or not 0.0 <= epsilon < math.inf:
            raise ValueError(f"{self.name} delta: expected a finite epsilon of at least 0, got {epsilon!r}")
        return self._delta(float(epsilon)) if self._ledger else 0.0

    def empty(self, *, draft: bool = False) -> Accountant:
        """A new accountant of this kind and relation with nothing composed.

        ``draft=True`` may return one that answers faster and never lower; searches use it to get close before
        they let the full one decide.
        """
        return type(self)(self._neighbors)

    def state_dict(self) -> dict[str, Any]:
        """JSON-safe state: the relation and the ledger."""
        return {
            "format": _STATE_FORMAT,
            "accountant": self.name,
            "neighbors": self._neighbors.value,
            "steps": self.steps,
            "ledger": [{"event": event.to_dict(), "count": count} for event, count in self._ledger],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces the ledger by a saved one; on any error the present ledger stays.

        A ledger says what was released, not how it was bounded, so one saved by another kind of accountant
        loads, provided that this one supports every event in it. One saved under another neighboring relation
        does not: the run it records was planned for a different guarantee.

        Raises:
            ValueError: malformed, inconsistent, or of another neighboring relation.
            UnsupportedEvent: an event this accountant has no bound for.
        """
        if not isinstance(state, Mapping) or frozenset(state) != _STATE_KEYS:
            raise ValueError(
                f"{self.name} load_state_dict: expected a mapping with keys {sorted(_STATE_KEYS)}; "
                "pass what state_dict() returned"
            )
        if state["format"] != _STATE_FORMAT or isinstance(state["format"], bool):
            raise ValueError(f"{self.name} load_state_dict: expected format {_STATE_FORMAT}, got {state['format']!r}")
        if state["neighbors"] != self._neighbors.value:
            raise ValueError(
                f"{self.name} load_state_dict: this accountant is for {self._neighbors.value}, "
                f"the state for {state['neighbors']!r}; build the accountant with the same Neighbors"
            )
        ledger = list(self._entries(state["ledger"]))
        steps = sum(count for _, count in ledger)
        if isinstance(state["steps"], bool) or state["steps"] != steps:
            raise ValueError(
                f"{self.name} load_state_dict: the ledger holds {steps} steps but the state says "
                f"{state['steps']!r}; the state was truncated or edited"
            )
        self._ledger = ledger

    def _entries(self, entries: object) -> Iterator[tuple[Event, int]]:
        if not isinstance(entries, list | tuple):
            raise ValueError(f"{self.name} load_state_dict: expected ledger to be a list, got {entries!r}")
        for entry in entries:
            if not isinstance(entry, Mapping) or frozenset(entry) != {"event", "count"}:
                raise ValueError(
                    f"{self.name} load_state_dict: expected an entry with 'event' and 'count', got {entry!r}"
                )
            event = event_from_dict(entry["event"])
            yield event, self._checked(event, entry["count"])
