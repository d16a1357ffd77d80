# SPDX-License-Identifier: Apache-2.0
"""Training and judging l_inf-distance and sort networks without privacy, shared by two reproductions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dplip.certify import certify
from dplip.layers import (
    AveragePool2d,
    Flatten,
    LinfDistance,
    MeanShift,
    Scale,
    StochasticSortLinear,
    advance_masks,
)
from dplip.losses import BoundedLoss
from dplip.margin_losses import Hinge, Mixture
from dplip.recipes import GeometricDecay, NormDecayAdam, PSchedule, reestimate_means

__all__ = ["Recipe", "Scores", "deployed_scores", "fit"]


@dataclass(frozen=True)
class Recipe:
    """What is trained and how; the defaults are the small setting.

    Attributes:
        width, depth, pool: hidden neurons, number of distance layers, side of the average-pooling window in front.
        keep: keep probability of sort layers; 1 gives l_inf-distance layers.
        anneal: p schedule 8 -> 1000 -> inf; otherwise p = inf throughout.
        mean_shift: centre hidden layers.
        loss: ``"hinge"`` or ``"mixture"``.
        eps: radius trained for; the losses' threshold is twice it.
        weights, temperature: of the mixture's cross-entropy, at first and at last; its initial temperature.
        epochs, batch, lr, decay: budget and optimizer.
        begin, finish: when p and the weight start and end to change, as shares of the budget.
        power_mean: normalise distances at finite p, which the source does not.
    """

    width: int = 64
    depth: int = 3
    pool: int = 2
    keep: float = 1.0
    anneal: bool = True
    mean_shift: bool = True
    loss: str = "mixture"
    eps: float = 0.15
    weights: tuple[float, float] = (1.0, 0.1)
    temperature: float = 10.0
    epochs: int = 12
    batch: int = 64
    lr: float = 0.02
    decay: float = 5e-3
    begin: float = 0.0
    finish: float = 0.8
    power_mean: bool = True


class Scores(NamedTuple):
    """Accuracies in percent on the same examples, and the share of weights that a step of the first epoch moves."""

    clean: float
    attacked: float
    certified: float
    moved: float


def network(recipe: Recipe, side: int, seed: int) -> nn.Module:
    """Pool, distance layers with mean shifts between them, minus the last distances."""
    modules: list[nn.Module] = [AveragePool2d(recipe.pool)] if recipe.pool > 1 else []
    modules.append(Flatten())
    d = (side // recipe.pool) ** 2
    sizes = [recipe.width] * (recipe.depth - 1) + [10]
    for i, m in enumerate(sizes):
        last = i == len(sizes) - 1
        options = {"bias": last or not recipe.mean_shift, "init": "identity" if 0 < i and d <= m else "normal"}
        if recipe.keep < 1 and i > 0:  # like the source, whose first layer is an l_inf distance
            modules.append(StochasticSortLinear(d, m, recipe.keep, seed=1000 * seed + i, **options))
        else:
            modules.append(LinfDistance(d, m, power_mean=recipe.power_mean, **options))
        if recipe.mean_shift and not last:
            modules.append(MeanShift(m))
        d = m
    return nn.Sequential(*modules, Scale(-1.0))


def fit(recipe: Recipe, x: Tensor, y: Tensor, seed: int) -> tuple[nn.Module, float]:
    """The deployed network (evaluation mode, p = inf, means re-estimated), and the share of first-layer weights moved.

    The share counts weights with a gradient, over the steps of the first epoch: at p = inf each neuron moves one weight
    per example.
    """
    torch.manual_seed(seed)
    model = network(recipe, x.shape[-1], seed).to(x.device)
    loss: BoundedLoss = Hinge(2 * recipe.eps)
    if recipe.loss == "mixture":
        loss = Mixture(2 * recipe.eps, recipe.weights[0], temperature=recipe.temperature, learn_temperature=True).to(
            x.device
        )
    optimizer = NormDecayAdam(model, lr=recipe.lr, weight_decay=recipe.decay)
    extra = torch.optim.Adam([*loss.parameters(), torch.nn.Parameter(torch.zeros(()))], lr=0.3 * recipe.lr)
    begin, finish = recipe.begin * recipe.epochs, recipe.finish * recipe.epochs
    p_schedule = PSchedule(begin=begin, finish=finish if recipe.anneal else 0.0)
    decay = GeometricDecay(*recipe.weights, begin, finish)
    steps, moved, counted = len(x) // recipe.batch, 0.0, 0
    for epoch in range(recipe.epochs):
        order = torch.randperm(len(x)).to(x.device)
        for step in range(steps):
            t = epoch + step / steps
            p_schedule.apply(model, t)
            if isinstance(loss, Mixture):
                loss.weight = decay.at(t)
            for group in (*optimizer.param_groups, *extra.param_groups):
                peak = recipe.lr if group in optimizer.param_groups else 0.3 * recipe.lr
                group["lr"] = 0.5 * peak * (1 + math.cos(math.pi * t / recipe.epochs))
            rows = order[step * recipe.batch : (step + 1) * recipe.batch]
            optimizer.zero_grad()
            extra.zero_grad()
            (loss(model(x[rows]), y[rows]) / len(rows)).backward()
            if epoch == 0:
                first = next(m for m in model if isinstance(m, LinfDistance)).weight
                moved, counted = moved + float((first.grad.abs() > 1e-12).double().mean()), counted + 1
            optimizer.step()
            extra.step()
            advance_masks(model)
    p_schedule.apply(model, recipe.epochs + 1)
    if recipe.mean_shift:
        reestimate_means(model, x.split(recipe.batch))
    return model.eval(), 100 * moved / max(counted, 1)


def _attack(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int) -> Tensor:
    """[B]: which examples stay right under PGD, cross-entropy and margin in turn, checked at every step."""
    right = model(x).argmax(1) == y
    for goal in range(2):
        start = (torch.randn_like(x) * eps / 4).clamp(-eps / 2, eps / 2)
        moved = (x + start).clamp(0, 1)
        for _ in range(steps):
            moved.requires_grad_()
            z = model(moved)
            other = z.scatter(1, y[:, None], -math.inf).amax(1) - z.gather(1, y[:, None])[:, 0]
            (g,) = torch.autograd.grad(F.cross_entropy(z, y, reduction="sum") if goal == 0 else other.sum(), moved)
            moved = (moved.detach() + eps / 4 * g.sign()).clamp(x - eps, x + eps).clamp(0, 1)
            with torch.no_grad():
                right &= model(moved).argmax(1) == y
    return right


def deployed_scores(model: nn.Module, moved: float, x: Tensor, y: Tensor, eps: float, steps: int = 20) -> Scores:
    """Clean, attacked and certified accuracy at l_inf radius ``eps`` for inputs in [0, 1]."""
    certificate = certify(model, x, method="best", domain=(0.0, 1.0))
    clean = float((certificate.predicted == y).double().mean())
    attacked = float(_attack(model, x, y, eps, steps).double().mean())
    return Scores(100 * clean, 100 * attacked, 100 * certificate.certified_accuracy(y, eps), moved)
