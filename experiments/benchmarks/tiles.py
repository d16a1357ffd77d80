# SPDX-License-Identifier: Apache-2.0
"""Measures launch tiles of the selection kernels on this machine's GPU, for ``DPLIP_TILES``."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from clock import once
from rich.console import Console
from torch import Tensor

# The kernels need Triton; the tables of the CPU benchmark do not.


def candidates() -> dict[str, list[Any]]:
    """Kernel -> tiles worth timing: threads, pipeline and how results leave, in one wave or more."""
    from dplip.kernels.triton.tile import Tile

    wide = [(8, 8, 16, 8), (8, 8, 32, 4), (4, 16, 32, 4), (4, 8, 32, 4)]
    forward = [
        Tile(*t, 8, u, stages, 4, 4 if t[:2] == (4, 8) else 3, direct, waves)
        for t in wide
        for u, stages in ((1, 4), (2, 3))
        for direct in (False, True)
        for waves in (1, 4)
    ]
    smaller = [(4, 8, 16, 8), (4, 8, 32, 4), (8, 4, 16, 8), (4, 4, 16, 8)]
    other = [
        Tile(*t, 8, u, stages, 4, 4 if t[:2] == (4, 4) else 3, direct, waves)
        for t in smaller
        for u, stages in ((2, 3), (4, 3))
        for direct in (False, True)
        for waves in (1, 4)
    ]
    deep = [t._replace(STAGES=2) for t in other if t.U == 4]
    return {
        "largest": forward,
        "half_largest": forward,
        "index": other,
        "half_index": other,
        "interval": other,
        "keys": [t for t in other if t.U == 4] + deep,
    }


def tune(shapes: list[tuple[int, int, int]], console: Console, rounds: int = 7) -> dict[str, Any]:
    """The fastest tile per kernel and bucket of ``shapes``; one that does not fit the device is passed over."""
    from dplip.kernels.triton.launch import bucket

    best: dict[str, dict[str, tuple[float, Any]]] = {}
    for b, i, o in shapes:
        name = bucket(b, o, i)
        for kernel, tiles in candidates().items():
            for tile in tiles:
                try:
                    ms = measured(kernel, tile, b, i, o, rounds)
                except Exception as error:  # out of registers or shared memory: another tile serves
                    console.print(f"{kernel} {tuple(tile)}: {type(error).__name__}, passed over")
                    continue
                row = best.setdefault(kernel, {})
                if name not in row or ms < row[name][0]:
                    row[name] = (ms, tile)
            if name in best.get(kernel, {}):
                ms, tile = best[kernel][name]
                console.print(f"{(b, i, o)} {kernel}: {ms:.4f} ms with {tuple(tile)}")
    return {
        "device": torch.cuda.get_device_name(),
        "tiles": {kernel: {name: list(tile) for name, (_, tile) in row.items()} for kernel, row in best.items()},
        "ms": {kernel: {name: round(ms, 4) for name, (ms, _) in row.items()} for kernel, row in best.items()},
    }


def measured(kernel: str, tile: Any, b: int, i: int, o: int, rounds: int) -> float:
    """Median milliseconds of ``kernel`` with ``tile``."""
    from dplip.kernels.triton.largest import interval, largest, largest_with_index
    from dplip.kernels.triton.top_k import top_k

    dtype = torch.float16 if kernel.startswith("half") else torch.float32
    x, w = (torch.randn(n, i, device="cuda", dtype=dtype) for n in (b, o))
    one, ten = torch.ones(1, device="cuda"), torch.full((10,), 0.1, device="cuda")

    def run() -> tuple[Tensor, ...] | Tensor:
        if kernel == "interval":
            return interval(x - 0.1, x + 0.1, w, one, tile)
        if kernel == "keys":
            return top_k(x, w, ten, True, tile=tile)
        return (largest_with_index if kernel.endswith("index") else largest)(x, w, one, tile=tile)

    run()
    return statistics.median(once(run, "cuda") for _ in range(rounds))
