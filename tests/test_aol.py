# SPDX-License-Identifier: Apache-2.0
"""Almost-orthogonal rescaling: never longer than 1, exact for orthogonal columns."""

import math

import pytest
import torch
from torch.nn import functional as F

from dplip.aol import aol_bound, aol_factors
from dplip.layers import NormalizedLinear


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (1, 6, 9, 1, 1), (2, 5, 3, 2, 3), (1, 2, 4, 3, 1)], ids=str)
@pytest.mark.parametrize("kind", ["normal", "ones", "sparse", "scales"])
def test_rescaled_convolutions_are_short(shape: tuple[int, ...], kind: str) -> None:
    torch.manual_seed(0)
    kernel = torch.randn(shape, dtype=torch.float64)
    if kind == "ones":
        kernel = torch.ones_like(kernel)
    elif kind == "sparse":
        kernel = kernel * (torch.rand_like(kernel) < 0.3)
    elif kind == "scales":
        kernel = kernel * 10 ** (3 * torch.randn(shape[0], 1, shape[2], 1, 1, dtype=torch.float64))
    rescaled = kernel * aol_factors(kernel)[:, None, :, None, None]
    for group, before in zip(rescaled, kernel, strict=True):
        eye = torch.eye(shape[2] * 49, dtype=torch.float64).view(-1, shape[2], 7, 7)
        for w, bound in ((group, 1.0), (before, aol_bound(kernel))):
            matrix = F.conv2d(eye, w, padding=2).flatten(1)
            assert float(torch.linalg.matrix_norm(matrix, 2)) <= bound * (1 + 1e-12)


def test_orthogonal_columns_become_unit_vectors() -> None:
    q = torch.linalg.qr(torch.randn(6, 4, dtype=torch.float64))[0] * torch.tensor([3.0, 0.1, 7.0, 1.0]).double()
    factors = aol_factors(q[None, :, :, None, None])[0]
    torch.testing.assert_close((q * factors).norm(dim=0), torch.ones(4, dtype=torch.float64))


def test_extreme_entries() -> None:
    zero = torch.zeros(1, 3, 2, 1, 1)
    assert aol_bound(zero) == 0.0 and torch.equal(aol_factors(zero), torch.ones(1, 2, dtype=torch.float64))
    assert aol_bound(zero + math.inf) == math.inf
    for scale in (1e-200, 1e200):
        w = torch.full((1, 3, 1, 1, 1), scale, dtype=torch.float64)
        assert aol_bound(w) == pytest.approx(math.sqrt(3) * scale)
        assert float((w * aol_factors(w)).norm()) == pytest.approx(1.0)


def test_linear_layers_rescale_their_columns() -> None:
    torch.manual_seed(0)
    kept = {}
    for projection in ("scale", "aol"):
        layer = NormalizedLinear(6, 20, projection=projection).double()
        with torch.no_grad():
            layer.weight.copy_(torch.randn(20, 6, generator=torch.Generator().manual_seed(1)))
            layer.weight[:, 0] *= 1e3
        layer.project_()
        assert float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) <= 1 + 1e-12
        kept[projection] = float(layer.weight[:, 1:].detach().norm())
        before = layer.weight.detach().clone()
        layer.project_()
        torch.testing.assert_close(layer.weight.detach(), before, rtol=1e-9, atol=0)
    assert kept["aol"] > 100 * kept["scale"]
