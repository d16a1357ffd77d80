# SPDX-License-Identifier: Apache-2.0
"""Any torch optimizer made private without clipping."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer, SparseAdam

from accountants import Accountant
from dplip.errors import BoundViolation, PlanError
from dplip.layers import LipschitzLayer
from dplip.privacy.allocation import Tensors, allocate, noise_weights
from dplip.privacy.guard import Guard
from dplip.privacy.noise import NoiseSource
from dplip.privacy.plan import PrivacyPlan
from dplip.privacy.quantile import AdaptiveLogitClip
from dplip.privacy.sensitivity import StepSensitivity

__all__ = ["ClipFreeOptimizer"]


class ClipFreeOptimizer(Optimizer):
    """Wraps a torch optimizer; :meth:`step` releases one Gaussian mechanism and then lets it step.

    ``p.grad`` holds the SUM of per-example gradients of the batch, whose l_2 sensitivity in tensor ``k`` is at most the
    analytic ``s_k``. One step: check, compute ``sigma_k`` from the current weights, record the step in the ledger, add
    N(0, sigma_k^2) to every entry of tensor ``k`` (a missing gradient counts as 0), divide by the public expected batch
    size, take the inner optimizer's step, project the layers. Everything after the noise is post-processing.

    Guarantee. With Poisson batches of probability ``q``, each step is ``PoissonSampled(Gaussian(noise_multiplier), q)``
    on the joint gradient (Abadi et al., CCS 2016; sensitivity without clipping: Bethune et al., ICLR 2024), because
    ``sum_k (s_k / sigma_k)^2 = 1 / noise_multiplier^2``; later steps may choose ``sigma_k`` by released weights
    (adaptive composition).

    The bounds are those of the forward pass (the largest, after several), so a layer changed between ``backward`` and
    ``step`` still gets the noise its gradient needs. Gradients left over from before are dropped on construction.

    Raises:
        PlanError: the budget of ``plan.steps`` is used up, a parameter is foreign to the module, the optimizer calls
            its closure itself (LBFGS), or examples may have counted twice or unchecked.
        BoundViolation: a gradient is not finite, or moves a tensor whose sensitivity is 0.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        plan: PrivacyPlan,
        sensitivity: StepSensitivity,
        accountant: Accountant,
        noise: NoiseSource,
        guard: Guard,
    ) -> None:
        # Optimizer.__init__ is not called: parameters, state and defaults are the inner optimizer's.
        self.original_optimizer = optimizer
        self.plan, self.sensitivity, self.accountant = plan, sensitivity, accountant
        self.noise, self.guard = noise, guard
        self.steps_taken = 0
        self._announced: float | None = None  # what a noise scheduler assigned last
        self.released_sigma: dict[str, float] = {}  # of the last step's sum, per tensor; public
        self._names = {id(p): name for name, p in sensitivity.trainable.items()}
        self._projected = [m for m in sensitivity.model.modules() if isinstance(m, LipschitzLayer)]
        self._step_hooks: list[Callable[[ClipFreeOptimizer], None]] = []
        self._noted: dict[str, Tensors] = {}
        for p in self._all_parameters():
            p.grad = None
        self._check_parameters()
        if inspect.signature(optimizer.step).parameters["closure"].default is inspect.Parameter.empty:
            raise PlanError(
                f"optimizer: expected one gradient per step, got {type(optimizer).__name__}, which calls its closure; "
                "use SGD or Adam"
            )
        if isinstance(optimizer, SparseAdam):
            raise PlanError("optimizer: expected one for dense gradients, got SparseAdam; noise is dense, use Adam")
        self._check_clip_noise()
        if any(isinstance(m, AdaptiveLogitClip) for m in sensitivity.loss.modules() if m is not sensitivity.loss):
            raise PlanError("optimizer: expected AdaptiveLogitClip outermost, got it inside another loss; swap them")
        guard.on_forward = self._note_bounds

    def _check_clip_noise(self) -> None:
        """Refuse a clip quantile that would overspend in any step of the plan."""
        if self._adaptive is not None:
            for factor, _ in self.plan.noise_schedule or ((1.0, 1),):
                self._adaptive.gradient_multiplier(self.plan.noise_multiplier * factor, 0)

    def _all_parameters(self) -> list[Tensor]:
        held = [p for group in self.param_groups for p in group["params"]]
        return [*held, *self.sensitivity.trainable.values()]

    def _check_parameters(self) -> None:
        groups = [p for group in self.param_groups for p in group["params"]]
        held = [p for p in groups if p.requires_grad or p.grad is not None]  # what the inner optimizer would move
        foreign = sum(id(p) not in self._names for p in held)
        if foreign or not held:
            raise PlanError(
                "optimizer: expected parameters of the module that were trainable when it was made private, got "
                f"{foreign} others among {len(held)}; build the optimizer from module.parameters(), and freeze "
                "parameters after make_private instead of before to thaw them later"
            )

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.original_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.original_optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.original_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.original_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.original_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.original_optimizer.defaults = defaults

    @property
    def noise_multiplier(self) -> float:
        """The plan's noise multiplier for the coming step, or what a noise scheduler assigned last.

        Assigning it, as Opacus' noise schedulers do, is allowed where it agrees with the plan, and a step is refused
        where it no longer does: noise that the plan did not announce would not be what its epsilon was calibrated for.
        """
        return self.plan.multiplier(self.steps_taken) if self._announced is None else self._announced

    @noise_multiplier.setter
    def noise_multiplier(self, value: float) -> None:
        planned = self.plan.multiplier(self.steps_taken)
        if not math.isclose(value, planned, rel_tol=1e-9, abs_tol=0.0):
            raise PlanError(
                f"optimizer: expected the planned noise multiplier {planned:g} for step {self.steps_taken}, got "
                f"{value!r}; give the schedule to make_private(noise_schedule=...), so that epsilon covers it"
            )
        self._announced = float(value)

    def continue_from(self, steps: int) -> None:
        """Stand where a run stands after ``steps`` steps; a noise scheduler goes on from its multiplier there."""
        self.steps_taken = steps
        if self._announced is not None:
            self.noise_multiplier = self.plan.multiplier(steps)

    @property
    def expected_batch_size(self) -> float:
        """The plan's public divisor."""
        return self.plan.expected_batch_size

    def tensors(self) -> dict[str, tuple[Tensors, float]]:
        """Bound, size and noise standard deviation (of the sum) of each trainable parameter, for current weights."""
        return self._with_noise(self.sensitivity.tensors())

    def _with_noise(self, bounds: dict[str, Tensors]) -> dict[str, tuple[Tensors, float]]:
        weights = noise_weights(self.param_groups, self.sensitivity.trainable)
        released = self._released()
        bounds = {name: t._replace(weight=weights[name]) for name, t in bounds.items() if name in released}
        sigma = allocate(self.plan.allocation, bounds, self._gradient_multiplier())
        return {name: (t, sigma[name]) for name, t in bounds.items()}

    def _released(self) -> dict[str, Tensor]:
        """What the coming step releases: all that was trainable when made private and is not frozen now.

        ``requires_grad`` is configuration, so freezing and thawing may follow the step number; a frozen tensor's
        gradient is dropped, and the others share its noise budget.
        """
        return {name: p for name, p in self.sensitivity.trainable.items() if p.requires_grad}

    def _note_bounds(self) -> None:
        for name, t in self.sensitivity.tensors().items():
            self._noted[name] = max(t, self._noted.get(name, t))

    def attach_step_hook(self, hook: Callable[[ClipFreeOptimizer], None]) -> None:
        """Call ``hook(self)`` after every private step."""
        self._step_hooks.append(hook)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.original_optimizer.add_param_group(param_group)

    def signal_skip_step(self, do_skip: bool = True, rows: int | None = None) -> None:
        """Say what the next batch is: a part of a Poisson draw that others follow, or (``False``) its last part.

        Until the last part, :meth:`step` and :meth:`zero_grad` do nothing, so a plain loop over parts accumulates
        the draw's gradient and releases it once. :func:`dplip.privacy.virtual_batches` calls this for each part.

        Args:
            do_skip: whether more parts follow.
            rows: how many examples the part holds; more are refused.

        Raises:
            PlanError: the part before went without a backward pass (see :meth:`Guard.open`).
        """
        self.guard.open(last=not do_skip, rows=rows)
        if self._adaptive is not None:
            self._adaptive.expect_part()

    def discard(self) -> None:
        """Drop gradients and parts that were not released, as if the draw had never been; costs no privacy."""
        self.guard.start_step()
        self.zero_grad()
        self._noted = {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.guard.part.index > 0:  # the draw's earlier parts are in the gradients
            return
        self.original_optimizer.zero_grad(set_to_none)
        for p in self.sensitivity.trainable.values():  # also those that the inner optimizer does not hold
            if set_to_none or p.grad is None:
                p.grad = None
            else:
                p.grad.zero_()
        self.guard.forget()
        if self._adaptive is not None:
            self._adaptive.forget()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Release one noisy step, unless further parts of the draw follow (:meth:`signal_skip_step`)."""
        if not self.guard.part.last:
            return self._closed(closure)
        loss, bounds, gradients = self._prepare(closure)
        tensors = self._with_noise(bounds)
        step = self.steps_taken
        self._spend()
        self._release(gradients, {name: sigma for name, (_, sigma) in tensors.items()})
        self._refresh_clip(step)
        self.original_optimizer.step()
        self.project_()
        self.guard.start_step()
        self._noted = {}
        for hook in self._step_hooks:
            hook(self)
        return loss

    def _closed(self, closure: Callable[[], float] | None) -> float | None:
        """Run the closure, then ask the guard about all backward passes so far."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.guard.require_one_backward()
        return loss

    def _prepare(
        self, closure: Callable[[], float] | None
    ) -> tuple[float | None, dict[str, Tensors], dict[str, Tensor]]:
        """Everything that may refuse the step: loss, bounds and summed gradients, nothing released."""
        if self.steps_taken >= self.plan.steps:
            raise PlanError(
                f"step: expected at most {self.plan.steps} steps, got one more; the privacy budget of the plan is spent"
            )
        if self._announced is not None:
            self.noise_multiplier = self._announced  # refused where the plan has moved on
        self._check_parameters()
        loss = self._closed(closure)
        for p in self.sensitivity.trainable.values():
            if not p.requires_grad:
                p.grad = None
        bounds = self._noted or self.sensitivity.tensors()
        gradients = {name: self._summed(p, name, bounds[name]) for name, p in self._released().items()}
        _require_finite(gradients)
        return loss, bounds, gradients

    def _release(self, gradients: dict[str, Tensor], sigma: dict[str, float]) -> None:
        """Noise and the public divisor; what every ``p.grad`` holds afterwards is public."""
        self.noise.release_(list(gradients.values()), [sigma[name] for name in gradients], self.expected_batch_size)
        for name, noisy in gradients.items():
            self.sensitivity.trainable[name].grad = noisy
        self.released_sigma = sigma

    def project_(self) -> None:
        """Put every layer's parameters back into their set."""
        for layer in self._projected:
            layer.project_()

    @property
    def _adaptive(self) -> AdaptiveLogitClip | None:
        loss = self.sensitivity.loss
        return loss if isinstance(loss, AdaptiveLogitClip) else None

    def _gradient_multiplier(self) -> float:
        """What the plan's multiplier leaves for the gradient when the clip quantile is released with it."""
        z, adaptive = self.plan.multiplier(self.steps_taken), self._adaptive
        return z if adaptive is None else adaptive.gradient_multiplier(z, self.steps_taken)

    def _refresh_clip(self, step: int) -> None:
        adaptive = self._adaptive
        if adaptive is not None:
            adaptive.release(step, self.expected_batch_size, self.noise, self.plan.noise_multiplier > 0)
            self.refresh_bounds()

    def refresh_bounds(self) -> None:
        """Ask the loss for its bounds again, after it has changed by public means (a released or restored clip)."""
        self.guard.cotangent = self.sensitivity.refresh_cotangent() * (1 / self.sensitivity.loss.copies)

    def _spend(self) -> None:
        # The ledger grows before the noise leaves: an interrupted step counts as taken.
        event = self.plan.step_event(self.steps_taken)
        self.steps_taken += 1
        if self.plan.noise_multiplier > 0:
            self.accountant.compose(event)

    def _gradient(self, p: Tensor) -> Tensor:
        return torch.zeros_like(p) if p.grad is None else p.grad

    def _summed(self, p: Tensor, name: str, tensor: Tensors) -> Tensor:
        gradient = self._gradient(p)
        if tensor.bound == 0 and bool(gradient.any()):
            raise BoundViolation(
                f"step: expected no gradient for '{name}', on which the traced output does not depend, got one; "
                "nothing was released, remove what bypasses the module from the loss"
            )
        return gradient

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state; the ledger is the engine's to save."""
        return self.original_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.original_optimizer.load_state_dict(state_dict)

    def __repr__(self) -> str:
        return f"ClipFreeOptimizer({self.original_optimizer!r}, {self.plan!r})"


def _require_finite(gradients: Mapping[str, Tensor]) -> None:
    # A sum is finite only if all its terms are: one pass, no mask. Where it overflows, the entries decide.
    totals = [g.sum() for g in gradients.values()]
    if all(math.isfinite(total) for total in totals):
        return
    for name, gradient in gradients.items():
        if not bool(torch.isfinite(gradient).all()):
            raise BoundViolation(
                f"step: expected a finite gradient for '{name}', got NaN or infinity; nothing was released, "
                "check the model"
            )
