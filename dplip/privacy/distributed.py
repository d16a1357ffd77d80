# SPDX-License-Identifier: Apache-2.0
"""Clip-free training on many processes: one plan, one ledger, one noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from accountants import Neighbors
from dplip.bounds import InputDomain
from dplip.checkpoint import save_checkpoint
from dplip.errors import PlanError
from dplip.losses import BoundedLoss
from dplip.privacy.checkpoint import capture
from dplip.privacy.distributed_optimizer import DistributedOptimizer, ReplicatedOptimizer
from dplip.privacy.distributed_ranks import Ranks
from dplip.privacy.distributed_sampling import ShardedPoissonSampler
from dplip.privacy.distributed_sharded import (
    ShardedOptimizer,
    ShardedSensitivity,
    Twin,
    is_sharded,
    reshard,
    sum_gradients,
)
from dplip.privacy.engine import ClipFreeEngine
from dplip.privacy.engine_settings import listed
from dplip.privacy.foreign import ForeignModule
from dplip.privacy.guard import Guard
from dplip.privacy.noise import NoiseSource, derived_seed
from dplip.privacy.optimizer import ClipFreeOptimizer
from dplip.privacy.plan import PrivacyPlan
from dplip.privacy.sampling import PrivateLoader
from dplip.privacy.sensitivity import StepSensitivity

__all__ = ["DistributedClipFreeEngine"]


class DistributedClipFreeEngine(ClipFreeEngine):
    """:class:`ClipFreeEngine` for the processes of ``torchrun``; the same script runs alone as well.

    >>> dist.init_process_group("gloo")  # "nccl" on GPUs  # doctest: +SKIP
    >>> engine = DistributedClipFreeEngine()  # doctest: +SKIP
    >>> model, optimizer, loader = engine.make_private_with_epsilon(module=DistributedDataParallel(model), ...)
    ... # doctest: +SKIP

    The module may be plain (gradients are summed in ``optimizer.step()``), wrapped in DistributedDataParallel (summed
    during backward) or sharded by FSDP2's ``fully_shard`` (optimizer built afterwards). All arguments mean what they
    mean in one process: ``batch_size``, ``population`` and the dataset are those of the whole run, on every rank. So:

    * **Sampling.** Rank ``r`` of ``W`` draws from its own examples ``r, r + W, ...`` with its own stream; the union is
      the Poisson batch of one process (:class:`ShardedPoissonSampler`). Empty local batches are batches.
    * **Gradients** are summed over ranks, never averaged, and divided by the public expected batch size.
    * **Noise** is added once: on rank 0 to the sum, or under FSDP2 by each rank to the entries it alone owns.
    * **Sensitivity, ledger, epsilon** are those of one process and the same on every rank.
    * **Refusals.** Before a step releases anything all ranks must agree; one that refuses stops all, and nothing is
      spent. A rank that dies ends the others through the group's timeout or its closed connection: restart all from the
      last checkpoint, whose ledger covers everything released before it was written.

    Call :meth:`save_checkpoint` and :meth:`load_checkpoint` on every rank; streams start anew, so no noise is drawn
    twice. Weights at the start are rank 0's. Gradients must not be reduced by the training loop itself.

    Args:
        accountant, neighbors, insecure_seed: see :class:`ClipFreeEngine`.
        process_group: the ranks that train together; by default all.
    """

    def __init__(
        self,
        *,
        accountant: str = "pld",
        neighbors: Neighbors | str = Neighbors.ADD_OR_REMOVE_ONE,
        insecure_seed: int | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(accountant=accountant, neighbors=neighbors, insecure_seed=insecure_seed)
        self.process_group = process_group
        self.ranks = Ranks(group=process_group)
        self._twin: Twin | None = None

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
        """:meth:`ClipFreeEngine.attach` on every rank, or on none.

        Raises:
            RankError: the ranks' plans, data sizes, models, losses or optimizers differ, or another rank refused.
            PlanError: a layout or precision that cannot be made exact, see :func:`sum_gradients`.
        """
        inner = module.module if isinstance(module, DistributedDataParallel) else module
        device = next((p.device for p in inner.parameters()), torch.device("cpu"))
        self.ranks = ranks = Ranks(device, self.process_group)
        ranks.together("engine", lambda: self._check_layout(module, inner))
        facts = ranks.together("engine", lambda: _facts(inner, optimizer, dataset, loss, plan, domain))
        ranks.require_equal("engine", facts)
        self._align(inner)
        attach = super().attach
        ranks.together("engine", lambda: attach(inner, optimizer, dataset, loss, plan, domain, collate))
        _, private, loader = self.attached("attach")
        if isinstance(private, ReplicatedOptimizer) and isinstance(module, DistributedDataParallel):
            private.sum_in_backward(module)
            module.train()
        elif isinstance(private, ShardedOptimizer):
            private.sensitivity.live = True
            private.project_()
        return module, private, loader

    def _check_layout(self, module: nn.Module, inner: nn.Module) -> None:
        if isinstance(module, DistributedDataParallel):
            if dist.get_process_group_ranks(module.process_group) != self.ranks.members():
                raise PlanError("engine: expected DDP over the engine's process group, got another; pass process_group")
            if module.mixed_precision is not None:
                raise PlanError(
                    "engine: expected full precision, got DDP's mixed precision; bounds are not proved in it"
                )
        reshard(inner)
        if is_sharded(inner):
            sum_gradients(inner, self.ranks)

    @torch.no_grad()
    def _align(self, module: nn.Module) -> None:
        """Public initial state: rank 0's whole tensors on all ranks, and the first gathering of sharded ones."""
        sharded = is_sharded(module)
        for t in [*(() if sharded else module.parameters()), *module.buffers()]:
            self.ranks.broadcast_(t)
        if sharded:
            self._twin = self.ranks.together("engine", lambda: Twin(module))
            self._twin.refresh()

    def _sampler(self, plan: PrivacyPlan, size: int) -> ShardedPoissonSampler:
        return ShardedPoissonSampler(plan, size, self.ranks.rank, self.ranks.size, self.insecure_seed)

    def _sensitivity(self, module: nn.Module, domain: InputDomain, loss: BoundedLoss) -> StepSensitivity:
        if self._twin is None:
            return super()._sensitivity(module, domain, loss)
        if any(isinstance(m, ForeignModule) for m in self._twin.module.modules()):
            raise PlanError("engine: expected whole foreign modules, got sharded ones; use DDP or the plain module")
        self._twin.module.train()
        return ShardedSensitivity(self._twin, domain, loss)

    def _optimizer(
        self, optimizer: Optimizer, plan: PrivacyPlan, sensitivity: StepSensitivity, guard: Guard
    ) -> DistributedOptimizer:
        sharded = isinstance(sensitivity, ShardedSensitivity)
        # Sharded noise comes from every rank; one seed for all of them would repeat it in every shard.
        seed = self.insecure_seed
        if seed is not None and sharded and self.ranks.size > 1:
            seed = derived_seed(seed, "rank", self.ranks.rank)
        kind = ShardedOptimizer if sharded else ReplicatedOptimizer
        return kind(
            optimizer,
            plan=plan,
            sensitivity=sensitivity,
            accountant=self.accountant,
            noise=NoiseSource(self.ranks.device, seed),
            guard=guard,
            ranks=self.ranks,
        )

    def save_checkpoint(
        self,
        path: Path | str,
        *,
        module: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        lr_scheduler: Any = None,
        extra: Any = None,
    ) -> None:
        """:meth:`ClipFreeEngine.save_checkpoint`, called on every rank; rank 0 writes, and all return once it has.

        The file holds whole tensors and the one ledger: any number of processes, in any layout, may go on from it.
        """
        self.ranks.together("save_checkpoint", lambda: self._check_own(_unwrapped(module), optimizer))
        schedulers = listed(lr_scheduler)
        if self._twin is not None:
            self._twin.refresh()
            state = capture(self, schedulers, extra)
        else:
            state = self.ranks.together("save_checkpoint", lambda: capture(self, schedulers, extra))
        self.ranks.together("save_checkpoint", lambda: save_checkpoint(Path(path), state) if self.ranks.first else None)

    def load_checkpoint(
        self,
        path: Path | str,
        *,
        module: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        lr_scheduler: Any = None,
    ) -> Any:
        """:meth:`ClipFreeEngine.load_checkpoint`, called on every rank, each of which must find the file."""
        load, own = super().load_checkpoint, _unwrapped(module)
        extra = self.ranks.together(
            "load_checkpoint", lambda: load(path, module=own, optimizer=optimizer, lr_scheduler=lr_scheduler)
        )
        if self._twin is not None:
            self._twin.scatter_()
        return extra

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`ClipFreeEngine.load_state_dict`; on every rank, with the same state and the same weights."""
        super().load_state_dict(state)
        if isinstance(self.optimizer, DistributedOptimizer):
            self.optimizer.compare_next = True


def _unwrapped(module: nn.Module | None) -> nn.Module | None:
    if module is not None:
        reshard(module)
    return module.module if isinstance(module, DistributedDataParallel) else module


def _facts(
    module: nn.Module, optimizer: Optimizer, dataset: Any, loss: nn.Module, plan: PrivacyPlan, domain: Any
) -> dict[str, str]:
    """What must be the same on every rank for the ranks to be one run."""
    return {
        "plan": plan.digest(),
        "number of examples": str(len(dataset)) if hasattr(dataset, "__len__") else "none",
        "parameters": repr([(n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in module.named_parameters()]),
        "module": repr(module),
        "optimizer": repr(optimizer),
        "loss": repr(loss),
        "domain": repr(domain),
    }
