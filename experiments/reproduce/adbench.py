# SPDX-License-Identifier: Apache-2.0
"""The ADBench tables of the Clipless DP-SGD paper, split 80/20.

Source: Han, Hu, Huang, Jiang, Zhao, ADBench: Anomaly Detection Benchmark, NeurIPS 2022. Nothing is standardised here: a
scale taken from the data costs privacy and belongs into the ledger (:class:`dplip.privacy.PrivateStandardizer`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from dplip.data import Split
from dplip.errors import ConfigError, DataError

__all__ = ["TABLES", "Table", "auroc", "load_table"]


class Facts(NamedTuple):
    """What is public about a table: file, delta and the AUROC (percent) published for lipdp at epsilon <= 1."""

    file: str
    delta: float
    lipdp_best: float


TABLES = {
    "ALOI": Facts("1_ALOI", 1e-5, 56.2),
    "campaign": Facts("5_campaign", 1e-5, 82.2),
    "celeba": Facts("8_celeba", 1e-6, 96.5),
    "donors": Facts("11_donors", 1e-6, 100.0),
    "magic": Facts("22_magic.gamma", 1e-5, 89.7),
    "shuttle": Facts("32_shuttle", 1e-5, 99.4),
    "skin": Facts("33_skin", 1e-6, 99.8),
    "yeast": Facts("47_yeast", 1e-4, 75.1),
}


@dataclass(frozen=True)
class Table:
    """Inputs float32 [N, d], labels int64 [N] (1 is an anomaly)."""

    name: str
    train: Split
    test: Split
    delta: float


def load_table(name: str, folder: Path, seed: int = 0, held_out: float = 0.2) -> Table:
    """Table ``name`` of :data:`TABLES` from ``folder/adbench``, permuted by ``seed``, the last ``held_out`` for the
    test.

    Raises:
        ConfigError: no such table.
        DataError: the file is absent, damaged, or holds values that are not finite or labels other than 0 and 1.
    """
    if name not in TABLES:
        raise ConfigError(f"adbench: expected one of {sorted(TABLES)}, got {name!r}; correct the name")
    path = folder / "adbench" / f"{TABLES[name].file}.npz"
    if not path.is_file():
        raise DataError(f"{path}: expected an ADBench file, got none; put it there or pass another --data-dir")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            x, y = arrays["X"].astype(np.float32), arrays["y"].astype(np.int64)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise DataError(f"{path}: expected arrays X and y, got a damaged file ({error}); replace it") from error
    if x.ndim != 2 or y.shape != x.shape[:1] or not np.isfinite(x).all() or not np.isin(y, (0, 1)).all():
        raise DataError(
            f"{path}: expected finite X [N, d] and labels 0 or 1, got {x.shape} and {y.shape} or odd values; replace it"
        )
    order = np.random.default_rng(seed).permutation(len(y))
    cut = len(y) - int(held_out * len(y))
    first, last = order[:cut], order[cut:]
    return Table(name, _split(x[first], y[first]), _split(x[last], y[last]), TABLES[name].delta)


def _split(x: np.ndarray, y: np.ndarray) -> Split:
    return Split(torch.from_numpy(x), torch.from_numpy(y))


def auroc(scores: Tensor, labels: Tensor) -> float:
    """Share of (anomaly, normal) pairs in which the anomaly scores higher, ties counted half (Mann-Whitney).

    Raises:
        DataError: a class is missing or a score is NaN.
    """
    y = labels.bool().numpy()
    positive, negative = int(y.sum()), int((~y).sum())
    values = scores.double().numpy()
    if not positive or not negative or np.isnan(values).any():
        raise DataError("auroc: expected both classes and no NaN, got otherwise; check the split and the model")
    ranks = rankdata(values)
    return float((ranks[y].sum() - positive * (positive + 1) / 2) / (positive * negative))
