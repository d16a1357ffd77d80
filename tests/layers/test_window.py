# SPDX-License-Identifier: Apache-2.0
"""Counts of sliding windows against the windows themselves."""

import itertools
import math

import pytest
import torch

from dplip.errors import ConfigError
from dplip.layers.window import Window

CASES = [
    (Window((k, l), (s, t), (p, q), (e, f)), size)
    for (k, l), (s, t), (p, q), (e, f), size in itertools.product(
        [(1, 2), (3, 3), (4, 2)],
        [(1, 1), (2, 3), (5, 1)],
        [(0, 0), (1, 2)],
        [(1, 1), (2, 3)],
        [(4, 5), (7, 3), (10, 9)],
    )
    if (k - 1) * e < size[0] + 2 * p and (l - 1) * f < size[1] + 2 * q
]


@pytest.mark.parametrize(("window", "size"), CASES, ids=str)
def test_counts_are_those_of_the_unfolded_image(window: Window, size: tuple[int, int]) -> None:
    numbered = torch.arange(1.0, 1 + math.prod(size), dtype=torch.float64).view(1, 1, *size)
    columns = window.unfold(numbered)[0].long()
    real = columns[columns > 0]
    assert columns.shape[1] == math.prod(window.positions(size))
    assert window.taps(size) == int((columns > 0).sum(0).max())
    # A dilated window never holds an entry twice, so occurrences are windows.
    assert window.overlap(size) == (int(real.bincount().max()) if len(real) else 0)
    ceilings = [math.ceil(k / s) for k, s in zip(window.kernel, window.stride, strict=True)]
    if window.dilation == (1, 1):
        assert window.overlap(size) <= math.prod(ceilings)


@pytest.mark.parametrize(("window", "size"), CASES, ids=str)
def test_entries_are_the_unfolded_image(window: Window, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size)
    entries = window.entries(x)
    assert entries.shape[3:] == window.positions(size)
    assert torch.equal(entries.flatten(3), window.unfold(x).unflatten(1, (3, -1)).permute(2, 0, 1, 3))


def test_borders_lower_the_overlap() -> None:
    assert Window((3, 3), padding=(1, 1)).overlap((28, 28)) == 9
    assert Window((3, 3)).overlap((4, 4)) == 4  # two windows an axis
    assert Window((5, 5)).overlap((5, 5)) == 1
    assert Window((3, 3), (2, 2), (1, 1)).overlap((8, 8)) == 4


@pytest.mark.parametrize("bad", [{"kernel": (0, 1)}, {"stride": (1, 0)}, {"padding": (-1, 0)}, {"dilation": (0, 1)}])
def test_bad_geometry(bad: dict) -> None:
    with pytest.raises(ConfigError, match="window"):
        Window(**{"kernel": (2, 2)} | bad)


def test_image_smaller_than_the_window() -> None:
    with pytest.raises(ValueError, match="as large as"):
        Window((3, 3)).positions((2, 5))
