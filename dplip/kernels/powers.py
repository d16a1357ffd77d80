# SPDX-License-Identifier: Apache-2.0
"""Powers that stay in range, for the power-mean operators."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_exponent", "mean_power", "row_power", "whole_power"]


def check_exponent(operator: str, p: float) -> None:
    """Raise ``ValueError`` unless ``2 <= p < inf``."""
    if not 2 <= p < float("inf"):
        raise ValueError(f"{operator}: expected 2 <= p < inf, got {p}; p = inf is order_statistic")


def mean_power(magnitude: Tensor, p: float) -> Tensor:
    """``(mean |t|^p)^(1/p)`` over the last axis for non-negative input, which is left as it is."""
    largest = magnitude.amax(-1, keepdim=True)
    ratio = magnitude / torch.where(largest == 0, 1, largest)
    return largest.squeeze(-1) * ratio.pow_(p).mean(-1).pow_(1 / p)


def row_power(t: Tensor, norm: Tensor, p: float) -> Tensor:
    """``sign(t) (|t| / norm)^(p-1)`` for ``|t| <= norm``; 0 where ``norm`` is below the smallest normal number."""
    small = norm < torch.finfo(t.dtype).tiny
    ratio = (t.abs() / torch.where(small, 1, norm)).clamp_max_(1)
    return ratio.pow_(p - 1).mul_(t.sign()).masked_fill_(small, 0)


def whole_power(t: Tensor, n: int) -> Tensor:
    """``t^n`` for whole ``n >= 1`` by squaring, in place."""
    odd = t.clone() if n & (n - 1) else None
    for bit in bin(n)[3:]:
        t.square_()
        if bit == "1" and odd is not None:
            t.mul_(odd)
    return t
