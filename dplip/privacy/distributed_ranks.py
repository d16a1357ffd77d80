# SPDX-License-Identifier: Apache-2.0
"""The processes that train one model together, and the few collectives that private training needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dplip.errors import RankError

__all__ = ["Ranks"]

T = TypeVar("T")


class Ranks:
    """A process group, or this process alone where torch.distributed is not initialised.

    Every method but the attributes is collective: all ranks call it, in the same order. A collective that fails,
    because a rank died, left or did not come within the group's timeout, raises :class:`RankError` on those that
    wait (under NCCL torch's watchdog ends the process instead).

    Args:
        device: where tensors to exchange live; the parameters' device.
        group: the process group; by default all of them.

    Raises:
        RankError: this process is no member of ``group``.
    """

    def __init__(self, device: torch.device | str = "cpu", group: dist.ProcessGroup | None = None) -> None:
        self.device, self.group = torch.device(device), group
        self.active = dist.is_available() and dist.is_initialized()
        if not self.active and group is not None:
            raise RankError("ranks: expected an initialised process group, got none; call init_process_group first")
        self.rank = dist.get_rank(group) if self.active else 0
        self.size = dist.get_world_size(group) if self.active else 1
        if self.rank < 0:
            raise RankError("ranks: expected a process of the group, got another; call it on the group's ranks only")
        # Gloo moves host memory; elsewhere tensors stay where they are.
        self._host = self.active and dist.get_backend(group) == "gloo" and self.device.type != "cpu"

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the one that draws what must be drawn once."""
        return self.rank == 0

    @contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankError(
                f"{what}: expected all {self.size} ranks to take part, got {_reason(error)}; another rank "
                "failed or was killed, restart all from the last checkpoint"
            ) from error

    def _exchange(self, tensor: Tensor, collective: Callable[[Tensor], Any]) -> Tensor:
        moved = (tensor.cpu() if self._host else tensor).contiguous()
        collective(moved)
        return tensor if moved is tensor else tensor.copy_(moved)

    def members(self) -> list[int]:
        """The group's ranks in the numbering of all processes."""
        return dist.get_process_group_ranks(self.group) if self.active else [0]

    def _source(self) -> int:
        return 0 if self.group is None else dist.get_global_rank(self.group, 0)

    def gather(self, values: list[float]) -> list[list[float]]:
        """Every rank's ``values`` (float64, the same number on all), by rank."""
        if not self.active:
            return [list(values)]
        with self._waiting("gather"):
            mine = torch.tensor(values, dtype=torch.float64, device="cpu" if self._host else self.device)
            all_values = [torch.empty_like(mine) for _ in range(self.size)]
            dist.all_gather(all_values, mine, group=self.group)
            return [v.tolist() for v in all_values]

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's ``value``, by rank."""
        if not self.active:
            return [value]
        with self._waiting("gather"):
            values: list[Any] = [None] * self.size
            dist.all_gather_object(values, value, group=self.group)
            return values

    def sum_to_first_(self, tensor: Tensor) -> Tensor:
        """On rank 0 the sum of all ranks' ``tensor``, in place; elsewhere its content is lost."""
        if not self.active:
            return tensor
        with self._waiting("sum"):
            return self._exchange(tensor, lambda t: dist.reduce(t, self._source(), group=self.group))

    def start_sum_to_first(self, tensor: Tensor) -> dist.Work:
        """:meth:`sum_to_first_` without waiting for it."""
        if self._host:  # Gloo reduces device memory to all ranks only
            return dist.all_reduce(tensor, group=self.group, async_op=True)
        return dist.reduce(tensor, self._source(), group=self.group, async_op=True)

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Overwrite ``tensor`` by rank 0's."""
        if not self.active:
            return tensor
        with self._waiting("broadcast"):
            return self._exchange(tensor, lambda t: dist.broadcast(t, self._source(), group=self.group))

    def together(self, where: str, action: Callable[[], T]) -> T:
        """Run ``action``, which must use no collective, and go on only if it succeeded on every rank.

        Raises:
            RankError: it failed on another rank. Where it failed, its own exception.
        """
        try:
            result, failure = action(), None
        except Exception as error:
            failure = error
        failures = self.gather_objects(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, text in enumerate(failures):
            if text is not None:
                raise RankError(f"{where}: expected every rank to succeed, got on rank {rank}: {text}")
        return result

    def require_equal(self, where: str, facts: Mapping[str, str]) -> None:
        """Raise :class:`RankError` on every rank unless ``facts`` are the same on all; names those that differ."""
        everywhere = self.gather_objects(dict(facts))
        differ = sorted({k for other in everywhere for k in other if other.get(k) != everywhere[0].get(k)})
        if differ:
            raise RankError(
                f"{where}: expected the same on every rank, got differences in {differ}; "
                "run the same script with the same configuration and data on all of them"
            )


def _reason(error: Exception) -> str:
    """The first sentence; Gloo goes on with advice."""
    return (str(error).splitlines() or [type(error).__name__])[0].split(". This is")[0]
