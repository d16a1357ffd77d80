# SPDX-License-Identifier: Apache-2.0
"""What every accountant must do, as a test class to inherit from. Needs nothing but pytest."""

from __future__ import annotations

import abc
import json
import math
from dataclasses import dataclass
from typing import Any

import pytest

from accountants import Accountant, Event, Gaussian, Neighbors, Repeat, Sequence, UnsupportedEvent


@dataclass(frozen=True, slots=True)
class _Unheard(Event):
    """An event no accountant can know."""

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "unheard"}


class _Lookalike(Gaussian):
    """A subclass may override what the noise means, so it must not be mistaken for its parent."""


class AccountantContract(abc.ABC):
    """Inherit as ``class TestMine(AccountantContract)`` and define ``make``; override the events at will."""

    DELTA = 1e-5

    @abc.abstractmethod
    def make(self) -> Accountant:
        """A fresh, empty accountant."""

    def event(self) -> Event:
        """An event it supports, with a finite positive epsilon at DELTA."""
        return Gaussian(4.0)

    def cheaper(self) -> Event:
        """An event it supports that loses less privacy than ``event``."""
        return Gaussian(8.0)

    def test_nothing_composed_costs_nothing(self) -> None:
        assert self.make().epsilon(self.DELTA) == 0.0
        assert self.make().delta(0.0) == 0.0
        assert self.make().ledger == ()

    def test_epsilon_is_finite_and_positive(self) -> None:
        assert 0.0 < self.make().compose(self.event()).epsilon(self.DELTA) < math.inf

    def test_more_composition_never_costs_less(self) -> None:
        accountant, seen = self.make(), 0.0
        for event in (self.event(), self.event(), self.cheaper(), self.event(), self.cheaper()):
            epsilon = accountant.compose(event, 3).epsilon(self.DELTA)
            assert epsilon >= seen - 1e-9
            seen = epsilon

    def test_cheaper_is_cheaper(self) -> None:
        assert self.make().compose(self.cheaper()).epsilon(self.DELTA) < self.make().compose(self.event()).epsilon(
            self.DELTA
        )

    def test_epsilon_falls_as_delta_grows(self) -> None:
        accountant = self.make().compose(self.event(), 5)
        values = [accountant.epsilon(d) for d in (1e-9, 1e-7, 1e-5, 1e-3, 0.1)]
        assert values == sorted(values, reverse=True)

    def test_delta_and_epsilon_agree(self) -> None:
        accountant = self.make().compose(self.event(), 5)
        epsilon = accountant.epsilon(self.DELTA)
        assert accountant.delta(epsilon * 1.001) <= self.DELTA
        assert accountant.delta(epsilon * 0.9) > self.DELTA

    def test_tree_of_events_equals_its_leaves(self) -> None:
        tree = Sequence((Repeat(self.event(), 2), Sequence(()), self.cheaper()))
        flat = self.make().compose(self.event(), 2).compose(self.cheaper())
        assert self.make().compose(tree).epsilon(self.DELTA) == pytest.approx(flat.epsilon(self.DELTA), rel=1e-9)

    def test_equal_consecutive_events_share_an_entry(self) -> None:
        accountant = self.make().compose(self.event()).compose(self.event(), 4).compose(self.cheaper())
        assert accountant.ledger == ((self.event(), 5), (self.cheaper(), 1))
        assert accountant.steps == 6

    @pytest.mark.parametrize("event", [_Unheard(), _Lookalike(4.0), Repeat(_Unheard(), 2), 4.0, None])
    def test_refuses_what_it_cannot_know_and_keeps_its_ledger(self, event: Any) -> None:
        accountant = self.make().compose(self.event())
        with pytest.raises(UnsupportedEvent):
            accountant.compose(event)
        assert accountant.ledger == ((self.event(), 1),)

    @pytest.mark.parametrize("count", [0, -1, 1.0, True, "2"])
    def test_refuses_bad_counts(self, count: Any) -> None:
        accountant = self.make()
        with pytest.raises(ValueError, match="count"):
            accountant.compose(self.event(), count)
        assert accountant.ledger == ()

    @pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 2.0, math.nan, math.inf, True, "1e-5", None])
    def test_refuses_bad_delta(self, delta: Any) -> None:
        with pytest.raises(ValueError, match="delta"):
            self.make().compose(self.event()).epsilon(delta)

    @pytest.mark.parametrize("epsilon", [-0.1, math.nan, math.inf, True, "1"])
    def test_refuses_bad_epsilon(self, epsilon: Any) -> None:
        with pytest.raises(ValueError, match="epsilon"):
            self.make().compose(self.event()).delta(epsilon)

    def test_no_noise_is_no_privacy(self) -> None:
        accountant = self.make().compose(self.event()).compose(Gaussian(0.0))
        assert accountant.epsilon(self.DELTA) == math.inf
        assert accountant.delta(10.0) == 1.0

    def test_state_survives_json(self) -> None:
        accountant = self.make().compose(self.event(), 7).compose(self.cheaper())
        copy = self.make()
        copy.load_state_dict(json.loads(json.dumps(accountant.state_dict())))
        assert copy.ledger == accountant.ledger
        assert copy.epsilon(self.DELTA) == accountant.epsilon(self.DELTA)

    def test_refuses_a_state_of_the_other_relation(self) -> None:
        state = self.make().compose(self.event()).state_dict()
        other = next(n for n in Neighbors if n is not self.make().neighbors)
        state["neighbors"] = other.value
        with pytest.raises(ValueError, match="Neighbors"):
            self.make().load_state_dict(state)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda s: s.pop("ledger"),
            lambda s: s.update(extra=1),
            lambda s: s.update(format=2),
            lambda s: s.update(neighbors="nobody"),
            lambda s: s.update(ledger="abc"),
            lambda s: s["ledger"].pop(),
            lambda s: s["ledger"][0].update(count=1),
            lambda s: s["ledger"][0].update(count=-3),
            lambda s: s["ledger"][0].update(count=3.0),
            lambda s: s["ledger"][0].pop("event"),
            lambda s: s["ledger"][0].update(event={"kind": "gaussian"}),
            lambda s: s["ledger"][0].update(event={"kind": "gaussian", "noise_multiplier": math.nan}),
            lambda s: s["ledger"][0].update(event={"kind": "laplace", "scale": 1.0}),
        ],
    )
    def test_refuses_a_damaged_state_and_keeps_its_ledger(self, damage: Any) -> None:
        state = self.make().compose(self.event(), 3).compose(self.cheaper(), 2).state_dict()
        damage(state)
        accountant = self.make().compose(self.cheaper())
        with pytest.raises(ValueError):
            accountant.load_state_dict(state)
        assert accountant.ledger == ((self.cheaper(), 1),)

    def test_the_draft_never_answers_lower(self) -> None:
        for event in (self.event(), self.cheaper()):
            full = self.make().compose(event, 20).epsilon(self.DELTA)
            assert self.make().empty(draft=True).compose(event, 20).epsilon(self.DELTA) >= full - 1e-9

    def test_empty_keeps_the_relation(self) -> None:
        accountant = self.make().compose(self.event())
        assert accountant.empty().neighbors is accountant.neighbors
        assert accountant.empty().ledger == ()
        assert accountant.steps == 1
