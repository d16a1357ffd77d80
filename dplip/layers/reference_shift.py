# SPDX-License-Identifier: Apache-2.0
"""Reference shift: the privacy-safe replacement of mean-shift normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from dplip.errors import ConfigError
from dplip.layers.base import LipschitzLayer, Shapes
from dplip.norms import Norms, OperatorNorms

__all__ = ["ReferenceShift"]


class ReferenceShift(LipschitzLayer):
    """``y = f(x) - f(reference)`` for an inner layer ``f``; the subtracted output is detached.

    Shapes: those of ``f``. ``reference`` is one example's input to ``f``, a tensor or a number (every entry equal).

    Guarantee. All norms and gradient bounds are those of ``f``: the shift is constant in ``x`` and in the batch, and no
    gradient flows through it. Batch means, which it replaces, couple the examples, so that no per-example bound
    exists. Where all layers up to this one are shifted by the same public network input, later references are 0 and
    ``||y|| <= ||x - x_ref||`` in the norm in which the layers are 1-Lipschitz.

    Args:
        layer: the inner layer.
        reference: public input of ``layer``, moved to its device; never an average of private data.

    Raises:
        ConfigError: ``layer`` is no :class:`LipschitzLayer` or ``reference`` is not finite.
    """

    reference: Tensor

    def __init__(self, layer: LipschitzLayer, reference: float | Tensor = 0.0) -> None:
        super().__init__()
        if not isinstance(layer, LipschitzLayer):
            raise ConfigError(
                f"ReferenceShift: expected a LipschitzLayer, got {type(layer).__name__}; wrap a layer with bounds"
            )
        value = torch.as_tensor(reference, dtype=torch.get_default_dtype()).detach().clone()
        if not bool(torch.isfinite(value).all()):
            raise ConfigError("ReferenceShift: expected a finite reference, got NaN or infinity; fix it")
        self.layer = layer
        device = next((p.device for p in layer.parameters()), value.device)
        self.register_buffer("reference", value.to(device))

    def _offset(self, example: Tensor) -> Tensor:
        with torch.no_grad():
            return self.layer(self.reference.expand(example.shape[1:]).unsqueeze(0).to(example.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) - self._offset(x)

    def operator_norms(self, shapes: Shapes) -> OperatorNorms:
        return self.layer.operator_norms(shapes)

    def output_bound(self, x: Norms, shapes: Shapes) -> Norms:
        return self.layer.output_bound(x, shapes)

    def cotangent_bound(self, g: Norms, shapes: Shapes) -> Norms:
        return self.layer.cotangent_bound(g, shapes)

    def param_sensitivity(self, x: Norms, g: Norms, shapes: Shapes) -> dict[str, float]:
        return {f"layer.{name}": bound for name, bound in self.layer.param_sensitivity(x, g, shapes).items()}

    def per_sample_grad(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        return {f"layer.{name}": grad for name, grad in self.layer.per_sample_grad(x, g).items()}

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.layer.interval(lower, upper)
        offset = self._offset(lower)
        return low - offset, high - offset

    def project_(self) -> None:
        self.layer.project_()

    def refuses_certificate(self) -> str | None:
        return self.layer.refuses_certificate()

    def fan_in(self, shapes: Shapes) -> int:
        return self.layer.fan_in(shapes) + 1
