# SPDX-License-Identifier: Apache-2.0
"""Exact range of the power-mean distance over a box.

``|x_i - w_i|`` ranges over ``[max(l_i - w_i, w_i - u_i, 0), max(|l_i - w_i|, |u_i - w_i|)]`` for every coordinate by
itself, and the power mean is monotone in each: both ends are power means of differences from one point of the box.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dplip.kernels.distance import blocks, check_operands
from dplip.kernels.powers import mean_power

__all__ = ["power_mean_interval"]


def power_mean_interval(lower: Tensor, upper: Tensor, w: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Exact range of every neuron over the box ``lower <= x <= upper`` (monotone in every ``|x_i - w_i|``)."""
    check_operands("power_mean_interval", lower, w)
    check_operands("power_mean_interval", upper, w)
    low, high = lower.new_empty(lower.shape[0], w.shape[0]), upper.new_empty(upper.shape[0], w.shape[0])
    for (rows, below), (_, above) in zip(blocks(lower, w), blocks(upper, w), strict=True):
        low[rows] = mean_power(torch.maximum(below, -above).clamp_min_(0), p)
        high[rows] = mean_power(torch.maximum(below.abs_(), above.abs_()), p)
    return low, high
