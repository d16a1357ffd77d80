# SPDX-License-Identifier: Apache-2.0
"""A plan refuses what is out of range, never changes, and says what its steps cost."""

import dataclasses
import json
import math
from itertools import pairwise
from typing import Any

import pytest

from accountants import Neighbors
from accountants.events import Gaussian, PoissonSampled, TruncatedPoissonSampled
from dplip.errors import PlanError
from dplip.privacy import PrivacyPlan
from tests.privacy.toy import plan

NAN, INF = float("nan"), float("inf")
BAD: dict[str, list[Any]] = {
    "population": [0, -1, 1.5, 100.0, True, None, "100", NAN],
    "sampling_prob": [0, 0.0, -0.1, 1.0001, NAN, INF, True, None, "0.1"],
    "steps": [0, -3, 2.0, True, None, "10", NAN],
    "delta": [0, 0.0, 1, 1.0, -1e-5, 2.0, NAN, True, False, None, "1e-5"],
    "noise_multiplier": [-0.1, NAN, INF, True, None, "1"],
    "target_epsilon": [0.0, -1.0, NAN, INF, True, "3"],
    "neighbors": ["add", "", None, 1, ["add_or_remove_one"], Neighbors.REPLACE_ONE],
    "accountant": ["gdp", "GDP", "prv", "", None, 3, ["pld"]],
    "allocation": ["", "per_layer", None, 1, ["global"]],
    "sampling": ["shuffle", "", None, 0, ["poisson"]],
    "max_batch_size": [10, 0, -1],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_value_out_of_range_is_refused(name: str, value: Any) -> None:
    with pytest.raises(PlanError, match=rf"plan\.{name}: expected") as error:
        plan(**{name: value})
    assert "\n" not in str(error.value) and ", got " in str(error.value)


@pytest.mark.parametrize("size", [None, 0, -5, 2.5, True, "9"])
def test_truncated_sampling_needs_a_batch_limit(size: Any) -> None:
    with pytest.raises(PlanError, match="max_batch_size"):
        plan(sampling="truncated_poisson", max_batch_size=size)


@pytest.mark.parametrize(
    "changes",
    [
        {"accountant": "rdp", "neighbors": "replace_one"},
        {"accountant": "rdp", "sampling": "truncated_poisson", "max_batch_size": 40},
    ],
)
def test_combination_without_a_theorem_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="theorem"):
        plan(**changes)
    with pytest.raises(PlanError, match="theorem"):
        PrivacyPlan.calibrated(target_epsilon=3.0, population=100, sampling_prob=0.2, steps=10, delta=1e-5, **changes)


def test_edges_are_allowed() -> None:
    assert plan(sampling_prob=1).epsilon() > 0
    assert plan(population=1, sampling_prob=1.0, steps=1).expected_batch_size == 1
    assert plan(noise_multiplier=0).epsilon() == INF


def test_plan_is_frozen() -> None:
    settings = plan()
    for field in dataclasses.fields(settings):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(settings, field.name, getattr(settings, field.name))
    with pytest.raises(TypeError):
        PrivacyPlan(100, 0.2, 10, 1e-5, 1.0)  # type: ignore[misc]


def test_digest_changes_with_every_field() -> None:
    changes: list[dict[str, Any]] = [
        {"population": 101},
        {"sampling_prob": 0.2000001},
        {"steps": 11},
        {"delta": 2e-5},
        {"noise_multiplier": 1.0000001},
        {"target_epsilon": 3.0},
        {"neighbors": "replace_one"},
        {"accountant": "rdp"},
        {"allocation": "global"},
        {"sampling": "truncated_poisson", "max_batch_size": 40},
        {"sampling": "truncated_poisson", "max_batch_size": 41},
        {"noise_schedule": ((1.0, 9), (0.5, 1))},
    ]
    assert {f.name for f in dataclasses.fields(PrivacyPlan)} == {n for c in changes for n in c}
    digests = {plan().digest(), *(plan(**c).digest() for c in changes)}
    assert len(digests) == len(changes) + 1
    assert plan().digest() == plan().digest()


