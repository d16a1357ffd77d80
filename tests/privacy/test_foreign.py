# SPDX-License-Identifier: Apache-2.0
"""A model that is only partly Lipschitz: foreign parts are clipped per example, the rest is proved, jointly."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, TensorDataset

from dplip.bounds import InputDomain, lipschitz
from dplip.errors import ConfigError, DplipError, MixesExamplesError, NoRuleError, PlanError, UnboundedInputError
from dplip.layers import BallClip, LinfDistance, NormalizedLinear, PositionBias, Scale
from dplip.losses import CrossEntropy, MulticlassMargin
from dplip.multiplicity import AugmentationMultiplicity, augmented
from dplip.privacy import ClipFreeEngine, ForeignModule, StepSensitivity, clip_foreign, unclip_foreign, virtual_batches
from dplip.privacy.allocation import ALLOCATIONS, Tensors, allocate, check_allocation, joint
from dplip.report import privacy_section
from tests.privacy.toy import CLASSES, DIM, DOMAIN, attach, data, plan, same, weights

LOSS = CrossEntropy()


def features() -> nn.Sequential:
    """Nothing here but the last activation has a useful bound."""
    return nn.Sequential(nn.Linear(DIM, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 6), nn.Tanh())


def hybrid(clip: float = 0.5, scale: float = 1.0, radius: float = 1.0) -> nn.Sequential:
    module = nn.Sequential(features(), BallClip(radius), NormalizedLinear(6, CLASSES)).double()
    with torch.no_grad():
        for p in module[0].parameters():
            p.mul_(scale)
    clip_foreign(module, {"0": clip})
    return module


def sensitivity(module: nn.Module, domain: InputDomain = DOMAIN, loss: Any = LOSS) -> StepSensitivity:
    return StepSensitivity(module.train(), domain, loss)


def gradient(module: nn.Module, x: Tensor, y: Tensor, loss: nn.Module = LOSS) -> dict[str, Tensor]:
    module.zero_grad()
    loss(module(x), y).backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def batch(n: int) -> tuple[Tensor, Tensor]:
    return torch.rand(n, DIM, dtype=torch.float64), torch.arange(n) % CLASSES


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("clip", [1e-3, 0.5, 1e6])
def test_gradients_are_those_of_a_loop_that_clips_each_example(clip: float, chunk: int) -> None:
    torch.manual_seed(0)
    module = hybrid(clip)
    module[0].chunk_size = chunk
    plain = copy.deepcopy(module)
    unclip_foreign(plain, ["0"])
    x, y = batch(7)
    got = gradient(module, x, y)
    torch.testing.assert_close(module(x), plain(x))
    want = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
    clipped = 0
    for i in range(len(x)):
        single = gradient(plain, x[i : i + 1], y[i : i + 1])
        norm = math.sqrt(sum(float(g.square().sum()) for n, g in single.items() if n.startswith("0.")))
        clipped += norm > clip
        for n, g in single.items():
            want[n] += g * min(1.0, clip / norm) if n.startswith("0.") else g
    assert clipped == {1e-3: 7, 0.5: clipped, 1e6: 0}[clip]
    for n, g in want.items():
        torch.testing.assert_close(got[n.replace("0.", "0.module.", 1) if n.startswith("0.") else n], g)


@pytest.mark.filterwarnings("ignore")
def test_gradients_are_those_of_opacus_clipped() -> None:
    """Per-example gradients by another library's hooks, flat clipping over the foreign part."""
    grad_sample = pytest.importorskip("opacus.grad_sample")
    from dplip.interop.opacus import prepare

    torch.manual_seed(5)
    module = Net().train()
    hooked = grad_sample.GradSampleModule(prepare(copy.deepcopy(module)), strict=False, loss_reduction="sum")
    x, y = torch.rand(9, 1, 6, 6), torch.arange(9) % 2
    nn.functional.cross_entropy(hooked(x), y, reduction="sum").backward()
    parts = {n: p.grad_sample for n, p in hooked._module.features.named_parameters()}
    norms = sum(g.flatten(1).square().sum(1) for g in parts.values()).sqrt()
    bound = float(norms.median())
    assert (norms > bound).any() and (norms < bound).any()
    clip_foreign(module, {"features": bound})
    got = gradient(module, x, y)
    for n, g in parts.items():
        want = (g * (bound / norms.clamp_min(bound)).view(-1, *[1] * (g.ndim - 1))).sum(0)
        torch.testing.assert_close(got[f"features.module.{n}"], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [0.01, 1.0, 1e3])
