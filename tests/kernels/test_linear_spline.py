# SPDX-License-Identifier: Apache-2.0
"""Linear splines: interpolation, both kinds of ends, and no reading of a neighbour's coefficients."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dplip.kernels.linear_spline import (
    linear_spline,
    linear_spline_coefficient_grad,
    linear_spline_reference,
    locate,
)


def ends(c: Tensor, unit_slope: bool) -> Tensor | None:
    return torch.ones(len(c), 2, dtype=c.dtype) if unit_slope else None


def by_numpy(x: Tensor, c: Tensor, reach: float, unit_slope: bool) -> Tensor:
    knots = np.linspace(-reach, reach, c.shape[1])
    y = np.stack([np.interp(x[:, k].numpy(), knots, c[k].numpy()) for k in range(len(c))], 1)
    beyond = x - x.clamp(-reach, reach) if unit_slope else torch.zeros_like(x)
    return torch.from_numpy(y) + beyond


@pytest.mark.parametrize("unit_slope", [False, True])
@pytest.mark.parametrize(("intervals", "reach"), [(1, 1.0), (4, 0.3), (7, 2.5), (20, 1.0)])
def test_value_is_interpolation(intervals: int, reach: float, unit_slope: bool) -> None:
    c = torch.randn(3, intervals + 1, dtype=torch.float64)
    knots = torch.linspace(-reach, reach, intervals + 1, dtype=torch.float64)
    x = torch.cat([3 * reach * torch.randn(40, dtype=torch.float64), knots, knots * (1 + 1e-15), 1e9 * knots])
    x = x[:, None, None].expand(-1, 3, 2).contiguous()
    torch.testing.assert_close(linear_spline(x, c, reach, ends(c, unit_slope)), by_numpy(x, c, reach, unit_slope))


@pytest.mark.parametrize("unit_slope", [False, True])
def test_gradients_are_right(unit_slope: bool) -> None:
    c = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    x = (2 * torch.randn(5, 2, 3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, c: linear_spline(x, c, 1.0, ends(c, unit_slope)), (x, c))
    assert torch.autograd.gradgradcheck(lambda x, c: linear_spline(x, c, 1.0, ends(c, unit_slope)), (x, c))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("intervals", [1, 3, 20, 49])
def test_no_input_reads_a_neighbours_coefficients(intervals: int, dtype: torch.dtype) -> None:
    c = torch.full((3, intervals + 1), torch.nan, dtype=dtype)
    c[1] = torch.linspace(-1, 1, intervals + 1)
    reach = 0.7
    edge = torch.tensor([reach, -reach], dtype=dtype)
    x = torch.cat([edge, edge.nextafter(2 * edge), edge.nextafter(0 * edge), 1e30 * edge, torch.zeros(1, dtype=dtype)])
    x = torch.cat([x, torch.tensor([torch.inf, -torch.inf], dtype=dtype)])
    y = linear_spline(x[:, None, None].expand(-1, 3, 1).contiguous(), c, reach, None)
    assert y[:, 1].isfinite().all()
    assert y[:, 1].abs().max() <= 1


def test_location_is_a_convex_combination() -> None:
    x = torch.cat([torch.randn(100), torch.tensor([-1.0, 1.0, 1e30, -1e30, torch.inf, -torch.inf])])
    index, fraction = locate(x, 1.0, 10)
    assert int(index.min()) >= 0 and int(index.max()) <= 9
    assert float(fraction.min()) >= 0 and float(fraction.max()) <= 1


def test_nan_stays_visible() -> None:
    x = torch.tensor([[[torch.nan]], [[0.5]]])
    y = linear_spline(x, torch.zeros(1, 3), 1.0, torch.ones(1, 2))
    assert y[0].isnan().all() and y[1].isfinite().all()


@pytest.mark.parametrize("unit_slope", [False, True])
def test_gradients_are_those_of_the_reference(unit_slope: bool) -> None:
    """On knots and at the ends too, where a difference quotient has no one answer."""
    knots = torch.linspace(-1, 1, 5, dtype=torch.float64)
    x = torch.cat([knots, knots[[0, -1]].nextafter(2 * knots[[0, -1]]), torch.randn(9).double()])[:, None, None]
    x, c = x.clone().requires_grad_(), torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(x)
    got = torch.autograd.grad((linear_spline(x, c, 1.0, ends(c, unit_slope)) * weights).sum(), (x, c))
    expected = torch.autograd.grad((linear_spline_reference(x, c, 1.0, ends(c, unit_slope)) * weights).sum(), (x, c))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_raw_operators() -> None:
    x, c, dy = torch.randn(4, 2, 3), torch.randn(2, 6), torch.randn(4, 2, 3)
    ops = torch.ops.dplip
    for slopes in (None, ends(c, True)):
        torch.library.opcheck(ops.linear_spline, (x, c, 1.0, slopes))
        for need in ((True, False), (False, True)):
            torch.library.opcheck(ops.linear_spline_backward, (x, c, 1.0, slopes, dy, *need))
    torch.library.opcheck(ops.linear_spline_coefficient_grad, (x, 6, 1.0, dy))


def test_function_transforms() -> None:
    x, c, dy = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 2, 3), (2, 6), (5, 2, 3)))

    def loss(c: Tensor, x: Tensor, dy: Tensor) -> Tensor:
        return (linear_spline(x[None], c, 1.0, None)[0] * dy).sum()

    per_example = torch.func.vmap(torch.func.grad(loss, (0, 1)), (None, 0, 0))(c, x, dy)
    torch.testing.assert_close(per_example[0], linear_spline_coefficient_grad(x, 6, 1.0, dy))
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(
        per_example[1], torch.autograd.grad((linear_spline(leaf, c, 1.0, None) * dy).sum(), leaf)[0]
    )
    whole = torch.func.grad(lambda c: torch.func.vmap(loss, (None, 0, 0))(c, x, dy).sum())(c)
    torch.testing.assert_close(whole, per_example[0].sum(0))
    jacobian = torch.func.jacrev(lambda c: linear_spline(x, c, 1.0, None))(c)
    torch.testing.assert_close(
        jacobian, torch.autograd.functional.jacobian(lambda c: linear_spline(x, c, 1.0, None), c)
    )
    ensemble = torch.func.vmap(lambda c: linear_spline(x, c, 1.0, None))(torch.stack([c, 2 * c]))
    torch.testing.assert_close(ensemble[1], 2 * ensemble[0])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # from torch itself
def test_compiles_without_a_graph_break() -> None:
    x, c = torch.randn(5, 2, 3, requires_grad=True), torch.randn(2, 6, requires_grad=True)

    def loss(x: Tensor, c: Tensor) -> Tensor:
        return linear_spline(x, c, 1.0, None).square().sum()

    eager = torch.autograd.grad(loss(x, c), (x, c))
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x, c), (x, c))
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("x", "c", "reach"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 4), 1.0),
        (torch.zeros(2, 3, 1), torch.zeros(4, 4), 1.0),
        (torch.zeros(2, 3, 1), torch.zeros(3, 1), 1.0),
        (torch.zeros(2, 3, 1), torch.zeros(3, 4), 0.0),
        (torch.zeros(2, 3, 1), torch.zeros(3, 4), float("nan")),
        (torch.zeros(2, 3, 1), torch.zeros(3, 4).double(), 1.0),
    ],
)
def test_operands_that_do_not_fit(x: Tensor, c: Tensor, reach: float) -> None:
    with pytest.raises(ValueError, match="linear_spline: expected"):
        linear_spline(x, c, reach, None)
