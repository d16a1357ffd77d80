# SPDX-License-Identifier: Apache-2.0
"""Every rule spends exactly the noise multiplier; the minimum-energy rule is minimal."""

import math

import numpy as np
import pytest

from dplip.errors import ConfigError
from dplip.privacy.allocation import ALLOCATIONS, Tensors, allocate, check_allocation

CASES = {
    "one": {"a": Tensors(0.3, 7)},
    "equal": {"a": Tensors(1.0, 10), "b": Tensors(1.0, 10)},
    "spread": {"a": Tensors(1e-3, 1), "b": Tensors(2.0, 10_000), "c": Tensors(50.0, 3), "d": Tensors(1.4, 128)},
    "weighted": {"a": Tensors(1.0, 5, 1e-12), "b": Tensors(2.0, 50, 0.25), "c": Tensors(3.0, 500, 1.0)},
    "tiny": {"a": Tensors(1e-200, 4), "b": Tensors(1e-190, 9)},
    "huge": {"a": Tensors(1e200, 4), "b": Tensors(1e190, 9)},
    "fixed": {"a": Tensors(0.0, 9), "b": Tensors(2.0, 4), "c": Tensors(1.0, 4)},
}


def joint(tensors: dict[str, Tensors], sigma: dict[str, float]) -> float:
    """Noise multiplier of the whole release, by the definition."""
    return 1 / math.sqrt(sum((t.bound / sigma[n]) ** 2 for n, t in tensors.items() if t.bound > 0))


def energy(tensors: dict[str, Tensors], sigma: dict[str, float]) -> float:
    return sum(t.weight * t.dim * sigma[n] ** 2 for n, t in tensors.items())


@pytest.mark.parametrize("z", [1e-3, 0.7, 1.0, 40.0])
@pytest.mark.parametrize("rule", ALLOCATIONS)
@pytest.mark.parametrize("case", CASES)
def test_every_rule_spends_the_noise_multiplier(case: str, rule: str, z: float) -> None:
    sigma = allocate(rule, CASES[case], z)
    assert list(sigma) == list(CASES[case])
    assert joint(CASES[case], sigma) == pytest.approx(z, rel=1e-12)


@pytest.mark.parametrize("case", ["one", "equal", "spread", "weighted", "fixed"])
def test_minimum_energy_beats_every_other_split(case: str) -> None:
    tensors, z = CASES[case], 1.3
    least = energy(tensors, allocate("minimum_energy", tensors, z))
    for rule in ALLOCATIONS:
        assert least <= energy(tensors, allocate(rule, tensors, z)) * (1 + 1e-12)
    rng = np.random.default_rng(0)
    best = allocate("minimum_energy", tensors, z)
    moving = [n for n, t in tensors.items() if t.bound > 0]
    for spread in (3.0, 0.3, 0.01) * 200:
        sigma = {n: best[n] * math.exp(spread * rng.standard_normal()) for n in moving}
        scale = z / joint(tensors, sigma | dict.fromkeys(set(tensors) - set(moving), 0.0))
        sigma = {n: sigma.get(n, 0.0) * scale for n in tensors}
        assert joint(tensors, sigma) == pytest.approx(z)
        assert energy(tensors, sigma) >= least * (1 - 1e-12)


def test_minimum_energy_is_the_closed_form() -> None:
    tensors = CASES["spread"]
    total = sum(t.bound * math.sqrt(t.dim) for t in tensors.values())
    sigma = allocate("minimum_energy", tensors, 2.0)
    for name, t in tensors.items():
        assert sigma[name] ** 2 == pytest.approx(4 * t.bound / math.sqrt(t.dim) * total)
    assert energy(tensors, sigma) == pytest.approx(4 * total**2)


def test_other_rules_by_hand() -> None:
    tensors = {"a": Tensors(3.0, 5), "b": Tensors(4.0, 50)}
    assert allocate("global", tensors, 2.0) == pytest.approx({"a": 10.0, "b": 10.0})
    assert allocate("equal_share", tensors, 2.0) == pytest.approx({"a": 6 * math.sqrt(2), "b": 8 * math.sqrt(2)})


@pytest.mark.parametrize("rule", ALLOCATIONS)
def test_zero_sensitivity_costs_nothing(rule: str) -> None:
    sigma = allocate(rule, CASES["fixed"], 1.0)
    assert sigma["a"] == 0
    without = {n: t for n, t in CASES["fixed"].items() if n != "a"}
    assert {n: s for n, s in sigma.items() if n != "a"} == allocate(rule, without, 1.0)
    assert allocate(rule, {"a": Tensors(0.0, 9)}, 1.0) == {"a": 0.0}
    assert allocate(rule, {}, 1.0) == {}


@pytest.mark.parametrize("rule", ALLOCATIONS)
def test_no_noise_multiplier_gives_no_noise(rule: str) -> None:
    assert set(allocate(rule, CASES["spread"], 0.0).values()) == {0.0}


def test_unknown_rule_is_refused() -> None:
    with pytest.raises(ConfigError, match="minimum_energy"):
        allocate("per_layer", CASES["one"], 1.0)


def test_too_little_noise_is_refused() -> None:
    tensors = CASES["spread"]
    sigma = allocate("global", tensors, 1.0)
    check_allocation(tensors, sigma, 1.0)
    check_allocation(tensors, {n: 2 * s for n, s in sigma.items()}, 1.0)
    for changed in (
        {n: s * (1 - 1e-8) for n, s in sigma.items()},
        sigma | {"b": 0.0},
        sigma | {"b": math.nan},
    ):
        with pytest.raises(ConfigError):
            check_allocation(tensors, changed, 1.0)
    with pytest.raises(ConfigError):
        check_allocation(tensors, sigma, 1.0001)


@pytest.mark.parametrize("rule", ALLOCATIONS)
def test_unbounded_sensitivity_is_refused(rule: str) -> None:
    for bound in (math.inf, math.nan, -1.0):
        with pytest.raises(ConfigError, match="finite sensitivity for 'a'"):
            allocate(rule, {"a": Tensors(bound, 3), "b": Tensors(1.0, 3)}, 1.0)
