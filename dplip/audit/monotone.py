# SPDX-License-Identifier: Apache-2.0
"""A search for pairs of inputs that refute monotonicity."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dplip.errors import ConfigError

__all__ = ["MonotoneAttack", "monotone_violations"]


@dataclass(frozen=True)
class MonotoneAttack:
    """The worst pair found for every start and asked direction.

    Attributes:
        descent: [R] float64, the largest ``-s (f_j(x + t e_i) - f_j(x))`` found; positive where the output moved
            the wrong way.
        output, feature: [R] int64, j and i.
        x: [R, d], the lower end of the pair.
        step: [R] float64, t > 0.
        slope: [R] float64, the least ``s (f_j(x + t e_i) - f_j(x)) / t``.
    """

    descent: Tensor
    output: Tensor
    feature: Tensor
    x: Tensor
    step: Tensor
    slope: Tensor

    def violations(self, tolerance: float = 1e-9) -> int:
        """How many pairs move the wrong way by more than ``tolerance`` (float64 rounding)."""
        return int((self.descent > tolerance).sum())


def monotone_violations(
    model: nn.Module,
    directions: Tensor,
    starts: Tensor,
    *,
    domain: tuple[float, float] | tuple[Tensor, Tensor] = (0.0, 1.0),
    steps: int = 50,
    lr: float = 0.05,
    seed: int = 0,
) -> MonotoneAttack:
    """Projected gradient ascent on ``-s (f(x + t e_i) - f(x))`` over the input ``x`` and the length ``t``.

    Every start meets every (output, feature) with a direction. All values are computed in float64, whatever the model's
    type; the model is left as it was. A search can refute monotonicity, never prove it.

    Args:
        model: maps [B, d] to [B, C].
        directions: [d] or [C, d] in {-1, 0, 1}.
        starts: [R, d].
        domain: lower and upper ends of every entry, numbers or [d]; ``x`` and ``x + t e_i`` stay within.
        steps: Adam steps.
        lr: their size, relative to the domain's width.
        seed: of the first lengths.

    Raises:
        ConfigError: the domain is empty, or no direction is asked.
    """
    twin = copy.deepcopy(model).double().requires_grad_(False)
    low, high = (torch.as_tensor(e, dtype=torch.float64).expand(starts.shape[1]) for e in domain)
    with torch.no_grad():
        outputs = twin(starts[:1].double()).shape[1]
    signs = torch.as_tensor(directions).double()
    asked = signs.expand(outputs, starts.shape[1]).nonzero()
    if not bool((low < high).all()) or not len(asked):
        raise ConfigError(
            "monotone_violations: expected lower < upper and a direction that is not 0, "
            "got none; fix the domain or directions"
        )
    generator = torch.Generator().manual_seed(seed)
    x = starts.double().clamp(low, high).repeat_interleave(len(asked), 0).requires_grad_()
    output, feature = (asked[:, k].repeat(len(starts)) for k in (0, 1))
    sign, rows = signs.expand(outputs, starts.shape[1])[output, feature], torch.arange(len(output))
    width, width_i = high - low, (high - low)[feature]
    share = torch.rand(len(output), generator=generator, dtype=torch.float64).mul_(width_i).requires_grad_()

    def pairs() -> tuple[Tensor, Tensor, Tensor]:
        """Where the pair lies after projection: from, to, and the signed rise between them."""
        base = torch.minimum(torch.maximum(x, low), high)
        t = share.clamp_min(1e-6 * float(width.min()))
        end = torch.minimum(base[rows, feature] + t, high[feature])
        start = torch.minimum(base[rows, feature], high[feature] - 1e-6 * width_i)
        at = base.scatter(1, feature[:, None], start[:, None])
        to = base.scatter(1, feature[:, None], torch.maximum(end, start)[:, None])
        rise = sign * (twin(to) - twin(at))[rows, output]
        return at, to, rise

    best = _Best(len(output), x)
    optimizer = torch.optim.Adam([x, share], lr=lr * float(width.mean()))
    for step in range(steps + 1):
        at, to, rise = pairs()
        best.update(at.detach(), (to - at).detach()[rows, feature], rise.detach())
        if step == steps or not rise.requires_grad:
            break
        optimizer.zero_grad()
        gradients: Sequence[Tensor] = torch.autograd.grad(rise.sum(), [x, share])
        for variable, gradient in zip((x, share), gradients, strict=True):
            variable.grad = gradient.nan_to_num(0.0, 0.0, 0.0)
        optimizer.step()
        with torch.no_grad():
            x.copy_(torch.minimum(torch.maximum(x, low), high))
            share.copy_(torch.minimum(share.clamp_min(0), width_i))
    return MonotoneAttack(best.descent, output, feature, best.x, best.step, best.slope)


class _Best:
    """The largest descent and the least slope of every pair so far."""

    def __init__(self, count: int, x: Tensor) -> None:
        self.descent = x.new_full((count,), -torch.inf).detach()
        self.slope = -self.descent
        self.x, self.step = x.detach().clone(), torch.zeros_like(self.descent)

    def update(self, x: Tensor, step: Tensor, rise: Tensor) -> None:
        better = -rise > self.descent
        self.descent = torch.where(better, -rise, self.descent)
        self.x = torch.where(better[:, None], x, self.x)
        self.step = torch.where(better, step, self.step)
        slope = torch.where(step > 0, rise / step, torch.inf)
        self.slope = torch.minimum(self.slope, slope)