def test_one_example_moves_the_sum_by_no_more_than_the_joint_bound(scale: float) -> None:
    """Weights and inputs at every scale; the example is added to and taken from a batch."""
    torch.manual_seed(1)
    module = hybrid(0.3, scale)
    found = sensitivity(module, InputDomain((DIM,)))
    bounds = found.tensors()
    total = found.total(bounds)
    head = [t.bound for n, t in bounds.items() if not n.startswith("0.")]
    assert total == pytest.approx(math.hypot(0.3, *head), rel=1e-6)
    worst = 0.0
    for size in (1e-3, 1.0, 1e3, 1e9):
        x, y = size * torch.randn(6, DIM, dtype=torch.float64), torch.randint(CLASSES, (6,))
        whole, less = gradient(module, x, y), gradient(module, x[1:], y[1:])
        moved = {n: float((whole[n] - less[n]).norm()) for n in whole}
        assert all(moved[n] <= bounds[n].bound * (1 + 1e-9) for n in moved)
        assert math.hypot(*(m for n, m in moved.items() if n.startswith("0."))) <= 0.3 * (1 + 1e-9)
        worst = max(worst, math.hypot(*moved.values()) / total)
    assert worst <= 1 + 1e-9 and (scale < 1 or worst > 0.3)


def test_released_noise_is_that_of_one_mechanism() -> None:
    """z^2 sum over tensors of ||move||^2 / sigma^2 <= 1 for the worst joint move, under every allocation."""
    for rule in ALLOCATIONS:
        module = hybrid(0.5)
        _, optimizer = attach(module, allocation=rule, noise_multiplier=2.0)
        bounds = optimizer.tensors()
        foreign = {sigma for n, (_, sigma) in bounds.items() if n.startswith("0.")}
        assert len(foreign) == 1  # one group, one noise
        spent = (0.5 * (1 + optimizer.sensitivity.numerical_slack) / foreign.pop()) ** 2
        spent += sum((t.bound / sigma) ** 2 for n, (t, sigma) in bounds.items() if not n.startswith("0."))
        assert 4.0 * spent == pytest.approx(1.0)


def test_groups_are_one_tensor_to_every_rule() -> None:
    tensors = {"a": Tensors(1.0, 3, 1.0, "g"), "b": Tensors(1.0, 5, 0.5, "g"), "c": Tensors(2.0, 4)}
    assert joint(tensors) == {"g": Tensors(1.0, 8, 5.5 / 8, "g"), "c": Tensors(2.0, 4)}
    for rule in ALLOCATIONS:
        sigma = allocate(rule, tensors, 1.5)
        alone = allocate(rule, {"g": Tensors(1.0, 8, 5.5 / 8), "c": Tensors(2.0, 4)}, 1.5)
        assert sigma == {"a": alone["g"], "b": alone["g"], "c": alone["c"]}
        with pytest.raises(ConfigError):
            check_allocation(tensors, sigma | {"b": sigma["b"] / 2}, 1.5)
    with pytest.raises(ConfigError):
        allocate("global", {"a": Tensors(1.0, 3, 1.0, "g"), "b": Tensors(math.nan, 3, 1.0, "g")}, 1.0)


