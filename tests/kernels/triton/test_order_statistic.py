# SPDX-License-Identifier: Apache-2.0
"""Triton's l_inf distances, sort neurons, intervals and gradients against the references in float64."""

import itertools

import pytest
import torch
from torch import Tensor

from dplip.kernels.dispatch import select
from dplip.kernels.order_statistic import _backward_reference, _weight_grad_reference, order_statistic_reference
from dplip.kernels.order_statistic_interval import _backward_reference as interval_backward_reference
from dplip.kernels.order_statistic_interval import order_statistic_interval_reference
from dplip.kernels.triton import launch
from dplip.kernels.triton import order_statistic as ours
from dplip.kernels.triton.largest import interval, largest, largest_with_index
from dplip.kernels.triton.scatter import scatter
from dplip.kernels.triton.tile import Tile
from dplip.kernels.triton.top_k import top_k

SMALL = Tile(2, 2, 4, 4, 8, 2, 2, 1, 2)
TILES = [SMALL, Tile(2, 4, 4, 2, 4, 4, 3, 1, 3, direct=True, waves=2)]
SHAPES = [(0, 3, 4), (2, 0, 4), (1, 1, 1), (3, 7, 5), (3, 5, 33)]


def name_of(shape: tuple[int, int, int]) -> str:
    return "B{}-O{}-I{}".format(*shape)


