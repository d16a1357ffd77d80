# SPDX-License-Identifier: Apache-2.0
"""GroupSort: values, permutations at ties, transforms."""

import pytest
import torch
from torch import Tensor

from dplip.kernels.group_sort import group_sort, group_sort_reference

SIZES = [2, 3, 4, 8, 24]


def draw(ties: bool = False, b: int = 5, s: int = 3) -> Tensor:
    return torch.randint(-1, 2, (b, 24, s)).double() if ties else torch.randn(b, 24, s, dtype=torch.float64)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ties", [False, True])
def test_groups_are_sorted_and_indices_say_from_where(size: int, ties: bool) -> None:
    x = draw(ties)
    y, index = group_sort_reference(x, size, True)
    groups = x.unflatten(1, (-1, size))
    assert torch.equal(y.unflatten(1, (-1, size)), groups.sort(dim=2)[0])
    assert torch.equal(groups.gather(2, index.long().unflatten(1, (-1, size))).flatten(1, 2), y)
    assert torch.equal(group_sort_reference(x, size, False)[0], y)
    assert group_sort_reference(x, size, False)[1].numel() == 0
    assert torch.equal(group_sort(x, size), y)


@pytest.mark.parametrize("size", SIZES)
def test_the_jacobian_is_a_permutation_at_ties(size: int) -> None:
    x = draw(ties=True, b=3, s=1)
    jacobian = torch.autograd.functional.jacobian(lambda v: group_sort(v, size), x).flatten(3).flatten(0, 2)
    assert bool(((jacobian == 0) | (jacobian == 1)).all())
    assert bool((jacobian.sum(0) == 1).all()) and bool((jacobian.sum(1) == 1).all())


@pytest.mark.parametrize("size", SIZES)
def test_gradients_are_right(size: int) -> None:
    x = draw(b=2, s=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: group_sort(x, size), (x,))
    assert torch.autograd.gradgradcheck(lambda x: group_sort(x, size).square(), (x,))


@pytest.mark.parametrize("size", [2, 4])
def test_raw_operators(size: int) -> None:
    x = draw()
    for flag in (False, True):
        torch.library.opcheck(torch.ops.dplip.group_sort, (x, size, flag))
    index = torch.ops.dplip.group_sort(x, size, True)[1]
    torch.library.opcheck(torch.ops.dplip.group_sort_backward, (x, index, size))


@pytest.mark.parametrize("size", [2, 4])
def test_function_transforms(size: int) -> None:
    x, g = draw(), draw()

    def loss(x: Tensor, g: Tensor) -> Tensor:
        return (group_sort(x[None], size)[0] * g).sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad((group_sort(leaf, size) * g).sum(), leaf)
    assert torch.equal(torch.func.vmap(torch.func.grad(loss))(x, g), expected)
    assert torch.equal(torch.func.grad(lambda x: torch.func.vmap(loss)(x, g).sum())(x), expected)
    jacobian = torch.func.jacrev(lambda v: group_sort(v, size))(x[:2])
    assert torch.equal(jacobian, torch.autograd.functional.jacobian(lambda v: group_sort(v, size), x[:2]))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # from torch itself
def test_compiles_without_a_graph_break() -> None:
    x = draw().requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return (group_sort(x, 4) ** 3).sum()

    (eager,) = torch.autograd.grad(loss(x), x)
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize(("shape", "size"), [((2, 4), 2), ((2, 4, 1), 3), ((2, 4, 1), 1)])
def test_operands_that_do_not_fit(shape: tuple[int, ...], size: int) -> None:
    with pytest.raises(ValueError, match="group_sort: expected"):
        group_sort(torch.zeros(shape), size)
