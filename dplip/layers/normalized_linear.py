# SPDX-License-Identifier: Apache-2.0
"""Affine layers whose weight lives in a norm ball."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dplip.aol import aol_factors
from dplip.errors import ConfigError
from dplip.layers.affine import Affine
from dplip.layers.snapshot import Snapshot
from dplip.operator_norm import spectral_bound, spectral_estimate

__all__ = ["BALLS", "PROJECTIONS", "NormalizedLinear", "project_rows_l1_"]

BALLS = ("spectral", "frobenius", "rows_l1", "columns_l1", "rows_l2", "entries")
PROJECTIONS = ("scale", "aol")
"""Ways into the spectral ball."""

_NEAR = 1 + 1e-5  # closer to the ball than this, scaling replaces the almost-orthogonal rescaling


class NormalizedLinear(Affine):
    r"""``y = W x + b`` with ``W`` in a ball; ``x`` [B, in_features], ``weight`` [out_features, in_features], ``y``
    [B, out_features].

    =============== ================================ =====================
    ``ball``        constraint (``max_norm`` = 1)    1-Lipschitz
    =============== ================================ =====================
    ``spectral``    largest singular value <= 1      l_2 to l_2
    ``frobenius``   ``||W||_F <= 1``                 l_2 to l_2
    ``rows_l1``     every row ``||w_o||_1 <= 1``     l_inf to l_inf
    ``columns_l1``  every column ``||.||_1 <= 1``    l_1 to l_1
    ``rows_l2``     every row ``||w_o||_2 <= 1``     l_2 to l_inf
    ``entries``     every ``|w_oi| <= 1``            l_1 to l_inf
    =============== ================================ =====================

    Guarantee. The five operator norms are computed from the weight as it is (float64, rounded up), so they hold between
    projections too. One example has ``||dL/dW||_F = ||g||_2 ||x||_2`` exactly and ``||dL/db||_2 = ||g||_2``: the
    input's l_2 norm must be bounded. The weight is free during the step and projected after it: noise is put on the
    gradient of the weight itself, never differentiated through a normalisation, and the projection is post-processing.

    Args:
        in_features: number of inputs.
        out_features: number of outputs.
        bias: add a learned ``b``.
        ball: the constraint set, one of :data:`BALLS`.
        max_norm: radius of the ball.
        orthogonalize: Bjorck steps ``W <- 3/2 W - 1/2 W W^T W`` at each projection onto the spectral ball; they push
            all singular values towards ``max_norm``, so gradients keep their norm (Anil, Lucas, Grosse, Sorting out
            Lipschitz function approximation, ICML 2019).
        projection: how a weight outside the spectral ball gets in, one of :data:`PROJECTIONS`: ``"scale"`` divides
            by the spectral norm; ``"aol"`` first gives every column its own factor, see :mod:`dplip.aol`.

    Raises:
        ConfigError: a size or ``max_norm`` is not positive, ``ball`` or ``projection`` is unknown, or one of the last
            two arguments is asked of another ball.
        ValueError: ``forward`` gets anything but [B, in_features].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        ball: str = "spectral",
        max_norm: float = 1.0,
        orthogonalize: int = 0,
        projection: str = "scale",
    ) -> None:
        if in_features < 1 or out_features < 1 or not 0 < max_norm < float("inf"):
            raise ConfigError(
                "NormalizedLinear: expected positive sizes and max_norm, "
                f"got {in_features}, {out_features} and {max_norm}; fix them"
            )
        if ball not in BALLS or orthogonalize < 0 or (orthogonalize and ball != "spectral"):
            raise ConfigError(
                f"NormalizedLinear: expected ball in {BALLS} and orthogonalize >= 0 with the spectral ball only, "
                f"got {ball!r} and {orthogonalize}; fix them"
            )
        if projection not in PROJECTIONS or (projection != "scale" and ball != "spectral"):
            raise ConfigError(
                f"NormalizedLinear: expected projection in {PROJECTIONS}, and 'aol' with the spectral ball only, "
                f"got {projection!r} with {ball!r}; fix it"
            )
        weight = nn.Parameter(torch.empty(out_features, in_features))
        super().__init__(weight, nn.Parameter(torch.empty(out_features)) if bias else None)
        self.in_features, self.out_features = in_features, out_features
        self.ball, self.max_norm, self.orthogonalize = ball, float(max_norm), orthogonalize
        self.projection = projection
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Orthogonal weight projected onto the ball, zero bias."""
        nn.init.orthogonal_(self.weight)
        if self.bias is not None:
            self.bias.zero_()
        self.project_()

    @torch.no_grad()
    def project_(self) -> None:
        w = self.weight
        if self.ball == "spectral":
            # The first bound only has to bring Bjorck steps into their range; the last one is the proof.
            sigma = spectral_estimate(w) if self.orthogonalize else spectral_bound(w)
            if self.projection == "aol" and sigma > _NEAR * self.max_norm:
                w.mul_(self.max_norm * aol_factors(w[None, :, :, None, None])[0])
                sigma = spectral_bound(w)
            self._scale_into_ball_(sigma)
            for _ in range(self.orthogonalize):
                v = w / self.max_norm
                v = v.T if v.shape[0] > v.shape[1] else v
                v = 1.5 * v - 0.5 * (v @ v.T) @ v
                w.copy_(self.max_norm * (v.T if w.shape[0] > w.shape[1] else v))
            if self.orthogonalize:  # the map keeps sigma <= 1 exactly, its rounding does not
                sigma = spectral_bound(w)
                self._scale_into_ball_(sigma)
            self._proved = (Snapshot(w), min(sigma, self.max_norm))
        elif self.ball == "frobenius":
            self._scale_into_ball_(float(torch.linalg.vector_norm(w, dtype=torch.float64)))
        elif self.ball == "rows_l1":
            project_rows_l1_(w, self.max_norm)
        elif self.ball == "rows_l2":
            norms = torch.linalg.vector_norm(w, dim=1, keepdim=True, dtype=torch.float64)
            inside = self.max_norm * (1 - 4 * torch.finfo(w.dtype).eps)  # the product rounds back to at most the radius
            w.copy_(torch.where(norms > self.max_norm, w * (inside / norms), w.double()).to(w.dtype))
        elif self.ball == "entries":
            w.clamp_(-self.max_norm, self.max_norm)
        else:
            columns = w.T.contiguous()
            w.copy_(project_rows_l1_(columns, self.max_norm).T)

    def _scale_into_ball_(self, norm: float) -> None:
        if norm > self.max_norm:
            # Factor and products are rounded, by no more than u ||W||_F <= u sqrt(n) sigma each: that much further in.
            rounding = 2 * torch.finfo(self.weight.dtype).eps * math.sqrt(min(self.weight.shape))
            self.weight.mul_(self.max_norm / norm * (1 - rounding))

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, ball={self.ball!r}, "
            f"max_norm={self.max_norm:g}"
        )


def project_rows_l1_(w: Tensor, radius: float) -> Tensor:
    """Euclidean projection of every row of ``w`` [O, I] onto the l_1 ball, in place.

    Source: Duchi, Shalev-Shwartz, Singer, Chandra, Efficient Projections onto the l1-Ball for Learning in High
    Dimensions, ICML 2008, figure 1.
    """
    outside = w.abs().sum(1) > radius
    if bool(outside.any()):
        rows = w[outside].double()  # float32 would lose the radius next to large entries
        sorted_rows = rows.abs().sort(dim=1, descending=True)[0]
        excess = (sorted_rows.cumsum(1) - radius) / torch.arange(1, w.shape[1] + 1, device=w.device)
        last = (sorted_rows > excess).sum(1, keepdim=True).clamp_min(1) - 1
        threshold = excess.gather(1, last).clamp_min(0)
        inside = rows.sign() * (rows.abs() - threshold).clamp_min(0)
        w[outside] = (inside * (radius / inside.abs().sum(1, keepdim=True)).clamp_max(1)).to(w.dtype)
    return w
