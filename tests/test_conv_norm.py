# SPDX-License-Identifier: Apache-2.0
"""Convolution norms against the explicit matrix: never below it, for any geometry, and close to it."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dplip import conv_symbol
from dplip.conv_norm import conv_norms, conv_spectral_bound, phases
from dplip.norms import OperatorNorms

GEOMETRIES = [
    {"stride": s, "padding": p, "dilation": d, "groups": g}
    for s, p, d, g in itertools.product([(1, 1), (2, 2), (3, 1)], [(0, 0), (1, 2)], [(1, 1), (2, 3)], [1, 2])
]
KERNELS = [(1, 1), (3, 3), (2, 4), (5, 1)]
SIZES = [(3, 4), (6, 5), (9, 9)]


def fits(kernel, size, geometry) -> bool:
    return all(
        (k - 1) * d < n + 2 * p
        for k, n, p, d in zip(kernel, size, geometry["padding"], geometry["dilation"], strict=True)
    )


def matrix(weight: Tensor, size: tuple[int, int], geometry: dict) -> Tensor:
    """The convolution as a dense matrix [outputs, inputs]."""
    channels = weight.shape[1] * geometry["groups"]
    eye = torch.eye(channels * math.prod(size), dtype=torch.float64).view(-1, channels, *size)
    return F.conv2d(eye, weight.double(), **geometry).flatten(1).T


def exact(m: Tensor) -> dict[str, float]:
    return {
        "inf_inf": float(m.abs().sum(1).max()),
        "two_inf": float(torch.linalg.vector_norm(m, dim=1).max()),
        "two_two": float(torch.linalg.matrix_norm(m, 2)),
        "one_one": float(m.abs().sum(0).max()),
        "one_inf": float(m.abs().max()),
    }


def weights(kernel, groups) -> list[Tensor]:
    torch.manual_seed(sum(kernel) + groups)
    shape = (4, 2, *kernel)
    ramp = torch.arange(math.prod(kernel), dtype=torch.float64).view(kernel) - 1
    edge = torch.zeros(shape, dtype=torch.float64)
    edge[:, :, 0, 0], edge[:, :, -1, -1] = 1.0, -1.0  # a difference filter: zero on a torus of the wrong period
    scaled = torch.randn(shape, dtype=torch.float64)
    scaled[: 4 // groups] *= 100  # the norm is that of the largest group
    return [
        torch.randn(shape, dtype=torch.float64),
        torch.ones(shape, dtype=torch.float64),
        ramp.expand(shape).contiguous(),
        edge,
        scaled,
        torch.randn(shape, dtype=torch.float64).sign(),
    ]


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: " ".join(map(str, g.values())))
def test_never_below_the_explicit_matrix(geometry: dict, kernel: tuple[int, int]) -> None:
    for w in weights(kernel, geometry["groups"]):
        free = conv_norms(w, **geometry)
        for size in SIZES:
            if not fits(kernel, size, geometry):
                continue
            known = conv_norms(w, **geometry, size=size)
            for name, true in exact(matrix(w, size, geometry)).items():
                assert true <= getattr(known, name) * (1 + 1e-14), (name, size)
                assert true <= getattr(free, name) * (1 + 1e-14), (name, size)
            assert known.two_two <= free.two_two * (1 + 1e-12)


@pytest.mark.parametrize("side", [0, 16])
def test_gram_iteration_and_eigenvalues_agree(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    w = torch.randn(20, 18, 3, 3, dtype=torch.float64)
    true = exact(matrix(w, (6, 6), {"groups": 1, "padding": (1, 1)}))["two_two"]
    monkeypatch.setattr(conv_symbol, "EIGEN_SIDE", 20 if side else 0)
    bound = conv_spectral_bound(w, padding=(1, 1), size=(6, 6))
    assert true <= bound <= 1.1 * true


def test_the_bound_of_all_sizes_is_reached_by_large_images() -> None:
    """The mean filter's norm tends to 1 from below; no period of the image's own size would see the worst frequency."""
    w = torch.full((1, 1, 3, 3), 1 / 9, dtype=torch.float64)
    free = conv_spectral_bound(w)
    assert 1.0 <= free <= 1.02
    sigmas = [exact(matrix(w, (n, n), {"groups": 1, "padding": (1, 1)}))["two_two"] for n in (4, 8, 16)]
    assert sigmas == sorted(sigmas) and sigmas[-1] > 0.95
    for n in (8, 64, 10_000):
        assert conv_spectral_bound(w, padding=(1, 1), size=(n, n)) >= 1.0 - 1e-12


def test_a_period_of_the_unpadded_image_would_be_wrong() -> None:
    """w = (1, 0, -1) on two pixels: the circulant of period 2 is zero, the padded convolution is not."""
    w = torch.tensor([[[[1.0, 0.0, -1.0]]]], dtype=torch.float64)
    bound = conv_spectral_bound(w, padding=(0, 1), size=(1, 2))
    assert bound >= exact(matrix(w, (1, 2), {"groups": 1, "padding": (0, 1)}))["two_two"] == 1.0


def test_windows_that_tile_are_exact() -> None:
    torch.manual_seed(0)
    w = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    true = float(torch.linalg.matrix_norm(w.flatten(1), 2))
    for size in (None, (6, 6)):
        assert conv_spectral_bound(w, stride=(2, 2), size=size) == pytest.approx(true, rel=1e-12)


def test_a_single_window_is_a_matrix() -> None:
    """Known overlap: where one window covers the image, the norm is that of the flattened kernel."""
    torch.manual_seed(0)
    w = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    true = float(torch.linalg.matrix_norm(w.flatten(1), 2))
    assert conv_spectral_bound(w, size=(3, 3), overlap=1) == pytest.approx(true, rel=1e-12)


def test_strided_bounds_are_tight() -> None:
    """The phases see the stride: the bound of the stride-1 convolution alone would be up to ``s`` times too large."""
    torch.manual_seed(0)
    ratios = []
    for kernel, s in ((3, 2), (4, 2), (5, 2), (5, 3)):
        w = torch.randn(6, 4, kernel, kernel, dtype=torch.float64)
        geometry = {"stride": (s, s), "padding": (1, 1), "groups": 1}
        true = exact(matrix(w, (11, 11), geometry))["two_two"]
        ratios.append(conv_spectral_bound(w, stride=(s, s), padding=(1, 1), size=(11, 11)) / true)
    assert all(1 - 1e-12 <= r <= 1.25 for r in ratios), ratios


def test_phases_are_the_strided_convolution() -> None:
    torch.manual_seed(0)
    w, x = torch.randn(6, 2, 3, 2, dtype=torch.float64), torch.randn(2, 4, 12, 12, dtype=torch.float64)
    kernel = phases(w, (2, 3), (2, 1), 2)
    g, o, i, a, b, u, v = kernel.shape
    split = x.view(2, g, i, 6, 2, 4, 3).permute(0, 1, 2, 4, 6, 3, 5).reshape(2, g * i * a * b, 6, 4)
    expected = F.conv2d(x, w, stride=(2, 3), dilation=(2, 1), groups=2)
    got = F.conv2d(split, kernel.reshape(g * o, i * a * b, u, v), groups=g)
    torch.testing.assert_close(got[..., : expected.shape[2], : expected.shape[3]], expected)


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e-20, 1e20, 1e170])
def test_scale(scale: float) -> None:
    torch.manual_seed(0)
    w = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    one, other = conv_norms(w, size=(5, 5)), conv_norms(w * scale, size=(5, 5))
    for name in OperatorNorms.__slots__:
        assert getattr(other, name) / scale == pytest.approx(getattr(one, name), rel=1e-9)


def test_entries_that_bound_nothing() -> None:
    w = torch.zeros(2, 2, 3, 3)
    assert conv_norms(w) == OperatorNorms.uniform(0.0)
    w[1, 1, 1, 1] = math.nan
    assert conv_norms(w) == OperatorNorms()
    assert conv_spectral_bound(w) == math.inf
