# SPDX-License-Identifier: Apache-2.0
"""Norms of matrices with rows and columns weighted away: never below the truth, and close to it."""

import math

import pytest
import torch
from torch import nn

from dplip.bounds.rules import module_layer
from dplip.certify import masked_norm
from dplip.certify.masked_norm import linear_part, root, scaled_spectral
from dplip.layers import MaxMin, NormalizedConv2d, NormalizedLinear, ReferenceShift
from dplip.operator_norm import spectral_bound


def weights(batch: int, size: int) -> torch.Tensor:
    w = torch.rand(batch, size, dtype=torch.float64) * (torch.rand(batch, size) > 0.4)
    w[0], w[1], w[2] = 0.0, 1.0, (w[2] > 0).to(w)
    return w


def exact(matrix: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(left[:, :, None] * matrix * right[:, None])[:, 0]


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (1, 4), (4, 1)])
def test_eigenvalues_bound_the_norm_tightly(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    for common in (False, True):
        left, right = weights(9, shape[0]), weights(9, shape[1])
        if common:
            left, right = (left[3:4].expand(9, -1), right) if shape[0] > shape[1] else (left, right[3:4].expand(9, -1))
        truth, bound = exact(matrix, left, right), scaled_spectral(matrix, left, right)
        assert bool((bound >= truth).all())
        torch.testing.assert_close(bound, truth, rtol=1e-6, atol=1e-7)
        assert bool((bound[(left == 0).all(1) | (right == 0).all(1)] == 0).all())


def test_gram_iterates_are_bounds_at_every_step_and_differentiable() -> None:
    matrix = torch.randn(8, 12, dtype=torch.float64)
    left, right = weights(6, 8), weights(6, 12)
    truth = exact(matrix, left, right)
    for t in range(1, 7):
        bound = scaled_spectral(matrix, left, right, t)
        assert bool((bound >= truth * (1 - 1e-14)).all())
        assert bool((bound <= truth * 8 ** (1 / 2 ** (t + 1)) * (1 + 1e-12) + 1e-60).all())
    matrix.requires_grad_()
    assert torch.autograd.gradcheck(lambda w: scaled_spectral(w, left[1:], right[1:], 3), (matrix,))
    (g,) = torch.autograd.grad(scaled_spectral(matrix, left, right, 3).sum(), matrix)
    assert bool(torch.isfinite(g).all())  # the first example's matrix is 0


def test_chunks_and_repeated_weights_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, left, right = torch.randn(5, 6, dtype=torch.float64), weights(11, 5), weights(11, 6)
    whole = scaled_spectral(matrix, left, right)
    monkeypatch.setattr(masked_norm, "_CHUNK", 60)
    twice = torch.cat([torch.arange(11), torch.arange(11)])
    torch.testing.assert_close(scaled_spectral(matrix, left[twice], right[twice]), whole[twice], rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e200])
def test_extreme_weights_neither_underflow_nor_overflow(scale: float) -> None:
    matrix = torch.randn(4, 5, dtype=torch.float64)
    left, right = torch.full((2, 4), 1e-90).double(), torch.ones(2, 5).double()
    left[1] = 1.0
    bound = scaled_spectral(matrix * scale, left, right)
    assert bool((bound >= exact(matrix, left, right) * scale * (1 - 1e-14)).all())
    assert float(bound[1]) <= float(exact(matrix, left, right)[1] * scale) * (1 + 1e-6)


def test_what_is_not_finite_has_no_bound() -> None:
    matrix = torch.randn(4, 5, dtype=torch.float64)
    matrix[1, 2] = math.nan
    left, right = torch.ones(2, 4).double(), torch.ones(2, 5).double()
    assert scaled_spectral(matrix, left, right).tolist() == [math.inf] * 2
    assert scaled_spectral(torch.zeros_like(matrix), left, right).tolist() == [0.0] * 2
    assert scaled_spectral(matrix, left[:0], right[:0]).shape == (0,)


CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1),
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=2),
    "even": lambda: nn.Conv2d(2, 3, 4, stride=2, padding=1),
    "normalized": lambda: NormalizedConv2d(2, 4, 3),
}


def dense(layer: nn.Module, size: tuple[int, ...]) -> torch.Tensor:
    zero = torch.zeros(1, *size, dtype=torch.float64)
    eye = torch.eye(zero.numel(), dtype=torch.float64).view(-1, *size)
    return (layer(eye) - layer(zero)).flatten(1).T


@pytest.mark.parametrize("formed", [True, False])
@pytest.mark.parametrize("name", sorted(CONVOLUTIONS))
def test_convolutions(name: str, formed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = CONVOLUTIONS[name]().double().requires_grad_(False)
    size = (4 if name == "groups" else 2, 7, 6)
    if not formed:  # too large to be written out: Schur's test, capped by the whole norm
        monkeypatch.setattr(masked_norm, "ENTRIES", 0)
    part = linear_part(module_layer(layer), size)
    assert part is not None and (part.matrix is not None) == formed
    matrix = dense(layer, size)
    shape = layer(torch.zeros(1, *size, dtype=torch.float64)).shape[1:]
    left, right = weights(6, matrix.shape[0]), weights(6, matrix.shape[1])
    bound = part.norm(left.view(-1, *shape), right.view(-1, *size))
    truth = exact(matrix, left, right)
    assert bool((bound >= truth).all()) and float(bound[0]) == 0.0
    if formed:
        torch.testing.assert_close(bound, truth, rtol=1e-6, atol=1e-7)
    assert float(bound[1]) <= spectral_bound(matrix) * 1.3
    torch.testing.assert_close(part.absolute(right.view(-1, *size)).flatten(1), right @ matrix.abs().T)
    rows = torch.linalg.vector_norm(matrix * right[:, None], dim=2)
    assert bool((part.rows(right.view(-1, *size)).flatten(1) >= rows).all())
    torch.testing.assert_close(part.rows(right.view(-1, *size)).flatten(1), rows, rtol=1e-9, atol=1e-9)


def test_wide_dense_layers_fall_back_and_only_affine_layers_have_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = NormalizedLinear(6, 5).double()
    left, right = weights(4, 5), weights(4, 6)
    monkeypatch.setattr(masked_norm, "COST", 0)
    part = linear_part(layer, (6,))
    assert part is not None and part.matrix is None
    assert bool((part.norm(left, right) >= exact(layer.weight.detach(), left, right)).all())
    assert float(part.norm(left, right)[1]) <= spectral_bound(layer.weight) * (1 + 1e-12)
    assert linear_part(ReferenceShift(layer, 0.0), (6,)) is not None
    assert linear_part(MaxMin(), (6,)) is None and linear_part(None, (6,)) is None

    class Doubled(NormalizedLinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    assert linear_part(Doubled(6, 5), (6,)) is None


def test_an_infinite_move_stays_infinite() -> None:
    part = linear_part(NormalizedLinear(3, 2).double(), (3,))
    x = torch.tensor([[0.0, math.inf, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    assert part is not None and part.absolute(x)[0].tolist() == [math.inf] * 2
    assert bool(torch.isfinite(part.absolute(x)[1]).all())


def test_root_has_no_gradient_at_zero() -> None:
    x = torch.tensor([0.0, 4.0], requires_grad=True)
    root(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.0, 0.25]
