# SPDX-License-Identifier: Apache-2.0
"""States that cross from one kind of accountant or relation to another, and the registry."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from accountants import (
    ACCOUNTANTS,
    Gaussian,
    Neighbors,
    PldAccountant,
    PoissonSampled,
    RdpAccountant,
    TruncatedPoissonSampled,
    UnsupportedEvent,
    make_accountant,
)


def test_a_ledger_loads_into_another_kind_if_supported() -> None:
    source = PldAccountant().compose(PoissonSampled(Gaussian(1.0), 0.01), 100)
    target = RdpAccountant()
    target.load_state_dict(source.state_dict())
    assert target.ledger == source.ledger
    assert target.epsilon(1e-5) >= source.epsilon(1e-5)

    source.compose(TruncatedPoissonSampled(Gaussian(1.0), 0.01, 1000, 20))
    with pytest.raises(UnsupportedEvent):
        target.load_state_dict(source.state_dict())
    assert target.steps == 100


@pytest.mark.parametrize("saved", Neighbors)
@pytest.mark.parametrize("loading", Neighbors)
def test_a_state_keeps_its_relation(saved: Neighbors, loading: Neighbors) -> None:
    state = json.loads(json.dumps(PldAccountant(saved).compose(Gaussian(2.0)).state_dict()))
    target = PldAccountant(loading)
    if saved is loading:
        target.load_state_dict(state)
        assert target.steps == 1
    else:
        with pytest.raises(ValueError, match=saved.value):
            target.load_state_dict(state)
        assert target.steps == 0


def test_registry() -> None:
    for name, kind in ACCOUNTANTS.items():
        accountant = make_accountant(name, Neighbors.REPLACE_ONE)
        assert type(accountant) is kind
        assert accountant.name == name
        assert accountant.neighbors is Neighbors.REPLACE_ONE
    with pytest.raises(ValueError, match="under-reports"):
        make_accountant("gdp")
    with pytest.raises(ValueError, match="pld"):
        make_accountant("prv")


def test_neighbors_must_be_given_as_such() -> None:
    with pytest.raises(ValueError, match="Neighbors"):
        PldAccountant("replace_one")  # type: ignore[arg-type]


def test_importing_is_light() -> None:
    code = "import sys, accountants; print([m for m in ('torch', 'dplip', 'dp_accounting') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
