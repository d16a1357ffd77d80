# SPDX-License-Identifier: Apache-2.0
"""The search stays below the bounds of random convolutional networks, and reaches the factors of weight sharing."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dplip.audit.sensitivity import TOTAL, search
from dplip.bounds import InputDomain
from dplip.layers import (
    Abs,
    AveragePool2d,
    Flatten,
    L2Pool2d,
    LinearSpline,
    LinfDistance,
    LinfDistanceConv2d,
    MaxMin,
    MaxPool2d,
    NormalizedConv2d,
    NormalizedLinear,
    ReferenceShift,
    Residual,
    Scale,
    Shapes,
    SortConv2d,
)
from dplip.layers.normalized_conv2d import CONV_BALLS
from dplip.losses import CrossEntropy, MulticlassMargin
from dplip.norms import Norms


def convolution(draw: random.Random, i: int, o: int) -> nn.Module:
    scale, groups = draw.choice([0.3, 1.0, 3.0]), draw.choice([1, 2])
    shape = {"stride": draw.choice([1, 1, 2]), "padding": draw.choice([0, 1])}
    k = draw.choice([2, 3, (3, 2)])
    choices: list[Callable[[], nn.Module]] = [
        lambda: LinfDistanceConv2d(i, o, k, groups=groups, init_scale=scale, **shape),
        lambda: LinfDistanceConv2d(i, o, k, p=draw.choice([2, 8]), init_scale=scale, **shape),
        lambda: SortConv2d.geometric(i, o, k, rho=draw.choice([0.3, 0.7]), groups=groups, init_scale=scale, **shape),
        lambda: SortConv2d.top_k_mean(i, o, k, k=3, init_scale=scale, **shape),
        lambda: NormalizedConv2d(i, o, k, ball=draw.choice(CONV_BALLS), groups=groups, **shape),
        lambda: NormalizedConv2d(i, o, k, projection="aol", max_norm=1.5, **shape),
        lambda: NormalizedConv2d(i, o, k, orthogonalize=5, **shape),
        lambda: nn.Conv2d(i, o, k, groups=groups, **shape),
        lambda: ReferenceShift(LinfDistanceConv2d(i, o, k, **shape), 0.5),
    ]
    return draw.choice(choices)()


def between(draw: random.Random, channels: int) -> nn.Module:
    choices: list[Callable[[], nn.Module]] = [
        lambda: MaxPool2d(2, 1),
        lambda: L2Pool2d(2, 1, eps=draw.choice([0.0, 0.1])),
        lambda: AveragePool2d(2, 1),
        lambda: nn.MaxPool2d(3, stride=2, padding=1),
        lambda: LinearSpline(channels, intervals=4, init="maxmin"),
        MaxMin,
        Abs,
        lambda: Residual(NormalizedConv2d(channels, channels, 3, padding=1, bias=False)),
        lambda: Residual(LinfDistanceConv2d(channels, channels, 3, padding=1), 0.5),
    ]
    return draw.choice(choices)()


def network(seed: int) -> tuple[nn.Module, InputDomain]:
    """One or two convolutions, whatever fits between them, and a dense head."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    shape = (2, 6, 5)
    layers: list[nn.Module] = [convolution(draw, 2, 4), between(draw, 4)]
    if seed % 2:
        layers += [convolution(draw, 4, 4), between(draw, 4)]
    body = nn.Sequential(*layers, Flatten())
    try:
        width = body(torch.zeros(1, *shape)).shape[1]
    except (RuntimeError, ValueError):  # the second window no longer fits
        body = nn.Sequential(*layers[:2], Flatten())
        width = body(torch.zeros(1, *shape)).shape[1]
    head = LinfDistance(width, 3) if seed % 3 else NormalizedLinear(width, 3)
    domain = InputDomain(shape, 0.0, draw.choice([1.0, 4.0]), reference=0.5, l2_radius=draw.choice([2.0, float("inf")]))
    return nn.Sequential(*body, head, Scale(2.0)), domain


@pytest.mark.parametrize("seed", range(24))
def test_search_never_exceeds_a_bound(seed: int) -> None:
    model, domain = network(seed)
    loss = [CrossEntropy(2.0), MulticlassMargin(5.0), CrossEntropy()][seed % 3]
    found = search(model, domain, loss, weights=True, restarts=12, steps=16, seed=seed)
    assert set(found) == {TOTAL, *(name for name, _ in model.named_parameters())}
    for name, (norm, bound) in found.items():
        assert norm <= bound * (1 + 1e-6), name
    assert found[TOTAL][0] > 0


class Sum(nn.Module):
    """All positions of each filter as one logit: every cotangent of a filter is the same."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.pool = AveragePool2d(positions)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.flatten(self.pool(x), 1)


@pytest.mark.parametrize(
    ("layer", "share"),
    [
        (lambda: LinfDistanceConv2d(1, 3, 2, init="uniform", init_scale=-9.0), 0.999),
        (lambda: SortConv2d.top_k_mean(1, 3, 2, k=4, init="uniform", init_scale=-9.0), 0.999),
        (lambda: NormalizedConv2d(1, 3, 2), 0.8),
    ],
)
def test_constant_images_attain_the_sharing_factor(layer: Callable[[], nn.Module], share: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(layer(), Sum(7))
    if isinstance(model[0], SortConv2d):
        with torch.no_grad():
            model[0].weight.copy_(model[0].weight[:, :1].expand_as(model[0].weight))
    images = torch.cat([torch.ones(6, 1, 8, 8), torch.zeros(2, 1, 8, 8)])
    found = search(model, InputDomain((1, 8, 8), 0.0, 1.0), CrossEntropy(50.0), inputs=images, restarts=4, steps=4)
    for name in ("0.weight", "0.bias"):
        assert share * found[name][1] <= found[name][0] <= found[name][1] * (1 + 1e-9), name


def test_search_sees_a_sharing_factor_that_is_forgotten() -> None:
    class Unshared(LinfDistanceConv2d):
        """The bound of a dense layer, a factor sqrt(S) too small."""

        def param_sensitivity(self, x: Norms, g: Norms, shapes: Shapes) -> dict[str, float]:
            return {"weight": g.l2, "bias": g.l2}

    torch.manual_seed(0)
    model = nn.Sequential(Unshared(1, 3, 2, init="uniform", init_scale=-9.0), Sum(3))
    found = search(model, InputDomain((1, 4, 4), 0.0, 1.0), CrossEntropy(), restarts=4, steps=2)
    assert found["0.weight"][0] > 2 * found["0.weight"][1]