class Beside(nn.Module):
    """A foreign branch beside a proved one."""

    def __init__(self) -> None:
        super().__init__()
        self.proved, self.foreign = NormalizedLinear(DIM, CLASSES), ForeignModule(nn.Linear(DIM, CLASSES), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.proved(x) + self.foreign(x)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.foreign = ForeignModule(nn.Linear(DIM, DIM), 0.5)
        self.head = nn.Sequential(BallClip(1.0), NormalizedLinear(DIM, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.foreign(self.foreign(x)))


def foreign(dim_in: int, dim_out: int, clip: float = 0.5) -> ForeignModule:
    return ForeignModule(nn.Sequential(nn.Linear(dim_in, dim_out), nn.SiLU()), clip)


ACCEPTED: dict[str, Callable[[], nn.Module]] = {
    "extractor, ball, head": lambda: nn.Sequential(foreign(DIM, 4), BallClip(1.0), NormalizedLinear(4, CLASSES)),
    "extractor, distance head": lambda: nn.Sequential(foreign(DIM, 4), LinfDistance(4, CLASSES, p=math.inf)),
    "extractor, sigmoid, head": lambda: nn.Sequential(foreign(DIM, 4), nn.Sigmoid(), NormalizedLinear(4, CLASSES)),
    "foreign all through": lambda: nn.Sequential(foreign(DIM, 4), foreign(4, CLASSES, 0.7)),
    "foreign head, nothing below": lambda: nn.Sequential(BallClip(1.0), foreign(DIM, CLASSES)),
    "branches": Beside,
    "twice": Twice,
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_topologies_hold_their_bounds(name: str) -> None:
    torch.manual_seed(2)
    module = ACCEPTED[name]().double()
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, ForeignModule):
                for p in m.parameters():
                    p.mul_(20)
    found = sensitivity(module)
    bounds, loss = found.tensors(), MulticlassMargin(50.0)  # full gradients at every example
    for _ in range(20):
        x, y = batch(1)
        moved = {n: float(g.norm()) for n, g in gradient(module, x, y, loss).items()}
        assert all(m <= bounds[n].bound * (1 + 1e-9) for n, m in moved.items())
        assert math.hypot(*moved.values()) <= found.total(bounds) * (1 + 1e-9)
    if name == "twice":
        assert bounds["foreign.module.weight"].bound == pytest.approx(1.0, rel=1e-6)


REFUSED: dict[str, tuple[Callable[[], nn.Module], type[DplipError], str]] = {
    "parameters below": (
        lambda: nn.Sequential(NormalizedLinear(DIM, 4), foreign(4, 4), BallClip(1.0), NormalizedLinear(4, CLASSES)),
        UnboundedInputError,
        "node '_0'",
    ),
    "bias below": (
        lambda: nn.Sequential(PositionBias(DIM), foreign(DIM, CLASSES)),
        UnboundedInputError,
        r"0\.bias",
    ),
    "unbounded features": (
        lambda: nn.Sequential(foreign(DIM, 4), NormalizedLinear(4, CLASSES)),
        UnboundedInputError,
        r"1\.weight",
    ),
    "dropout": (
        lambda: nn.Sequential(ForeignModule(nn.Sequential(nn.Linear(DIM, 4), nn.Dropout()), 1.0), BallClip(1.0)),
        NoRuleError,
        "vmap",
    ),
    "batch norm": (
        lambda: nn.Sequential(ForeignModule(nn.Sequential(nn.Linear(DIM, 4), nn.BatchNorm1d(4)), 1.0), BallClip(1.0)),
        MixesExamplesError,
        r"node '0' \(ForeignModule\) mixes examples",
    ),
    "frozen batch norm": (
        lambda: nn.Sequential(ForeignModule(nn.Sequential(nn.Linear(DIM, 4), nn.BatchNorm1d(4).eval()), 1.0)),
        MixesExamplesError,
        r"node '0' \(ForeignModule\) mixes examples",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_topologies_are_refused_by_name(name: str) -> None:
    make, kind, match = REFUSED[name]
    with pytest.raises(kind, match=match) as error:
        sensitivity(make())
    assert "\n" not in str(error.value)


class Centred(nn.Module):
    """Mixes examples without a module that is known for it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y - y.mean(0)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.mean.lerp_(y.mean(0).detach(), 0.1)
        return y - self.mean


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else -self.linear(x)


@pytest.mark.parametrize("kind", [Centred, Counting, Branching])
def test_modules_that_do_not_treat_examples_by_themselves_are_refused(kind: type[nn.Module]) -> None:
    with pytest.raises((MixesExamplesError, NoRuleError)):
        sensitivity(nn.Sequential(ForeignModule(kind(), 1.0), BallClip(1.0), NormalizedLinear(4, CLASSES)))


def test_an_example_whose_gradient_is_not_finite_contributes_nothing() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(DIM, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).abs().sqrt()  # infinite slope at 0

    module = nn.Sequential(ForeignModule(Root(), 0.5), BallClip(1.0), NormalizedLinear(4, CLASSES)).double()
    x, y = batch(5)
    x[2] = 0.0
    got = gradient(module, x, y)
    kept = torch.tensor([0, 1, 3, 4])
    want = gradient(module, x[kept], y[kept])
    torch.testing.assert_close(got["0.module.linear.weight"], want["0.module.linear.weight"])


def test_empty_batches_and_parts() -> None:
    module = hybrid()
    engine = ClipFreeEngine(insecure_seed=1)
    dataset = data()
    dataset.tensors = (dataset.tensors[0].double(), dataset.tensors[1])
    _, optimizer, loader = engine.attach(module, SGD(module.parameters(), 0.1), dataset, LOSS, plan(), DOMAIN)
    x, y = batch(0)
    assert all(not g.any() for g in gradient(module, x, y).values())
    with virtual_batches(loader, optimizer, 3) as batches:
        for x, y in batches:
            optimizer.zero_grad()
            LOSS(module(x), y).backward()
            optimizer.step()
    assert engine.accountant.steps == 5


def test_frozen_parts_of_a_foreign_module_are_left_out_of_the_norm() -> None:
    torch.manual_seed(3)
    module = hybrid(1e-2)
    module[0].module[0].requires_grad_(False)
    found = sensitivity(module)
    assert not any(n.startswith("0.module.0") for n in found.tensors())
    x, y = batch(1)
    got = gradient(module, x, y)
    clipped = math.hypot(*(float(g.norm()) for n, g in got.items() if n.startswith("0.")))
    assert clipped == pytest.approx(1e-2) and "0.module.0.weight" not in got


def test_every_copy_of_an_example_is_clipped_to_the_bound() -> None:
    """K copies are K rows, each within C: the bound must be K C."""
    torch.manual_seed(4)
    module, loss = hybrid(1e-3), AugmentationMultiplicity(MulticlassMargin(50.0), 3)
    found = sensitivity(module, loss=loss)
    bounds = found.tensors()
    assert bounds["0.module.0.weight"].bound == pytest.approx(3e-3, rel=1e-6)
    x, y = batch(1)
    got = gradient(module, augmented(x, 3, lambda t: t + 0.01 * torch.rand_like(t)), y, loss)
    moved = math.hypot(*(float(g.norm()) for n, g in got.items() if n.startswith("0.")))
    assert 2e-3 < moved <= 3e-3 * (1 + 1e-9)


def test_tied_weights_are_refused() -> None:
    module = nn.Sequential(ForeignModule(nn.Linear(DIM, DIM), 0.5), BallClip(1.0), nn.Linear(DIM, DIM))
    module[2].weight = module[0].module.weight
    with pytest.raises(PlanError, match="several places"):
        sensitivity(module)


def test_names_are_checked() -> None:
    module = nn.Sequential(features(), BallClip(1.0))
    for names in ({"": 1.0}, {"9": 1.0}, {"0": 1.0, "0.0": 1.0}, {"0": 0.0}, {"0": math.inf}):
        with pytest.raises(ConfigError):
            clip_foreign(copy.deepcopy(module), names)
    wrapped = clip_foreign(module, {"0": 1.0})
    for names in ({"0": 1.0}, {"0.module.0": 1.0}):
        with pytest.raises(ConfigError):
            clip_foreign(wrapped, names)
    assert isinstance(unclip_foreign(wrapped, ["0"])[0], nn.Sequential)


class Net(nn.Module):
    """A small convolutional extractor and a Lipschitz head."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.bounded, self.head = BallClip(2.0), NormalizedLinear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.bounded(self.features(x)))
        return out


def images(n: int = 200) -> TensorDataset:
    """Bright upper or bright lower half."""
    y = torch.arange(n) % 2
    x = 0.2 * torch.rand(n, 1, 6, 6)
    x[y == 0, :, :3] += 0.8
    x[y == 1, :, 3:] += 0.8
    return TensorDataset(x, y)


def test_a_convolutional_extractor_trains_privately_and_is_reported() -> None:
    torch.manual_seed(0)
    dataset, module = images(), Net()
    engine = ClipFreeEngine(insecure_seed=3)
    inner = Adam(module.parameters(), 0.02)
    _, optimizer, loader = engine.make_private_with_epsilon(
        module=module,
        optimizer=inner,
        data_loader=DataLoader(dataset, batch_size=100),
        loss=LOSS,
        target_epsilon=8.0,
        target_delta=1e-5,
        epochs=30,
        population=200,
        foreign={"features": 1.0},
    )
    assert isinstance(module.features, ForeignModule) and type(module) is Net
    for _ in range(30):
        for x, y in loader:
            optimizer.zero_grad()
            LOSS(module(x), y).backward()
            optimizer.step()
    x, y = dataset.tensors
    with torch.no_grad():
        assert float((module(x).argmax(1) == y).float().mean()) > 0.9
    assert engine.get_epsilon() <= 8.0
    section = privacy_section(engine, LOSS)
    assert section["foreign_clipping"] == {"features": 1.0}
    bounds = section["sensitivity"]["tensors"]
    head = math.hypot(*(t["bound"] for n, t in bounds.items() if n.startswith("head")))
    assert section["sensitivity"]["total"] == pytest.approx(math.hypot(1.001, head), rel=1e-3)


def test_a_refusal_leaves_the_module_as_it_came() -> None:
    module = nn.Sequential(NormalizedLinear(DIM, 4), features()[3:], nn.Linear(6, CLASSES))
    module[1][0] = nn.Linear(4, 6)
    before, names = weights(module), [n for n, _ in module.named_modules()]
    with pytest.raises(UnboundedInputError):
        ClipFreeEngine().make_private(
            module=module,
            optimizer=SGD(module.parameters(), 0.1),
            data_loader=DataLoader(data(), batch_size=20),
            loss=LOSS,
            noise_multiplier=1.0,
            steps=5,
            population=100,
            domain=DOMAIN,
            foreign={"1": 1.0},
        )
    assert same(before, weights(module)) and names == [n for n, _ in module.named_modules()]


def test_a_foreign_part_has_no_certificate() -> None:
    module = ForeignModule(nn.Linear(DIM, CLASSES), 1.0)
    assert "no Lipschitz bound" in (module.refuses_certificate() or "")
    graph = sensitivity(nn.Sequential(module, Scale(1.0))).graph
    values = graph.evaluate(torch.zeros(1, DIM))
    assert lipschitz(graph, values).linf == math.inf == lipschitz(graph, values).l2


@pytest.mark.parametrize(("clip", "chunk"), [(0.0, 1), (-1.0, 1), (math.nan, 1), (math.inf, 1), (1.0, 0)])
def test_arguments_are_checked(clip: float, chunk: int) -> None:
    with pytest.raises(ConfigError, match="ForeignModule"):
        ForeignModule(nn.Linear(2, 2), clip, chunk)
