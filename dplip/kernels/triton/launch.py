# SPDX-License-Identifier: Apache-2.0
"""Operands as the kernels read them, which tile a shape gets, and how work is shared among programs."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dplip.errors import ConfigError
from dplip.kernels.triton.tile import Tile

__all__ = [
    "TILES",
    "Rows",
    "Work",
    "bucket",
    "operands",
    "options",
    "packed",
    "processors",
    "register_cap",
    "row_slabs",
    "tile_for",
    "tuned",
]

# Kernel -> its tiles by shape, see :func:`bucket`. Deep, wide and small ones were the fastest of 79 timings on an H200,
# except for those of "keys", which like all narrow ones are estimates.
TILES = {
    "largest": {
        "deep": Tile(8, 8, 16, 8, 8, 2, 3, 4, 3),
        "wide": Tile(8, 8, 16, 8, 8, 2, 3, 4, 3),
        "small": Tile(4, 8, 32, 4, 8, 2, 3, 4, 4, direct=True),
        "narrow": Tile(8, 2, 16, 8, 8, 2, 3, 4, 4),
    },
    "half_largest": {
        "deep": Tile(8, 8, 16, 8, 8, 2, 3, 4, 3),
        "wide": Tile(8, 8, 16, 8, 8, 2, 3, 4, 3),
        "small": Tile(8, 8, 16, 8, 8, 2, 3, 4, 3),
        "narrow": Tile(8, 2, 16, 8, 8, 2, 3, 4, 4),
    },
    "index": {
        "deep": Tile(4, 8, 32, 4, 8, 4, 3, 4, 3, direct=True),
        "wide": Tile(4, 8, 32, 4, 8, 2, 3, 4, 3, direct=True),
        "small": Tile(4, 8, 16, 8, 8, 2, 3, 4, 3),
        "narrow": Tile(4, 2, 16, 8, 8, 4, 2, 4, 4),
    },
    "half_index": {
        "deep": Tile(4, 8, 32, 4, 8, 2, 3, 4, 3, direct=True),
        "wide": Tile(4, 8, 32, 4, 8, 2, 3, 4, 3, direct=True),
        "small": Tile(4, 8, 16, 8, 8, 2, 2, 4, 3),
        "narrow": Tile(4, 2, 16, 8, 8, 2, 2, 4, 4),
    },
    "interval": {
        "deep": Tile(4, 8, 16, 8, 8, 2, 3, 4, 3),
        "wide": Tile(4, 8, 16, 8, 8, 2, 3, 4, 3),
        "small": Tile(4, 4, 16, 8, 8, 2, 3, 4, 4),
        "narrow": Tile(4, 2, 16, 8, 8, 2, 3, 4, 4),
    },
    "keys": {
        "deep": Tile(4, 8, 16, 8, 8, 4, 3, 4, 3),
        "wide": Tile(4, 8, 16, 8, 8, 4, 3, 4, 3),
        "small": Tile(4, 8, 16, 8, 8, 4, 3, 4, 3),
        "narrow": Tile(8, 2, 16, 8, 8, 4, 2, 4, 4),
    },
}


def packed(x: Tensor, w: Tensor) -> bool:
    """Whether both operands are float16 rows of whole pairs, which the float16 kernel reads as int32."""
    return all(t.dtype == torch.float16 and t.shape[1] % 2 == 0 for t in (x, w))


def operands(x: Tensor, w: Tensor, x2: Tensor | None, half: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``x``, ``w`` and ``x2`` (``x`` where None) with unit inner stride, float32 or, with ``half``, as int32 pairs.

    ``x`` and ``x2`` get one row stride.
    """
    if half:
        x, w = (
            t if t.stride(1) == 1 and t.stride(0) % 2 == t.storage_offset() % 2 == 0 else t.contiguous() for t in (x, w)
        )
        x, w = x.view(torch.int32), w.view(torch.int32)
        return x, w, x
    x, w = (t.float() if t.stride(1) == 1 else t.float().contiguous() for t in (x, w))
    if x2 is None:
        return x, w, x
    x2 = x2.float() if x2.stride(1) == 1 else x2.float().contiguous()
    return (x, w, x2) if x.stride(0) == x2.stride(0) else (x.contiguous(), w, x2.contiguous())


