# SPDX-License-Identifier: Apache-2.0
"""The tabular sets with known monotone features: COMPAS, heart disease, auto-mpg, BlogFeedback.

Splits, filters and monotone features are those of Kitouni, Nolte, Williams (ICLR 2023) and of Liu, Han, Zhang, Liu
(Certified Monotonic Neural Networks, NeurIPS 2020), with what is wrong in their scripts put right; each loader says
what.
"""

from __future__ import annotations

import lzma
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dplip.errors import DataError

__all__ = ["Tabular", "auto_mpg", "blog_feedback", "compas", "compas_public", "heart_disease", "standardized"]


@dataclass(frozen=True, eq=False)
class Tabular:
    """Features [N, d] and targets [N, 1] in float32; ``directions`` [d] in {-1, 0, 1}; ``unit`` scales errors back."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    directions: Tensor
    unit: float = 1.0


def _table(path: Path, read: Callable[[Any], pd.DataFrame], opener: Callable[..., Any] = open) -> pd.DataFrame:
    if not path.is_file():
        raise DataError(f"{path.name}: expected the file in {path.parent}, got none; see --data-dir")
    try:
        with opener(path, "rb") as file:
            return read(file)
    except (ValueError, EOFError, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise DataError(f"{path.name}: expected a readable table, got a damaged one ({error}); restore it") from error


def _pack(x: np.ndarray, y: np.ndarray, train: int, signs: dict[int, int], unit: float = 1.0) -> Tabular:
    directions = torch.zeros(x.shape[1])
    for i, sign in signs.items():
        directions[i] = sign
    features = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    targets = torch.from_numpy(np.ascontiguousarray(y, dtype=np.float32)).view(-1, 1)
    if not bool(torch.isfinite(features).all() and torch.isfinite(targets).all()):
        raise DataError("tabular: expected finite features and targets, got others; check the file")
    return Tabular(features[:train], targets[:train], features[train:], targets[train:], directions, unit)


def standardized(data: Tabular, reach: float = math.inf) -> Tabular:
    """Zero mean and unit variance by the training part (not private), then cut to [-reach, reach], which keeps every
    order; constant features become 0."""
    mean, std = data.x_train.mean(0), data.x_train.std(0)
    std = torch.where(std > 0, std, torch.ones_like(std))
    train, test = (((x - mean) / std).clamp(-reach, reach) for x in (data.x_train, data.x_test))
    return replace(data, x_train=train, x_test=test)


def _compas(folder: Path) -> pd.DataFrame:
    path = folder / "compas" / "compas_scores_two_years_deid.csv.xz"
    frame = _table(path, lambda f: pd.read_csv(f, keep_default_na=True), lzma.open)
    within = frame["days_b_screening_arrest"].between(-30, 30)
    kept = within & (frame["is_recid"] != -1) & (frame["c_charge_degree"] <= "O") & (frame["score_text"] != "N/A")
    frame = frame[kept]
    # The split of Liu et al.: this seed, this order of rows, four fifths to train on.
    return frame.iloc[np.random.RandomState(78712).permutation(len(frame))]


def _compas_columns(frame: pd.DataFrame, counts: Callable[[str, np.ndarray], np.ndarray], age: np.ndarray) -> Tabular:
    columns = [counts(name, frame[name].to_numpy(float)) for name in _COUNTS]
    columns.append(age)
    columns += [(frame["race"] == name).to_numpy(float) for name in _RACES]
    columns += [(frame["sex"] == name).to_numpy(float) for name in ("Male", "Female")]
    return _pack(
        np.stack(columns, 1), frame["two_year_recid"].to_numpy(), int(0.8 * len(frame)), dict.fromkeys(range(4), 1)
    )


_COUNTS = {"priors_count": 40, "juv_fel_count": 20, "juv_misd_count": 20, "juv_other_count": 20}
_RACES = ("African-American", "Hispanic", "Asian", "Caucasian", "Native American", "Other")


def compas(folder: Path) -> Tabular:
    """13 features, the four counts increasing; predicts recidivism within two years."""
    frame = _compas(folder)
    return _compas_columns(frame, lambda _, v: v, frame["age"].to_numpy(float))


def compas_public(folder: Path) -> Tabular:
    """:func:`compas` in [0, 1] by public constants only: ``log(1 + count)`` up to a cap, age from 18 to 80."""
    frame = _compas(folder)
    age = np.clip((frame["age"].to_numpy(float) - 18) / 62, 0, 1)
    return _compas_columns(frame, lambda k, v: np.clip(np.log1p(v) / np.log1p(_COUNTS[k]), 0, 1), age)


def heart_disease(folder: Path) -> Tabular:
    """13 features, resting blood pressure and cholesterol increasing. The row number, which the source keeps as a
    feature, is dropped."""
    parts = [_table(folder / "heart_disease" / f"heart_{part}.csv", pd.read_csv) for part in ("train", "test")]
    frame = pd.concat(parts).drop(columns="Unnamed: 0")
    features = frame.drop(columns="target")
    signs = {features.columns.get_loc(name): 1 for name in ("trestbps", "chol")}
    return _pack(features.to_numpy(float), frame["target"].to_numpy(), len(parts[0]), signs)


def auto_mpg(folder: Path, seed: int) -> Tabular:
    """7 features; miles per gallon fall with displacement, horsepower and weight. Random four fifths to train on,
    targets standardised (``unit`` is their deviation), the six rows without horsepower dropped."""
    frame = _table(folder / "auto_mpg" / "auto-mpg.csv", lambda f: pd.read_csv(f, na_values="?")).dropna()
    frame = frame.iloc[np.random.RandomState(seed).permutation(len(frame))]
    features, target = frame.drop(columns=["mpg", "car name"]), frame["mpg"].to_numpy(float)
    signs = {features.columns.get_loc(name): -1 for name in ("displacement", "horsepower", "weight")}
    train = int(0.8 * len(frame))
    mean, std = target[:train].mean(), target[:train].std()
    return _pack(features.to_numpy(float), (target - mean) / std, train, signs, float(std))


def blog_feedback(folder: Path) -> Tabular:
    """276 or so features, eight comment counts increasing; predicts comments in 24 hours, scaled to [0, 1].

    As in the source, rows above the 90th percentile of the target are dropped. Unlike it, targets above 255 are not
    wrapped around beforehand, and the monotone features are found after constant columns are dropped.
    """
    path = folder / "blog_feedback" / "BlogFeedback.zip"

    def read(file: Any) -> pd.DataFrame:
        archive = zipfile.ZipFile(file)
        tests = sorted(n for n in archive.namelist() if n.startswith("blogData_test"))
        frames = [pd.read_csv(archive.open(n), header=None, dtype=np.float32) for n in ("blogData_train.csv", *tests)]
        return pd.concat(frames, keys=range(len(frames)))

    frame = _table(path, read)
    target = frame[280].to_numpy(float)
    kept = target <= np.percentile(target, 90)
    frame, target = frame[kept], target[kept]
    features = frame.drop(columns=280)
    features = features.loc[:, (features != features.iloc[0]).any()]
    signs = {features.columns.get_loc(k): 1 for k in (50, 51, 52, 53, 55, 56, 57, 58)}
    train = int((frame.index.get_level_values(0) == 0).sum())
    return _pack(features.to_numpy(), target / target.max(), train, signs)
