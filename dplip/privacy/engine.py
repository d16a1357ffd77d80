# SPDX-License-Identifier: Apache-2.0
"""One call makes a torch module, optimizer and loader private, without clipping and without wrapping the module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from accountants import Accountant, Neighbors, make_accountant
from dplip.bounds import InputDomain, input_like
from dplip.checkpoint import load_checkpoint, save_checkpoint
from dplip.errors import NoRuleError, PlanError
from dplip.losses import BoundedLoss, bounded
from dplip.privacy.arithmetic import Arithmetic
from dplip.privacy.checkpoint import capture, restore, restore_ledger
from dplip.privacy.engine_settings import (
    PublicSizeWarning,
    clipping,
    dataset_size,
    default_domain,
    listed,
    plan_settings,
)
from dplip.privacy.guard import Guard
from dplip.privacy.noise import NoiseSource
from dplip.privacy.optimizer import ClipFreeOptimizer
from dplip.privacy.plan import PrivacyPlan
from dplip.privacy.replacements import fix
from dplip.privacy.sampling import PoissonSampler, PrivateLoader
from dplip.privacy.sensitivity import StepSensitivity
from dplip.privacy.validate import Finding, validate

__all__ = ["ClipFreeEngine", "PublicSizeWarning"]


class ClipFreeEngine:
    """Clip-free DP-SGD with the calls Opacus users know.

    >>> engine = ClipFreeEngine(accountant="pld")
    >>> model, optimizer, loader = engine.make_private_with_epsilon(
    ...     module=model, optimizer=optimizer, data_loader=loader, loss=loss,
    ...     target_epsilon=3.0, target_delta=1e-5, epochs=10, population=60_000)  # doctest: +SKIP
    >>> for x, y in loader:  # doctest: +SKIP
    ...     optimizer.zero_grad()
    ...     loss(model(x), y).backward()
    ...     optimizer.step()

    The module keeps its class and its parameters; hooks check what the proof assumes (:class:`Guard`).

    Args:
        accountant: ``"pld"`` or ``"rdp"``.
        neighbors: neighbouring relation of the guarantee.
        insecure_seed: fixes noise and sampling for tests; recorded, and not private against who knows it.

    Raises:
        PlanError: ``accountant`` or ``neighbors`` is unknown.
    """

    def __init__(
        self,
        *,
        accountant: str = "pld",
        neighbors: Neighbors | str = Neighbors.ADD_OR_REMOVE_ONE,
        insecure_seed: int | None = None,
    ) -> None:
        try:
            self.neighbors = Neighbors(neighbors)
            self.accountant: Accountant = make_accountant(accountant, self.neighbors)
        except ValueError as error:
            raise PlanError(f"engine: {error}; choose a known accountant and relation") from error
        self.insecure_seed = insecure_seed
        self.plan: PrivacyPlan | None = None
        self.optimizer: ClipFreeOptimizer | None = None
        self.loader: PrivateLoader | None = None

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        data_loader: DataLoader[Any],
        loss: nn.Module,
        noise_multiplier: float,
        epochs: int | None = None,
        steps: int | None = None,
        delta: float = 1e-5,
        population: int | None = None,
        domain: InputDomain | None = None,
        foreign: Mapping[str, float] | None = None,
        **plan_options: Any,
    ) -> tuple[nn.Module, ClipFreeOptimizer, PrivateLoader]:
        """Train with a given noise multiplier.

        Args:
            module: a model that :func:`dplip.bounds.trace` accepts.
            optimizer: any torch optimizer over the module's parameters.
            data_loader: supplies the dataset, the expected batch size and the collate function; batches will be
                Poisson draws instead of its own.
            loss: the loss that will be trained with, summed over the batch (:func:`dplip.losses.bounded`).
            noise_multiplier: noise standard deviation over sensitivity.
            epochs, steps: length of the run; one epoch is ``round(population / batch_size)`` steps.
            delta: of the guarantee.
            population: public nominal size of the dataset. Without it ``len(dataset)`` is used, with a warning: that
                number becomes public.
            domain: where inputs live. By default any finite input of the first example's shape, where an example is a
                sequence (x, ...).
            foreign: ``{submodule: max_grad_norm}`` of the parts of ``module`` without a bound; their gradients are
                clipped per example (:class:`dplip.privacy.ForeignModule`), the others' sensitivity is proved as usual.
            plan_options: ``sampling``, ``max_batch_size``, ``allocation``, ``noise_schedule`` of :class:`PrivacyPlan`.

        Raises:
            PlanError, NoRuleError, MixesExamplesError, UnboundedInputError, DataError: before anything is spent.
        """
        settings = plan_settings(
            data_loader, epochs, steps, delta, population, self.neighbors, self.accountant.name, plan_options
        )
        plan = PrivacyPlan(noise_multiplier=noise_multiplier, **settings)
        with clipping(module, foreign or {}):
            return self.attach(module, optimizer, data_loader.dataset, loss, plan, domain, data_loader.collate_fn)

    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        data_loader: DataLoader[Any],
        loss: nn.Module,
        target_epsilon: float,
        target_delta: float,
        epochs: int | None = None,
        steps: int | None = None,
        population: int | None = None,
        domain: InputDomain | None = None,
        foreign: Mapping[str, float] | None = None,
        **plan_options: Any,
    ) -> tuple[nn.Module, ClipFreeOptimizer, PrivateLoader]:
        """Train with the least noise whose proven epsilon after all steps is at most ``target_epsilon``.

        See :meth:`make_private` for the arguments.
        """
        settings = plan_settings(
            data_loader, epochs, steps, target_delta, population, self.neighbors, self.accountant.name, plan_options
        )
        plan = PrivacyPlan.calibrated(target_epsilon=target_epsilon, **settings)
        with clipping(module, foreign or {}):
            return self.attach(module, optimizer, data_loader.dataset, loss, plan, domain, data_loader.collate_fn)

    def attach(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        dataset: Any,
        loss: nn.Module,
        plan: PrivacyPlan,
        domain: InputDomain | None = None,
        collate: Any = None,
    ) -> tuple[nn.Module, ClipFreeOptimizer, PrivateLoader]:
        """Make everything private under an existing ``plan``; the other two methods end here."""
        if self.optimizer is not None:
            raise PlanError("engine: expected one module per engine, got a second; make another ClipFreeEngine")
        if plan.neighbors != self.neighbors.value or plan.accountant != self.accountant.name:
            raise PlanError(
                f"engine: expected a plan for {self.accountant.name} and {self.neighbors.value}, got {plan.accountant} "
                f"and {plan.neighbors}; create the engine with the plan's"
            )
        sampler = self._sampler(plan, dataset_size(dataset))
        loader = PrivateLoader(dataset, sampler, collate)
        proved: BoundedLoss = bounded(loss)
        domain = default_domain(dataset) if domain is None else domain
        modes = [(m, m.training) for m in module.modules()]
        module.train()
        eager = getattr(module, "_orig_mod", module)  # what torch.compile wraps
        guard = None
        try:
            sensitivity = self._sensitivity(eager, domain, proved)
            guard = self._guard(eager, sensitivity)
            private = self._optimizer(optimizer, plan, sensitivity, guard)
        except Exception:  # leave a refused module as it came
            if guard is not None:
                guard.remove()
            for part, training in modes:
                part.training = training
            raise
        if eager is not module:
            torch.compiler.reset()  # code compiled before the guard's hooks would pass them by
        private.project_()
        self.plan, self.optimizer, self.loader = plan, private, loader
        return module, private, loader

    def _sampler(self, plan: PrivacyPlan, size: int) -> PoissonSampler:
        return PoissonSampler(plan, size, self.insecure_seed)

    def _sensitivity(self, module: nn.Module, domain: InputDomain, loss: BoundedLoss) -> StepSensitivity:
        if isinstance(module, DistributedDataParallel) or any(hasattr(p, "full_tensor") for p in module.parameters()):
            raise PlanError(
                f"engine: expected a module of one process, got {type(module).__name__} over several; "
                "use DistributedClipFreeEngine"
            )
        return StepSensitivity(module, domain, loss)

    def _optimizer(
        self, optimizer: Optimizer, plan: PrivacyPlan, sensitivity: StepSensitivity, guard: Guard
    ) -> ClipFreeOptimizer:
        return ClipFreeOptimizer(
            optimizer,
            plan=plan,
            sensitivity=sensitivity,
            accountant=self.accountant,
            noise=NoiseSource(next(iter(sensitivity.trainable.values())).device, self.insecure_seed),
            guard=guard,
        )

    def _guard(self, module: nn.Module, sensitivity: StepSensitivity) -> Guard:
        return Guard(
            module,
            sensitivity.domain,
            sensitivity.cotangent * (1 / sensitivity.loss.copies),
            copies=sensitivity.loss.copies,
            arithmetic=Arithmetic(sensitivity.graph, input_like(sensitivity.model, sensitivity.domain)),
        )

    @staticmethod
    def validate(module: nn.Module, *, strict: bool = False, domain: InputDomain | None = None) -> list[Finding]:
        """What in ``module`` breaks the proof, by name, with remedies; see :func:`dplip.privacy.validate`.

        Raises:
            NoRuleError: with ``strict``, if there is anything.
        """
        found = validate(module, domain=domain)
        if strict and found:
            raise NoRuleError(f"validate: {found[0]}" + (f" (and {len(found) - 1} more)" if found[1:] else ""))
        return found

    @staticmethod
    def is_compatible(module: nn.Module, *, domain: InputDomain | None = None) -> bool:
        """Whether :meth:`validate` finds nothing."""
        return not validate(module, domain=domain)

    @staticmethod
    def get_compatible_module(module: nn.Module, *, normalize: bool = False) -> nn.Module:
        """A fixed copy of ``module``; :func:`dplip.privacy.fix` also tells what it changed.

        Raises:
            NoRuleError: something is left that has no sound replacement.
        """
        fixed, _ = fix(module, normalize=normalize)
        ClipFreeEngine.validate(fixed, strict=True)
        return fixed

    def get_epsilon(self, delta: float | None = None) -> float:
        """Proven epsilon of the steps taken so far, at ``delta`` (default: the plan's); ``inf`` without noise.

        Raises:
            PlanError: nothing was made private yet, or ``delta`` is outside (0, 1).
        """
        plan, optimizer, _ = self.attached("get_epsilon")
        at = plan.delta if delta is None else delta
        if not 0 < at < 1:
            raise PlanError(f"engine: expected 0 < delta < 1, got {at}; fix it")
        if optimizer.steps_taken == 0:
            return 0.0
        return math.inf if plan.noise_multiplier == 0 else self.accountant.epsilon(at)

    def attached(self, call: str) -> tuple[PrivacyPlan, ClipFreeOptimizer, PrivateLoader]:
        """Plan, optimizer and loader, which ``call`` needs; :class:`PlanError` where nothing was made private yet."""
        if self.plan is None or self.optimizer is None or self.loader is None:
            raise PlanError(f"engine: expected make_private before {call}, got no plan; call it first")
        return self.plan, self.optimizer, self.loader

    def save_checkpoint(
        self,
        path: Path | str,
        *,
        module: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        lr_scheduler: Any = None,
        extra: Any = None,
    ) -> None:
        """Write the run to one file in one atomic step: weights, inner optimizer, loss, ledger, plan, schedulers.

        The ledger counts the steps behind the saved weights: save before anything about a step leaves the process, and
        what is lost with the process was never released (:mod:`dplip.privacy.checkpoint`). No random state is saved.
        What is neither parameter nor buffer, such as an annealed exponent, belongs into ``extra``.

        Args:
            path: the file; replaced whole, never in part.
            module, optimizer: as in Opacus; if given they must be those of this engine.
            lr_scheduler: a torch learning-rate scheduler, or a sequence of them.
            extra: tensors, numbers, strings and containers to give back on loading.

        Raises:
            PlanError: nothing was made private yet, or a draw is accumulated in part.
            CheckpointError: a state holds something else than plain data, or the file cannot be written.
        """
        self._check_own(module, optimizer)
        save_checkpoint(Path(path), capture(self, listed(lr_scheduler), extra))

    def load_checkpoint(
        self,
        path: Path | str,
        *,
        module: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        lr_scheduler: Any = None,
    ) -> Any:
        """Go on from :meth:`save_checkpoint`, after ``make_private`` with the same arguments; returns ``extra``.

        Noise and sampling start from fresh streams. Runs no code from the file.

        Raises:
            PlanError: nothing was made private yet.
            CheckpointError: the file is damaged or belongs to another plan, model, optimizer or scheduler, or this
                engine has taken steps that loading would forget. Nothing is changed.
        """
        self._check_own(module, optimizer)
        return restore(self, load_checkpoint(Path(path)), listed(lr_scheduler))

    def _check_own(self, module: nn.Module | None, optimizer: Optimizer | None) -> None:
        _, own, _ = self.attached("checkpoints")
        held = {id(p) for p in own.sensitivity.named_parameters().values()}
        if module is not None and {id(p) for p in module.parameters()} != held:
            raise PlanError("engine: expected the module of make_private, got another; one engine holds one run")
        if optimizer is not None and optimizer is not own and optimizer is not own.original_optimizer:
            raise PlanError("engine: expected the optimizer of make_private, got another; one engine holds one run")

    def state_dict(self) -> dict[str, Any]:
        """Plan, ledger and steps taken, JSON-safe."""
        plan, optimizer, _ = self.attached("state_dict")
        return {
            "plan": plan.to_dict(),
            "accountant": self.accountant.state_dict(),
            "steps_taken": optimizer.steps_taken,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a run: restores ledger and steps; noise and sampling start from fresh seeds.

        Raises:
            CheckpointError: the saved plan is another one, the ledger is not that of the plan after the steps taken, or
                this engine has taken more steps, which loading would forget.
        """
        restore_ledger(self, state)
