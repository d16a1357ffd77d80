# SPDX-License-Identifier: Apache-2.0
"""Private training from end to end, resuming, and what is refused before anything happens."""

import copy
import json
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from accountants import Neighbors
from dplip.bounds import InputDomain
from dplip.errors import CheckpointError, ConfigError, DataError, DplipError, MixesExamplesError, NoRuleError, PlanError
from dplip.layers import LinfDistance, NormalizedLinear, Scale
from dplip.losses import CrossEntropy
from dplip.privacy import ClipFreeEngine, ClipFreeOptimizer, PrivateLoader, PublicSizeWarning
from tests.privacy.toy import CLASSES, DIM, DOMAIN, attach, data, net, plan, same, weights


def clusters(n: int = 300) -> TensorDataset:
    """Three well separated clusters in [0, 1]^2."""
    y = torch.arange(n) % 3
    centres = torch.tensor([[0.1, 0.1], [0.9, 0.1], [0.5, 0.9]])
    return TensorDataset((centres[y] + 0.05 * torch.randn(n, 2)).clamp(0, 1), y)


def small_net() -> nn.Sequential:
    return nn.Sequential(LinfDistance(2, 16, init="uniform"), LinfDistance(16, 3, init="uniform"), Scale(-1.0))


def options(**changes: Any) -> dict[str, Any]:
    """Arguments of make_private that work."""
    module = net()
    values: dict[str, Any] = {
        "module": module,
        "optimizer": SGD(module.parameters(), 0.1),
        "data_loader": DataLoader(data(), batch_size=20, shuffle=True),
        "loss": CrossEntropy(),
        "noise_multiplier": 1.0,
        "steps": 10,
        "population": 100,
        "domain": DOMAIN,
    }
    return values | changes


def run(module: nn.Module, optimizer: ClipFreeOptimizer, loader: PrivateLoader, loss: nn.Module, steps: int) -> None:
    taken = 0
    while taken < steps:
        for x, y in loader:
            if taken == steps:
                break
            optimizer.zero_grad()
            loss(module(x), y).backward()
            optimizer.step()
            taken += 1


def accuracy(module: nn.Module, dataset: TensorDataset) -> float:
    x, y = dataset.tensors
    with torch.no_grad():
        return float((module(x).argmax(1) == y).float().mean())


def test_training_with_a_noise_multiplier_learns() -> None:
    dataset, module, loss = clusters(), small_net(), CrossEntropy(8.0)
    engine = ClipFreeEngine(insecure_seed=1)
    private, optimizer, loader = engine.make_private(
        module=module,
        optimizer=Adam(module.parameters(), 0.03),
        data_loader=DataLoader(dataset, batch_size=100),
        loss=loss,
        noise_multiplier=0.3,
        epochs=20,
        population=300,
        domain=InputDomain((2,), 0.0, 1.0),
    )
    assert private is module and type(module) is nn.Sequential and module.training
    assert optimizer.plan is engine.plan is loader.plan and engine.plan is not None
    assert engine.plan.sampling_prob == pytest.approx(1 / 3) and engine.plan.steps == 60
    assert engine.get_epsilon() == 0
    with torch.no_grad():
        before = float(loss(module(dataset.tensors[0]), dataset.tensors[1]))
    for _ in range(20):
        for x, y in loader:
            optimizer.zero_grad()
            loss(module(x), y).backward()
            optimizer.step()
    with torch.no_grad():
        after = float(loss(module(dataset.tensors[0]), dataset.tensors[1]))
    assert after < 0.7 * before and accuracy(module, dataset) > 0.7
    with pytest.raises(PlanError, match="at most 60 steps"):
        optimizer.step()
    assert engine.get_epsilon() == engine.plan.epsilon()


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_training_to_an_epsilon_stays_within_it(accountant: str) -> None:
    dataset, module, loss = clusters(), small_net(), CrossEntropy(8.0)
    engine = ClipFreeEngine(accountant=accountant, insecure_seed=2)
    _, optimizer, loader = engine.make_private_with_epsilon(
        module=module,
        optimizer=Adam(module.parameters(), 0.03),
        data_loader=DataLoader(dataset, batch_size=60),
        loss=nn.CrossEntropyLoss(reduction="sum"),
        target_epsilon=4.0,
        target_delta=1e-5,
        epochs=2,
        population=300,
    )
    assert engine.plan is not None and engine.plan.target_epsilon == 4.0 and len(loader) == 5
    run(module, optimizer, loader, nn.CrossEntropyLoss(reduction="sum"), 9)
    assert engine.get_epsilon() < 4.0
    run(module, optimizer, loader, loss, 1)
    assert 3.9 < engine.get_epsilon() <= 4.0 and engine.get_epsilon() == engine.plan.epsilon()
    assert engine.get_epsilon(1e-6) > engine.get_epsilon()
    with pytest.raises(PlanError):
        run(module, optimizer, loader, loss, 1)


