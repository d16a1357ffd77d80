# SPDX-License-Identifier: Apache-2.0
"""SortNet's theory on Boolean functions, and its networks on MNIST.

    python experiments/reproduce/sortnet.py --quick --json runs/sortnet.json

A network that is 1-Lipschitz in l_inf and fits a Boolean function on {0, 1}^d has margin at most 1/2. Standard networks
(affine maps with rows of l_1 norm at most 1, ReLU or absolute value) are proved to reach at most 1/(2d) on OR, and to miss the
maximum of d numbers by at least 1/2 - 1/(2d) somewhere in [0, 1]^d; MaxMin, l_inf-distance and sort networks have no such
limit (Zhang, Jiang, He, Wang, Rethinking Lipschitz Neural Networks and Certified Robustness: A Boolean Function
Perspective, NeurIPS 2022, section 3). Each network is trained for its worst margin by a soft minimum whose temperature is fixed
(20) or annealed. Every margin is divided by the l_inf constant that the norm calculus certifies, so no network can cheat.

The full mode (without ``--quick``) takes more steps and adds MNIST: sort against l_inf-distance networks, equal budget.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable

import torch
from claims import Claim, mean_spread, progress, run
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dplip.bounds import lipschitz, trace
from dplip.layers import Abs, LinfDistance, MaxMin, NormalizedLinear, OrderStatisticLinear
from dplip.recipes import PSchedule

WIDTH = 32
STANDARD = ("relu", "abs")
NETS = (*STANDARD, "maxmin", "linf-dist", "sortnet")
FIXED = {  # network -> best margin on OR at temperature 20, for d = 2, 3, 4
    "relu": (0.2327, 0.139, 0.090),
    "abs": (0.2327, 0.139, 0.090),
    "maxmin": (0.4725, 0.451, 0.432),
    "linf-dist": (0.4726, 0.452, 0.433),
}
ANNEALED = {  # (function, d) -> best margin of ReLU, MaxMin and l_inf-dist as the temperature rises to 1000
    ("or", 2): {"relu": 0.2496, "maxmin": 0.4994, "linf-dist": 0.4994},
    ("or", 3): {"relu": 0.1661, "maxmin": 0.4989, "linf-dist": 0.4989},
    ("xor", 2): {"relu": 0.125, "maxmin": 0.500, "linf-dist": 0.500},
    ("maj", 3): {"relu": 0.1667},
}
MAXIMUM = {2: {"relu": 0.2506, "maxmin": 0.0, "linf-dist": 0.0}, 3: {"relu": 0.3339, "maxmin": 0.0, "linf-dist": 0.0}}
TOLERANCE = 0.02


class _RowsL1(nn.Module):
    """Divides every row by its l_1 norm where that exceeds 1, inside the graph."""

    def forward(self, w: Tensor) -> Tensor:
        return w / w.abs().sum(1, keepdim=True).clamp_min(1.0)


def build(kind: str, d: int) -> nn.Module:
    """A network [B, d] -> [B, 1], 1-Lipschitz in l_inf at every step."""
    sizes = [(d, WIDTH), (WIDTH, WIDTH), (WIDTH, 1)]
    if kind == "linf-dist":
        return nn.Sequential(*[LinfDistance(i, o) for i, o in sizes])
    if kind == "sortnet":
        layers: list[nn.Module] = [_general(i, o) for i, o in (sizes[0], sizes[2])]
        names = ["order_weights"] * 2
        model = nn.Sequential(*layers)
    else:
        activation: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "abs": Abs, "maxmin": MaxMin}
        layers = [NormalizedLinear(i, o, ball="rows_l1") for i, o in sizes]
        names = ["weight"] * 3
        model = nn.Sequential(layers[0], activation[kind](), layers[1], activation[kind](), layers[2])
    for layer, name in zip(layers, names, strict=True):
        parametrize.register_parametrization(layer, name, _RowsL1())
    return model


def _general(d: int, m: int) -> OrderStatisticLinear:
    """Sorts ``|x - w|`` with learned signed weights of each neuron's own."""
    k = min(d, 8)
    c = torch.rand(m, k)
    return OrderStatisticLinear(d, m, c / c.sum(1, keepdim=True), learned=True)


def train(kind: str, d: int, loss: Callable[[Tensor, float], Tensor], x: Tensor, temperatures: tuple[float, float],
          steps: int, seed: int, anneal_p: bool = False) -> tuple[nn.Module, float]:
    """Adam with projection after every step; returns the network and its certified l_inf constant."""
    torch.manual_seed(seed)
    model = build(kind, d).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    schedule = PSchedule(finish=0.6) if anneal_p else None
    start, end = temperatures
    for step in range(steps):
        r = step / steps
        if schedule is not None:
            schedule.apply(model, r)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * min(1.0, 2 * (1 - r)) * (start / (start * (end / start) ** r)) ** 0.5
        optimizer.zero_grad()
        loss(model(x)[:, 0], start * (end / start) ** r).backward()
        optimizer.step()
    if schedule is not None:
        schedule.apply(model, 1.0)
    for layer in model:
        for name in list(getattr(layer, "parametrizations", {})):
            parametrize.remove_parametrizations(layer, name)  # what is left is an ordinary layer with its rules
    graph = trace(model.eval())
    return model, lipschitz(graph, graph.evaluate(x)).linf
