# SPDX-License-Identifier: Apache-2.0
"""Large Poisson draws on small memory: one step spread over several backward passes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator
from types import TracebackType
from typing import Any

from dplip.errors import PlanError
from dplip.privacy.optimizer import ClipFreeOptimizer
from dplip.privacy.sampling import PrivateLoader

__all__ = ["virtual_batches"]


class virtual_batches:
    """Hands out an epoch of Poisson draws in parts of at most ``max_physical_batch_size`` examples.

    >>> with virtual_batches(loader, optimizer, max_physical_batch_size=64) as batches:  # doctest: +SKIP
    ...     for x, y in batches:
    ...         optimizer.zero_grad()
    ...         loss(model(x), y).backward()
    ...         optimizer.step()

    The loop is that of whole batches; ``step`` and ``zero_grad`` act at the ends of a draw only. Counterpart of
    ``opacus.utils.batch_memory_manager.BatchMemoryManager``.

    Guarantee. The parts of a draw are disjoint, so the accumulated gradient is the draw's sum and its sensitivity is
    that of one backward pass. Each part admits one backward pass of at most its own examples, and no step mixes two
    draws (:class:`dplip.privacy.guard.Guard`); a loop that fetches ahead or skips a part is refused. Leaving the loop
    or the block in the middle of a draw drops the draw: nothing was released, nothing is counted, and the next draw is
    a fresh one. An empty draw is handed out as one empty part, so that its noise is released.

    Args:
        loader: what ``make_private`` returned.
        optimizer: what ``make_private`` returned.
        max_physical_batch_size: most examples in memory at once.

    Raises:
        PlanError: the size is below 1, or loader and optimizer follow different plans.
    """

    def __init__(self, loader: PrivateLoader, optimizer: ClipFreeOptimizer, max_physical_batch_size: int) -> None:
        if type(max_physical_batch_size) is not int or max_physical_batch_size < 1:
            raise PlanError(
                "virtual_batches: expected max_physical_batch_size to be an integer >= 1, "
                f"got {max_physical_batch_size!r}; fix it"
            )
        if loader.plan is not optimizer.plan:
            raise PlanError(
                "virtual_batches: expected the loader and the optimizer of one make_private call, got those of two; "
                "pass what it returned"
            )
        self.loader, self.optimizer, self.size = loader, optimizer, max_physical_batch_size
        # Weak, so that a loop that is broken off ends at once, as its draw must not linger into the next.
        self._running: Callable[[], Generator[Any, None, None] | None] = lambda: None

    def __enter__(self) -> virtual_batches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def __iter__(self) -> Iterator[Any]:
        self._leave()
        running = self._parts()
        self._running = weakref.ref(running)
        return running

    def _leave(self) -> None:
        running = self._running()
        if running is not None:
            running.close()

    def _parts(self) -> Generator[Any, None, None]:
        guard, part = self.optimizer.guard, None
        self.optimizer.discard()
        try:
            for _ in range(len(self.loader)):
                parts = self.loader.sampler.draw().split(self.size)
                for left, index in zip(range(len(parts) - 1, -1, -1), parts, strict=True):
                    batch = self.loader.batch(index)
                    self.optimizer.signal_skip_step(left > 0, rows=len(index))
                    part = guard.part
                    yield batch
        finally:
            if guard.part is part:  # else the draw was released, or another loop runs
                self.optimizer.discard()
