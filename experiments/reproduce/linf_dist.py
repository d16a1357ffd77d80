# SPDX-License-Identifier: Apache-2.0
"""l_inf-distance networks on MNIST without privacy: what the p schedule, mean shift and the mixture loss are good for.

    python experiments/reproduce/linf_dist.py --quick --data-dir DATA --json runs/linf_dist.json

Claims of Zhang, Cai, Lu, He, Wang, Towards Certifying L-infinity Robustness using Neural Networks with L-inf-dist
Neurons, ICML 2021, and of Zhang, Jiang, He, Wang, Boosting the Certified Robustness of L-infinity Distance Nets, ICLR
2022: training at p = inf directly fails, since each neuron moves one weight per example; annealing p trains; a clipped
margin beside a decaying cross-entropy beats the hinge in clean and in certified accuracy. All networks are certified as
deployed: p = inf, running means re-estimated and frozen, inputs in [0, 1], rounding included.

The quick mode takes 5,000 training images pooled to 14x14, width 64, depth 3, and a test subset. The full mode is the
published size: 28x28, 60,000 images, width 5120, depth 5, 400 epochs, for a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from claims import Claim, progress, run
from distance_training import Recipe, Scores, deployed_scores, fit

from dplip.data import load

SMALL = Recipe()
LARGE = Recipe(
    width=5120,
    depth=5,
    pool=1,
    epochs=400,
    batch=512,
    eps=0.45,
    weights=(0.1, 0.001),
    temperature=1.0,
    begin=0.125,
    finish=0.875,
)
VARIANTS = {
    "mixture": {},
    "hinge": {"loss": "hinge"},
    "direct p = inf": {"anneal": False},
    "no mean shift": {"mean_shift": False},
}
PUBLISHED = {"clean": 98.56, "attacked": 94.73, "certified": 93.20}  # radius 0.3, mixture, width 5120


def one(name: str, seed: int, quick: bool, folder: Path) -> Scores:
    """Train and judge one network."""
    data = load("mnist", folder)
    device = torch.device("cuda" if torch.cuda.is_available() and not quick else "cpu")
    if quick:
        torch.set_num_threads(1)
    recipe = dataclasses.replace(SMALL if quick else LARGE, **VARIANTS[name])
    count, tested = (5000, 400) if quick else (len(data.train.y), len(data.test.y))
    x, y = data.train.x[:count].to(device), data.train.y[:count].to(device)
    model, moved = fit(recipe, x, y, seed)
    return deployed_scores(
        model, moved, data.test.x[:tested].to(device), data.test.y[:tested].to(device), radius(quick)
    )


def radius(quick: bool) -> float:
    """At which attacks and certificates are compared."""
    return 0.1 if quick else 0.3


def main(options: argparse.Namespace) -> list[Claim]:
    """Train every variant with every seed."""
    folder = options.data()
    todo = [(name, seed) for seed in range(options.seeds) for name in VARIANTS]
    names, seeds = zip(*todo, strict=True)
    scores: dict[str, list[Scores]] = {name: [] for name in VARIANTS}
    # A GPU trains one network at a time.
    workers = min(2, os.cpu_count() or 1) if options.quick else 1
    with ProcessPoolExecutor(max_workers=workers, mp_context=get_context("spawn")) as pool:
        results = pool.map(one, names, seeds, [options.quick] * len(todo), [folder] * len(todo))
        for (name, seed), found in zip(todo, results, strict=True):
            scores[name].append(found)
            progress(f"seed {seed}, {name}: {', '.join(f'{k} {v:.2f}' for k, v in found._asdict().items())}")
    return compare(scores, radius(options.quick), options.quick)


def compare(scores: dict[str, list[Scores]], eps: float, quick: bool) -> list[Claim]:
    """The claims; differences are paired by seed."""

    def column(name: str, field: str) -> list[float]:
        return [getattr(s, field) for s in scores[name]]

    def gain(a: str, b: str, field: str) -> list[float]:
        return [x - y for x, y in zip(column(a, field), column(b, field), strict=True)]

    claims = []
    for name in VARIANTS:
        for field in ("clean", "attacked", "certified"):
            at = "" if field == "clean" else f" at {eps:g}"
            values = column(name, field)
            if name == "mixture" and not quick:
                claims.append(Claim.at_least(f"{name}: {field} %{at}", values, PUBLISHED[field], 1.0))
            elif name == "direct p = inf":
                claims.append(
                    Claim.at_most(f"{name}: {field} %{at}", values, statistics.fmean(column("mixture", field)))
                )
            else:  # nothing was published at the small size; chance is 10
                claims.append(Claim.at_least(f"{name}: {field} %{at}", values, 10.0))
    ordered = [min(s.clean - s.attacked, s.attacked - s.certified) for several in scores.values() for s in several]
    claims += [
        Claim.at_least("certified <= attacked <= clean, least gap of all runs", min(ordered), 0.0),
        Claim.at_least("p schedule over direct p = inf: clean", gain("mixture", "direct p = inf", "clean"), 20.0),
        Claim.at_least(
            "p schedule over direct p = inf: certified", gain("mixture", "direct p = inf", "certified"), 20.0
        ),
        Claim.at_most(
            "direct p = inf: % of first-layer weights with a gradient", column("direct p = inf", "moved"), 1.0
        ),
        Claim.at_least("p schedule: % of first-layer weights with a gradient", column("mixture", "moved"), 10.0),
        Claim.at_least("mixture over hinge: clean", gain("mixture", "hinge", "clean"), 0.0),
        Claim.at_least("mixture over hinge: certified", gain("mixture", "hinge", "certified"), 0.0),
    ]
    if not quick:  # the small network is too shallow to need it
        claims.append(Claim.at_least("mean shift over none: clean", gain("mixture", "no mean shift", "clean"), 0.0))
    return claims


if __name__ == "__main__":
    sys.exit(run(main, __doc__.splitlines()[0]))
