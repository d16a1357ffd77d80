# SPDX-License-Identifier: Apache-2.0
"""How long one call takes, on the CPU or on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def once(run: Callable[[], Any], device: str) -> float:
    """Milliseconds of one call. On a GPU, of the work alone: the queue is filled before it starts."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)
