# SPDX-License-Identifier: Apache-2.0
"""Local Lipschitz bounds on MNIST without privacy: how much tighter a ball's own constant is, and training with it.

    python experiments/reproduce/local_lipschitz.py --quick --data-dir DATA --json runs/local_lipschitz.json

Claims of Huang, Zhang, Shi, Kolter, Anandkumar, Training Certifiably Robust Neural Networks with Efficient Local
Lipschitz Bounds, NeurIPS 2021: neurons that are constant in the ball drop out of the operator norms, so the local
constant is below the global one and certifies more; the gain vanishes where the ball is large, unless the network is
trained with the local bound and the sparsity term. Their certificate rests on power iteration, a lower bound; here
every norm is an upper bound.

First part: 784-128-128-10 with clipped ReLUs, plain cross-entropy, 3 epochs of all 60,000 images. Second part: the same
shape behind 2x2 averages, 196-48-48-10, with plain cross-entropy and with the local loss. The quick mode trains the
second part on 5,000 images and certifies 300 test images; the full mode takes 128 hidden units, all images and the
first 2,000.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import torch
from claims import Claim, progress, run
from local_lipschitz_figure import draw
from torch import Tensor, nn
from torch.nn import functional as F

from dplip.audit.robustness import flips
from dplip.bounds import lipschitz, trace
from dplip.certify import certify, local_lipschitz
from dplip.data import Split, load
from dplip.layers import AveragePool2d, ClippedReLU, Flatten
from dplip.recipes import EpsSchedule, LocalLipschitzLoss

EPS = (0.1, 0.3, 0.5, 1.58)
RATIOS = (0.44, 0.61, 0.72, 0.96)  # local over global constant in an earlier run of the original method, one seed
CERTIFIED = {0.1: 92.3, 0.3: 17.3}  # the same run; the global constant certified 75.3 and 0
SLACK = 0.05  # on ratios, which differ from network to network
TRAINED_EPS = 0.5
DOMAIN = (0.0, 1.0)
FIGURE = Path(__file__).parent / "figures" / "local_lipschitz.png"


@dataclass(frozen=True)
class Found:
    """What one network shows.

    Attributes:
        clean: accuracy in percent on the certified examples.
        radii: per method, certified l_2 radii [N], 0 where the class is wrong.
        ratio: per radius, the mean local over the global constant.
        worst: the largest local over global constant of 1,000 examples at radius 0.1; NaN where not asked.
        flipped: certified examples whose class an attack changed.
    """

    clean: float
    radii: dict[str, Tensor]
    ratio: dict[float, float]
    worst: float
    flipped: int

    def certified(self, method: str, eps: float) -> float:
        """Share certified beyond ``eps``, in percent."""
        return 100 * float((self.radii[method] > eps).double().mean())


def network(hidden: int, pooled: bool) -> nn.Sequential:
    """Affine layers with clipped ReLUs of one threshold per neuron."""
    front: list[nn.Module] = [AveragePool2d(2), Flatten()] if pooled else [Flatten()]
    sizes = (196 if pooled else 784, hidden, hidden)
    for d, m in pairwise(sizes):
        front += [nn.Linear(d, m), ClippedReLU(m)]
    return nn.Sequential(*front, nn.Linear(hidden, 10))


def fit(model: nn.Sequential, data: Split, epochs: int, batch: int, rate: float, local: bool) -> None:
    """Adam with plain cross-entropy, or with the local loss: radius and its weight grow over the first two thirds."""
    loss = LocalLipschitzLoss(model, "l2", sparsity=0.01, domain=DOMAIN, iterations=3)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    steps, step = epochs * (len(data.y) // batch), 0
    radius, weight = EpsSchedule(TRAINED_EPS, 0.1, 0.6), EpsSchedule(0.9, 0.1, 0.6)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.y))[: len(data.y) // batch * batch].split(batch):
            optimizer.param_groups[0]["lr"] = rate * min(1.0, 3 * (1 - step / steps))
            optimizer.zero_grad()
            if local:
                loss.eps, loss.kappa = radius.at(step / steps), 1 - weight.at(step / steps)
                value = loss(data.x[rows], data.y[rows])
            else:
                value = F.cross_entropy(model(data.x[rows]), data.y[rows], reduction="sum")
            (value / batch).backward()
            optimizer.step()
            for layer in model:
                if isinstance(layer, ClippedReLU):
                    layer.project_()
            step += 1


def judge(model: nn.Sequential, x: Tensor, y: Tensor, many: Tensor | None) -> Found:
    """Certify in float64 over inputs in [0, 1]."""
    model = model.double().eval()
    graph = trace(model)
    whole = lipschitz(graph, graph.evaluate(x[:1])).l2
    certificates = {m: certify(model, x, "l2", method=m, domain=DOMAIN) for m in ("margin", "best", "local")}
    right = certificates["local"].predicted == y
    ratio = {eps: float(local_lipschitz(model, x, eps, "l2", domain=DOMAIN).mean()) / whole for eps in EPS}
    worst = float("nan") if many is None else float(local_lipschitz(model, many, EPS[0], "l2", domain=DOMAIN).amax())
    flipped = flips(model, x, certificates["local"], restarts=2, steps=10, domain=DOMAIN)
    radii = {m: torch.where(right, c.radius, 0.0) for m, c in certificates.items()}
    return Found(100 * float(right.double().mean()), radii, ratio, worst / whole, flipped)


def one(name: str, seed: int, quick: bool, folder: Path) -> Found:
    """Train and judge one network: ``"plain"``, ``"pooled"`` or ``"local"``."""
    if quick:
        torch.set_num_threads(1)
    data = load("mnist", folder)
    torch.manual_seed(seed)
    pooled = name != "plain"
    model = network(48 if pooled and quick else 128, pooled)
    count = 5000 if pooled and quick else len(data.train.y)
    train = Split(data.train.x[:count], data.train.y[:count])
    if pooled:
        fit(model, train, 6 if quick else 20, 125, 2e-3, local=name == "local")
    else:
        fit(model, train, 3, 512, 1e-3, local=False)
    tested = 300 if quick else 2000
    x = data.test.x.double()
    return judge(model, x[:tested], data.test.y[:tested], None if pooled else x[:1000])


def main(options: argparse.Namespace) -> list[Claim]:
    """Train the three networks with every seed."""
    folder = options.data()
    todo = [(name, seed) for seed in range(options.seeds) for name in ("local", "plain", "pooled")]
    names, seeds = zip(*todo, strict=True)
    found: dict[str, list[Found]] = {"local": [], "plain": [], "pooled": []}
    workers = min(2, os.cpu_count() or 1) if options.quick else 1
    with ProcessPoolExecutor(max_workers=workers, mp_context=get_context("spawn")) as pool:
        results = pool.map(one, names, seeds, [options.quick] * len(todo), [folder] * len(todo))
        for (name, seed), result in zip(todo, results, strict=True):
            found[name].append(result)
            at = {f"{m} {eps:g}": round(result.certified(m, eps), 1) for m in result.radii for eps in EPS}
            progress(f"seed {seed}, {name}: clean {result.clean:.2f}, certified {at}, ratio {result.ratio}")
    draw(FIGURE, found)
    return compare(found)


def compare(found: dict[str, list[Found]]) -> list[Claim]:
    """The claims; differences are paired by seed."""
    plain, pooled, local = found["plain"], found["pooled"], found["local"]
    claims = [Claim.at_most("largest local over global constant, 1,000 test points", [f.worst for f in plain], 1.0)]
    for eps, reference in zip(EPS, RATIOS, strict=True):
        name = f"plain: mean local over global constant at {eps:g}"
        claims.append(Claim.at_most(name, [f.ratio[eps] for f in plain], reference, SLACK))
    for eps, reference in CERTIFIED.items():
        name = f"plain: certified % at {eps:g}, local"
        claims.append(Claim.at_least(name, [f.certified("local", eps) for f in plain], reference))
    for eps in CERTIFIED:
        name = f"plain: certified % at {eps:g}, local over the best of margin and intervals"
        claims.append(Claim.at_least(name, [f.certified("local", eps) - f.certified("best", eps) for f in plain], 5.0))
    claims.append(Claim.at_least("pooled, plain: clean %", [f.clean for f in pooled], 85.0))
    claims.append(Claim.at_least("pooled, local loss: clean %", [f.clean for f in local], 85.0))
    for name, several in (("pooled, plain", pooled), ("pooled, local loss", local)):
        values = [f.certified("local", TRAINED_EPS) for f in several]
        claims.append(Claim.at_least(f"{name}: certified % at {TRAINED_EPS:g}", values, 0.0))
    gain = [a.certified("local", TRAINED_EPS) - b.certified("local", TRAINED_EPS) for a, b in _pairs(local, pooled)]
    claims.append(Claim.at_least(f"local loss over plain: certified % at {TRAINED_EPS:g}", gain, 10.0))
    ratio = [a.ratio[TRAINED_EPS] - b.ratio[TRAINED_EPS] for a, b in _pairs(local, pooled)]
    # The source's aim of the sparsity term; see experiments/README.md for what happens at this size.
    claims.append(Claim.at_most(f"local loss less plain: local over global constant at {TRAINED_EPS:g}", ratio, 0.0))
    tighter = [a.certified("local", TRAINED_EPS) - a.certified("margin", TRAINED_EPS) for a in local]
    claims.append(Claim.at_least(f"local loss: local over margin, certified % at {TRAINED_EPS:g}", tighter, 0.0))
    flipped = sum(f.flipped for several in found.values() for f in several)
    return [*claims, Claim.at_most("certified examples flipped by attack", float(flipped), 0.0)]


def _pairs(a: list[Found], b: list[Found]) -> list[tuple[Found, Found]]:
    return list(zip(a, b, strict=True))


if __name__ == "__main__":
    sys.exit(run(main, __doc__.splitlines()[0]))
