# SPDX-License-Identifier: Apache-2.0
"""Monotone Lipschitz networks: four tabular sets against the published numbers, certified, attacked, and one private.

    python experiments/reproduce/monotonic.py --data-dir DATA [--quick] [--seeds N] [--json FILE]

Source: Kitouni, Nolte, Williams, Expressive Monotonic Neural Networks, ICLR 2023, table 1: COMPAS 69.3 % accuracy,
heart disease 89.6 % accuracy, auto-mpg 7.58 mean squared error, BlogFeedback 0.16 root mean squared error. The source
reports the best test value over all epochs (for accuracy also over thresholds); both that and the plain value
(threshold 0 after the last epoch, nothing chosen by test data) are shown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from claims import Claim, mean_spread, progress, run
from monotonic_figure import draw
from tabular import Tabular, auto_mpg, blog_feedback, compas, compas_public, heart_disease, standardized
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dplip.audit.monotone import monotone_violations
from dplip.bounds import InputDomain
from dplip.certify.monotone import certify_monotone
from dplip.layers import LipschitzLayer, MaxMin, MonotoneResidual, NormalizedLinear
from dplip.losses import BinaryCrossEntropy
from dplip.privacy import ClipFreeEngine

EPSILON, DELTA = 3.0, 1e-5
PRIVATE_STRENGTH = 4.0


@dataclass(frozen=True)
class Recipe:
    """How one set is trained; ``quick`` and ``full`` are numbers of epochs."""

    load: Callable[[Path, int], Tabular]
    widths: tuple[int, ...]
    strength: float
    lr: float
    batch: int
    quick: int
    full: int
    published: float
    accuracy: bool
    squared: bool = False  # mean squared error rather than its root


RECIPES = {
    "COMPAS": Recipe(lambda d, s: standardized(compas(d)), (8, 8), 2.86, 2e-3, 256, 60, 500, 69.3, True),
    "heart disease": Recipe(lambda d, s: standardized(heart_disease(d)), (8, 8), 1.0, 5e-3, 242, 300, 600, 89.6, True),
    "auto-mpg": Recipe(
        lambda d, s: standardized(auto_mpg(d, s)), (16, 16), 1.0, 1e-2, 64, 300, 2000, 7.58, False, True
    ),
    "BlogFeedback": Recipe(
        lambda d, s: standardized(blog_feedback(d), 3.0), (32,), 0.1, 1e-2, 1024, 12, 200, 0.16, False
    ),
}


def monotone_net(
    directions: Tensor, widths: tuple[int, ...], strength: float, balls: tuple[str, str] = ("entries", "rows_l1")
) -> nn.Module:
    """A MaxMin network with every ``|df/dx_i| < strength``, and the ramp that outweighs it.

    The balls of the first and of the later layers: l_1 to l_inf, then l_inf; spectral balls for both bound the slopes
    by the l_2 constant, which is smaller than needed but keeps the norms of hidden layers, and so the noise, low.
    """
    sizes, layers = [len(directions), *widths, 1], []
    # A hair inside, so that the rounded-up bound of float32 weights stays below the strength.
    norm = (strength * (1 - 1e-5)) ** (1 / (len(sizes) - 1))
    for k, (i, o) in enumerate(pairwise(sizes)):
        layers += [NormalizedLinear(i, o, ball=balls[min(k, 1)], max_norm=norm), MaxMin()]
    return MonotoneResidual(nn.Sequential(*layers[:-1]), directions, strength=strength)


def plain_net(d: int, widths: tuple[int, ...]) -> nn.Module:
    """The same shape without constraint or ramp."""
    sizes = [d, *widths, 1]
    layers = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), MaxMin())]
    return nn.Sequential(*layers[:-1])


def project(model: nn.Module) -> None:
    """Every layer back into its ball."""
    for layer in model.modules():
        if isinstance(layer, LipschitzLayer):
            layer.project_()


def fit(
    model: nn.Module, data: Tabular, recipe: Recipe, epochs: int, seed: int, watch: Callable[[nn.Module], float]
) -> list[float]:
    """Adam with a projection after every step and a step size falling to zero; ``watch`` after every epoch."""
    generator, seen = torch.Generator().manual_seed(seed), []
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr)
    per_epoch = -(-len(data.x_train) // recipe.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    loss = F.binary_cross_entropy_with_logits if recipe.accuracy else F.mse_loss
    for _ in range(epochs):
        for rows in torch.randperm(len(data.x_train), generator=generator).split(recipe.batch):
            optimizer.zero_grad()
            loss(model(data.x_train[rows]), data.y_train[rows]).backward()
            optimizer.step()
            project(model)
            schedule.step()
        with torch.no_grad():
            seen.append(watch(model))
    return seen


def score(model: nn.Module, data: Tabular, recipe: Recipe) -> tuple[float, float]:
    """The plain test value, and that of the threshold which the test data like best (the same for errors)."""
    z = model(data.x_test).flatten()
    if not recipe.accuracy:
        mse = float(F.mse_loss(z, data.y_test.flatten())) * data.unit**2
        return (mse, mse) if recipe.squared else (mse**0.5, mse**0.5)
    labels = data.y_test.flatten() > 0.5
    at = torch.cat([torch.zeros(1), torch.linspace(-2, 2, 81)])
    hits = 100 * ((z > at[:, None]) == labels).double().mean(1)
    return float(hits[0]), float(hits.max())


def attacked(model: nn.Module, data: Tabular, count: int = 32, steps: int = 30) -> float:
    """Share, in per cent, of searched pairs within the range of the data that move the wrong way."""
    low, high = data.x_train.amin(0).double() - 1e-3, data.x_train.amax(0).double() + 1e-3
    attack = monotone_violations(model, data.directions, data.x_test[:count], domain=(low, high), steps=steps)
    return 100 * attack.violations() / len(attack.descent)


def reproduce(name: str, recipe: Recipe, options: argparse.Namespace) -> list[Claim]:
    """One set over all seeds."""
    plain, chosen, features, bad, bad_free = [], [], [], [], []
    epochs = recipe.quick if options.quick else recipe.full
    for seed in range(options.seeds):
        data = recipe.load(options.data(), seed)
        torch.manual_seed(seed)
        model, free = (
            monotone_net(data.directions, recipe.widths, recipe.strength),
            plain_net(data.x_train.shape[1], recipe.widths),
        )
        best: list[float] = fit(model, data, recipe, epochs, seed, lambda m, d=data: score(m, d, recipe)[1])
        fit(free, data, recipe, max(1, epochs // 3), seed, lambda m: 0.0)
        model.eval(), free.eval()
        with torch.no_grad():
            plain.append(score(model, data, recipe)[0])
        chosen.append((max if recipe.accuracy else min)(best))
        features.append(float(certify_monotone(model, data.directions).features.sum()))
        bad.append(attacked(model, data))
        bad_free.append(attacked(free, data))
        progress(
            f"{name} seed {seed}: {plain[-1]:.4g}, source's choice {chosen[-1]:.4g}, {features[-1]:.0f} certified, "
            f"violations {bad[-1]:.3g} %, unconstrained {bad_free[-1]:.3g} %"
        )
    signs, tests = data.directions, len(data.y_test)
    unit = "accuracy (%)" if recipe.accuracy else "MSE" if recipe.squared else "RMSE"
    better = Claim.at_least if recipe.accuracy else Claim.at_most
    # One point, or one test example where that is more; 5 per cent of an error.
    slack = max(1.0, 100 / tests) if recipe.accuracy else 0.05 * recipe.published
    return [
        better(
            f"{name}: {unit}, the source's choice of epoch and threshold, within {slack:.2g}",
            chosen,
            recipe.published,
            slack,
        ),
        better(
            f"{name}: {unit}, nothing chosen by test data, within {3 * slack:.2g}", plain, recipe.published, 3 * slack
        ),
        Claim.equal(f"{name}: features certified monotone", features, float(signs.abs().sum())),
        Claim.equal(f"{name}: violations found (% of pairs)", bad, 0.0),
        Claim.at_least(f"{name}: violations of an unconstrained network (% of pairs)", bad_free, 1.0),
    ]


def private(options: argparse.Namespace) -> tuple[list[Claim], nn.Module, nn.Module, Tensor]:
    """COMPAS under clip-free DP-SGD: monotone through the noise, and a private network without the ramp."""
    data, rows = compas_public(options.data()), {True: [], False: []}
    features, bad, bad_free, models = [], [], [], {}
    for seed in range(options.seeds):
        for monotone in (True, False):
            torch.manual_seed(seed)
            model = monotone_net(data.directions, (8,), PRIVATE_STRENGTH, ("spectral", "spectral"))
            if not monotone:
                norm = PRIVATE_STRENGTH**0.5
                layers = [NormalizedLinear(13, 8, max_norm=norm), MaxMin(), NormalizedLinear(8, 1, max_norm=norm)]
                model = nn.Sequential(*layers)
            models[monotone] = train_privately(model, data, 20, seed)
            labels = data.y_test.flatten() > 0.5
            with torch.no_grad():
                rows[monotone].append(100 * float(((model(data.x_test).flatten() > 0) == labels).double().mean()))
        features.append(float(certify_monotone(models[True], data.directions).features.sum()))
        bad.append(attacked(models[True], data))
        bad_free.append(attacked(models[False], data))
        progress(
            f"private COMPAS seed {seed}: {rows[True][-1]:.2f} % against {rows[False][-1]:.2f} % without the ramp, "
            f"violations {bad[-1]:.3g} % against {bad_free[-1]:.3g} %"
        )
    free = mean_spread(rows[False])[0]
    claims = [
        Claim.at_least(
            f"private COMPAS, epsilon {EPSILON:g}: accuracy (%) against the same without monotonicity, within 1",
            rows[True],
            free,
            1.0,
        ),
        Claim.at_least(
            f"private COMPAS, epsilon {EPSILON:g}: accuracy (%) against the published non-private one, within 3",
            rows[True],
            69.3,
            3.0,
        ),
        Claim.equal("private COMPAS: features certified monotone", features, 4.0),
        Claim.equal("private COMPAS: violations found (% of pairs)", bad, 0.0),
        Claim.at_least("private COMPAS without the ramp: violations found (% of pairs)", bad_free, 1.0),
    ]
    return claims, models[True], models[False], data.x_test[:200]


def train_privately(model: nn.Module, data: Tabular, epochs: int, seed: int) -> nn.Module:
    """Clip-free DP-SGD with a public input domain; the seed makes the run repeatable and is for this experiment
    only."""
    loss = BinaryCrossEntropy()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(TensorDataset(data.x_train, data.y_train), batch_size=512)
    engine = ClipFreeEngine(insecure_seed=seed)
    # Five entries in [0, 1] and two one-hot groups.
    domain = InputDomain((13,), 0.0, 1.0, l2_radius=7**0.5)
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model, optimizer=sgd, data_loader=loader, loss=loss,
        target_epsilon=EPSILON, target_delta=DELTA, epochs=epochs, population=len(data.x_train), domain=domain,
    )  # fmt: skip
    average, half = [torch.zeros_like(p) for p in model.parameters()], optimizer.plan.steps // 2
    for x, y in (batch for _ in range(epochs) for batch in loader):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
        if optimizer.steps_taken > half:
            for total, p in zip(average, model.parameters(), strict=True):
                total += p.detach()
    with torch.no_grad():  # the mean of the second half of the released weights: free, and inside the convex balls
        for total, p in zip(average, model.parameters(), strict=True):
            p.copy_(total / (optimizer.steps_taken - half))
    project(model)
    return model.eval()


def log_data(seed: int) -> Tabular:
    """30 noisy points of log(0.5 + 9.5 x) on [0, 1], of slopes 0.95 to 19; the test part is the truth."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(30, 1, generator=generator)
    grid = torch.linspace(0, 1, 400)[:, None]
    noise = 0.4 * torch.randn(30, 1, generator=generator)
    return Tabular(x, (0.5 + 9.5 * x).log() + noise, grid, (0.5 + 9.5 * grid).log(), torch.ones(1))


