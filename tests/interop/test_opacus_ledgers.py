# SPDX-License-Identifier: Apache-2.0
"""Our epsilon inside Opacus is an upper bound, survives checkpoints, and ledgers cross over both ways."""

from __future__ import annotations

import math

import pytest
import torch
from opacus import PrivacyEngine
from opacus.accountants import PRVAccountant, RDPAccountant, create_accountant
from opacus.accountants.utils import get_noise_multiplier
from opacus.schedulers import ExponentialNoise
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accountants import Gaussian, Neighbors, PldAccountant, PoissonSampled, RdpAccountant, TruncatedPoissonSampled
from dplip.errors import CheckpointError, ConfigError, PlanError
from dplip.interop.opacus import accountant, from_opacus, prepare, to_opacus
from dplip.layers import LinfDistance

pytestmark = pytest.mark.filterwarnings(
    "ignore:Secure RNG turned off", "ignore:Full backward hook is firing", "ignore:Optimal order is the largest alpha"
)

RUNS = [(1.0, 0.01, 1000), (0.8, 256 / 60000, 4700), (20.0, 1.0, 100)]


@pytest.mark.filterwarnings("ignore:divide by zero")  # of Opacus, at q = 1
@pytest.mark.parametrize("run", RUNS)
def test_epsilon_is_our_bound_and_above_the_estimate(run):
    ours = create_accountant(accountant("pld"))
    ours.history = [run]
    z, q, steps = run
    assert ours.get_epsilon(1e-5) == PldAccountant().compose(PoissonSampled(Gaussian(z), q), steps).epsilon(1e-5)
    prv = PRVAccountant()
    prv.history = [run]
    dprv = prv._get_dprv(eps_error=0.01, delta_error=1e-8)
    lower, _, upper = dprv.compute_epsilon(1e-5, 1e-8, 0.01)
    assert lower < ours.get_epsilon(1e-5) < upper
    rdp = RDPAccountant()
    rdp.history = [run]
    assert ours.get_epsilon(1e-5) < rdp.get_epsilon(1e-5)


def test_steps_are_counted_and_merged():
    ours = create_accountant(accountant("pld"))
    for z in (1.0, 1.0, 2.0, 1.0):
        ours.step(noise_multiplier=z, sample_rate=0.1)
    assert ours.history == [(1.0, 0.1, 2), (2.0, 0.1, 1), (1.0, 0.1, 1)]
    assert len(ours) == 4
    assert len(create_accountant(accountant("pld"))) == 0
    assert create_accountant(accountant("pld")).get_epsilon(1e-5) == 0.0


@pytest.mark.parametrize(
    ("z", "q"), [(-1.0, 0.1), (math.nan, 0.1), (1.0, 0.0), (1.0, 1.5), (1.0, math.nan), ("1", 0.1)]
)
def test_steps_without_a_theorem_are_refused(z, q):
    ours = create_accountant(accountant("pld"))
    with pytest.raises(PlanError, match="sampling probability"):
        ours.step(noise_multiplier=z, sample_rate=q)
    assert ours.history == []


def test_no_noise_is_no_privacy():
    ours = create_accountant(accountant("pld"))
    ours.step(noise_multiplier=0.0, sample_rate=0.1)
    assert ours.get_epsilon(1e-5) == math.inf


@pytest.mark.parametrize("delta", [0.0, 1.0, math.nan])
def test_delta_is_checked(delta):
    ours = create_accountant(accountant("pld"))
    ours.step(noise_multiplier=1.0, sample_rate=0.1)
    with pytest.raises(PlanError, match="delta"):
        ours.get_epsilon(delta)


def test_names_are_registered_once_and_say_the_relation():
    assert accountant() == accountant("pld") == "dplip_pld"
    assert accountant("rdp") == "dplip_rdp"
    name = accountant("pld", Neighbors.REPLACE_ONE)
    assert name == accountant("pld", "replace_one") == "dplip_pld_replace_one"
    one, other = create_accountant(name), create_accountant(accountant("pld"))
    one.history = other.history = [(1.0, 0.01, 100)]
    assert one.get_epsilon(1e-5) > other.get_epsilon(1e-5)


@pytest.mark.parametrize("arguments", [("gdp",), ("prv",), ("pld", "nearly_equal")])
def test_unknown_names_are_refused(arguments):
    with pytest.raises(ConfigError):
        accountant(*arguments)


@pytest.mark.parametrize("target", [0.5, 3.0])
def test_calibration_inside_opacus_overshoots_no_target(target):
    z = get_noise_multiplier(
        target_epsilon=target, target_delta=1e-5, sample_rate=0.02, epochs=2, accountant=accountant("pld")
    )
    spent = PldAccountant().compose(PoissonSampled(Gaussian(z), 0.02), 100).epsilon(1e-5)
    assert target - 0.01 <= spent <= target


