# SPDX-License-Identifier: Apache-2.0
r"""Attempts to refute certificates by attacks inside certified balls.

An attack that fails proves nothing; one flipped certified example is a bug.
Projected gradient ascent follows Madry, Makelov, Schmidt, Tsipras, Vladu, Towards Deep Learning Models Resistant to
Adversarial Attacks, ICLR 2018. The gradient of a distance network is sparse, so half of the runs follow that of a
smooth relative instead (Athalye, Carlini, Wagner, Obfuscated Gradients Give a False Sense of Security, ICML 2018,
section 4.1); what counts as flipped is always decided by the model itself.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dplip.audit.lipschitz import lipschitz_lower_bound
from dplip.certify import Certificate
from dplip.errors import ConfigError
from dplip.layers import LinfDistance, SortLinear

__all__ = ["Attack", "attack", "flips", "lipschitz_lower_bound", "smooth_relative"]

_NORMS = ("linf", "l2")
_SMOOTH_P = 16.0


@dataclass(frozen=True)
class Attack:
    """The worst input found for every example.

    Attributes:
        flipped: [B] bool, whether the model returns another class there.
        adversarial: [B, *], the input, within the radius and the domain; ``x`` where nothing better was found.
        margin: [B] float64, the predicted class's logit less the largest other one there.
    """

    flipped: Tensor
    adversarial: Tensor
    margin: Tensor


def smooth_relative(model: nn.Module, p: float = _SMOOTH_P) -> nn.Module:
    """A copy in which every order-statistic neuron is the power mean of exponent ``p``, whose gradient is dense."""
    relative = copy.deepcopy(model)
    if isinstance(relative, SortLinear):
        return _power_mean(relative, p)
    for module in list(relative.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, SortLinear):
                setattr(module, name, _power_mean(child, p))
    for module in relative.modules():
        if isinstance(module, LinfDistance):
            module.p = min(module.p, p)
    return relative


def _power_mean(layer: SortLinear, p: float) -> LinfDistance:
    smooth = LinfDistance(layer.in_features, layer.out_features, bias=layer.bias is not None, p=p)
    smooth.weight, smooth.bias = layer.weight, layer.bias
    return smooth.to(layer.weight).train(layer.training)


def attack(
    model: nn.Module,
    x: Tensor,
    predicted: Tensor,
    radius: Tensor,
    norm: str = "linf",
    *,
    restarts: int = 10,
    steps: int = 40,
    domain: tuple[float, float] | None = None,
    seed: int = 0,
) -> Attack:
    """Look for inputs within ``radius`` of ``x`` that the model does not assign to ``predicted``.

    Runs differ in goal (cross-entropy, the largest other logit, every other class in turn, nearest first), in start
    (the example, corners or the sphere, the inside of the ball) and in gradient (the model's and its smooth
    relative's). There are ``restarts`` runs, or one per goal where that is more. Every step of every run is checked on
    the model itself.

    Args:
        model: returns logits [B, C]; left as it was.
        x: [B, *] in the model's dtype.
        predicted: [B] int64.
        radius: [B], per example; examples of radius 0 are left alone.
        norm: ``"linf"`` or ``"l2"``.
        restarts, steps: number of runs, and of gradient steps in each.
        domain: ``(lower, upper)`` that attackers respect, or None.
        seed: of the random starts.

    Raises:
        ConfigError: an argument is out of range.
    """
    if norm not in _NORMS or restarts < 1 or steps < 1:
        raise ConfigError(
            f"attack: expected norm in {_NORMS}, restarts >= 1 and steps >= 1, "
            f"got {norm!r}, {restarts} and {steps}; fix them"
        )
    ball = _Ball(x, radius.to(x.device), norm, domain, torch.Generator().manual_seed(seed))
    search = _Search(model, ball, predicted.to(x.device))
    if len(x) == 0:
        return search.result()
    with torch.no_grad():
        others = model(x).double().scatter(1, predicted[:, None].to(x.device), -math.inf)
    order = others.argsort(1, descending=True)
    goals: list[Callable[[Tensor], Tensor]] = [search.cross_entropy, search.least_margin]
    goals += [search.towards(order[:, k]) for k in range(order.shape[1] - 1)]
    relative = smooth_relative(model)
    for run in range(max(restarts, len(goals))):
        goal = goals[run % len(goals)]
        search.climb(goal, relative if (run + run // len(goals)) % 2 else model, ball.start(run // 2 % 3), steps)
    return search.result()


class _Ball:
    """The inputs an attacker may choose, as moves from ``x`` in float64."""

    def __init__(
        self, x: Tensor, radius: Tensor, norm: str, domain: tuple[float, float] | None, generator: torch.Generator
    ) -> None:
        self.x, self.exact, self.norm, self.domain, self.generator = x, x.double(), norm, domain, generator
        self.limit = radius.double()
        # Rounding x + move to x's dtype must not leave the ball.
        room = torch.finfo(x.dtype).eps * (x.double().flatten(1).abs().amax(1) + self.limit) if len(x) else self.limit
        room = room * (math.sqrt(math.prod(x.shape[1:])) if norm == "l2" else 1.0)
        self.radius = self._wide((self.limit - room).clamp_min(0))

    def _wide(self, v: Tensor) -> Tensor:
        return v.view(-1, *[1] * (self.x.ndim - 1))

    def _l2(self, move: Tensor) -> Tensor:
        return self._wide(torch.linalg.vector_norm(move.flatten(1), dim=1))

    def random(self) -> Tensor:
        """Standard normal moves."""
        noise = torch.randn(self.x.shape, generator=self.generator, dtype=torch.float64)
        return noise.to(self.exact)

    def start(self, kind: int) -> Tensor:
        """The centre (0), a random corner or point of the sphere (1), or a point of the inside (2)."""
        if kind == 0:
            return self.project(1e-3 * self.radius * self.random())
        move = self.steepest(self.random())
        if kind == 2:
            depth = torch.rand(len(self.x), generator=self.generator, dtype=torch.float64)
            move = move * self._wide(depth.to(self.exact))
        return self.project(move)

    def steepest(self, gradient: Tensor) -> Tensor:
        """The move of full radius along which a linear function grows most; random where there is no gradient."""
        gradient = gradient.double().nan_to_num(0.0, 0.0, 0.0)
        gradient = gradient / self._wide(gradient.flatten(1).abs().amax(1)).clamp_min(1e-300)
        flat = self._wide((gradient.flatten(1) == 0).all(1))
        gradient = torch.where(flat, self.random(), gradient)
        if self.norm == "linf":
            return self.radius * gradient.sign()
        return self.radius * gradient / self._l2(gradient).clamp_min(1e-300)

    def project(self, move: Tensor) -> Tensor:
        """The move put back into the domain and the ball."""
        if self.domain is not None:
            inside = (self.exact + move).clamp(*self.domain)
            move = torch.where((inside - self.exact).abs() < move.abs(), inside - self.exact, move)
        if self.norm == "linf":
            return torch.maximum(torch.minimum(move, self.radius), -self.radius)
        return move * (self.radius / self._l2(move).clamp_min(1e-300)).clamp_max(1)

    def contains(self, point: Tensor) -> Tensor:
        """[B]: whether ``point``, as rounded, is really within the given radius."""
        move = (point.double() - self.exact).flatten(1)
        size = move.abs().amax(1) if self.norm == "linf" else torch.linalg.vector_norm(move, dim=1)
        return size <= self.limit


class _Search:
    """Goals, ascent, and the worst input so far."""

    def __init__(self, model: nn.Module, ball: _Ball, predicted: Tensor) -> None:
        self.model, self.ball, self.predicted = model, ball, predicted
        self.best = ball.x.detach().clone()
        self.margin = torch.full_like(ball.limit, math.inf)
        self.flipped = torch.zeros_like(predicted, dtype=torch.bool)

    def result(self) -> Attack:
        return Attack(self.flipped, self.best, self.margin)

    def cross_entropy(self, logits: Tensor) -> Tensor:
        # The scale keeps the softmax from saturating.
        spread = (logits.detach().amax(1, keepdim=True) - logits.detach().amin(1, keepdim=True)).clamp_min(1e-30)
        return F.cross_entropy(4 * logits / spread, self.predicted, reduction="none")

    def least_margin(self, logits: Tensor) -> Tensor:
        return -self._margin(logits)

    def towards(self, target: Tensor) -> Callable[[Tensor], Tensor]:
        def goal(logits: Tensor) -> Tensor:
            chosen = torch.stack([target, self.predicted], 1)
            return torch.sub(*logits.gather(1, chosen).unbind(1))

        return goal

    def _margin(self, logits: Tensor) -> Tensor:
        own = self.predicted[:, None]
        return logits.gather(1, own)[:, 0] - logits.scatter(1, own, -math.inf).amax(1)

    @torch.no_grad()
    def observe(self, move: Tensor) -> None:
        """Judge the inputs ``x + move`` on the model."""
        point = (self.ball.exact + move).to(self.ball.x.dtype)
        logits = self.model(point).double()
        margin = self._margin(logits)
        counts = self.ball.contains(point) & (self.ball.limit > 0)
        broken = (logits.argmax(1) != self.predicted) | torch.isnan(logits).any(1)
        better = counts & (broken | (margin < self.margin)) & ~self.flipped
        self.best[better], self.margin[better] = point[better], margin[better]
        self.flipped |= counts & broken

    def climb(self, goal: Callable[[Tensor], Tensor], guide: nn.Module, move: Tensor, steps: int) -> None:
        """Ascend ``goal`` along ``guide``'s gradient from ``x + move``."""
        self.observe(move)
        for step in range(steps):
            point = (self.ball.exact + move).to(self.ball.x.dtype).requires_grad_()
            with torch.enable_grad():
                value = goal(guide(point)).sum()
                gradient = torch.autograd.grad(value, point, allow_unused=True)[0]
            gradient = torch.zeros_like(point) if gradient is None else gradient
            length = 2.0 * (1 - step / steps) ** 2 + 1 / steps  # from across the ball to a fine step
            move = self.ball.project(move + length * self.ball.steepest(gradient))
            self.observe(move)


def flips(model: nn.Module, x: Tensor, certificate: Certificate, *, fraction: float = 0.999, **options: Any) -> int:
    """How many certified examples change class within ``fraction`` of their radius; more than 0 refutes the claim.

    An example whose class already differs from ``certificate.predicted`` counts too.

    Args:
        model, x: what was certified.
        certificate: the claim; give :func:`attack` the ``domain`` the claim was restricted to.
        fraction: of each radius, in (0, 1).
        options: passed to :func:`attack`.

    Raises:
        ConfigError: the certificate is not one of ``x``, or ``fraction`` is out of range.
    """
    if len(certificate) != len(x) or not 0 < fraction < 1:
        raise ConfigError(
            f"flips: expected a certificate of {len(x)} examples and 0 < fraction < 1, "
            f"got {len(certificate)} and {fraction}; pass the certified batch"
        )
    rows = certificate.radius > 0
    if not bool(rows.any()):
        return 0
    found = attack(
        model,
        x[rows],
        certificate.predicted[rows],
        certificate.radius[rows] * fraction,
        certificate.norm,
        **options,
    )
    return int(found.flipped.sum())
