# SPDX-License-Identifier: Apache-2.0
"""Small nets of every layer type with random and adversarial weights, and inputs on which claims fail first."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

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
    Monotone,
    NormalizedLinear,
    ReferenceShift,
    Residual,
    Scale,
    Shift,
    SortLinear,
)

D, C = 4, 3


class Branches(nn.Module):
    """Concatenation, a difference of branches, constants and functions."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = LinfDistance(D, 4), nn.Linear(D, 4)
        self.head = SortLinear.geometric(8, C, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.left(x), torch.relu(self.right(x))
        return 1.5 - self.head(torch.cat([a - b, 0.5 * b], 1))


def _prototypes(body: nn.Module, head: LinfDistance | SortLinear, factor: float) -> nn.Module:
    """Each class is the distance to the features of one input, so that all classes occur."""
    with torch.no_grad():
        head.weight.copy_(body(torch.rand(C, D)))
    return nn.Sequential(body, head, Scale(factor))


def _spline() -> nn.Module:
    spline = LinearSpline(6, intervals=7, reach=0.8, init="maxmin")
    with torch.no_grad():
        spline.coefficients.add_(0.2 * torch.randn_like(spline.coefficients))
    return nn.Sequential(nn.Linear(D, 6), spline, NormalizedLinear(6, C))


def _tied() -> nn.Module:
    """Neurons that coincide with one another and with the inputs of `inputs`."""
    net = nn.Sequential(LinfDistance(D, 5), LinfDistance(5, C), Scale(-1.0))
    with torch.no_grad():
        net[0].weight[:2] = 0.5
        net[0].weight[2:4] = net[0].weight[4]
    return net


def _scaled(factor: float) -> nn.Module:
    net = nn.Sequential(nn.Linear(D, 6), MaxMin(), Scale(1 / factor), nn.Linear(6, C), Scale(factor))
    with torch.no_grad():
        net[0].weight.mul_(factor)
        net[3].weight.mul_(3.0)
    return net


NETS: dict[str, Callable[[], nn.Module]] = {
    "linf": lambda: nn.Sequential(
        ReferenceShift(LinfDistance(D, 6), 0.5), LinfDistance(6, C, init_scale=0.1), Scale(-1.0)
    ),
    "power_mean": lambda: nn.Sequential(LinfDistance(D, 6, p=8), LinfDistance(6, C, p=50), Scale(-1.0)),
    "sort": lambda: _prototypes(SortLinear.geometric(D, 8, 0.3), SortLinear.top_k_mean(8, C, 3), -2.0),
    "spectral": lambda: nn.Sequential(NormalizedLinear(D, 6), MaxMin(), NormalizedLinear(6, C), Shift(0.3)),
    "rows": lambda: nn.Sequential(
        NormalizedLinear(D, 6, ball="rows_l1"), GroupSort(3), NormalizedLinear(6, C, ball="rows_l1", max_norm=2.0)
    ),
    "columns": lambda: nn.Sequential(
        NormalizedLinear(D, 6, ball="columns_l1"), Abs(), NormalizedLinear(6, C, ball="frobenius")
    ),
    "relu": lambda: nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, C)),
    "softplus": lambda: nn.Sequential(
        nn.Linear(D, 5), nn.Softplus(), nn.Linear(5, 5), nn.Sigmoid(), nn.Linear(5, C, bias=False)
    ),
    "monotone": lambda: nn.Sequential(Monotone(torch.atan), NormalizedLinear(D, C), Scale(-3.0)),
    "clip": lambda: nn.Sequential(Shift(0.5), BallClip(0.7), NormalizedLinear(D, 4), GroupSort(0), nn.Linear(4, C)),
    "clamp": lambda: nn.Sequential(Clamp(0.2, 0.8), nn.Linear(D, 4), LinfDistance(4, C, init_scale=0.3)),
    "residual": lambda: nn.Sequential(
        Residual(nn.Sequential(nn.Linear(D, D), MaxMin()), mix=0.3), NormalizedLinear(D, C)
    ),
    "spline": _spline,
    "branches": Branches,
    "tied": _tied,
    "large": lambda: _scaled(1e4),
    "small": lambda: _scaled(1e-4),
}


def image() -> nn.Module:
    """Takes [B, 1, 2, 2]."""
    return nn.Sequential(AveragePool2d(1), Flatten(), SortLinear.top_k_mean(D, C, 2), Scale(-1.0)).eval()


def build(name: str, seed: int = 0) -> nn.Module:
    """The net of this name, in evaluation mode."""
    torch.manual_seed(seed)
    return NETS[name]().eval()


def inputs(rows: int = 12) -> Tensor:
    """[rows + 6, D]: random points of the unit cube, its corners, its centre, constants and a far point."""
    eye = torch.eye(D)
    fixed = [torch.zeros(1, D), torch.ones(1, D), torch.full((1, D), 0.5), eye[:2], torch.full((1, D), 30.0)]
    return torch.cat([torch.rand(rows, D), *fixed])