def test_replace_one_and_truncated_sampling() -> None:
    engine = ClipFreeEngine(neighbors=Neighbors.REPLACE_ONE)
    module, optimizer, loader = engine.make_private(**options())
    run(module, optimizer, loader, CrossEntropy(), 2)
    assert engine.get_epsilon() > plan().epsilon(2)
    engine = ClipFreeEngine(neighbors="add_or_remove_one")
    module, optimizer, loader = engine.make_private(
        **options(sampling="truncated_poisson", max_batch_size=15, allocation="global")
    )
    run(module, optimizer, loader, CrossEntropy(), 3)
    assert engine.plan is not None and engine.plan.max_batch_size == 15 and engine.plan.allocation == "global"
    assert max(len(loader.sampler.draw()) for _ in range(50)) <= 15


def test_dataset_size_becomes_public_only_with_a_warning() -> None:
    with pytest.warns(PublicSizeWarning, match="60"):
        engine = ClipFreeEngine()
        engine.make_private(**options(population=None))
    assert engine.plan is not None and engine.plan.population == 60 and engine.plan.sampling_prob == 20 / 60
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = ClipFreeEngine()
        engine.make_private(**options(population=1000))
    assert engine.plan is not None and engine.plan.sampling_prob == 0.02 and engine.plan.expected_batch_size == 20


def test_batch_size_above_population_takes_everything() -> None:
    engine = ClipFreeEngine()
    engine.make_private(**options(population=10))
    assert engine.plan is not None and engine.plan.sampling_prob == 1.0


def test_own_collate_function_is_used() -> None:
    loader = DataLoader(data(), batch_size=20, collate_fn=lambda items: {"x": torch.stack([x for x, _ in items])})
    _, _, private = ClipFreeEngine().make_private(**options(data_loader=loader))
    assert set(next(iter(private))) == {"x"}


def test_default_domain_is_any_input_of_the_first_shape() -> None:
    engine = ClipFreeEngine()
    module, optimizer, _ = engine.make_private(**options(domain=None))
    module(1e6 * torch.randn(3, DIM))
    assert optimizer.guard.domain == InputDomain((DIM,))
    with pytest.raises(DataError):
        module(torch.full((1, DIM), math.nan))

    class Named(Dataset[Any]):
        def __len__(self) -> int:
            return 9

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"x": torch.zeros(DIM)}

    with pytest.raises(PlanError, match="domain="):
        ClipFreeEngine().make_private(**options(domain=None, data_loader=DataLoader(Named(), 20)))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([])


def normalised() -> nn.Module:
    return nn.Sequential(NormalizedLinear(DIM, 4), nn.BatchNorm1d(4), LinfDistance(4, CLASSES))


REFUSED: list[tuple[dict[str, Any], type[DplipError]]] = [
    ({"delta": 1.0}, PlanError),
    ({"delta": 0.0}, PlanError),
    ({"delta": 17}, PlanError),
    ({"noise_multiplier": -1.0}, PlanError),
    ({"noise_multiplier": math.nan}, PlanError),
    ({"population": 0}, PlanError),
    ({"population": -10}, PlanError),
    ({"population": 99.5}, PlanError),
    ({"steps": 0}, PlanError),
    ({"steps": None}, PlanError),
    ({"epochs": 3}, PlanError),
    ({"steps": None, "epochs": 0}, PlanError),
    ({"steps": None, "epochs": 1.5}, PlanError),
    ({"allocation": "none"}, PlanError),
    ({"sampling": "truncated_poisson"}, PlanError),
    ({"sampling": "truncated_poisson", "max_batch_size": 5, "population": 30}, PlanError),
    ({"loss": nn.CrossEntropyLoss()}, PlanError),
    ({"loss": nn.MSELoss(reduction="sum")}, PlanError),
    ({"data_loader": [1, 2, 3]}, PlanError),
    ({"data_loader": DataLoader(data(), batch_size=None)}, PlanError),
    ({"data_loader": DataLoader(Stream(), batch_size=4)}, PlanError),
    ({"data_loader": DataLoader(TensorDataset(torch.zeros(0, DIM), torch.zeros(0)), batch_size=4)}, DataError),
    ({"optimizer": SGD([nn.Parameter(torch.zeros(1))], 0.1)}, PlanError),
    ({"domain": InputDomain((DIM + 1,), 0.0, 1.0)}, NoRuleError),
]


