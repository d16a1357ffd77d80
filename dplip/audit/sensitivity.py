# SPDX-License-Identifier: Apache-2.0
"""A search for a violated sensitivity: the largest per-example gradient that gradient ascent can find."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dplip.audit.ascent import ascend
from dplip.bounds import Graph, InputDomain, forward, input_like, sensitivities, trace
from dplip.bounds.operations import Apply
from dplip.layers import DistanceLayer, LinfDistance, LipschitzLayer, SortLinear
from dplip.losses import BinaryCrossEntropy, BoundedLoss

__all__ = ["TOTAL", "search"]

TOTAL = "(total)"
"""Key of the norm of one example's whole gradient, whose bound is the root of the sum of squares."""


def search(
    model: nn.Module,
    domain: InputDomain,
    loss: BoundedLoss,
    *,
    weights: bool = False,
    inputs: Tensor | None = None,
    restarts: int = 24,
    steps: int = 40,
    lr: float = 0.05,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Maximises one example's gradient norm over inputs in the domain, labels and, if asked, weights.

    Each restart has its own input and label and climbs towards one parameter's norm; labels start as the least likely
    class. What is compared are exact autograd gradients of ``loss`` in float64, one example at a time, with the
    bounds for the weights of that moment. ``model`` itself is left alone. A result below the bound proves nothing:
    ascent may stop short of the maximum.

    Args:
        model: a model that :func:`dplip.bounds.trace` accepts. Its layers must be twice differentiable by autograd,
            except distance layers, for which the ascent (not the comparison) uses a plain formula.
        domain: where inputs live; infinite ends are searched within 3 of the reference.
        loss: summed loss with a bound on its logit gradient.
        weights: climb over the weights too, projecting them after every step.
        inputs: further starting inputs [R, *shape], put into the domain.
        restarts: number of random starting inputs.
        steps: Adam steps.
        lr: step size, relative to the domain's width for the inputs.
        seed: of the starting inputs.

    Returns:
        ``{parameter: (largest norm found, its bound)}``, where the *ratio* was largest, and the same for :data:`TOTAL`.

    Raises:
        DplipError: the model has no bounds on this domain; see :mod:`dplip.bounds`.
    """
    model = copy.deepcopy(model).double()
    graph = trace(model)
    reference = input_like(model, domain)
    names = [name for name, _ in model.named_parameters()]
    parameters = dict(model.named_parameters())
    to_domain = _projection(domain)
    x = _starts(domain, restarts, seed)
    if inputs is not None:
        x = torch.cat([inputs.detach().double(), x])
    x = to_domain(x).requires_grad_()
    with torch.no_grad():
        logits = model(x)
    targets = _targets(loss, logits)
    focus = torch.arange(len(x)) % (len(names) + 1)
    best = {name: (0.0, math.inf) for name in [*names, TOTAL]}

    def observe() -> None:
        bounds = sensitivities(graph, forward(graph, domain, reference), loss.logit_gradient(logits.shape[1]))
        bounds[TOTAL] = math.sqrt(sum(b * b for b in bounds.values()))
        for i in range(len(x)):
            found = _norms(model, parameters, loss, x.detach()[i : i + 1], targets[i : i + 1])
            for name, norm in found.items():
                bound = bounds.get(name, 0.0)  # a parameter that no output depends on
                if _ratio(norm, bound) >= _ratio(*best[name]):
                    best[name] = (norm, bound)

    def objective() -> Tensor:
        with _twice_differentiable(graph):
            squares = _per_example_squares(graph, loss, x, targets)
        columns = [squares.get(name, x.new_zeros(len(x))) for name in names]
        columns.append(torch.stack(columns).sum(0))
        return torch.stack(columns, 1).gather(1, focus[:, None]).squeeze(1).clamp_min(1e-300).sqrt()

    @torch.no_grad()
    def project() -> None:
        x.copy_(to_domain(x))
        for module in model.modules() if weights else ():
            if isinstance(module, LipschitzLayer):
                module.project_()

    variables = [x, *parameters.values()] if weights else [x]
    every = max(1, steps // 4)
    ascend(objective, variables, steps=steps, lr=lr, observe=observe, project=project, every=every)
    return best


def _ratio(found: float, bound: float) -> float:
    if bound == 0:
        return math.inf if found > 0 else 0.0
    return found / bound


def _projection(domain: InputDomain) -> Callable[[Tensor], Tensor]:
    def project(x: Tensor) -> Tensor:
        x = x.detach().clamp(domain.lower, domain.upper)
        if math.isfinite(domain.l2_radius):
            away = x - domain.reference
            norm = torch.linalg.vector_norm(away.flatten(1), dim=1).view(-1, *[1] * (x.ndim - 1))
            x = domain.reference + away * (domain.l2_radius / norm.clamp_min(domain.l2_radius))
        return x

    return project


def _starts(domain: InputDomain, count: int, seed: int) -> Tensor:
    """Uniform, corner, constant and sparse inputs."""
    generator = torch.Generator().manual_seed(seed)
    low = domain.lower if math.isfinite(domain.lower) else domain.reference - 3
    high = domain.upper if math.isfinite(domain.upper) else domain.reference + 3
    share = torch.rand(count, *domain.shape, generator=generator, dtype=torch.float64)
    share[1::4] = share[1::4].round()
    share[2::4] = share[2::4, ...].flatten(1)[:, :1].round().view(-1, *[1] * len(domain.shape))
    share[3::4] = torch.where(share[3::4] < 0.8, 0.0, 1.0)
    return low + (high - low) * share


def _targets(loss: BoundedLoss, logits: Tensor) -> Tensor:
    """The least likely class for every other example, each class in turn for the rest."""
    if isinstance(loss, BinaryCrossEntropy):
        return (logits < 0).to(logits.dtype)
    turn = torch.arange(len(logits)) % logits.shape[1]
    return torch.where(torch.arange(len(logits)) % 2 == 0, logits.argmin(1), turn)


def _norms(
    model: nn.Module, parameters: dict[str, nn.Parameter], loss: BoundedLoss, x: Tensor, target: Tensor
) -> dict[str, float]:
    grads = torch.autograd.grad(loss(model(x), target), list(parameters.values()), materialize_grads=True)
    norms = {name: float(torch.linalg.vector_norm(g)) for name, g in zip(parameters, grads, strict=True)}
    return norms | {TOTAL: math.sqrt(sum(n * n for n in norms.values()))}


def _per_example_squares(graph: Graph, loss: BoundedLoss, x: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Squared norms [B] of every example's gradient, differentiable in the inputs and the weights."""
    values = graph.evaluate(x)
    value = loss(values[graph.output], targets)
    owners = [(n, n.operation.layer) for n in graph.nodes if n.parameters and isinstance(n.operation, Apply)]
    outputs = [values[n.name] for n, _ in owners]
    cotangents = torch.autograd.grad(value, outputs, create_graph=True, materialize_grads=True)
    total: dict[str, Tensor] = {}
    for (node, layer), g in zip(owners, cotangents, strict=True):
        for local, grad in layer.per_sample_grad(values[node.inputs[0]], g).items():
            name = node.parameters[local]
            total[name] = total[name] + grad if name in total else grad
    return {name: grad.flatten(1).square().sum(1) for name, grad in total.items()}


@contextmanager
def _twice_differentiable(graph: Graph) -> Iterator[None]:
    """Replaces the kernels of distance layers, which autograd differentiates once, by formulas in plain torch."""
    layers = [m for layer in graph.layers() for m in layer.modules() if isinstance(m, DistanceLayer)]
    for layer in layers:
        layer.__dict__["distance"] = _plain_distance(layer)
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("distance", None)


def _plain_distance(layer: DistanceLayer) -> Callable[[Tensor, Tensor], Tensor]:
    def distance(x: Tensor, w: Tensor) -> Tensor:
        t = (x[:, None] - w).abs()
        if isinstance(layer, SortLinear):
            return t.topk(len(layer.order_weights), dim=-1)[0] @ layer.order_weights
        p = layer.p if isinstance(layer, LinfDistance) else math.inf
        if math.isinf(p):
            return t.max(-1)[0]
        largest = t.detach().amax(-1, keepdim=True).clamp_min(1e-30)
        mean = ((t / largest).clamp_min(1e-30) ** p).mean(-1)
        gain = 1.0 if layer.power_mean else layer.in_features ** (1 / p)
        return gain * largest.squeeze(-1) * mean ** (1 / p)

    return distance
