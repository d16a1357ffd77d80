# SPDX-License-Identifier: Apache-2.0
"""Convolutions in a norm ball."""

import pytest
import torch

from dplip.errors import ConfigError
from dplip.layers import LipschitzLayer, NormalizedConv2d, Shapes
from dplip.testing import LayerContract


class TestSpectral(LayerContract):
    in_shape = (2, 3, 4)
    constraint = {"two_two": 1.0}

    def make(self) -> LipschitzLayer:
        return NormalizedConv2d(2, 2, 3, padding=1)


class TestStridedGroups(LayerContract):
    in_shape = (2, 4, 4)
    parameter_draws = ("initial", "large", "tied")
    constraint = {"two_two": 0.5}

    def make(self) -> LipschitzLayer:
        return NormalizedConv2d(2, 4, 3, stride=2, padding=1, groups=2, max_norm=0.5, bias=False)


class TestFrobenius(LayerContract):
    in_shape = (2, 4, 3)
    parameter_draws = ("initial", "large", "tied")
    constraint = {"two_two": 1.0}

    def make(self) -> LipschitzLayer:
        return NormalizedConv2d(2, 2, (3, 2), ball="frobenius", padding=(1, 0))


class TestRowsL1(LayerContract):
    in_shape = (1, 4, 4)
    parameter_draws = ("initial", "large", "tied")
    constraint = {"inf_inf": 1.0}

    def make(self) -> LipschitzLayer:
        return NormalizedConv2d(1, 3, 3, ball="rows_l1", padding=1)


class TestAol(LayerContract):
    in_shape = (2, 4, 3)
    constraint = {"two_two": 1.0}

    def make(self) -> LipschitzLayer:
        return NormalizedConv2d(2, 3, 3, stride=2, padding=1, projection="aol")


class TestOrthogonal(LayerContract):
    in_shape = (2, 3, 3)
    parameter_draws = ("initial", "large", "tied")
    constraint = {"two_two": 1.0}

    def make(self) -> LipschitzLayer:
        return NormalizedConv2d(2, 2, 2, orthogonalize=40, bias=False)


SIZES = [(3, 3), (5, 8), (13, 13)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"projection": "aol"},
        {"projection": "aol", "stride": 2, "groups": 2},
        {"stride": (2, 1), "dilation": (1, 2)},
        {"ball": "frobenius", "stride": 2},
        {"ball": "frobenius", "groups": 2, "dilation": 2, "stride": 2},
        {"orthogonalize": 15},
        {"orthogonalize": 15, "groups": 2},
    ],
    ids=str,
)
def test_projected_kernels_obey_the_ball_at_every_size(options: dict, dtype: torch.dtype) -> None:
    """Measured with an SVD of the explicit matrix, after a projection from far outside."""
    torch.manual_seed(0)
    layer = NormalizedConv2d(4, 6, 3, padding=2, max_norm=0.8, bias=False, **options).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(5 * torch.randn_like(layer.weight))
    layer.project_()
    layer.double()
    for size in SIZES:
        eye = torch.eye(4 * size[0] * size[1], dtype=torch.float64).view(-1, 4, *size)
        matrix = layer(eye).detach().flatten(1)
        sigma = float(torch.linalg.matrix_norm(matrix, 2))
        assert sigma <= 0.8 * (1 + 1e-6), size
        around = Shapes((4, *size), (6, *layer.window.positions(size)))
        assert sigma <= layer.operator_norms(around).two_two <= 0.8 * (1 + 1e-5)


def test_aol_keeps_more_of_a_kernel_whose_columns_differ() -> None:
    """One large input channel: scaling shrinks the small one with it, almost-orthogonal rescaling does not."""
    torch.manual_seed(0)
    norms = {}
    for projection in ("scale", "aol"):
        layer = NormalizedConv2d(2, 8, 3, projection=projection, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(8, 2, 3, 3, generator=torch.Generator().manual_seed(0)))
            layer.weight[:, 0] *= 100
        layer.project_()
        norms[projection] = float(layer.weight[:, 1].detach().norm())
    assert norms["aol"] > 10 * norms["scale"]


def test_orthogonal_patches() -> None:
    """Windows that tile: the kernel's rows become orthonormal and the certified norm is 1."""
    torch.manual_seed(0)
    layer = NormalizedConv2d(2, 5, 2, stride=2, orthogonalize=25, bias=False).double()
    rows = layer.weight.detach().flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-6)


def test_inside_the_ball_nothing_moves() -> None:
    for options in ({}, {"projection": "aol"}, {"ball": "rows_l1"}, {"ball": "frobenius"}):
        layer = NormalizedConv2d(2, 3, 3, **options)
        with torch.no_grad():
            layer.weight.mul_(0.5)
        before = layer.weight.detach().clone()
        layer.project_()
        assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    "bad",
    [
        {"groups": 2},
        {"ball": "columns_l1"},
        {"max_norm": 0.0},
        {"projection": "power"},
        {"projection": "aol", "ball": "rows_l1"},
        {"orthogonalize": 3, "ball": "frobenius"},
        {"orthogonalize": -1},
        {"kernel_size": 0},
    ],
)
def test_bad_options(bad: dict) -> None:
    with pytest.raises(ConfigError):
        NormalizedConv2d(**({"in_channels": 3, "out_channels": 4, "kernel_size": 2} | bad))
