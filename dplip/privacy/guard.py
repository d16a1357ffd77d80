# SPDX-License-Identifier: Apache-2.0
"""Checks, while training, that what the sensitivity was proved for is what runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dplip.bounds import InputDomain
from dplip.errors import BoundViolation, PlanError
from dplip.norms import Norms

__all__ = ["Guard"]

_TOLERANCE = 1e-4  # float32 softmax sums to 1 within a few roundings


class Guard:
    """Hooks on the private module; each failure is raised before any noise is spent on the step.

    * Inputs of a training forward pass must lie in the public domain, finite.
    * The gradient that arrives at the logits must respect the loss's bounds, example by example: catches another
      loss than the one declared, a weighted one, a sum over several calls.
    * One backward pass per step: a second one would add an example's gradient twice.
    """

    def __init__(self, module: nn.Module, domain: InputDomain, cotangent: Norms) -> None:
        self.domain, self.cotangent = domain, cotangent
        self.backward_passes = 0
        self._handles = [
            module.register_forward_pre_hook(self._check_input),
            module.register_forward_hook(self._watch_output),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def start_step(self) -> None:
        """Forget the previous step."""
        self.backward_passes = 0

    def require_one_backward(self) -> None:
        """Raise :class:`PlanError` if examples may have contributed more than once since the last step."""
        if self.backward_passes > 1:
            raise PlanError(
                f"step: expected at most one backward pass through the model per step, got {self.backward_passes}; "
                "call optimizer.step() and optimizer.zero_grad() after each, so no example counts twice"
            )

    def _check_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module.training and torch.is_grad_enabled():
            self.domain.check(args[0], "training input")

    def _watch_output(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if module.training and output.requires_grad:
            output.register_hook(self._check_cotangent)

    @torch.no_grad()
    def _check_cotangent(self, g: Tensor) -> None:
        self.backward_passes += 1
        if g.numel() == 0:
            return
        rows = g.flatten(1)
        for name, p in (("l1", 1.0), ("l2", 2.0), ("linf", float("inf"))):
            worst, allowed = float(torch.linalg.vector_norm(rows, p, dim=1).amax()), getattr(self.cotangent, name)
            if not worst <= allowed * (1 + _TOLERANCE):  # also catches NaN
                raise BoundViolation(
                    f"loss: expected one example's logit gradient to have {name} norm <= {allowed:g}, got {worst:g}; "
                    "train with the loss given to make_private, summed over the batch, without weights"
                )
