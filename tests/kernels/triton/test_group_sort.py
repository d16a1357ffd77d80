# SPDX-License-Identifier: Apache-2.0
"""The GroupSort kernels against torch.sort: in the interpreter, or on a GPU where there is one."""

import pytest
import torch

pytest.importorskip("triton")

from dplip.kernels.dispatch import select
from dplip.kernels.group_sort import group_sort, group_sort_backward_reference, group_sort_reference
from dplip.kernels.triton import group_sort as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1, 1), (2, 3, 5), (5, 7, 1), (0, 3, 2), (2, 0, 3), (2, 3, 0)]  # batch, groups, positions
SIZES = [2, 3, 4, 8]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs, the last one short."""
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "_BLOCK", 64)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sorts_and_unsorts(shape: tuple[int, int, int], size: int, ties: bool) -> None:
    b, groups, s = shape
    x = torch.randint(-1, 2, (b, groups * size, s)).float() if ties else torch.randn(b, groups * size, s)
    x = x.to(DEVICE)
    y, index = kernels.forward(x, size, True)
    assert torch.equal(y, group_sort_reference(x, size, False)[0])
    if x.numel():
        split = (x.shape[1] // size, size)
        places = index.unflatten(1, split).long()
        assert torch.equal(x.unflatten(1, split).gather(2, places).flatten(1, 2), y)
        assert torch.equal(places.sort(dim=2)[0], torch.arange(size, device=DEVICE)[:, None].expand(places.shape))
        assert ties is False or torch.equal(places, x.unflatten(1, split).sort(dim=2, stable=True)[1])
    dy = torch.randn_like(x)
    assert torch.equal(kernels.backward(dy, index, size), group_sort_backward_reference(dy, index, size))
    assert torch.equal(kernels.forward(x, size, False)[0], y)


@pytest.mark.parametrize("size", [2, 4, 5])
def test_special_values(size: int) -> None:
    values = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.0, -1.0])
    x = values[torch.randint(len(values), (40, 4 * size, 1))].to(DEVICE)
    y, index = kernels.forward(x, size, True)
    assert torch.equal(y, group_sort_reference(x, size, True)[0])  # 0 == -0
    assert bool((index.unflatten(1, (4, size)).sort(dim=2)[0][:, :, :, 0] == torch.arange(size, device=DEVICE)).all())


@pytest.mark.parametrize("size", [2, 3, 4])
def test_nan_goes_where_the_reference_puts_it(size: int) -> None:
    x = torch.randn(6, 2 * size, 1)
    x[0, 0], x[1, 1], x[2, : size - 1] = torch.nan, -torch.nan, torch.nan
    x = x.to(DEVICE)
    y, index = kernels.forward(x, size, True)
    torch.testing.assert_close(y, group_sort_reference(x, size, True)[0], equal_nan=True, rtol=0, atol=0)
    assert bool((index.unflatten(1, (2, size)).sort(dim=2)[0][..., 0] == torch.arange(size, device=DEVICE)).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [2, 4])
def test_other_dtypes(size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPLIP_KERNELS", "triton")
    forward, backward = select("group_sort", DEVICE), select("group_sort_backward", DEVICE)
    x = torch.randn(3, 8, 5).to(DEVICE, dtype)
    y, index = forward(x, size, True)
    assert torch.equal(y, group_sort_reference(x, size, True)[0])
    assert backward(y, index, size).dtype == dtype
    assert torch.equal(backward(y, index, size), x)


def test_groups_too_large_take_the_reference() -> None:
    x = torch.randn(1, 1025, 1, device=DEVICE)
    assert torch.equal(kernels.forward(x, 1025, True)[0], x.sort(dim=1)[0])


def test_views_are_read_as_they_are() -> None:
    x = torch.randn(4, 12, 6, device=DEVICE)[::2, 2:10, ::2]
    for size in (2, 4):
        assert torch.equal(kernels.forward(x, size, True)[0], kernels.forward(x.contiguous(), size, True)[0])


def test_through_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPLIP_KERNELS", "triton")
    x = torch.randn(3, 8, 5, device=DEVICE, requires_grad=True)
    for size in (2, 4):
        (grad,) = torch.autograd.grad((group_sort(x, size) ** 3).sum(), x)
        torch.testing.assert_close(grad, 3 * x.detach() ** 2)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 4, 16, 1024])
def test_large_and_deterministic(size: int) -> None:
    x = torch.randn(512, 1024, 9, device=DEVICE)
    first = kernels.forward(x, size, True)
    assert torch.equal(first[0], group_sort_reference(x.double(), size, True)[0].float())
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(kernels.forward(x, size, True), first, strict=True))
