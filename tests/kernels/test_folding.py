# SPDX-License-Identifier: Apache-2.0
"""The mapped axis joins the batch and comes back."""

import pytest
import torch

from dplip.kernels.folding import fold, gradient_of, sample_by_sample, unfold


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_unfold_undoes_fold(axis: int, dim: int) -> None:
    v = torch.randn(3, 4, 5)
    folded = fold(v, dim, v.shape[dim], axis)
    assert folded.ndim == 2
    torch.testing.assert_close(unfold(folded, v.shape[dim], axis), v.movedim(dim, axis))


def test_a_tensor_without_a_mapped_axis_is_repeated() -> None:
    v = torch.randn(4, 5)
    assert torch.equal(fold(v, None, 3), v.repeat(3, 1))
    assert torch.equal(fold(v, None, 3, axis=1), v.repeat(1, 3))


def test_no_samples() -> None:
    assert unfold(fold(torch.zeros(0, 4, 5), 0, 0), 0).shape == (0, 0, 5)
    with pytest.raises(ValueError, match="at least one sample"):
        sample_by_sample(torch.neg, 0, (0,), (torch.zeros(0, 4),))


def test_samples_one_by_one() -> None:
    a, b = torch.randn(3, 4), torch.randn(4)
    got, dim = sample_by_sample(torch.add, 3, (0, None), (a, b))
    assert dim == 0 and torch.equal(got, a + b)
    (least, most), dims = sample_by_sample(lambda v: (v.amin(), v.amax()), 4, (1,), (a,))
    assert dims == (0, 0) and torch.equal(least, a.amin(0)) and torch.equal(most, a.amax(0))


def test_second_derivatives_are_refused_by_name() -> None:
    with pytest.raises(NotImplementedError, match="op: expected one derivative"):
        gradient_of("op").backward(None)
