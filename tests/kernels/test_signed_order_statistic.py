# SPDX-License-Identifier: Apache-2.0
"""Signed order statistics under function transforms; values and bounds are tested with their layer."""

import pytest
import torch
from torch import Tensor

from dplip.kernels.signed_order_statistic import signed_order_statistic, signed_order_statistic_indices


def draw() -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(*shape, dtype=torch.float64) for shape in ((5, 8), (4, 8), (4, 3)))


@pytest.mark.parametrize("magnitude", [False, True])
def test_values_and_gradients(magnitude: bool) -> None:
    x, w, c = draw()
    t = x[:, None] - w
    ordered = (t.abs() if magnitude else t).sort(-1, descending=True)[0][..., :3]
    torch.testing.assert_close(signed_order_statistic(x, w, c, magnitude), (ordered * c).sum(-1))
    leaves = tuple(v.requires_grad_() for v in (x, w, c))
    assert torch.autograd.gradcheck(lambda *v: signed_order_statistic(*v, magnitude), leaves)


@pytest.mark.parametrize("magnitude", [False, True])
def test_function_transforms(magnitude: bool) -> None:
    x, w, c = draw()

    def loss(w: Tensor, x: Tensor) -> Tensor:
        return signed_order_statistic(x[None], w, c, magnitude).square().sum()

    per_example = torch.func.vmap(torch.func.grad(loss), (None, 0))(w, x)
    for b in range(5):
        leaf = w.clone().requires_grad_()
        torch.testing.assert_close(per_example[b], torch.autograd.grad(loss(leaf, x[b]), leaf)[0])
    whole = torch.func.grad(lambda w: torch.func.vmap(loss, (None, 0))(w, x).sum())(w)
    torch.testing.assert_close(whole, per_example.sum(0))
    ensemble = torch.func.vmap(lambda w: signed_order_statistic(x, w, c, magnitude))(torch.stack([w, 2 * w]))
    torch.testing.assert_close(ensemble[0], signed_order_statistic(x, w, c, magnitude))
    torch.library.opcheck(torch.ops.dplip.signed_order_statistic_indices, (x, w, 3, magnitude))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # from torch itself
def test_compiles_without_a_graph_break() -> None:
    x, w, c = draw()
    x.requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return signed_order_statistic(x, w, c).square().sum()

    (eager,) = torch.autograd.grad(loss(x), x)
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(compiled, eager)


def test_indices_are_distinct_at_ties() -> None:
    index = signed_order_statistic_indices(torch.zeros(2, 6), torch.ones(3, 6), 4, True)
    assert all(len(set(row)) == 4 for row in index.flatten(0, 1).tolist())