@pytest.mark.parametrize(("changes", "kind"), REFUSED, ids=lambda v: str(v)[:50])
def test_refusals_come_before_any_change(changes: dict[str, Any], kind: type[DplipError]) -> None:
    arguments = options(**changes)
    module = arguments["module"]
    module.eval()
    before, engine = weights(module), ClipFreeEngine()
    with pytest.raises(kind) as error:
        engine.make_private(**arguments)
    assert "\n" not in str(error.value)
    assert same(before, weights(module)) and not module.training
    assert not module._forward_pre_hooks and not module._forward_hooks
    assert engine.plan is None and engine.optimizer is None and not engine.accountant.ledger
    good = options(module=module, optimizer=SGD(module.parameters(), 0.1))
    engine.make_private(**good)


def test_model_that_mixes_examples_is_refused_unchanged() -> None:
    module = normalised()
    with torch.no_grad():
        module[0].weight.mul_(5)  # outside its ball: a projection would show
    module[1].eval()
    before, buffers = weights(module), copy.deepcopy(dict(module.named_buffers()))
    with pytest.raises(MixesExamplesError, match="BatchNorm1d"):
        ClipFreeEngine().make_private(**options(module=module, optimizer=SGD(module.parameters(), 0.1)))
    assert same(before, weights(module)) and module.training and not module[1].training
    assert all(torch.equal(b, buffers[n]) for n, b in module.named_buffers())


def test_unknown_accountant_or_relation_is_refused() -> None:
    for arguments in ({"accountant": "gdp"}, {"accountant": "x"}, {"neighbors": "x"}, {"neighbors": 1}):
        with pytest.raises(PlanError, match="engine"):
            ClipFreeEngine(**arguments)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="theorem"):
        ClipFreeEngine(accountant="rdp", neighbors="replace_one").make_private(**options())


def test_calls_in_the_wrong_order_are_refused() -> None:
    engine = ClipFreeEngine()
    for call in (engine.get_epsilon, engine.state_dict, lambda: engine.load_state_dict({})):
        with pytest.raises(PlanError, match="make_private"):
            call()
    engine.make_private(**options())
    with pytest.raises(PlanError, match="one module per engine"):
        engine.make_private(**options())
    for delta in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(PlanError, match="delta"):
            engine.get_epsilon(delta)


def test_plan_of_another_engine_is_refused() -> None:
    module = net()
    with pytest.raises(PlanError, match="rdp"):
        ClipFreeEngine().attach(module, SGD(module.parameters(), 0.1), data(), CrossEntropy(), plan(accountant="rdp"))


def test_no_noise_is_no_privacy() -> None:
    engine, optimizer = attach(net(), noise_multiplier=0.0)
    assert engine.get_epsilon() == 0
    optimizer.step()
    assert engine.get_epsilon() == math.inf and not engine.accountant.ledger


def test_layers_start_inside_their_sets() -> None:
    module = nn.Sequential(NormalizedLinear(DIM, CLASSES))
    with torch.no_grad():
        module[0].weight.mul_(100)
    attach(module)
    assert float(torch.linalg.matrix_norm(module[0].weight, 2).detach()) <= 1 + 1e-5


def half_way(steps: int = 4, **changes: Any) -> tuple[nn.Module, ClipFreeEngine, dict[str, Any]]:
    module = net()
    engine, optimizer = attach(module, **changes)
    for _ in range(steps):
        optimizer.step()
    return module, engine, json.loads(json.dumps(engine.state_dict()))


def resumed(state: dict[str, Any], **changes: Any) -> tuple[ClipFreeEngine, ClipFreeOptimizer]:
    engine, optimizer = attach(net(), **changes)
    engine.load_state_dict(state)
    return engine, optimizer


@pytest.mark.parametrize("steps", [0, 1, 4, 10])
def test_resumed_run_continues_the_ledger(steps: int) -> None:
    _, first, state = half_way(steps)
    engine, optimizer = resumed(state)
    assert optimizer.steps_taken == steps and engine.accountant.ledger == first.accountant.ledger
    assert engine.get_epsilon() == first.get_epsilon() == plan().epsilon(steps)
    for _ in range(10 - steps):
        optimizer.step()
    assert engine.get_epsilon() == plan().epsilon()
    with pytest.raises(PlanError, match="at most 10 steps"):
        optimizer.step()


def test_run_without_noise_resumes() -> None:
    _, _, state = half_way(3, noise_multiplier=0.0)
    engine, optimizer = resumed(state, noise_multiplier=0.0)
    assert optimizer.steps_taken == 3 and engine.get_epsilon() == math.inf


@pytest.mark.parametrize(
    "changes",
    [{"steps": 11}, {"noise_multiplier": 1.01}, {"delta": 1e-6}, {"population": 101}, {"allocation": "global"}],
)
def test_changed_plan_is_refused(changes: dict[str, Any]) -> None:
    _, _, state = half_way()
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        resumed(state, **changes)