@pytest.mark.parametrize(
    "changes", [{}, {"sampling": "truncated_poisson", "max_batch_size": 40}, {"target_epsilon": 2.5}]
)
def test_plan_survives_json(changes: dict[str, Any]) -> None:
    settings = plan(**changes)
    restored = PrivacyPlan.from_dict(json.loads(json.dumps(settings.to_dict())))
    assert restored == settings and restored.digest() == settings.digest()


def test_from_dict_refuses_what_it_did_not_write() -> None:
    good = plan().to_dict()
    less = {k: v for k, v in good.items() if k != "delta"}
    for values in (good | {"extra": 1}, less, good | {"delta": 2.0}, good | {"steps": True}, {}):
        with pytest.raises(PlanError) as error:
            PrivacyPlan.from_dict(values)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_epsilon": 8},
        {"target_epsilon": 0.5},
        {"target_epsilon": 3.0, "accountant": "rdp"},
        {"target_epsilon": 3.0, "neighbors": "replace_one"},
        {"target_epsilon": 1.0, "sampling": "truncated_poisson", "max_batch_size": 30, "population": 100, "steps": 5},
        {"target_epsilon": 1.0, "sampling_prob": 1.0, "steps": 1},
    ],
)
def test_calibrated_plan_meets_its_target_closely(changes: dict[str, Any]) -> None:
    target = changes["target_epsilon"]
    settings: dict[str, Any] = {"population": 200, "sampling_prob": 0.2, "steps": 20, "delta": 1e-5}
    calibrated = PrivacyPlan.calibrated(**(settings | changes))
    assert calibrated.target_epsilon == target
    assert calibrated.epsilon() <= target
    assert calibrated.epsilon() >= 0.99 * target
    less = dataclasses.replace(calibrated, noise_multiplier=calibrated.noise_multiplier * 0.999)
    assert less.epsilon() > target


@pytest.mark.parametrize("target", [0, 0.0, -1.0, NAN, INF, True, None, "3"])
def test_calibration_refuses_a_bad_target(target: Any) -> None:
    with pytest.raises(PlanError, match="target_epsilon"):
        PrivacyPlan.calibrated(target_epsilon=target, population=100, sampling_prob=0.2, steps=10, delta=1e-5)


def test_calibration_refuses_a_bad_plan_before_searching() -> None:
    with pytest.raises(PlanError, match=r"plan\.delta"):
        PrivacyPlan.calibrated(target_epsilon=1.0, population=100, sampling_prob=0.2, steps=10, delta=1.0)


def test_epsilon_grows_with_steps() -> None:
    settings = plan()
    spent = [settings.epsilon(k) for k in range(settings.steps + 1)]
    assert spent[0] == 0
    assert all(a < b for a, b in pairwise(spent))
    assert settings.epsilon() == spent[-1]
    by_hand = settings.make_accountant().compose(PoissonSampled(Gaussian(1.0), 0.2), 4).epsilon(1e-5)
    assert settings.epsilon(4) == by_hand
    assert plan(noise_multiplier=0.0).epsilon(0) == 0
    for steps in (-1, 1.5, True, NAN):
        with pytest.raises(PlanError):
            settings.epsilon(steps)


def test_replacing_costs_more_than_adding() -> None:
    assert plan(neighbors="replace_one").epsilon() > plan().epsilon()


def test_step_event_describes_the_plan() -> None:
    assert plan().step_event() == PoissonSampled(Gaussian(1.0), 0.2)
    truncated = plan(sampling="truncated_poisson", max_batch_size=40)
    assert truncated.step_event() == TruncatedPoissonSampled(Gaussian(1.0), 0.2, 100, 40)
    assert truncated.epsilon() >= plan().epsilon() * (1 - 1e-6)
    assert truncated.make_accountant().neighbors is Neighbors.ADD_OR_REMOVE_ONE


@pytest.mark.parametrize(("q", "steps"), [(1.0, 1), (0.2, 5), (0.3, 3), (0.7, 1), (1e-3, 1000)])
def test_public_sizes(q: float, steps: int) -> None:
    settings = plan(sampling_prob=q)
    assert settings.steps_per_epoch == steps
    assert math.isclose(settings.expected_batch_size, 100 * q)
