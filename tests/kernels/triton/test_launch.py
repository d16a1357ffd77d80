# SPDX-License-Identifier: Apache-2.0
"""Tiles by shape, a machine's own table, and work shared evenly."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dplip.errors import ConfigError
from dplip.kernels.triton.launch import TILES, Rows, Work, bucket, options, row_slabs, tile_for, tuned
from dplip.kernels.triton.tile import Tile


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    tuned.cache_clear()
    yield
    tuned.cache_clear()


def test_every_shape_has_a_tile() -> None:
    shapes = {
        (512, 5120, 5120): "deep",
        (4096, 1024, 1024): "wide",
        (512, 1024, 784): "small",
        (4096, 10, 5120): "narrow",
    }
    for shape, name in shapes.items():
        assert bucket(*shape) == name
        assert all(tile_for(kernel, *shape) == TILES[kernel][name] for kernel in TILES)


def test_a_table_of_this_machine_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Tile(2, 2, 8, 16, 8, 1, 2, 4, 5, direct=True, waves=4)
    table = tmp_path / "tiles.json"
    table.write_text(json.dumps({"device": "any", "tiles": {"largest": {"wide": list(mine)}}}))
    monkeypatch.setenv("DPLIP_TILES", str(table))
    assert tile_for("largest", 4096, 1024, 1024) == mine
    assert tile_for("largest", 512, 1024, 784) == TILES["largest"]["small"]
    assert tile_for("index", 4096, 1024, 1024) == TILES["index"]["wide"]


@pytest.mark.parametrize("text", [None, "not json", "{}", '{"tiles": {"largest": {"wide": [1]}}}', '{"tiles": 3}'])
def test_a_table_that_cannot_be_read_is_named(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "tiles.json"
    if text is not None:
        table.write_text(text)
    monkeypatch.setenv("DPLIP_TILES", str(table))
    with pytest.raises(ConfigError, match=r"DPLIP_TILES to name a table.*tiles\.json"):
        tile_for("largest", 1, 64, 1)


@pytest.mark.parametrize("shape", [(1, 1, 1), (512, 5120, 5120), (129, 65, 33), (4096, 10, 784)])
def test_work_covers_every_unit_once(shape: tuple[int, int, int]) -> None:
    for tile in (*TILES["largest"].values(), TILES["keys"]["deep"]._replace(waves=4)):
        work = Work.of(tile, *shape, torch.device("cpu"))
        tiles = work.tiles_m * -(-shape[1] // tile.columns)
        assert work.total == tiles * work.units and work.units * tile.depth >= shape[2]
        assert (work.programs - 1) * work.share < work.total <= work.programs * work.share


def test_registers_leave_room_for_the_stated_programs() -> None:
    for tiles in TILES.values():
        for tile in tiles.values():
            registers = options(tile)["maxnreg"]
            assert registers <= 255 and registers * 32 * tile.warps * tile.per_sm <= 65536


def test_rows_in_whole_copies() -> None:
    x = torch.zeros(3, 8)
    assert Rows.of(x, x) == (4, (2, 2, 2))
    assert Rows.of(x[:, :7], x[:, :7]) == (1, (7, 8, 8))


def test_slabs_cover_the_batch_below_2_to_the_31() -> None:
    slabs = list(row_slabs(10, 1 << 29))
    assert [(s.start, s.stop) for s in slabs] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert list(row_slabs(0, 5)) == []
