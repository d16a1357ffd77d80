# SPDX-License-Identifier: Apache-2.0
"""1-Lipschitz networks of orthogonal affine layers and one activation, and how they are trained, for splines.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from dplip.bounds import InputDomain, input_like, trace
from dplip.bounds.lipschitz import lipschitz
from dplip.layers import Abs, GroupSort, LinearSpline, LipschitzLayer, NormalizedLinear

__all__ = ["ACTIVATIONS", "certified_constant", "fit", "network", "regions", "splines", "tv2"]


class ClippedPReLU(nn.PReLU):
    """``max(x, 0) + a_c min(x, 0)`` with a learned slope per channel in [-1, 1], starting as |x| and x in turn."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        with torch.no_grad():
            self.weight[0::2], self.weight[1::2] = -1.0, 1.0

    @torch.no_grad()
    def project_(self) -> None:
        self.weight.clamp_(-1, 1)


def _spline(width: int, init: str) -> LinearSpline:
    return LinearSpline(width, intervals=20, reach=1.0, ends="match", init=init, scaled=True, projection="nearest")


ACTIVATIONS: dict[str, Callable[[int, str], nn.Module]] = {
    "spline": _spline,
    "groupsort": lambda width, init: GroupSort(2),
    "prelu": lambda width, init: ClippedPReLU(width),
    "abs": lambda width, init: Abs(),
    "relu": lambda width, init: nn.ReLU(),
}


def network(sizes: Sequence[int], activation: str, init: str = "absolute_value") -> nn.Sequential:
    """Affine layers of the given sizes, spectral norm <= 1 and nearly orthogonal, with activations between them.

    ``init`` is the initial function of splines.
    """
    layers: list[nn.Module] = []
    for k, (d, m) in enumerate(pairwise(sizes)):
        layers.append(NormalizedLinear(d, m, orthogonalize=3))
        if k < len(sizes) - 2:
            layers.append(ACTIVATIONS[activation](m, init))
    return nn.Sequential(*layers)


def splines(model: nn.Module) -> list[LinearSpline]:
    return [m for m in model.modules() if isinstance(m, LinearSpline)]


def tv2(model: nn.Module) -> Tensor:
    """TV(2) of all splines, a tensor that can be minimised; 0 without splines."""
    return sum((s.tv2() for s in splines(model)), start=torch.zeros(()))


def regions(model: nn.Module) -> float:
    """Mean number of linear pieces of a spline; 0 without splines."""
    counts = [s.linear_regions(0.01).double() for s in splines(model)]
    return float(torch.cat(counts).mean()) if counts else 0.0


def certified_constant(model: nn.Module, size: int) -> float:
    """An upper bound on the l_2 Lipschitz constant, from the trained weights, in float64; ReLU and PReLU count as 1."""
    constant = 1.0
    known = [m for m in model.modules() if isinstance(m, LipschitzLayer)]
    if not any(isinstance(m, (nn.ReLU, nn.PReLU)) for m in model.modules()):
        graph = trace(model)
        return lipschitz(graph, graph.evaluate(input_like(model, InputDomain((size,))))).l2
    for layer in known:
        if isinstance(layer, NormalizedLinear):
            constant *= layer.operator_norms(None).two_two  # type: ignore[arg-type]
    return constant


def fit(model: nn.Module, loss: Callable[[], Tensor], steps: int, lr: float, *, smoothness: float = 0.0) -> None:
    """Adam on ``loss() + smoothness * TV2`` with projections after every step.

    Three groups as in the source: weights, spline coefficients (0.3 of the rate), scales (a quarter).
    """
    coefficients = [s.coefficients for s in splines(model)]
    scales = [s.scale for s in splines(model) if s.scale is not None]
    held = {id(p) for p in [*coefficients, *scales]}
    groups = [{"params": [p for p in model.parameters() if id(p) not in held]}]
    if coefficients:
        groups += [{"params": coefficients, "lr": 0.3 * lr}, {"params": scales, "lr": lr / 4}]
    optimizer = Adam(groups, lr)
    schedule = CosineAnnealingLR(optimizer, steps)
    projected = [m for m in model.modules() if isinstance(m, (LipschitzLayer, ClippedPReLU))]
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        if smoothness > 0:
            value = value + smoothness * tv2(model)
        value.backward()
        optimizer.step()
        schedule.step()
        for m in projected:
            m.project_()
