# SPDX-License-Identifier: Apache-2.0
"""Gradient ascent that tries to refute a bound: behind the sensitivity audit and the layer contract."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["ascend"]


def ascend(
    objective: Callable[[], Tensor],
    variables: Sequence[Tensor],
    *,
    steps: int,
    lr: float,
    observe: Callable[[], None],
    project: Callable[[], None] | None = None,
    every: int = 1,
) -> None:
    """Adam on ``-log objective``, where ``objective`` returns one positive value per restart.

    The logarithm makes restarts of different size move alike. Where the objective does not depend on a
    variable, or its gradient is not finite, that variable stays put.

    Args:
        objective: differentiable; called once a step.
        variables: leaf tensors that require a gradient; changed in place.
        steps: number of Adam steps.
        lr: step size, annealed to a tenth of itself.
        observe: called before the first step, after every ``every``-th and after the last, to record what was reached.
        project: puts the variables back where they may be, after every step.
    """
    optimizer = torch.optim.Adam(variables, lr=lr, betas=(0.9, 0.99))
    observe()
    for step in range(steps):
        loss = -objective().clamp_min(1e-30).log().sum()
        if not loss.requires_grad:
            return
        grads = torch.autograd.grad(loss, list(variables), allow_unused=True)
        for variable, grad in zip(variables, grads, strict=True):
            variable.grad = None if grad is None else grad.nan_to_num(0.0, 0.0, 0.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - 0.9 * step / steps)
        optimizer.step()
        if project is not None:
            with torch.no_grad():
                project()
        if (step + 1) % every == 0 or step + 1 == steps:
            observe()
