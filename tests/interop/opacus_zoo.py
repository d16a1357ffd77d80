# SPDX-License-Identifier: Apache-2.0
"""One small instance, or several, of everything in ``dplip.layers`` for tests inside Opacus."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from dplip import layers as L

Case = tuple[Callable[[], nn.Module], tuple[int, ...]]  # how to make it, and one example's shape

DENSE, IMAGE = (6,), (4, 5, 5)


def _householder() -> nn.Module:
    layer = L.Householder(6)
    nn.init.uniform_(layer.angle, 0.0, 3.0)
    return layer


def _offset_reference(layer: L.LipschitzLayer) -> nn.Module:
    return L.ReferenceShift(layer, 0.25)


CASES: dict[str, Case] = {
    "Abs": (L.Abs, DENSE),
    "Affine": (lambda: L.Affine(nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4))), DENSE),
    "AffineConv2d": (
        lambda: L.AffineConv2d(nn.Parameter(torch.randn(6, 2, 3, 3)), None, L.window.Window((3, 3)), groups=2),
        IMAGE,
    ),
    "AveragePool2d": (lambda: L.AveragePool2d(2), IMAGE),
    "BallClip": (lambda: L.BallClip(1.5), DENSE),
    "Clamp": (lambda: L.Clamp(-0.5, 0.5), DENSE),
    "ClippedReLU": (lambda: L.ClippedReLU(6, 0.5), DENSE),
    "ClippedReLU-images": (lambda: L.ClippedReLU(4, 0.5), IMAGE),
    "ConvexMix": (lambda: L.ConvexMix(L.NormalizedLinear(6, 6), 0.3), DENSE),
    "Flatten": (L.Flatten, IMAGE),
    "GroupSort": (lambda: L.GroupSort(3), DENSE),
    "Householder": (_householder, DENSE),
    "L2Pool2d": (lambda: L.L2Pool2d(2), IMAGE),
    "LearnedScale": (lambda: L.LearnedScale(1.5), DENSE),
    "LinearSpline": (lambda: L.LinearSpline(6, scaled=True, init="maxmin"), DENSE),
    "LinearSpline-images": (lambda: L.LinearSpline(4, ends="clamp"), IMAGE),
    "LinfDistance": (lambda: L.LinfDistance(6, 4), DENSE),
    "LinfDistance-p8": (lambda: L.LinfDistance(6, 4, p=8.0, bias=False), DENSE),
    "LinfDistance-p8-plain": (lambda: L.LinfDistance(6, 4, p=8.0, power_mean=False), DENSE),
    "LinfDistanceConv2d": (lambda: L.LinfDistanceConv2d(4, 6, 3, groups=2, padding=1, stride=2), IMAGE),
    "LinfDistanceConv2d-p8": (lambda: L.LinfDistanceConv2d(4, 3, 3, p=8.0), IMAGE),
    "MaxMin": (L.MaxMin, DENSE),
    "MaxPool2d": (lambda: L.MaxPool2d(2), IMAGE),
    "Monotone": (lambda: L.Monotone(torch.tanh), DENSE),
    "MonotoneResidual": (
        lambda: L.MonotoneResidual(L.NormalizedLinear(6, 2), torch.ones(6), outputs=2, learned="feature"),
        DENSE,
    ),
    "NormalizedConv2d": (lambda: L.NormalizedConv2d(4, 6, 3, groups=2, padding=1, stride=2), IMAGE),
    "NormalizedLinear": (lambda: L.NormalizedLinear(6, 4), DENSE),
    "NormalizedLinear-no-bias": (lambda: L.NormalizedLinear(6, 4, bias=False, ball="rows_l1"), DENSE),
    "OrderStatisticLinear": (lambda: L.OrderStatisticLinear(6, 4, [0.5, -0.3, 0.1]), DENSE),
    "OrderStatisticLinear-learned": (lambda: L.OrderStatisticLinear(6, 4, [0.5, -0.3, 0.1], learned=True), DENSE),
    "OrderStatisticLinear-signed": (lambda: L.OrderStatisticLinear(6, 4, [0.5, 0.5], magnitude=False), DENSE),
    "PositionBias": (lambda: L.PositionBias(4), IMAGE),
    "Ramp": (lambda: L.Ramp(torch.ones(2, 6), learned="common"), DENSE),
    "RandomFeatures": (lambda: L.RandomFeatures(6, 8, radius=2.0), DENSE),
    "ReferenceShift": (lambda: _offset_reference(L.LinfDistance(6, 4)), DENSE),
    "ReferenceShift-images": (lambda: _offset_reference(L.SortConv2d.geometric(4, 3, 3, 0.3)), IMAGE),
    "Reshape": (lambda: L.Reshape(2, 3), DENSE),
    "Residual": (lambda: L.Residual(L.LinfDistance(6, 6), 0.5), DENSE),
    "Scale": (lambda: L.Scale(-2.0), DENSE),
    "Share": (lambda: L.Share(nn.Parameter(torch.tensor([0.3])), complement=True), DENSE),
    "Shift": (lambda: L.Shift(0.3), DENSE),
    "SortConv2d": (lambda: L.SortConv2d.geometric(4, 6, 3, 0.3, groups=2), IMAGE),
    "SortLinear": (lambda: L.SortLinear.geometric(6, 4, 0.3), DENSE),
    "SortLinear-mean": (lambda: L.SortLinear.top_k_mean(6, 4, 3, init="templates"), DENSE),
    "StochasticSortLinear": (lambda: L.StochasticSortLinear(6, 4, 0.5), DENSE),
    "StochasticSortLinear-p8": (lambda: L.StochasticSortLinear(6, 4, 0.5, p=8.0), DENSE),
}
"""Cases by name; what precedes a hyphen is the class."""

ABSTRACT = {"LipschitzLayer", "DistanceLayer", "DistanceConv2d"}
REFUSED = {"MeanShift"}  # mixes examples in training


def trains(name: str) -> bool:
    """Whether the case has parameters."""
    return any(True for _ in CASES[name][0]().parameters())


def mixed(name: str) -> nn.Module:
    """The case between torch's own layers, and ours behind: every kind of neighbour."""
    make, shape = CASES[name]
    before = nn.Linear(6, 6) if shape == DENSE else nn.Conv2d(4, 4, 1)
    middle = nn.Sequential(before, make(), L.Flatten())
    with torch.no_grad():
        width = middle(torch.zeros(1, *shape)).shape[1]
    return nn.Sequential(middle, L.NormalizedLinear(width, 3), nn.Linear(3, 2))
