# SPDX-License-Identifier: Apache-2.0
"""Mean shift: batch-mean centring of distance networks, for training without privacy only."""

from __future__ import annotations

import torch
from torch import Tensor

from dplip.errors import ConfigError, MixesExamplesError
from dplip.layers.base import LipschitzLayer, Shapes
from dplip.norms import OperatorNorms

__all__ = ["MeanShift"]


class MeanShift(LipschitzLayer):
    """``y = x - mean``, per channel: the batch's mean while training, a frozen running mean in evaluation.

    Shapes: ``x`` [B, C, *] -> the same; ``running_mean`` [C].

    Guarantee. In evaluation mode the shift is a constant: norm 1 in every norm, and the layer can be certified. In
    training mode one example moves every other example's output, no per-example bound exists, and every rule raises.
    The running mean is computed from the training data without noise, so no mode of this layer can be part of a private
    run; :class:`ReferenceShift` is its replacement there.

    Source: Zhang, Cai, Lu, He, Wang, Towards Certifying L-infinity Robustness using Neural Networks with L-inf-dist
    Neurons, ICML 2021, section 4.3 (normalisation by the mean alone, without scale).

    Args:
        channels: ``C``.
        momentum: weight of the newest batch in the running mean, in (0, 1].

    Raises:
        ConfigError: ``channels`` or ``momentum`` is out of range.
        MixesExamplesError: a bound or an interval is asked for in training mode.
        ValueError: ``forward`` gets anything but [B, C, *].
    """

    running_mean: Tensor

    def __init__(self, channels: int, momentum: float = 0.1) -> None:
        super().__init__()
        if channels < 1 or not 0 < momentum <= 1:
            raise ConfigError(
                f"MeanShift: expected channels >= 1 and 0 < momentum <= 1, got {channels} and {momentum}; fix them"
            )
        self.channels, self.momentum = channels, float(momentum)
        self.register_buffer("running_mean", torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[1] != self.channels:
            raise ValueError(f"MeanShift: expected x [B, {self.channels}, *], got {tuple(x.shape)}")
        mean = self.running_mean
        if self.training and x.numel():
            mean = x.transpose(0, 1).flatten(1).mean(1)
            with torch.no_grad():
                self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), self.momentum)
        return x - mean.to(x.dtype).view(1, -1, *[1] * (x.ndim - 2))

    def operator_norms(self, shapes: Shapes) -> OperatorNorms:
        self._require_frozen()
        return OperatorNorms.uniform(1.0)

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        self._require_frozen()
        return self(lower), self(upper)

    def refuses_certificate(self) -> str | None:
        return "batch means are not the deployed function; call model.eval()" if self.training else None

    def fan_in(self, shapes: Shapes) -> int:
        return 1

    def _require_frozen(self) -> None:
        if self.training:
            raise MixesExamplesError(
                "MeanShift: expected evaluation mode, got batch means, which mix examples; call eval(), or use "
                "dplip.layers.ReferenceShift in private training"
            )

    def extra_repr(self) -> str:
        return f"{self.channels}, momentum={self.momentum:g}"