def bucket(B: int, O: int, I: int) -> str:
    """Which of a kernel's tiles serves a shape: ``narrow`` below 48 neurons, ``small`` below 2^30 elements, ``deep``
    from 2048 coordinates on, else ``wide``."""
    if O < 48:
        return "narrow"
    if B * O * I < 1 << 30:
        return "small"
    return "deep" if I >= 2048 else "wide"


def tile_for(kernel: str, B: int, O: int, I: int) -> Tile:
    """The tile that serves a shape; this machine's own, where :func:`tuned` has one."""
    name = bucket(B, O, I)
    return tuned().get(kernel, {}).get(name, TILES[kernel][name])


@functools.cache
def tuned() -> dict[str, dict[str, Tile]]:
    """What was measured on this machine's GPU, read once: ``DPLIP_TILES``, a JSON file {kernel: {bucket: tile}}.

    Raises:
        ConfigError: the file is absent or not of that form.
    """
    path = os.environ.get("DPLIP_TILES")
    if not path:
        return {}
    try:
        table = json.loads(Path(path).read_text())["tiles"]
        return {kernel: {name: Tile(*tile) for name, tile in row.items()} for kernel, row in table.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"kernels: expected DPLIP_TILES to name a table of tiles, got {path!r} ({error}); unset it, or measure one "
            "with experiments/benchmarks/kernels.py --tune"
        ) from error


def options(tile: Tile) -> dict[str, int]:
    """Keyword arguments of a launch; registers are capped so that ``per_sm`` programs fit a multiprocessor."""
    names = ("RM", "RN", "TM", "TN", "BK", "U", "STAGES")
    sizes = {name: getattr(tile, name) for name in names} | {"DIRECT": tile.direct}
    return sizes | {"num_warps": tile.warps, "maxnreg": register_cap(tile.per_sm, tile.warps)}


class Rows(NamedTuple):
    """Length and strides of the rows of two operands in pieces of ``vec`` entries.

    Four entries make a 16-byte copy; that all rows are made of such, the compiler learns from the product.
    """

    vec: int
    sizes: tuple[int, int, int]

    @classmethod
    def of(cls, x: Tensor, w: Tensor) -> Rows:
        sizes = (x.shape[1], x.stride(0), w.stride(0))
        vec = 4 if all(size % 4 == 0 for size in sizes) else 1
        return cls(vec, (sizes[0] // vec, sizes[1] // vec, sizes[2] // vec))


def row_slabs(B: int, O: int) -> Iterator[slice]:
    """Slices of the batch whose outputs have offsets below 2^31."""
    rows = max(1, ((1 << 31) - 1) // max(1, O))
    for start in range(0, B, rows):
        yield slice(start, min(start + rows, B))


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few where there is none, for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def register_cap(programs: int, warps: int) -> int:
    """Registers of a thread that let ``programs`` of ``warps`` warps share a multiprocessor."""
    return min(255, 65536 // (programs * warps * 32) // 8 * 8)


class Work(NamedTuple):
    """How the units (tile, block of ``k``) of a launch are numbered and shared."""

    programs: int
    tiles_m: int
    units: int
    share: int
    total: int

    @property
    def split(self) -> tuple[int, int, int, int, int]:
        return self.tiles_m, self.units, self.share, self.total, 0

    @classmethod
    def of(cls, tile: Tile, B: int, O: int, I: int, device: torch.device) -> Work:
        """Every program gets the same number of units."""
        tiles_m = -(-B // tile.rows)
        units = -(-I // tile.depth)
        total = tiles_m * -(-O // tile.columns) * units
        slots = tile.waves * tile.per_sm * processors(device)
        share = max(1, -(-total // slots))
        return cls(-(-total // share), tiles_m, units, share, total)
