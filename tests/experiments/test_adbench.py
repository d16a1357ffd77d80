# SPDX-License-Identifier: Apache-2.0
"""The ADBench loader and its metric, on small tables made here."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dplip.errors import ConfigError, DataError

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "reproduce"))

from adbench import auroc, load_table
from private_tabular import Settings, detect


def write(folder: Path, x: np.ndarray, y: np.ndarray, file: str = "47_yeast") -> Path:
    (folder / "adbench").mkdir(exist_ok=True)
    np.savez(folder / "adbench" / f"{file}.npz", X=x, y=y)
    return folder


def rings(rows: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """Anomalies on a ring around the rest: no linear score tells them apart."""
    rng = np.random.default_rng(0)
    y = (np.arange(rows) % 5 == 0).astype(np.int64)
    angle, radius = rng.uniform(0, 2 * np.pi, rows), np.where(y, 3.0, 1.0) + 0.2 * rng.standard_normal(rows)
    return np.stack([100 * radius * np.cos(angle), 5 + 1e-3 * radius * np.sin(angle)], 1), y


def test_the_split_is_fixed_by_its_seed_and_loses_no_row(tmp_path: Path) -> None:
    x = np.arange(20.0).reshape(10, 2)
    write(tmp_path, x, np.arange(10) % 2)
    a, b, c = (load_table("yeast", tmp_path, seed) for seed in (0, 0, 1))
    assert torch.equal(a.train.x, b.train.x) and not torch.equal(a.train.x, c.train.x)
    assert len(a.test.y) == 2
    both = torch.cat([a.train.x, a.test.x])
    assert torch.equal(both[both[:, 0].argsort()], torch.from_numpy(x).float())
    assert torch.equal(torch.cat([a.train.y, a.test.y]), (both[:, 0].long() // 2) % 2)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected one of"):
        load_table("nosuch", tmp_path)
    with pytest.raises(DataError, match="expected an ADBench file"):
        load_table("yeast", tmp_path)
    for x, y in ((np.full((4, 2), np.nan), np.zeros(4)), (np.zeros((4, 2)), np.full(4, 2)), (np.zeros(4), np.zeros(4))):
        with pytest.raises(DataError, match="finite X"):
            load_table("yeast", write(tmp_path, x, y))
    (tmp_path / "adbench" / "47_yeast.npz").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(DataError, match="damaged"):
        load_table("yeast", tmp_path)


def test_auroc_counts_pairs() -> None:
    torch.manual_seed(0)
    scores, y = torch.randint(0, 6, (60,)).float(), torch.arange(60) % 3 == 0
    gaps = scores[y][:, None] - scores[~y][None, :]
    expected = float((gaps > 0).double().mean() + 0.5 * (gaps == 0).double().mean())
    assert auroc(scores, y.long()) == pytest.approx(expected)
    for bad, labels in ((scores, torch.zeros(60)), (scores / 0 * 0, y.long())):
        with pytest.raises(DataError, match="auroc"):
            auroc(bad, labels)


def test_a_private_detector_learns_and_its_whole_budget_is_kept(tmp_path: Path) -> None:
    """Scales 100 and 0.001 apart, an offset, a ring: standardisation and cosines are both needed."""
    write(tmp_path, *rings())
    table = load_table("yeast", tmp_path)
    settings = Settings(steps=20, features=64, epsilon=4.0)
    outcome = detect(table, settings, seed=0)
    assert 3.9 < outcome.epsilon <= 4.0
    assert outcome.auroc > 85
