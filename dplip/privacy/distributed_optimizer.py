# SPDX-License-Identifier: Apache-2.0
"""One private step taken by many processes: gradients are summed over ranks, noise is added once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dplip.errors import PlanError, RankError
from dplip.privacy.allocation import Tensors, noise_weights
from dplip.privacy.distributed_ranks import Ranks
from dplip.privacy.optimizer import ClipFreeOptimizer

__all__ = ["CHECK_EVERY", "DistributedOptimizer", "ReplicatedOptimizer"]

CHECK_EVERY = 100
"""Steps between comparisons of the replicas' weights; the first step after a start or a resume compares too."""

Prepared = tuple[float | None, dict[str, Tensors], dict[str, Tensor]]


class DistributedOptimizer(ClipFreeOptimizer):
    """What replicated and sharded steps share: the ranks agree on a step before anything is spent or released.

    Each rank checks its own part. Then all exchange one short vector: whether a check failed, the steps taken, the
    bounds used and the noise weights. If any rank refuses, all raise and no ledger grows. An example lives on one rank,
    whose gradient respects that rank's bounds; every rank uses the largest bound of all, so one set of noise scales,
    the one-process allocation, covers every example.

    Raises:
        RankError: another rank refused the step, ranks have taken different numbers of steps, use different learning
            rates or hold different weights, or a rank is gone.
    """

    _collective_backward = False

    def __init__(self, *args: Any, ranks: Ranks, **kwargs: Any) -> None:
        self.ranks = ranks
        super().__init__(*args, **kwargs)
        self.compare_next = True

    def _weights_key(self) -> float:
        """A number that replicas share; ranks that hold shards have nothing to compare."""
        return 0.0

    def signal_skip_step(self, do_skip: bool = True, rows: int | None = None) -> None:
        """See :meth:`ClipFreeOptimizer.signal_skip_step`; ranks may split their local batches in different numbers.

        Raises:
            PlanError: backward passes sum over ranks (DDP, FSDP2), so their number must be the same on all.
        """
        if self._collective_backward:
            raise PlanError(
                "virtual_batches: expected a plain module, got one whose every backward pass waits for all ranks, "
                "while their draws differ in parts; pass the module without DDP or FSDP2"
            )
        super().signal_skip_step(do_skip, rows)

    def _prepare(self, closure: Callable[[], float] | None) -> Prepared:
        prepared, failure = None, None
        try:
            prepared = super()._prepare(closure)
            self._check_summed()
        except Exception as error:
            # The others see the same, or wait in backward where no message reaches them: end at once, so do they.
            if isinstance(error, RankError) or (closure is not None and self._collective_backward):
                raise
            failure = error
        bounds = self._agreed(None if prepared is None or failure else prepared[1])
        if prepared is None or failure is not None:
            raise failure if failure is not None else RankError("step: expected a prepared step, got none; restart")
        return prepared[0], bounds, prepared[2]

    def _check_summed(self) -> None:
        """Refuse gradients that backward should have summed over ranks and did not."""

    def _agreed(self, bounds: dict[str, Tensors] | None) -> dict[str, Tensors]:
        """The largest bounds of all ranks, once every rank has said that it is ready."""
        trainable = self.sensitivity.trainable
        weights = noise_weights(self.param_groups, trainable)
        compare = self.compare_next or self.steps_taken % CHECK_EVERY == 0
        mine = [
            float(bounds is None),
            float(self.steps_taken),
            self._weights_key() if compare else 0.0,
            *(weights[name] * p.requires_grad for name, p in trainable.items()),  # ranks freeze the same tensors
            *(math.inf if bounds is None else bounds[name].bound for name in trainable),
        ]
        everywhere = self.ranks.gather(mine)
        count, names = len(trainable), list(trainable)
        failed = [rank for rank, row in enumerate(everywhere) if row[0]]
        if bounds is None:
            return {}
        if failed:
            raise RankError(
                f"step: expected every rank to be ready, got a refusal on rank {failed[0]}; nothing was released, "
                "see its error"
            )
        for what, part in (("steps taken", slice(1, 2)), ("weights", slice(2, 3)), ("lr", slice(3, 3 + count))):
            if any(row[part] != everywhere[0][part] for row in everywhere):
                raise RankError(
                    f"step: expected the same {what} on every rank, got differences; nothing was released, "
                    "load one checkpoint and one configuration on all of them"
                )
        self.compare_next = False
        largest = [max(column) for column in zip(*(row[3 + count :] for row in everywhere), strict=True)]
        return {name: bounds[name]._replace(bound=value) for name, value in zip(names, largest, strict=True)}

    def _refresh_clip(self, step: int) -> None:
        """The clip quantile of the union: counts are summed, rank 0 releases, the new bound is everyone's."""
        adaptive = self._adaptive
        if adaptive is None or not adaptive.due(step):
            super()._refresh_clip(step)
            return
        within, rows = adaptive._seen or (0, 0)
        counts = torch.tensor([within, rows], dtype=torch.int64, device=self.ranks.device)
        self.ranks.sum_to_first_(counts)
        adaptive.forget()
        if self.ranks.first:
            adaptive.observe(*counts.tolist())
            super()._refresh_clip(step)
        else:
            adaptive.refreshes += 1
        bound = self.ranks.broadcast_(adaptive._bound.detach().clone().to(self.ranks.device))
        adaptive._bound.copy_(bound)
        self.refresh_bounds()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.original_optimizer!r}, {self.plan!r}, ranks={self.ranks.size})"


