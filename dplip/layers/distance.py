# SPDX-License-Identifier: Apache-2.0
"""What all distance neurons share: weights, bias, initialisation and the bounds that follow from row norms."""

from __future__ import annotations

import abc
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dplip.errors import ConfigError
from dplip.layers.base import LipschitzLayer, Shapes
from dplip.norms import Norms, OperatorNorms

__all__ = ["INITS", "DistanceLayer", "RowNorms"]

INITS = ("normal", "uniform", "templates", "identity")
_HALF = (torch.float16, torch.bfloat16)
_IDENTITY = 10.0  # of the source; larger than the inputs, so that this coordinate attains the maximum


class RowNorms(NamedTuple):
    """Bounds on the l_1, l_2 and l_inf norm of every row of ``dy/dx`` (and of ``dy_o/dw_o``)."""

    l1: float
    l2: float
    linf: float


class DistanceLayer(LipschitzLayer):
    r"""``y_o = d(x, w_o) + b_o`` where ``d`` depends on ``x - w_o`` only.

    Shapes: ``x`` [B, in_features], ``weight`` [out_features, in_features], ``bias`` [out_features], ``y`` [B,
        out_features].

    Guarantee. Let every row of ``dy/dx`` have norms at most ``(k1, k2, kinf)``. Because ``dy_o/dw_o = -dy_o/dx``,
    one example with cotangent ``g`` has ``||dL/dW||_F <= k2 ||g||_2`` and ``||dL/db||_2 = ||g||_2``, for any input,
    bounded or not; and ``||J|| <= (k1, k2, sqrt(m) k2, m kinf, kinf)`` in the order of :class:`OperatorNorms`.

    Args:
        in_features: number of inputs ``d``.
        out_features: number of neurons ``m``.
        bias: add a learned ``b``.
        init: ``"normal"`` N(0, 1), ``"uniform"`` on [0, 1], ``"templates"`` uniform on {0, 1}, or ``"identity"``:
            ``"normal"`` with ``w[o, o mod d] = -10``, so that an l_inf distance starts as ``y_o = x_(o mod d) + 10``
            wherever no other entry is as far from its weight (needs ``d <= m``; not scaled by ``init_scale``).
        init_scale: factor on the initial weights.

    Raises:
        ConfigError: a size is not positive or ``init`` is unknown.
        ValueError: ``forward`` gets anything but [B, in_features].

    Mixed precision. Under ``torch.autocast`` distances stay float32. With :attr:`half_training` set, selections
    (``p = inf`` and order statistics) are made among float16 or bfloat16 values in training mode, and gradients are
    still float32 sums of signed rows, of the norms above. Evaluation, intervals and certificates never round. Private
    training refuses half precision by the name of the layer: activations move by up to ``u (|x| + |w|)``, 2^-11 or 2^-8
    of their *magnitude*, while their bounds are relative to the distance from the reference.
    """

    half_training: bool = False
    """Whether autocast may choose coordinates in half precision while training. Assign it; never in private runs."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        init: str = "normal",
        init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        if in_features < 1 or out_features < 1:
            raise ConfigError(f"{where}: expected positive sizes, got {in_features} and {out_features}; fix them")
        if init not in INITS:
            raise ConfigError(f"{where}: expected init in {INITS}, got {init!r}; choose one of them")
        if init == "identity" and in_features > out_features:
            raise ConfigError(
                f"{where}: expected in_features <= out_features for init='identity', got {in_features} and "
                f"{out_features}; use 'normal' where the layer narrows"
            )
        self.in_features, self.out_features = in_features, out_features
        self.init, self.init_scale = init, init_scale
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights anew from torch's global generator; set the bias to zero."""
        if self.init in ("normal", "identity"):
            self.weight.normal_()
        else:
            self.weight.uniform_()
            if self.init == "templates":
                self.weight.round_()
        self.weight.mul_(self.init_scale)
        if self.init == "identity":
            rows = torch.arange(self.out_features, device=self.weight.device)
            self.weight[rows, rows % self.in_features] = -_IDENTITY
        if self.bias is not None:
            self.bias.zero_()

    @abc.abstractmethod
    def distance(self, x: Tensor, w: Tensor) -> Tensor:
        """``d(x, w_o)``: ``x`` [N, in_features], ``w`` [M, in_features] (some rows of the weight) -> [N, M]."""

    @abc.abstractmethod
    def distance_interval(self, lower: Tensor, upper: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Range of the distances to ``w`` over a box."""

    @abc.abstractmethod
    def row_norms(self) -> RowNorms:
        """Bounds on the rows of the Jacobian."""

    @abc.abstractmethod
    def per_sample_weight_grad(self, x: Tensor, w: Tensor, g: Tensor) -> Tensor:
        """``dL_b/dw`` for cotangents ``g`` [N, M]: [N, M, in_features]."""

    def _operand(self, x: Tensor) -> Tensor:
        """Under autocast, a half-precision output of the layer before in the weight's own precision."""
        return x.to(self.weight.dtype) if torch.is_autocast_enabled(x.device.type) and x.dtype in _HALF else x

    def _low(self, x: Tensor) -> torch.dtype | None:
        """The dtype to select in, None where it is that of ``x``."""
        kind = x.device.type
        if not (self.half_training and self.training and torch.is_autocast_enabled(kind)) or x.dtype != torch.float32:
            return None
        dtype = torch.get_autocast_dtype(kind)
        return dtype if dtype in _HALF else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.distance(self._operand(x), self.weight)
        return y if self.bias is None else y + self.bias

    def operator_norms(self, shapes: Shapes) -> OperatorNorms:
        k, m = self.row_norms(), self.out_features
        return OperatorNorms(k.l1, k.l2, math.sqrt(m) * k.l2, m * k.linf, k.linf)

    def param_sensitivity(self, x: Norms, g: Norms, shapes: Shapes) -> dict[str, float]:
        bounds = {"weight": self.row_norms().l2 * g.l2}
        return bounds if self.bias is None else bounds | {"bias": g.l2}

    def per_sample_grad(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        grads = {"weight": self.per_sample_weight_grad(x, self.weight, g)}
        return grads if self.bias is None else grads | {"bias": g}

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.distance_interval(lower, upper, self.weight)
        return (low, high) if self.bias is None else (low + self.bias, high + self.bias)

    def fan_in(self, shapes: Shapes) -> int:
        return 3  # x - w, the bias, and the storage of the result

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
