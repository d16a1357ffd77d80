# SPDX-License-Identifier: Apache-2.0
"""Convolutions whose kernel lives in a norm ball."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dplip.aol import aol_bound, aol_factors
from dplip.conv_norm import conv_spectral_bound, phases
from dplip.errors import ConfigError
from dplip.layers.affine_conv2d import AffineConv2d
from dplip.layers.normalized_linear import PROJECTIONS, project_rows_l1_
from dplip.layers.window import Pair, Window, pair
from dplip.operator_norm import spectral_bound

__all__ = ["CONV_BALLS", "NormalizedConv2d"]

CONV_BALLS = ("spectral", "frobenius", "rows_l1")
_NEAR = 1 + 1e-5  # closer to the ball than this, scaling replaces the almost-orthogonal rescaling


class NormalizedConv2d(AffineConv2d):
    r"""``y = conv2d(x, W) + b`` with ``W`` in a ball, for images of *every* size; shapes and gradients:
    :class:`AffineConv2d`.

    =============== ======================================================= =====================
    ``ball``        constraint (``max_norm`` = 1)                           1-Lipschitz
    =============== ======================================================= =====================
    ``spectral``    certified bound of the convolution's norm <= 1          l_2 to l_2
    ``frobenius``   ``sqrt(v) ||W_g||_F <= 1`` in each group                l_2 to l_2
    ``rows_l1``     every filter ``||w_o||_1 <= 1``                         l_inf to l_inf
    =============== ======================================================= =====================

    Here ``v = ceil(k/s)^2`` windows share an entry (dilation 1), and the certified bound is
    :func:`dplip.conv_norm.conv_spectral_bound` without a size. The weight is free during the step and projected after
    it, which is post-processing; noise is put on the gradient of the weight itself, never through a normalisation.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as in :class:`torch.nn.Conv2d`.
        bias: add a learned ``b``, shared over positions.
        ball: the constraint set, one of :data:`CONV_BALLS`.
        max_norm: radius of the ball.
        projection: how a weight outside the spectral ball gets in, one of
            :data:`dplip.layers.normalized_linear.PROJECTIONS`: ``"scale"`` divides by the bound; ``"aol"`` first
            gives every input channel (and phase) its own factor, see :mod:`dplip.aol`, which shrinks only what
            overlaps.
        orthogonalize: Bjorck steps ``V <- 3/2 V - 1/2 V V^T V`` on each group's flattened kernel ``V`` at each
            projection onto the spectral ball, followed by the scaling that makes the certified bound ``max_norm``.

    Raises:
        ConfigError: an argument is out of range or does not fit another.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        *,
        stride: int | Pair = 1,
        padding: int | Pair = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        ball: str = "spectral",
        max_norm: float = 1.0,
        projection: str = "scale",
        orthogonalize: int = 0,
    ) -> None:
        if min(in_channels, out_channels, groups) < 1 or in_channels % groups or out_channels % groups:
            raise ConfigError(
                "NormalizedConv2d: expected positive channels divisible by groups, "
                f"got {in_channels}, {out_channels} and {groups}; change them"
            )
        if ball not in CONV_BALLS or projection not in PROJECTIONS or not 0 < max_norm < math.inf:
            raise ConfigError(
                f"NormalizedConv2d: expected ball in {CONV_BALLS}, projection in {PROJECTIONS} and 0 < max_norm < inf, "
                f"got {ball!r}, {projection!r} and {max_norm}; fix them"
            )
        if orthogonalize < 0 or ((orthogonalize or projection != "scale") and ball != "spectral"):
            raise ConfigError(
                "NormalizedConv2d: expected orthogonalize >= 0, and it and projection with the spectral ball only, "
                f"got {orthogonalize}, {projection!r} and {ball!r}; fix them"
            )
        window = Window(pair(kernel_size), pair(stride), pair(padding), pair(dilation))
        weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *window.kernel))
        super().__init__(weight, nn.Parameter(torch.empty(out_channels)) if bias else None, window, groups)
        self.ball, self.max_norm = ball, float(max_norm)
        self.projection, self.orthogonalize = projection, orthogonalize
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Kernels with orthogonal rows or columns, projected onto the ball; zero bias."""
        nn.init.orthogonal_(self.weight)
        if self.bias is not None:
            self.bias.zero_()
        self.project_()

    def _bound(self) -> float:
        """Bound on the spectral norm for images of every size."""
        w = self.window
        return conv_spectral_bound(self.weight, stride=w.stride, dilation=w.dilation, groups=self.groups)

    @torch.no_grad()
    def project_(self) -> None:
        if self.ball == "rows_l1":
            self.weight.copy_(project_rows_l1_(self.weight.flatten(1).clone(), self.max_norm).view_as(self.weight))
        elif self.ball == "frobenius":
            groups = self.weight.unflatten(0, (self.groups, -1))
            norm = torch.linalg.vector_norm(groups, dim=(1, 2, 3, 4), dtype=torch.float64)
            shared = math.sqrt(math.prod(self._phases().shape[5:]))
            factor = (self.max_norm / (shared * norm).clamp_min(1e-300)).clamp_max(1.0).to(groups.dtype)
            groups.mul_(factor[:, None, None, None, None])
        elif self.orthogonalize:
            self._orthogonalize_()
            norm_now = self._bound()
            if norm_now > 0:
                self.weight.mul_(self.max_norm / norm_now)
        else:
            self._shrink_()

    def _phases(self) -> Tensor:
        return phases(self.weight.detach(), self.window.stride, self.window.dilation, self.groups)

    def _shrink_(self) -> None:
        kernel = self._phases()
        flat = kernel.flatten(2, 4)
        if aol_bound(flat) <= self.max_norm:
            return
        bound = self._bound()
        if self.projection == "aol" and bound > _NEAR * self.max_norm:
            self._rescale_(self.max_norm * aol_factors(flat).view(self.groups, *kernel.shape[2:5]))
            bound = self._bound()
        if bound > self.max_norm:
            self.weight.mul_(self.max_norm / bound)

    def _rescale_(self, factors: Tensor) -> None:
        """Multiply the entries of each channel and phase by ``factors`` [groups, I, sh, sw]."""
        w = self.window
        at = [torch.arange(k) * d % s for k, d, s in zip(w.kernel, w.dilation, w.stride, strict=True)]
        of_taps = factors[:, :, at[0]][:, :, :, at[1]].to(self.weight.dtype)
        self.weight.unflatten(0, (self.groups, -1)).mul_(of_taps[:, None])

    def _orthogonalize_(self) -> None:
        for group in self.weight.chunk(self.groups):
            v = group.flatten(1).double()
            sigma = spectral_bound(v)
            if not 0 < sigma < math.inf:
                continue
            v = v / sigma
            v = v.T if v.shape[0] > v.shape[1] else v
            for _ in range(self.orthogonalize):
                v = 1.5 * v - 0.5 * (v @ v.T) @ v
            group.copy_((v.T if len(group) > group[0].numel() else v).reshape(group.shape))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ball={self.ball!r}, max_norm={self.max_norm:g}"