class ReplicatedOptimizer(DistributedOptimizer):
    """Every rank holds the whole model. Gradients are summed on rank 0, noised there once, and sent to all.

    The sum over the union of the local batches is formed first and noise is added to it as one process would, rounded
    once; what other ranks receive is the released gradient, bit for bit the same, so their steps and projections agree.
    A rank without gradients contributes zeros, whatever the reason.

    A plain module is summed in :meth:`step`, in one flat tensor. Under :class:`DistributedDataParallel` the sum is
    formed bucket by bucket during backward, by a hook that replaces DDP's average.
    """

    _reduced = False

    def sum_in_backward(self, module: DistributedDataParallel) -> None:
        """Replace DDP's average of gradients by their sum on rank 0.

        Raises:
            PlanError: ``module`` has a communication hook already.
        """
        try:
            module.register_comm_hook(None, self._sum_bucket)
        except (RuntimeError, ValueError) as error:
            raise PlanError(
                f"engine: expected a DDP module without a communication hook, got {str(error).splitlines()[0]}; "
                "wrap the module anew"
            ) from error
        self._collective_backward = True

    def _sum_bucket(self, _, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations kept as strings
        self._reduced, buffer = True, bucket.buffer()
        return self.ranks.start_sum_to_first(buffer).get_future().then(lambda _: buffer)

    def _check_summed(self) -> None:
        if self._collective_backward and self.guard.backward_passes > 1:
            raise PlanError(
                "step: expected one backward pass under DDP, which sums in each, got "
                f"{self.guard.backward_passes}; accumulate with the plain module instead"
            )
        if self._collective_backward and self.guard.backward_passes > 0 and not self._reduced:
            raise PlanError(
                "step: expected gradients summed by DDP in backward, got local ones; call the DDP module itself, "
                "outside no_sync()"
            )

    def _weights_key(self) -> float:
        """A sum of all parameters' bits, exact and independent of order."""
        whole = {torch.float32: torch.int32, torch.float64: torch.int64}
        total = 0
        for p in self.sensitivity.model.parameters():
            total += int(p.detach().contiguous().view(whole[p.dtype]).sum(dtype=torch.int64))
        return float(total % 2**52)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._reduced = False

    def _release(self, gradients: dict[str, Tensor], sigma: dict[str, float]) -> None:
        held = {name: self.sensitivity.trainable[name] for name in sigma}
        sizes = [p.numel() for p in held.values()]
        flat = torch.cat([gradients[name].reshape(-1) for name in held])
        if not self._collective_backward:
            self.ranks.sum_to_first_(flat)
        self._reduced = False
        if self.ranks.first:
            pieces = zip(held.items(), flat.split(sizes), strict=True)
            super()._release({name: piece.view_as(p) for (name, p), piece in pieces}, sigma)
            flat = torch.cat([p.grad.reshape(-1) for p in held.values() if p.grad is not None])
        self.ranks.broadcast_(flat)
        for p, piece in zip(held.values(), flat.split(sizes), strict=True):
            p.grad = piece.view_as(p)
        self.released_sigma = sigma