def log_fit(options: argparse.Namespace) -> tuple[list[Claim], list[tuple[Tabular, Tensor, Tensor]]]:
    """The source's demonstration: a monotone network does not follow the noise downhill."""
    recipe = Recipe(lambda d, s: log_data(s), (32, 32), 10.0, 1e-2, 30, 1500, 5000, 0.0, False)
    errors, free_errors, bad, bad_free, curves = [], [], [], [], []
    for seed in range(options.seeds):
        data = log_data(seed)
        torch.manual_seed(seed)
        model, free = monotone_net(data.directions, recipe.widths, recipe.strength), plain_net(1, recipe.widths)
        for m, errs, found in ((model, errors, bad), (free, free_errors, bad_free)):
            fit(m, data, recipe, recipe.quick if options.quick else recipe.full, seed, lambda m: 0.0)
            with torch.no_grad():
                errs.append(score(m.eval(), data, recipe)[0])
            found.append(attacked(m, data, count=400))
        with torch.no_grad():
            curves.append((data, model(data.x_test), free(data.x_test)))
        progress(f"log fit seed {seed}: RMSE to the truth {errors[-1]:.3f}, unconstrained {free_errors[-1]:.3f}")
    claims = [
        Claim.at_most(
            "log fit: RMSE to the truth, against the unconstrained network's", errors, mean_spread(free_errors)[0]
        ),
        Claim.equal("log fit: violations found (% of pairs)", bad, 0.0),
        Claim.at_least("log fit: violations of an unconstrained network (% of pairs)", bad_free, 1.0),
    ]
    return claims, curves


def main(options: argparse.Namespace) -> list[Claim]:
    """All parts, and the figure beside this file."""
    torch.set_num_threads(1)
    claims = [claim for name, recipe in RECIPES.items() for claim in reproduce(name, recipe, options)]
    more, monotone, free, x = private(options)
    last, curves = log_fit(options)
    draw(Path(__file__).with_name("figures") / "monotonic.png", curves, (monotone, free), x, EPSILON)
    return claims + more + last


if __name__ == "__main__":
    sys.exit(run(main, "Monotone Lipschitz networks against the published numbers."))
