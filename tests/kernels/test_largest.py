# SPDX-License-Identifier: Apache-2.0
"""Row maxima through one-hot rows: exact, the first index at ties, in every precision mode."""

from collections.abc import Iterator

import pytest
import torch

from dplip.kernels.largest import largest, largest_reference


@pytest.fixture(params=["highest", "medium"])
def precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """Products of float32 matrices may be rounded to bfloat16 under "medium"."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 1031, 66_000])
def test_first_index_of_the_maximum(length: int, dtype: torch.dtype) -> None:
    t = torch.randn(7, length, dtype=dtype)
    t[1] = 0.5
    t[2, length // 2 :] = 9.0
    t[3, -1], t[4, 0], t[5, length // 3] = torch.inf, torch.inf, 5e-324
    expected = largest_reference(t, 1)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value, index = largest(t.clone(), 1, True)
        assert torch.equal(value, expected[0]) and torch.equal(index, expected[1])
    value, none = largest(t.clone(), 1, False)
    assert torch.equal(value, expected[0]) and none is None


@pytest.mark.parametrize("k", [1, 2, 3, 8, 9, 12])
@pytest.mark.parametrize("ties", [False, True])
def test_k_largest(k: int, ties: bool) -> None:
    t = torch.randint(0, 3, (50, 12)).float() if ties else torch.randn(50, 12)
    expected = t.sort(-1, descending=True)[0][:, :k]
    value, index = largest(t.clone(), k, True)
    assert torch.equal(value, expected) and torch.equal(t.gather(-1, index), expected)
    assert all(len(set(row)) == k for row in index.tolist())
    assert torch.equal(largest(t.clone(), k, False)[0], expected)


@pytest.mark.parametrize(("length", "k"), [(65, 2), (127, 2), (128, 2), (129, 4), (196, 4), (255, 4), (256, 4)])
def test_rows_about_the_length_where_torch_sorts_otherwise(length: int, k: int) -> None:
    t = torch.randint(0, 40, (30, length)).float()
    t[0], t[1, 5] = 0.0, torch.inf
    value, index = largest(t.clone(), k, True)
    assert torch.equal(value, t.sort(-1, descending=True)[0][:, :k]) and torch.equal(t.gather(-1, index), value)
    assert all(len(set(row)) == k for row in index.tolist())


def test_nan_is_the_value_and_the_index_is_in_range() -> None:
    t = torch.randn(4, 9)
    t[1, 4] = torch.nan
    t[2] = torch.nan
    for k in (1, 3):
        value, index = largest(t.clone(), k, True)
        assert value[1:3, 0].isnan().all() and value[[0, 3]].isfinite().all()
        assert int(index.min()) >= 0 and int(index.max()) < 9


def test_empty() -> None:
    assert largest(torch.zeros(0, 3, 5), 1, True)[1].shape == (0, 3, 1)
