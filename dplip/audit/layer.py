# SPDX-License-Identifier: Apache-2.0
"""Searches for a violated bound of one layer, by gradient ascent over inputs, cotangents and parameters.

Every function returns the largest ratio *found / claimed* per bound. Above 1 the bound is refuted; close to 1
it is tight; below 1 nothing is proved, because ascent may stop short of the maximum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dplip.audit.ascent import ascend
from dplip.layers.base import LipschitzLayer, Shapes
from dplip.norms import Norms

__all__ = ["ORDERS", "PAIRS", "claims", "measured_norms", "rounding", "search_gradients", "search_moves"]

ORDERS = {"l1": 1.0, "l2": 2.0, "linf": math.inf}
PAIRS = {
    "inf_inf": ("linf", "linf"),
    "two_inf": ("l2", "linf"),
    "two_two": ("l2", "l2"),
    "one_one": ("l1", "l1"),
    "one_inf": ("l1", "linf"),
}
"""Field of :class:`dplip.norms.OperatorNorms`: norm of the input, norm of the output."""


def measured_norms(v: Tensor) -> dict[str, Tensor]:
    """The l_1, l_2 and l_inf norm of every example of ``v`` [B, *]: ``{name: [B]}``."""
    flat = v.detach().flatten(1)
    return {name: torch.linalg.vector_norm(flat, p, dim=1) for name, p in ORDERS.items()}


def claims(v: Tensor) -> list[tuple[Norms, Norms, Norms, Norms]]:
    """For every example, true statements about its norms: all three at once, then each alone."""
    norms, dim = {name: value.tolist() for name, value in measured_norms(v).items()}, math.prod(v.shape[1:])
    return [
        (Norms(dim, a, b, c), Norms(dim, l1=a), Norms(dim, l2=b), Norms(dim, linf=c))
        for a, b, c in zip(norms["l1"], norms["l2"], norms["linf"], strict=True)
    ]


def rounding(layer: LipschitzLayer, x: Tensor) -> float:
    """Absolute error to allow for a float64 difference of two outputs at inputs as large as ``x``."""
    with torch.no_grad():
        size = float(layer(x).abs().max()) + float(x.abs().max())
    size += max((float(p.detach().abs().max()) for p in layer.parameters()), default=0.0)
    return 1e-14 * size * math.prod(x.shape[1:])


def _quotient(found: float, bound: float) -> float:
    if bound == 0:
        return math.inf if found > 0 else 0.0
    return 0.0 if math.isinf(bound) else found / bound


def _per_example(scale: Tensor, like: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (like.ndim - 1))


def search_gradients(
    layer: LipschitzLayer, shapes: Shapes, x: Tensor, g: Tensor, *, steps: int, lr: float
) -> dict[str, float]:
    """Maximises ``||dL/dparameter|| / param_sensitivity`` over input, cotangent and parameters.

    Args:
        layer: in float64; its parameters are changed.
        shapes: one example's shapes.
        x, g: starting inputs and cotangents [B, *], one restart an example.
        steps: Adam steps.
        lr: their size.
    """
    best = {name: 0.0 for name, _ in layer.named_parameters()}
    if not best:
        return best
    x, g = x.detach().clone().requires_grad_(), g.detach().clone().requires_grad_()

    def sizes() -> dict[str, Tensor]:
        grads = layer.per_sample_grad(x, g)
        return {name: torch.linalg.vector_norm(v.flatten(1), dim=1) for name, v in grads.items()}

    def objective() -> Tensor:
        return torch.stack(list(sizes().values())).prod(0)

    def observe() -> None:
        with torch.no_grad():
            found = {name: value.tolist() for name, value in sizes().items()}
        for i, (of_x, of_g) in enumerate(zip(claims(x), claims(g), strict=True)):
            for name, bound in layer.param_sensitivity(of_x[0], of_g[0], shapes).items():
                best[name] = max(best[name], _quotient(found[name][i], bound))

    def project() -> None:
        g.div_(_per_example(torch.linalg.vector_norm(g.flatten(1), dim=1).clamp_min(1e-12), g))

    ascend(objective, [x, g, *layer.parameters()], steps=steps, lr=lr, observe=observe, project=project, every=5)
    return best


def search_moves(
    layer: LipschitzLayer, shapes: Shapes, x: Tensor, d: Tensor, *, steps: int, lr: float
) -> dict[str, float]:
    """Maximises the five quotients ``||f(x + d) - f(x)|| / ||d||`` over points, displacements and parameters.

    By duality the same five constants bound cotangents, whose search would need second derivatives.

    Args:
        layer: in float64; its parameters are changed.
        shapes: one example's shapes.
        x, d: starting points and displacements [B, *]; displacements keep at least their initial length.
        steps: Adam steps.
        lr: their size.
    """
    best = dict.fromkeys(PAIRS, 0.0)
    x, d = x.detach().clone().requires_grad_(), d.detach().clone().requires_grad_()
    least = torch.linalg.vector_norm(d.detach().flatten(1), dim=1)

    def quotients() -> dict[str, Tensor]:
        moved, move = (layer(x + d) - layer(x)).flatten(1), d.flatten(1)
        before = {k: torch.linalg.vector_norm(move, p, dim=1).clamp_min(1e-30) for k, p in ORDERS.items()}
        after = {k: torch.linalg.vector_norm(moved, p, dim=1) for k, p in ORDERS.items()}
        return {name: after[b] / before[a] for name, (a, b) in PAIRS.items()}

    def objective() -> Tensor:
        return torch.stack(list(quotients().values())).prod(0)

    def observe() -> None:
        with torch.no_grad():
            found = quotients()
        claimed = layer.operator_norms(shapes).closed(shapes.in_dim, shapes.out_dim)
        error = rounding(layer, x.detach()) / float(least.min())
        for name, value in found.items():
            best[name] = max(best[name], _quotient(float(value.max()) - error, getattr(claimed, name)))

    def project() -> None:  # too short a displacement is all rounding
        size = torch.linalg.vector_norm(d.flatten(1), dim=1).clamp_min(1e-30)
        d.mul_(_per_example((least / size).clamp_min(1.0), d))

    ascend(objective, [x, d, *layer.parameters()], steps=steps, lr=lr, observe=observe, project=project, every=5)
    return best
