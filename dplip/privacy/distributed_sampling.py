# SPDX-License-Identifier: Apache-2.0
"""Poisson sampling over disjoint shards of the data, whose union is the one-process mechanism."""

from __future__ import annotations

from torch import Tensor

from dplip.errors import PlanError
from dplip.privacy.noise import derived_seed
from dplip.privacy.plan import PrivacyPlan
from dplip.privacy.sampling import PoissonSampler

__all__ = ["ShardedPoissonSampler"]


class ShardedPoissonSampler(PoissonSampler):
    """Rank ``r`` of ``W`` owns the examples ``r, r + W, r + 2W, ...`` and draws each with probability ``q``.

    Guarantee. Every example is owned by exactly one rank and enters a step by its own coin of bias ``q``; the ranks'
    streams are seeded by the operating system apart from each other. So the union of the local batches is a Poisson
    batch of the whole data set, in distribution and whatever ``W``: plan, ledger and epsilon are those of one process.
    A local batch may be empty and is a batch all the same. With ``insecure_seed`` every rank derives its own seed from
    it, so ranks that share a seed do not share a mask.

    Args:
        plan: the plan; its ``sampling_prob`` is that of one process, its batch size the total over ranks.
        size: number of examples of the whole data set.
        rank, world: which rank this is, of how many.
        insecure_seed: see :class:`PoissonSampler`.

    Raises:
        DataError: there are no examples.
        PlanError: truncated sampling, whose limit is on the union that no rank sees.
    """

    def __init__(self, plan: PrivacyPlan, size: int, rank: int, world: int, insecure_seed: int | None = None) -> None:
        if plan.max_batch_size is not None and world > 1:
            raise PlanError(
                f"sampler: expected plain Poisson sampling over {world} ranks, got {plan.sampling}, which limits the "
                "union that no rank sees; use sampling='poisson'"
            )
        self.rank, self.world = rank, world
        seed = insecure_seed if insecure_seed is None or world == 1 else derived_seed(insecure_seed, "rank", rank)
        super().__init__(plan, size, seed)
        self.size = len(range(rank, size, world))

    def draw(self) -> Tensor:
        """The next local batch's indices into the whole data set, int64 [b] in increasing order; ``b`` may be 0."""
        return super().draw() * self.world + self.rank
