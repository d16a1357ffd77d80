# SPDX-License-Identifier: Apache-2.0
"""Inputs, cotangents, moves and boxes at which bounds of a layer tend to fail first."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dplip.layers.base import LipschitzLayer

__all__ = ["boxes", "hard_inputs", "hard_pairs", "jacobian", "moves"]


def jacobian(layer: LipschitzLayer, x: Tensor) -> Tensor:
    """One exact Jacobian per example, as autograd computes it: [B, out_dim, in_dim]."""
    x = x.detach().requires_grad_()
    y = layer(x).flatten(1)
    columns = [y[:, j].sum() for j in range(y.shape[1])]
    rows = [torch.autograd.grad(c, x, retain_graph=True, materialize_grads=True)[0] for c in columns]
    return torch.stack([r.flatten(1) for r in rows], 1)


def hard_inputs(layer: LipschitzLayer, shape: tuple[int, ...], scale: float) -> Tensor:
    """Random and extreme examples [B, *shape] in float64.

    Normal, heavy-tailed, zero, constant, one-hot, corners, ties, and, where a parameter's rows have the size of
    an example, those rows exactly, nearly, and displaced along one and along all axes.
    """
    n = math.prod(shape)
    eye, one = torch.eye(n, dtype=torch.float64), torch.ones(1, n, dtype=torch.float64)

    def random(rows: int) -> Tensor:
        return torch.randn(rows, n, dtype=torch.float64)

    unit = [random(3), random(2) ** 5, 0 * one, one, -one, 0.3 * one, eye[:2], -eye[-2:]]
    unit += [
        random(4) * 10 ** (2 * torch.rand(4, 1, dtype=torch.float64) - 1.5),
        2 * eye[:1] + 0.3 * random(1),
    ]
    unit += [random(3).sign(), random(3).round(), (10 * random(2)).round() / 10]
    near = []
    for p in layer.parameters():
        if p.numel() % n == 0:
            rows = p.detach().double().reshape(-1, n)[:2]
            near += [rows, rows + 1e-6 * random(1), rows + scale * eye[:1], rows - scale, rows + scale]
    return torch.cat([scale * torch.cat(unit), *near]).reshape(-1, *shape)


def hard_pairs(layer: LipschitzLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Every input with seven cotangents.

    One-hot, the heaviest row, all equal, random, the signs of a column and of the heaviest column of the
    Jacobian, and its leading left singular vector.
    """
    j = jacobian(layer, x)
    (b, m, n), at = j.shape, torch.arange(len(x))
    eye = torch.eye(m, dtype=x.dtype)
    kinds = [
        eye[at % m],
        eye[j.abs().sum(2).argmax(1)],
        torch.ones(b, m, dtype=x.dtype),
        torch.randn(b, m, dtype=x.dtype),
        j[at, :, at % n].sign(),
        j[at, :, j.abs().sum(1).argmax(1)].sign(),
        torch.linalg.svd(j)[0][:, :, 0],
    ]
    g = torch.cat(kinds).reshape(-1, *layer(x[:1]).shape[1:])
    return x.repeat(len(kinds), *[1] * (x.ndim - 1)), g


def moves(layer: LipschitzLayer, x: Tensor, scale: float) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """``(x, d, f(x + d) - f(x))`` for long and short displacements along all axes and along one."""
    n = math.prod(x.shape[1:])
    one_hot = torch.eye(n, dtype=x.dtype)[torch.arange(len(x)) % n].reshape(x.shape)
    signs = torch.randn_like(x).sign()
    for d in (x.flip(0) - x, 1e-3 * scale * signs, scale * signs, 1e-2 * scale * one_hot, scale * one_hot):
        yield x, d, (layer(x + d) - layer(x)).detach()


def boxes(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Lower and upper ends of boxes around ``x``: points, narrow and wide ones, some degenerate in some coordinates."""
    widths = torch.tensor([0.0, 1e-3, 1.0], dtype=x.dtype)[torch.arange(len(x)) % 3]
    width = scale * torch.rand_like(x) * widths.view(-1, *[1] * (x.ndim - 1))
    width *= torch.rand_like(x) < 0.8
    return x - width, x + width
