# SPDX-License-Identifier: Apache-2.0
"""What convolutions of distance neurons share: memory, batches, intervals."""

import pytest
import torch

from dplip.layers import LinfDistanceConv2d, SortConv2d, distance_conv2d


def layers() -> list:
    torch.manual_seed(0)
    return [
        LinfDistanceConv2d(2, 4, 3, padding=1, groups=2).double(),
        LinfDistanceConv2d(2, 4, 3, stride=2, p=6).double(),
        SortConv2d.geometric(2, 4, 2, rho=0.4, padding=1).double(),
    ]


@pytest.mark.parametrize("layer", layers(), ids=lambda m: type(m).__name__)
def test_per_sample_grad_does_not_depend_on_its_blocks(layer, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 2, 6, 5, dtype=torch.float64)
    g = torch.randn_like(layer(x))
    whole = layer.per_sample_grad(x, g)
    monkeypatch.setattr(distance_conv2d, "_GRAD_ELEMENTS", 1)
    for name, grad in layer.per_sample_grad(x, g).items():
        torch.testing.assert_close(grad, whole[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", layers(), ids=lambda m: type(m).__name__)
def test_interval_is_attained(layer) -> None:
    """Neurons whose window is a box of independent entries reach both ends of their interval at a corner."""
    torch.manual_seed(1)
    x = torch.randn(2, 2, 6, 5, dtype=torch.float64)
    low, high = layer.interval(x - 0.3, x + 0.3)
    filters = layer.weight.view(-1, 2 // layer.groups, *layer.window.kernel)
    top, left = layer.window.padding
    per = layer.out_channels // layer.groups
    for o in range(layer.out_channels):
        channels = slice(o // per * filters.shape[1], (o // per + 1) * filters.shape[1])
        i, j = 1, 1  # a window with no padding
        r, c = i * layer.window.stride[0] - top, j * layer.window.stride[1] - left
        far, near = x.clone(), x.clone()
        at = (slice(None), channels, slice(r, r + filters.shape[2]), slice(c, c + filters.shape[3]))
        away = x[at] - filters[o]
        far[at] = x[at] + 0.3 * away.sign()
        near[at] = x[at] - away.clamp(-0.3, 0.3)
        torch.testing.assert_close(layer(far)[:, o, i, j], high[:, o, i, j])
        torch.testing.assert_close(layer(near)[:, o, i, j], low[:, o, i, j])
