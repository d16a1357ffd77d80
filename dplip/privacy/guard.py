# SPDX-License-Identifier: Apache-2.0
"""Checks, while training, that what the sensitivity was proved for is what runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dplip.bounds import InputDomain
from dplip.bounds.rounding import FLOOR
from dplip.errors import BoundViolation, PlanError
from dplip.norms import Norms

__all__ = ["Guard"]


class Guard:
    """Hooks on the private module and its parameters; each failure is raised before any noise is spent on the step.

    * Inputs of a training forward pass must lie in the public domain, finite.
    * The gradient that arrives at the logits must respect the loss's bounds, example by example: catches another
      loss than the one declared, a weighted one, a sum over several calls. The tolerance is a tenth of
      :data:`dplip.bounds.rounding.FLOOR`, the slack that every sensitivity carries.
    * One backward pass per step: a second one would add an example's gradient twice.
    * No gradient from anywhere else: a backward pass through the module in evaluation mode, or through a part of
      it alone, reaches the parameters without passing the checks above.

    A deep copy of the module carries hooks that do nothing: its gradients are not the ones that are released.

    Args:
        module: the private module.
        domain: where its inputs must lie.
        cotangent: bounds on one example's logit gradient.
        on_forward: called at every checked forward pass.
    """

    def __init__(
        self,
        module: nn.Module,
        domain: InputDomain,
        cotangent: Norms,
        on_forward: Callable[[], None] | None = None,
    ) -> None:
        self.domain, self.cotangent, self.on_forward = domain, cotangent, on_forward
        self.active = True
        self.start_step()
        self._handles = [
            module.register_forward_pre_hook(self._check_input, with_kwargs=True),
            module.register_forward_hook(self._watch_output),
            *(p.register_post_accumulate_grad_hook(self._arrived) for p in module.parameters() if p.requires_grad),
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> Guard:
        inert = object.__new__(Guard)
        inert.active = False
        return inert

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def start_step(self) -> None:
        """Forget the previous step; only after its gradients were released or dropped."""
        self.backward_passes = 0
        self._arrivals: dict[int, int] = {}

    def require_one_backward(self) -> None:
        """Raise :class:`PlanError` if examples may have contributed more than once or unchecked since the last step."""
        if self.backward_passes > 1:
            raise PlanError(
                f"step: expected at most one backward pass through the model per step, got {self.backward_passes}; "
                "call optimizer.step() and optimizer.zero_grad() after each, so no example counts twice"
            )
        arrivals = max(self._arrivals.values(), default=0)
        if arrivals > self.backward_passes:
            raise PlanError(
                "step: expected gradients from one call of the private module in training mode, "
                f"got {arrivals - self.backward_passes} unchecked; call module.train() and module(x), then zero_grad()"
            )

    def _check_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.active and module.training and torch.is_grad_enabled():
            for x in (*args, *kwargs.values()):
                self.domain.check(x, "training input")
            if self.on_forward is not None:
                self.on_forward()

    def _watch_output(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.active and module.training and output.requires_grad:
            output.register_hook(self._check_cotangent)

    def _arrived(self, p: Tensor) -> None:
        self._arrivals[id(p)] = self._arrivals.get(id(p), 0) + 1

    @torch.no_grad()
    def _check_cotangent(self, g: Tensor) -> None:
        self.backward_passes += 1
        if g.numel() == 0:
            return
        rows, tolerance = g.flatten(1), FLOOR.get(g.dtype, 0.0) / 10
        for name, p in (("l1", 1.0), ("l2", 2.0), ("linf", float("inf"))):
            worst, allowed = float(torch.linalg.vector_norm(rows, p, dim=1).amax()), getattr(self.cotangent, name)
            if not worst <= allowed * (1 + tolerance):  # also catches NaN
                raise BoundViolation(
                    f"loss: expected one example's logit gradient to have {name} norm <= {allowed:g}, got {worst:g}; "
                    "train with the loss given to make_private, summed over the batch, without weights"
                )