def damaged(state: dict[str, Any]) -> dict[str, Any]:
    ledger = state["accountant"]
    entry = ledger["ledger"][0]
    weaker = {"kind": "poisson_sampled", "event": {"kind": "gaussian", "noise_multiplier": 99.0}, "sampling_prob": 0.2}
    return {
        "nothing": {},
        "none": None,
        "list": [],
        "no ledger": {k: v for k, v in state.items() if k != "accountant"},
        "no steps": {k: v for k, v in state.items() if k != "steps_taken"},
        "fewer steps": state | {"steps_taken": 3},
        "negative steps": state | {"steps_taken": -1},
        "true": state | {"steps_taken": True},
        "text steps": state | {"steps_taken": "4"},
        "fraction": state | {"steps_taken": 4.0},
        "plan is text": state | {"plan": "plan"},
        "plan lacks a key": state | {"plan": {k: v for k, v in state["plan"].items() if k != "delta"}},
        "ledger is text": state | {"accountant": "ledger"},
        "ledger is empty": state | {"accountant": ledger | {"ledger": [], "steps": 0}},
        "ledger forgets": state | {"accountant": ledger | {"ledger": [entry | {"count": 2}], "steps": 2}},
        "ledger disagrees": state | {"accountant": ledger | {"steps": 3}},
        "other relation": state | {"accountant": ledger | {"neighbors": "replace_one"}},
        "weaker event": state | {"accountant": ledger | {"ledger": [entry | {"event": weaker}]}},
        "broken event": state | {"accountant": ledger | {"ledger": [entry | {"event": {"kind": "x"}}]}},
        "beyond the plan": state
        | {"steps_taken": 40, "accountant": ledger | {"ledger": [entry | {"count": 40}], "steps": 40}},
    }


DAMAGES = tuple(damaged({"plan": {}, "accountant": {"ledger": [{}]}, "steps_taken": 4}))


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_state_is_refused_and_changes_nothing(kind: str) -> None:
    _, _, state = half_way()
    engine, optimizer = attach(net())
    with pytest.raises(CheckpointError) as error:
        engine.load_state_dict(damaged(state)[kind])
    assert "\n" not in str(error.value)
    assert optimizer.steps_taken == 0 and engine.accountant.ledger == () and engine.get_epsilon() == 0
    engine.load_state_dict(state)
    assert optimizer.steps_taken == 4


def test_steps_taken_cannot_be_forgotten() -> None:
    _, engine, state = half_way(4)
    assert engine.optimizer is not None
    engine.optimizer.step()
    with pytest.raises(CheckpointError, match="forgotten"):
        engine.load_state_dict(state)
    assert engine.accountant.steps == 5 == engine.optimizer.steps_taken


@pytest.mark.parametrize("seed", [None, 7])
def test_resumed_run_reuses_no_noise_and_no_batches(seed: int | None) -> None:
    noise, batches = [], []

    def take(module: nn.Module, engine: ClipFreeEngine, steps: int) -> None:
        assert engine.optimizer is not None and engine.loader is not None
        for _ in range(steps):
            engine.optimizer.zero_grad()
            engine.optimizer.step()
            noise.extend(float(v) for p in module.parameters() for v in p.grad.flatten())
            batches.append(tuple(engine.loader.sampler.draw().tolist()))

    module = net()
    engine, _ = attach(module, seed=seed)
    take(module, engine, 1)
    early = engine.state_dict()
    take(module, engine, 3)
    late = engine.state_dict()
    for state in (early, late):
        module = net()
        engine, _ = attach(module, seed=seed)
        engine.load_state_dict(state)
        take(module, engine, 4)
    assert len(set(noise)) == len(noise) and len(set(batches)) == len(batches)


def test_fixed_seed_makes_a_run_repeatable_and_none_does_not() -> None:
    def final(seed: int | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = net()
        engine, optimizer = attach(module, seed=seed)
        assert engine.loader is not None
        run(module, optimizer, engine.loader, CrossEntropy(), 6)
        return weights(module)

    assert same(final(3), final(3)) and not same(final(3), final(4)) and not same(final(None), final(None))


def test_empty_batches_are_steps_too() -> None:
    engine = ClipFreeEngine(insecure_seed=1)
    arguments = options(population=100_000, steps=20)
    module, optimizer, loader = engine.make_private(**arguments)
    sizes = []
    for (x, y), _ in zip(loader, range(20), strict=False):
        sizes.append(len(x))
        before = weights(module)
        optimizer.zero_grad()
        CrossEntropy()(module(x), y).backward()
        optimizer.step()
        assert not same(before, weights(module))
    assert sizes.count(0) >= 15 and engine.accountant.steps == 20


def test_configuration_errors_of_the_domain_are_named() -> None:
    with pytest.raises(ConfigError):
        ClipFreeEngine().make_private(**options(domain=InputDomain((DIM,), 1.0, 0.0)))