def make_private(engine: PrivacyEngine, noise: float = 1.0, **options):
    model = nn.Sequential(LinfDistance(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return engine.make_private(
        module=prepare(model, optimizer),
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(torch.randn(40, 4), torch.randint(2, (40,))), batch_size=8, **options),
        noise_multiplier=noise,
        max_grad_norm=1.0,
        loss_reduction="sum",
    )


def train(model, optimizer, loader, steps: int | None = None) -> None:
    for i, (x, y) in enumerate(loader):
        if i == steps:
            break
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
        optimizer.step()


def test_a_checkpoint_restores_the_ledger(tmp_path):
    engine = PrivacyEngine(accountant=accountant("pld"))
    model, optimizer, loader = make_private(engine)
    train(model, optimizer, loader)
    engine.save_checkpoint(path=tmp_path / "run", module=model, optimizer=optimizer)
    again = PrivacyEngine(accountant=accountant("pld"))
    model2, optimizer2, loader2 = make_private(again)
    again.load_checkpoint(path=tmp_path / "run", module=model2, optimizer=optimizer2)
    assert again.accountant.history == engine.accountant.history == [(1.0, 0.2, 5)]
    assert again.get_epsilon(1e-5) == engine.get_epsilon(1e-5) > 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), model2.parameters(), strict=True))
    train(model2, optimizer2, loader2)
    assert len(again.accountant) == 10


def test_a_run_of_opacus_continues_under_our_bound(tmp_path):
    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, loader = make_private(engine)
    train(model, optimizer, loader)
    engine.save_checkpoint(path=tmp_path / "run", module=model)
    ours = PrivacyEngine(accountant=accountant("pld"))
    model2, *_ = make_private(ours)
    ours.load_checkpoint(path=tmp_path / "run", module=model2)
    assert ours.accountant.history == [(1.0, 0.2, 5)]


@pytest.mark.parametrize(
    "history", [[(1.0, 2.0, 5)], [(-1.0, 0.1, 5)], [(1.0, 0.1, 0)], [(1.0, 0.1, 1.5)], [(1.0, 0.1)], ["abc"], None, 3]
)
def test_damaged_histories_are_refused_and_forget_nothing(history):
    ours = create_accountant(accountant("pld"))
    ours.step(noise_multiplier=1.0, sample_rate=0.1)
    with pytest.raises(CheckpointError, match="damaged"):
        ours.load_state_dict({"history": history, "mechanism": "prv"})
    assert ours.history == [(1.0, 0.1, 1)]


@pytest.mark.parametrize("state", [None, {}, {"history": []}, {"mechanism": "dplip_pld"}])
def test_states_that_lack_a_key_are_refused(state):
    with pytest.raises(ValueError):
        create_accountant(accountant("pld")).load_state_dict(state)


def test_noise_schedules_are_accounted_step_by_step():
    engine = PrivacyEngine(accountant=accountant("pld"))
    model, optimizer, loader = make_private(engine, noise=2.0)
    scheduler = ExponentialNoise(optimizer, gamma=0.5)
    for _ in range(2):
        train(model, optimizer, loader, 2)
        scheduler.step()
    assert engine.accountant.history == [(2.0, 0.2, 2), (1.0, 0.2, 2)]


def test_virtual_batches_are_one_step():
    engine = PrivacyEngine(accountant=accountant("pld"))
    model, optimizer, loader = make_private(engine)
    batches = 0
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as small:
        for x, y in small:
            batches += 1
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
            optimizer.step()
    assert batches > 5
    assert engine.accountant.history == [(1.0, 0.2, 5)]


def test_accumulated_poisson_batches_are_refused():
    engine = PrivacyEngine(accountant=accountant("pld"))
    model, optimizer, _ = make_private(engine)
    model.allow_grad_accumulation()
    before = [p.detach().clone() for p in model.parameters()]
    x, y = torch.randn(4, 4), torch.zeros(4, dtype=torch.long)
    for _ in range(2):
        nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
    with pytest.raises(PlanError, match="BatchMemoryManager"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert engine.accountant.history == []


# Both ways


def test_ledgers_cross_over_and_back():
    ours = (
        RdpAccountant().compose(PoissonSampled(Gaussian(1.5), 0.05), 30).compose(PoissonSampled(Gaussian(1.0), 0.02), 7)
    )
    theirs = to_opacus(ours, "rdp")
    assert sorted(theirs.history) == [(1.0, 0.02, 7), (1.5, 0.05, 30)]
    assert theirs.get_epsilon(1e-5) == pytest.approx(ours.epsilon(1e-5), rel=0.02)
    assert from_opacus(theirs, "rdp").epsilon(1e-5) == pytest.approx(ours.epsilon(1e-5))
    assert to_opacus(ours, accountant("pld")).get_epsilon(1e-5) < ours.epsilon(1e-5)
    assert from_opacus([(1.5, 0.05, 30)]).steps == 30


def test_full_batches_cross_over():
    theirs = to_opacus(PldAccountant().compose(Gaussian(10.0), 4), "rdp")
    assert theirs.history == [(5.0, 1.0, 1)]


@pytest.mark.parametrize(
    ("ours", "mechanism", "reason"),
    [
        (PldAccountant().compose(PoissonSampled(Gaussian(1.0), 0.1)), "gdp", "one of"),
        (PldAccountant(Neighbors.REPLACE_ONE), "prv", "only relation"),
        (PldAccountant().compose(TruncatedPoissonSampled(Gaussian(1.0), 0.1, 100, 20)), "prv", "Poisson samples"),
    ],
)
def test_what_opacus_cannot_state_is_refused(ours, mechanism, reason):
    with pytest.raises(PlanError, match=reason):
        to_opacus(ours, mechanism)