@pytest.fixture(params=[False, True], ids=["reals", "ties"])
def ties(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs element by element."""
    buckets = dict.fromkeys(["deep", "wide", "small", "narrow"], SMALL)
    monkeypatch.setattr(launch, "TILES", {kernel: buckets for kernel in launch.TILES})


def draw(shape: tuple[int, int, int], device: str, ties: bool = False) -> tuple[Tensor, Tensor]:
    b, o, i = shape
    x, w = torch.randn(b, i), torch.randn(o, i)
    if ties:
        x, w = x.round(), w.round()
    return x.to(device), w.to(device)


def weights(k: int, device: str) -> Tensor:
    return (torch.arange(k, 0, -1.0) / (k * (k + 1) / 2)).to(device)


def elements(x: Tensor, w: Tensor, x2: Tensor, kind: int) -> Tensor:
    below, above = x[:, None] - w, w - x2[:, None]
    return [below.abs(), torch.maximum(below, above).clamp_min(0), torch.maximum(below.abs(), above.abs())][kind]


@pytest.mark.parametrize("tile", TILES, ids=["tile", "direct"])
@pytest.mark.parametrize("kind", [0, 1, 2], ids=["distance", "lower", "upper"])
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_largest_is_exact_and_credits_the_first(
    shape: tuple[int, int, int], kind: int, tile: Tile, ties: bool, device: str
) -> None:
    x, w = draw(shape, device, ties)
    x2, c = x + 0.5, torch.tensor([0.75], device=device)
    t = elements(x, w, x2, kind)
    most = t.amax(-1) if t.numel() else t.new_zeros(t.shape[:2])
    assert torch.equal(largest(x, w, c, x2, kind, tile), 0.75 * most)
    y, index = largest_with_index(x, w, c, x2, kind, tile)
    assert torch.equal(y, 0.75 * most)
    assert index.dtype == torch.int32
    assert torch.equal(index, (t == most[..., None]).int().argmax(-1).int() if t.numel() else index)


@pytest.mark.parametrize(("shape", "k"), [((0, 3, 4), 2), ((3, 7, 5), 2), ((2, 3, 5), 5), ((2, 5, 33), 3)], ids=str)
def test_top_k_is_exact(shape: tuple[int, int, int], k: int, ties: bool, device: str) -> None:
    x, w = draw(shape, device, ties)
    c = weights(k, device)
    expected, _ = order_statistic_reference(x.double(), w.double(), c.double())
    values = (x[:, None] - w).abs().topk(k, dim=-1)[0]
    y, index = top_k(x, w, c, True, tile=SMALL)
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal((x[:, None] - w).abs().gather(2, index.long()), values)
    assert bool((torch.sort(index, dim=-1)[0].diff(dim=-1) > 0).all())
    y, none = top_k(x, w, c, False, tile=TILES[1])
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-7)
    assert none.numel() == 0


def test_a_shortcut_that_does_not_settle_is_done_again(device: str) -> None:
    """Six large elements in one block, more blocks at the floor than are kept, a spread of 2^40, infinity."""
    x, w = torch.zeros(4, 64), torch.zeros(2, 64)
    x[0, 8:14] = torch.arange(3.0, 9.0)
    x[1] = 1.0
    x[2, 3], x[2, 40] = 2.0**20, 2.0**-20
    x[3, 5] = float("inf")
    x, w, c = x.to(device), w.to(device), weights(3, device)
    t = (x[:, None] - w).abs()
    y, index = top_k(x, w, c, True, tile=SMALL)
    values = t.topk(3, dim=-1)[0]
    torch.testing.assert_close(y, values @ c)
    assert torch.equal(t.gather(2, index.long()), values)


@pytest.mark.parametrize("k", [1, 2])
def test_nan_infinity_and_denormals(k: int, device: str) -> None:
    x, w = draw((5, 4, 12), device)
    x[0, 3], x[1, 10], x[2, 7] = float("nan"), float("inf"), -float("inf")
    w[3, 2] = float("nan")
    x[3:5], w[:2] = x[3:5] * 1e-44, w[:2] * 1e-44
    c = weights(k, device)
    y, index = ours.order_statistic(x, w, c, True)
    expected, _ = order_statistic_reference(x.double(), w.double(), c.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=3e-45, equal_nan=True)
    assert bool(((0 <= index) & (index < 12)).all())
    low, high, *_ = ours.order_statistic_interval(x, x + 1, w, c, False)
    for got, right in zip(
        (low, high),
        order_statistic_interval_reference(x.double(), (x + 1).double(), w.double(), c.double()),
        strict=False,
    ):
        assert torch.equal(got.isnan(), right.isnan())


@pytest.mark.parametrize("shape", [(3, 7, 6), (5, 9, 16), (4, 11, 34)], ids=name_of)
def test_float16_is_within_its_rounding(shape: tuple[int, int, int], device: str) -> None:
    x, w = (t.half() for t in draw(shape, device))
    c = torch.ones(1, device=device)
    exact = (x.float()[:, None] - w.float()).abs()
    y, none = ours.order_statistic(x, w, c, False)
    assert y.dtype == torch.float32 and none.numel() == 0
    assert bool(((y - exact.amax(-1)).abs() <= 2**-10 * exact.amax(-1)).all())
    y, index = ours.order_statistic(x, w, c, True)
    assert torch.equal(exact.gather(2, index.long())[..., 0], y), "the value is that of the credited element"
    assert bool((y >= (1 - 2**-9) * exact.amax(-1)).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_operands_of_sort_neurons_and_intervals_are_exact(dtype: torch.dtype, device: str) -> None:
    x, w = (t.to(dtype) for t in draw((3, 5, 21), device))
    c = weights(3, device)
    torch.testing.assert_close(
        ours.order_statistic(x, w, c, True)[0], ours.order_statistic(x.float(), w.float(), c, True)[0]
    )
    for got, right in zip(
        ours.order_statistic_interval(x, x, w, c[:1], False)[:2],
        ours.order_statistic_interval(x.float(), x.float(), w.float(), c[:1], False)[:2],
        strict=True,
    ):
        assert torch.equal(got, right)


def test_float64_runs_the_reference(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPLIP_KERNELS", "triton")
    x, w = (t.double() for t in draw((3, 5, 9), device))
    c = weights(2, device).double()
    assert torch.equal(select("order_statistic", device)(x, w, c, True)[0], order_statistic_reference(x, w, c)[0])


@pytest.mark.parametrize(("shape", "k"), [((2, 0, 4), 1), ((1, 1, 1), 1), ((3, 5, 33), 1), ((2, 3, 9), 2)], ids=str)
def test_interval(shape: tuple[int, int, int], k: int, ties: bool, device: str) -> None:
    lower, w = draw(shape, device, ties)
    upper = lower + torch.rand_like(lower).round(decimals=1)
    c = weights(k, device)
    right = order_statistic_interval_reference(lower.double(), upper.double(), w.double(), c.double())
    for with_index in (False, True):
        got = ours.order_statistic_interval(lower, upper, w, c, with_index)
        torch.testing.assert_close(got[0].double(), right[0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(got[1].double(), right[1], rtol=1e-6, atol=1e-7)
    for y, index, kind in ((got[0], got[2], 1), (got[1], got[3], 2)):
        values = elements(lower, w, upper, kind).gather(2, index.long())
        torch.testing.assert_close(values @ c, y)
    for tile in TILES:
        ends = interval(lower, upper, w, c[:1], tile)
        assert all(
            torch.equal(a, elements(lower, w, upper, e).amax(-1) * c[0]) for a, e in zip(ends, (1, 2), strict=True)
        )


@pytest.mark.parametrize("exact", [False, True], ids=["atomic", "exact"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shape", [(2, 0, 4), (3, 7, 5)], ids=name_of)
def test_gradients(shape: tuple[int, int, int], k: int, exact: bool, ties: bool, device: str) -> None:
    x, w = draw(shape, device, ties)
    c, dy = weights(k, device), torch.randn(shape[:2]).to(device)
    _, index = order_statistic_reference(x, w, c)
    right = _backward_reference(x.double(), w.double(), c.double(), index, dy.double(), True, True)
    for need_x, need_w in itertools.product([False, True], repeat=2):
        dx, _, dw = scatter(x, w, c, index, dy, need_x, need_w, exact=exact)
        for got, expected, needed in ((dx, right[0], need_x), (dw, right[1], need_w)):
            if needed:
                torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
            else:
                assert got.numel() == 0
    grads = ours.order_statistic_weight_grad(x, w, c, index, dy)
    assert torch.equal(grads, _weight_grad_reference(x, w, c, index, dy))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shape", SHAPES[3:4], ids=name_of)
def test_interval_gradients(shape: tuple[int, int, int], k: int, ties: bool, device: str) -> None:
    lower, w = draw(shape, device, ties)
    upper = lower + torch.rand_like(lower).round(decimals=1)
    c, dlow, dhigh = weights(k, device), torch.randn(shape[:2]).to(device), torch.randn(shape[:2]).to(device)
    *_, at_low, at_high = order_statistic_interval_reference(lower, upper, w, c)
    operands = (lower, upper, w, c, at_low, at_high, dlow, dhigh)
    doubled = [t.double() if t.is_floating_point() else t for t in operands]
    right = interval_backward_reference(*doubled, True, True, True)
    for got, expected in zip(ours.order_statistic_interval_backward(*operands, True, True, True), right, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    assert ours.order_statistic_interval_backward(*operands, False, False, True)[0].numel() == 0


@pytest.mark.parametrize("scale", [1e-38, 1e-3, 1e30])
def test_exact_sums_do_not_depend_on_order_or_scale(scale: float, device: str) -> None:
    x, w = draw((7, 5, 3), device)
    c, dy = weights(2, device), scale * torch.randn(7, 5).to(device)
    _, index = order_statistic_reference(x, w, c)
    _, _, dw = scatter(x, w, c, index, dy, False, True, exact=True)
    order = torch.randperm(7).to(device)
    _, _, again = scatter(x[order], w, c, index[order], dy[order], False, True, exact=True)
    assert torch.equal(dw, again)
    right = _backward_reference(x.double(), w.double(), c.double(), index, dy.double(), False, True)[1]
    torch.testing.assert_close(dw.double(), right, rtol=1e-5, atol=1e-6 * scale)


def test_exact_sums_show_what_is_not_finite(device: str) -> None:
    x, w = draw((3, 4, 5), device)
    c, dy = torch.ones(1, device=device), torch.ones(3, 4, device=device)
    _, index = order_statistic_reference(x, w, c)
    dy[1, 2] = float("inf")
    assert bool(scatter(x, w, c, index, dy, True, False, exact=True)[0].isnan().all())


@pytest.mark.parametrize("k", [1, 2])
def test_strided_rows_and_wide_columns(k: int, device: str) -> None:
    """Views of larger arrays, transposed operands and rows that no vector load fits."""
    big, c = torch.randn(9, 40).to(device), weights(k, device)
    for x, w in (
        (big[:4, 1:18], big[4:, 3:20]),
        (big[::2, :16], big[1::2, 16:32]),
        (big.T[:6, :7], big.T[10:15, :7]),
    ):
        expected, _ = order_statistic_reference(x, w, c)
        y, index = ours.order_statistic(x, w, c, True)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close((x[:, None] - w).abs().gather(2, index.long()) @ c, expected)


def test_slabs_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    x, w = draw((9, 2, 8), device)
    c = weights(2, device)
    whole = ours.order_statistic(x, w, c, True)
    monkeypatch.setattr("dplip.kernels.triton.top_k._SLAB", 6)
    assert all(torch.equal(a, b) for a, b in zip(ours.order_statistic(x, w, c, True), whole, strict=True))
    one = ours.order_statistic(x, w, c[:1], True)
    monkeypatch.setattr("dplip.kernels.triton.largest.row_slabs", lambda b, o: [slice(0, 4), slice(4, 9)])
    assert all(torch.equal(a, b) for a, b in zip(ours.order_statistic(x, w, c[:1], True), one, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 10])
@pytest.mark.parametrize("shape", [(512, 1024, 784), (257, 129, 1023), (64, 10, 5120)], ids=name_of)
def test_at_full_size(shape: tuple[int, int, int], k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    x, w = draw(shape, "cuda")
    c = weights(k, "cuda")
    expected, _ = order_statistic_reference(x.double(), w.double(), c.double())
    first = ours.order_statistic(x, w, c, True)
    torch.testing.assert_close(first[0].double(), expected, rtol=1e-6, atol=1e-6)
    low, high, *_ = ours.order_statistic_interval(x - 0.1, x + 0.1, w, c, False)
    right = order_statistic_interval_reference((x - 0.1).double(), (x + 0.1).double(), w.double(), c.double())
    torch.testing.assert_close(low.double(), right[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(high.double(), right[1], rtol=1e-6, atol=1e-6)
    dy = torch.randn(shape[:2], device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        gradient = ours.order_statistic_backward(x, w, c, first[1], dy, True, True)
        for _ in range(20):
            assert all(torch.equal(a, b) for a, b in zip(ours.order_statistic(x, w, c, True), first, strict=True))
            again = ours.order_statistic_backward(x, w, c, first[1], dy, True, True)
            assert all(torch.equal(a, b) for a, b in zip(again, gradient, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
