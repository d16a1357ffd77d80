# SPDX-License-Identifier: Apache-2.0
"""Learned splines in 1-Lipschitz networks: fitting functions, estimating Wasserstein-1 distances, denoising images.

    python experiments/reproduce/splines.py --quick --json splines.json

Source: Ducotterd, Goujon, Bohra, Perdios, Neumayer, Unser, Improving Lipschitz-Constrained Neural Networks by Learning
Activation Functions, JMLR 2024, the experiments of the same three names. The data are made here (and scikit-learn's
digits for denoising), so no folder is read.

* Fitting: 1-10-10-10-1 networks, mean squared error on 1,000 points, the median over seeds.
* Wasserstein-1: a 1-Lipschitz critic ``f`` gives ``mean f(P) - mean f(Q) <= W1(P, Q)`` by Kantorovich duality. Two
  samples of two-dimensional Gaussian mixtures have an exact W1, by optimal assignment; an estimate above it would
  prove a network not to be 1-Lipschitz.
* Denoising: ``D = (I + N) / 2`` with ``N`` 1-Lipschitz is averaged with constant 1/2, that is firmly non-expansive
  (``||Dx - Dy||^2 <= <Dx - Dy, x - y>``), which plug-and-play iterations need to converge; the inequality is attacked.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from claims import Claim, progress, run
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_digits
from splines_nets import ACTIVATIONS, certified_constant, fit, network, regions, tv2
from torch import Tensor, nn

Results = dict[str, list[float]]
ROUNDING = 1e-5  # float32


def zigzag(x: Tensor) -> Tensor:
    """f1: slope +1 or -1 almost everywhere, 9 random knots (fixed)."""
    draw = torch.Generator().manual_seed(7)
    inner = (2 * torch.rand(9, generator=draw) - 1).sort().values
    knots = torch.cat([torch.tensor([-1.0]), inner, torch.tensor([1.0])])
    signs = torch.tensor([(-1.0) ** k for k in range(10)])
    values = torch.cat([torch.zeros(1), (knots.diff() * signs).cumsum(0)])
    piece = torch.searchsorted(knots, x.clamp(-1, 1 - 1e-6), right=True).clamp(1, 10) - 1
    return values[piece] - values.mean() + signs[piece] * (x - knots[piece])


def cosine(x: Tensor) -> Tensor:
    """f3: a smooth function whose slope is +-1 only at points."""
    return torch.cos(7 * math.pi * x) / (7 * math.pi)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"f1": zigzag, "f3": cosine}


def fitting(options: argparse.Namespace, models: dict[str, nn.Module]) -> list[Claim]:
    """Median squared errors per function and activation; splines against every other."""
    steps = 500 if options.quick else 5000
    x = torch.linspace(-1, 1, 1000)[:, None]
    claims, constants = [], []
    for name, function in FUNCTIONS.items():
        y, errors = function(x[:, 0]), {}
        for activation in ACTIVATIONS:
            errors[activation] = []
            for seed in range(options.seeds):
                torch.manual_seed(seed)
                model = network([1, 10, 10, 10, 1], activation)
                fit(model, lambda m=model, y=y: 100 * (m(x)[:, 0] - y).square().mean(), steps, 0.02)
                errors[activation].append(float((model(x)[:, 0] - y).detach().square().mean()))
                constants.append(certified_constant(model, 1))
                models[f"{name} {activation}"] = model
            progress(name, activation, *(f"{v:.2e}" for v in errors[activation]))
        for activation in ("groupsort", "prelu", "abs", "relu"):
            # Compared by medians, as in the source; a ratio below 1 says that splines fit better. f1 is itself a
            # composition of absolute values, which start there at the answer's form: only the order of magnitude is
            # compared.
            ratio = statistics.median(errors["spline"]) / statistics.median(errors[activation])
            limit = 3.0 if (name, activation) == ("f1", "abs") else 1.0
            claims.append(Claim.at_most(f"{name}: error of splines / {activation}", ratio, limit))
        best = statistics.median(errors["spline"])
        claims.append(Claim.at_most(f"{name}: error of splines (x 1e4)", 1e4 * best, 1e4 * float(y.var()) / 2))
    return [*claims, Claim.at_most("fitting: largest certified constant", max(constants), 1.0, ROUNDING)]


def mixtures(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Samples of two mixtures of four Gaussians in the plane, on the half-axes at distance 1 and 2: W1 is near 1."""
    torch.manual_seed(1000 + seed)
    angle = torch.arange(count).remainder(4).expand(2, -1) * (math.pi / 2)
    centre = torch.stack([angle.cos(), angle.sin()], 2) * torch.tensor([1.0, 2.0])[:, None, None]
    p, q = centre + 0.2 * torch.randn(2, count, 2)
    return p, q


def exact_distance(p: Tensor, q: Tensor) -> float:
    """W1 between two samples of equal size: the cheapest assignment."""
    cost = torch.cdist(p.double(), q.double())
    row, column = linear_sum_assignment(cost.numpy())
    return float(cost[row, column].mean())


