# SPDX-License-Identifier: Apache-2.0
"""The search stays below the bounds of random networks, reaches them where they are tight, and sees a wrong one."""

import random

import pytest
import torch
from torch import Tensor, nn

from dplip.audit.sensitivity import TOTAL, search
from dplip.bounds import InputDomain
from dplip.errors import UnboundedInputError
from dplip.layers import (
    Abs,
    AveragePool2d,
    BallClip,
    Clamp,
    Flatten,
    GroupSort,
    LinearSpline,
    LinfDistance,
    MaxMin,
    NormalizedLinear,
    ReferenceShift,
    Residual,
    Scale,
    Shapes,
    SortLinear,
)
from dplip.layers.normalized_linear import BALLS
from dplip.losses import BinaryCrossEntropy, CrossEntropy, MulticlassMargin
from dplip.norms import Norms, OperatorNorms


class Branches(nn.Module):
    """Two different layers on one input, concatenated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.left = LinfDistance(width, width // 2, init_scale=2.0)
        self.right = NormalizedLinear(width, width // 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), 1 - self.right(x)], dim=1)


class Twice(nn.Module):
    """One layer used twice, so that its gradients add up."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = LinfDistance(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x) * 0.5) - x


def affine(draw: random.Random, i: int, o: int) -> nn.Module:
    """A random layer with a weight, from width ``i`` to ``o``."""
    scale = draw.choice([0.3, 1.0, 5.0])
    choices = [
        lambda: LinfDistance(i, o, init_scale=scale),
        lambda: LinfDistance(i, o, p=draw.choice([2, 4, 32]), init_scale=scale),
        lambda: SortLinear.geometric(i, o, rho=draw.choice([0.0, 0.3, 0.7]), init_scale=scale),
        lambda: SortLinear.top_k_mean(i, o, k=3, init_scale=scale),
        lambda: NormalizedLinear(i, o, ball=draw.choice(BALLS), max_norm=draw.choice([0.7, 1.0, 2.0])),
        lambda: nn.Linear(i, o),
        lambda: ReferenceShift(LinfDistance(i, o, init_scale=scale), 0.5),
    ]
    return draw.choice(choices)()


def between(draw: random.Random, width: int) -> nn.Module:
    """A random layer that keeps the width."""
    choices = [
        lambda: LinearSpline(
            width, intervals=6, init=draw.choice(["maxmin", "relu"]), ends=draw.choice(["unit", "clamp"])
        ),
        MaxMin,
        lambda: GroupSort(0),
        Abs,
        lambda: Clamp(-1.0, 1.5),
        lambda: Scale(draw.choice([-2.0, 0.5])),
        lambda: BallClip(2.0),
        nn.Tanh,
        lambda: Residual(affine(draw, width, width), draw.choice([None, 0.5])),
        lambda: Branches(width),
        lambda: Twice(width),
    ]
    return draw.choice(choices)()


def network(seed: int) -> tuple[nn.Module, InputDomain]:
    """Depth 2 to 6; every fourth network starts from images."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    width, depth = 6, 2 + seed % 5
    layers: list[nn.Module] = []
    if seed % 4 == 3:
        domain = InputDomain((2, 4, 4), 0.0, 1.0, reference=0.5)
        layers += [LinearSpline(2, intervals=4, init="absolute_value"), AveragePool2d(3, 1), MaxMin(), Flatten()]
        layers += [affine(draw, 8, width)]
    else:
        domain = InputDomain((5,), -1.0, draw.choice([1.0, 4.0]), l2_radius=draw.choice([2.0, float("inf")]))
        layers += [affine(draw, 5, width)]
    for _ in range(depth - 2):
        layers += [between(draw, width), affine(draw, width, width)]
    return nn.Sequential(*layers, affine(draw, width, 4), Scale(3.0)), domain


@pytest.mark.parametrize("seed", range(20))
def test_search_never_exceeds_a_bound(seed: int) -> None:
    model, domain = network(seed)
    loss = [CrossEntropy(2.0), MulticlassMargin(5.0), BinaryCrossEntropy(), CrossEntropy(margin=0.5)][seed % 4]
    found = search(model, domain, loss, weights=True, restarts=24, steps=32, seed=seed)
    assert set(found) == {TOTAL, *(name for name, _ in model.named_parameters())}
    for name, (norm, bound) in found.items():
        assert norm <= bound * (1 + 1e-6), name
    assert found[TOTAL][0] > 0


@pytest.mark.parametrize(
    ("layer", "reach"),
    [
        (lambda: LinfDistance(6, 4, init_scale=15.0), 1.0),
        (lambda: LinfDistance(6, 4, p=8, init_scale=15.0), 1.0),
        (lambda: SortLinear.geometric(6, 4, rho=0.3, init_scale=15.0), 1.0),
        (lambda: SortLinear.top_k_mean(6, 4, k=2, init_scale=15.0), 1.0),
        *[(lambda ball=ball: NormalizedLinear(6, 4, ball=ball), 30.0) for ball in BALLS],
    ],
)
def test_search_reaches_tight_bounds(layer, reach: float) -> None:
    torch.manual_seed(0)
    model, domain = layer(), InputDomain((6,), -reach, reach)
    # An input far from its row along one axis: there the row of a power mean is one-hot.
    starts = model.weight.detach() + 40 * torch.eye(6)[0] if isinstance(model, LinfDistance) else None
    domain = domain if starts is None else InputDomain((6,))
    found = search(model, domain, CrossEntropy(), weights=True, inputs=starts, steps=60)
    assert found["weight"][0] >= 0.99 * found["weight"][1]
    assert all(norm <= bound * (1 + 1e-6) for norm, bound in found.values())


def test_search_leaves_the_model_alone() -> None:
    model, domain = network(1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    search(model, domain, CrossEntropy(), weights=True, restarts=4, steps=3)
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32 and torch.equal(p, before[name]) and p.grad is None


def test_search_sees_an_understated_bound() -> None:
    class Understated(LinfDistance):
        def param_sensitivity(self, x: Norms, g: Norms, shapes: Shapes) -> dict[str, float]:
            return {name: 0.95 * bound for name, bound in super().param_sensitivity(x, g, shapes).items()}

    torch.manual_seed(0)
    model = Understated(6, 4, init_scale=15.0)
    found = search(model, InputDomain((6,), -1.0, 1.0), CrossEntropy(), weights=True)
    assert found["weight"][0] > 1.01 * found["weight"][1]


def test_search_sees_a_scale_that_is_denied() -> None:
    class Denied(Scale):
        def operator_norms(self, shapes: Shapes) -> OperatorNorms:
            return Scale(1.0).operator_norms(shapes)

    model = nn.Sequential(NormalizedLinear(4, 4), Denied(1.5), NormalizedLinear(4, 3))
    found = search(model, InputDomain((4,), -9.0, 9.0), CrossEntropy(), weights=True)
    assert found["0.weight"][0] > 1.2 * found["0.weight"][1]


def test_search_needs_a_bound() -> None:
    with pytest.raises(UnboundedInputError):
        search(NormalizedLinear(3, 2), InputDomain((3,)), CrossEntropy())
