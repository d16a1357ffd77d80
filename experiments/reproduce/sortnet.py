# SPDX-License-Identifier: Apache-2.0
"""SortNet's theory on Boolean functions, and its networks on MNIST.

    python experiments/reproduce/sortnet.py --quick --json runs/sortnet.json

A network that is 1-Lipschitz in l_inf and fits a Boolean function on {0, 1}^d has margin at most 1/2. Standard networks
(affine maps with rows of l_1 norm at most 1, ReLU or absolute value) are proved to reach at most 1/(2d) on OR, and to
miss the maximum of d numbers by at least 1/2 - 1/(2d) somewhere in [0, 1]^d; MaxMin, l_inf-distance and sort networks
have no such limit (Zhang, Jiang, He, Wang, Rethinking Lipschitz Neural Networks and Certified Robustness: A Boolean
Function Perspective, NeurIPS 2022, section 3). Each network is trained for its worst margin by a soft minimum whose
temperature is fixed (20) or annealed. Every margin is divided by the l_inf constant that the norm calculus certifies,
so no network can cheat.

The full mode (without ``--quick``) takes more steps and adds MNIST: sort against l_inf-distance networks, equal budget.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from claims import Claim, mean_spread, progress, run
from distance_training import Recipe, deployed_scores, fit
from sortnet_figure import draw
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dplip.bounds import lipschitz, trace
from dplip.data import load
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
    ("maj", 3): {"relu": 0.1667, "maxmin": 0.331},
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


def train(
    kind: str,
    d: int,
    loss: Callable[[Tensor, float], Tensor],
    x: Tensor,
    temperatures: tuple[float, float],
    steps: int,
    seed: int,
    anneal_p: bool = False,
) -> tuple[nn.Module, float]:
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


def points(function: str, d: int) -> tuple[Tensor, Tensor]:
    """All of {0, 1}^d and the function's values as signs."""
    x = torch.tensor(list(itertools.product((0.0, 1.0), repeat=d)), dtype=torch.float64)
    ones = x.sum(1)
    true = {"or": ones > 0, "xor": ones % 2 == 1, "maj": ones > d / 2}[function]
    return x, torch.where(true, 1.0, -1.0).double()


@dataclass(frozen=True)
class Job:
    """One network to train; ``grid`` points per side for the maximum function, 0 for a Boolean one."""

    kind: str
    function: str
    d: int
    temperatures: tuple[float, float]
    steps: int
    seed: int
    anneal_p: bool = False
    grid: int = 0

    def run(self) -> float:
        """The margin divided by the certified constant, or the largest error of a network of constant at most 1."""
        torch.set_num_threads(1)
        if self.grid:
            side = torch.linspace(0, 1, self.grid, dtype=torch.float64)
            x = torch.cartesian_prod(*[side] * self.d)
            goal = x.amax(1)

            def loss(f: Tensor, t: float) -> Tensor:
                return torch.logsumexp(torch.cat([t * (f - goal), t * (goal - f)]), 0) / t

            model, constant = train(self.kind, self.d, loss, x, self.temperatures, self.steps, self.seed, self.anneal_p)
            error = float((model(x)[:, 0] - goal).detach().abs().max())
            return error if constant <= 1 + 1e-9 else math.inf
        x, sign = points(self.function, self.d)

        def soft_minimum(f: Tensor, t: float) -> Tensor:
            return torch.logsumexp(-t * sign * f, 0) / t

        model, constant = train(
            self.kind, self.d, soft_minimum, x, self.temperatures, self.steps, self.seed, self.anneal_p
        )
        return float((sign * model(x)[:, 0].detach()).min()) / constant


def jobs(seeds: int, scale: int) -> list[Job]:
    """Every network of the tables, ``seeds`` times."""
    found = []
    for seed, kind in itertools.product(range(seeds), NETS):
        found += [Job(kind, "or", d, (20, 20), 800 * scale, seed) for d in (2, 3, 4)]
        found += [Job(kind, f, d, (10, 1000), 1200 * scale, seed) for f, d in ANNEALED]
        found += [Job(kind, "max", d, (10, 1000), 1200 * scale, seed, grid=g) for d, g in ((2, 11), (3, 6))]
    return found + [Job("linf-dist", "maj", 3, (10, 1000), 1500 * scale, seed, anneal_p=True) for seed in range(seeds)]


def matches(name: str, values: list[float], reference: float, best: float) -> Claim:
    """The reference is the best of several seeds, so the best is compared."""
    return Claim(f"{name} (best)", best, reference, abs(best - reference) <= TOLERANCE, mean_spread(values)[1])