def wasserstein(options: argparse.Namespace, models: dict[str, nn.Module]) -> list[Claim]:
    """Estimate over exact W1 per activation, on the sample itself."""
    count, steps, width = (400, 500, 32) if options.quick else (2000, 5000, 128)
    shares: Results = {}
    for activation in ACTIVATIONS:
        shares[activation] = []
        for seed in range(options.seeds):
            p, q = mixtures(seed, count)
            torch.manual_seed(seed)
            model = network([2, width, width, 1], activation)
            fit(model, lambda m=model, p=p, q=q: m(q).mean() - m(p).mean(), steps, 0.02)
            gap = float((model(p).mean() - model(q).mean()).detach())
            shares[activation].append(gap / exact_distance(p, q))
            models[f"w1 {activation}"] = model
        progress("w1", activation, *(f"{v:.4f}" for v in shares[activation]))
    largest = max(v for values in shares.values() for v in values)
    claims = [Claim.at_most("W1: largest estimate / exact", largest, 1.0, ROUNDING)]
    claims.append(Claim.at_least("W1: splines, estimate / exact", shares["spline"], 0.95))
    for activation in ("groupsort", "prelu", "abs", "relu"):
        other = statistics.fmean(shares[activation])
        claims.append(Claim.at_least(f"W1: splines, against {activation}", shares["spline"], other, 0.02))
    return claims


class Averaged(nn.Module):
    """``(x + N(x)) / 2`` for a 1-Lipschitz ``N``: 1/2-averaged."""

    def __init__(self, residual: nn.Module) -> None:
        super().__init__()
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.residual(x)) / 2


def firmness_violation(model: nn.Module, x: Tensor, steps: int = 30) -> float:
    """Largest ``||Dx - Dy||^2 / <Dx - Dy, x - y>`` that gradient ascent on both points finds; at most 1 if firm."""
    a, b = x.clone().requires_grad_(), (x + 0.1 * torch.randn_like(x)).requires_grad_()
    optimizer, worst = torch.optim.Adam([a, b], 0.02), 0.0
    for _ in range(steps):
        moved, apart = model(a) - model(b), a - b
        ratio = moved.square().sum(1) / (moved * apart).sum(1).clamp_min(1e-12)
        clear = apart.detach().norm(dim=1) > 1e-2  # rounding rules between closer points
        worst = max(worst, float(ratio[clear].detach().amax())) if bool(clear.any()) else worst
        optimizer.zero_grad()
        (-ratio.sum()).backward()
        optimizer.step()
    return worst


def psnr(a: Tensor, b: Tensor) -> float:
    return -10 * math.log10(float((a - b).detach().square().mean()))


def denoising(options: argparse.Namespace, models: dict[str, nn.Module]) -> list[Claim]:
    """PSNR on test images with fresh noise of deviation 0.2; TV(2) and pieces of the splines."""
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    train, test = images[:1437], images[1437:]
    steps, width = (500, 64) if options.quick else (10000, 256)
    gains: Results = {"spline": [], "groupsort": [], "relu": []}
    firm, pieces, variation = [], [], []
    for activation, found in gains.items():
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            model = Averaged(network([64, width, width, 64], activation, init="relu"))

            def loss(m: nn.Module = model) -> Tensor:
                clean = train[torch.randint(len(train), (200,))]
                return (m(clean + 0.2 * torch.randn_like(clean)) - clean).square().sum(1).mean()

            fit(model, loss, steps, 0.01, smoothness=1e-4)
            torch.manual_seed(2000 + seed)
            noisy = test + 0.2 * torch.randn_like(test)
            found.append(psnr(model(noisy), test) - psnr(noisy, test))
            firm.append(firmness_violation(model, noisy))
            models[f"denoise {activation}"] = model
            if activation == "spline":
                pieces.append(regions(model))
                variation.append(float(tv2(model).detach()) / (2 * width))
        progress("denoise", activation, *(f"{v:.3f} dB" for v in found))
    return [
        Claim.at_least("denoising: gain of splines (dB)", gains["spline"], 3.0),
        Claim.at_least(
            "denoising: against groupsort (dB)", gains["spline"], statistics.fmean(gains["groupsort"]), 0.05
        ),
        Claim.at_least("denoising: against relu (dB)", gains["spline"], statistics.fmean(gains["relu"])),
        Claim.at_most("denoising: firmness ratio under attack", max(firm), 1.0, 1e-3),
        Claim.at_most("denoising: linear regions of a spline", pieces, 10.0),
        Claim.at_most("denoising: TV(2) of a spline", variation, 2.0),
    ]


def main(options: argparse.Namespace) -> list[Claim]:
    torch.set_num_threads(1)
    models: dict[str, nn.Module] = {}
    claims = fitting(options, models) + wasserstein(options, models) + denoising(options, models)
    from splines_figure import draw

    draw(models, FUNCTIONS, mixtures(options.seeds - 1, 400), Path(__file__).parent / "figures" / "splines.png")
    return claims


if __name__ == "__main__":
    raise SystemExit(run(main, __doc__.splitlines()[0]))