def boolean_claims(options: argparse.Namespace) -> list[Claim]:
    """Train everything and compare with the limits and the tables."""
    todo = jobs(options.seeds, 1 if options.quick else 3)
    results: dict[tuple[str, int, str, tuple[float, float], bool], list[float]] = {}
    with ProcessPoolExecutor(max_workers=min(2, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        for count, (job, value) in enumerate(zip(todo, pool.map(Job.run, todo), strict=True), 1):
            results.setdefault((job.function, job.d, job.kind, job.temperatures, job.anneal_p), []).append(value)
            if count % 20 == 0:
                progress(f"{count}/{len(todo)} networks")
    best = {kind: [max(results["or", d, kind, (20, 20), False]) for d in (2, 3, 4)] for kind in NETS}
    draw(Path(__file__).parent / "figures" / "sortnet.png", best, (2, 3, 4))
    claims = []
    for kind, references in FIXED.items():
        for d, reference in zip((2, 3, 4), references, strict=True):
            values = results["or", d, kind, (20, 20), False]
            claims.append(matches(f"OR d={d}, temperature 20, {kind}: margin", values, reference, max(values)))
    for (function, d), references in ANNEALED.items():
        for kind in NETS:
            values, reference = results[function, d, kind, (10, 1000), False], references.get(kind)
            name = f"{function.upper()} d={d}, annealed, {kind}: margin"
            if function == "maj" and kind == "maxmin":
                claims.append(Claim.at_least(name, [max(values)], 0.331, TOLERANCE))
            elif reference is not None:
                claims.append(matches(name, values, reference, max(values)))
            elif kind == "sortnet":
                claims.append(Claim.at_least(name, values, 0.5, TOLERANCE))
    for (function, d, kind, temperatures, _), values in results.items():
        where = f"OR d={d}, {'temperature 20' if temperatures == (20, 20) else 'annealed'}, {kind}"
        if function == "or" and kind in STANDARD:
            claims.append(Claim.at_most(f"{where}: largest of all, limit 1/(2d)", max(values), 1 / (2 * d), 1e-6))
        elif function == "or":
            claims.append(Claim.at_least(f"{where}: smallest of all, 1/(2d) + 0.1", min(values), 1 / (2 * d) + 0.1))
    for d, references in MAXIMUM.items():
        limit = 0.5 - 1 / (2 * d)
        for kind in NETS:
            values = results["max", d, kind, (10, 1000), False]
            if kind in references:
                claims.append(matches(f"maximum of {d}, {kind}: largest error", values, references[kind], min(values)))
            if kind in STANDARD:
                claims.append(
                    Claim.at_least(f"maximum of {d}, {kind}: least error of all runs, limit", min(values), limit, 1e-6)
                )
            if kind == "sortnet":
                claims.append(Claim.at_most(f"maximum of {d}, {kind}: largest error", values, 0.0, TOLERANCE))
    direct, annealed = (max(results["maj", 3, "linf-dist", (10, 1000), p]) for p in (False, True))
    claims.append(Claim.at_most("MAJ d=3, linf-dist trained at p = inf: margin (best), stuck", direct, 0.0, TOLERANCE))
    claims.append(Claim.at_least("MAJ d=3, linf-dist with p schedule: margin (best)", annealed, 0.331))
    return claims


def mnist_claims(options: argparse.Namespace) -> list[Claim]:
    """Sort networks trained by random maxima against l_inf-distance networks, same budget, certified as deployed."""
    data = load("mnist", options.data())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensors = [t.to(device) for t in (*data.train, *data.test)]
    scores = []
    for seed, keep in itertools.product(range(options.seeds), (0.75, 1.0)):
        recipe = Recipe(width=2048, depth=5, pool=1, keep=keep, eps=0.45, weights=(0.02, 0.0002), temperature=1.0)
        recipe = replace(recipe, epochs=100, batch=512, decay=0.0, finish=0.967)
        model, moved = fit(recipe, tensors[0], tensors[1], seed)
        scores.append(deployed_scores(model, moved, tensors[2], tensors[3], 0.3))
        progress(f"MNIST, seed {seed}, keep {keep}: {scores[-1]}")
    sort, dist = scores[0::2], scores[1::2]
    return [
        Claim.at_least("MNIST, sort: clean %", [s.clean for s in sort], 98.58, 1.0),
        Claim.at_least("MNIST, sort: certified % at 0.3", [s.certified for s in sort], 93.32, 2.0),
        Claim.at_least(
            "MNIST, sort over l_inf-dist: clean", [a.clean - b.clean for a, b in zip(sort, dist, strict=True)], 0.0
        ),
    ]


def main(options: argparse.Namespace) -> list[Claim]:
    """All claims of this system."""
    return boolean_claims(options) if options.quick else boolean_claims(options) + mnist_claims(options)


if __name__ == "__main__":
    sys.exit(run(main, __doc__.splitlines()[0]))
