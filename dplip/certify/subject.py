# SPDX-License-Identifier: Apache-2.0
"""The model under proof: a float64 twin that is computed with, beside the model as it is deployed."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dplip.bounds import Graph, trace
from dplip.errors import UnsoundCertificate

__all__ = ["Point", "Subject"]


@dataclass(frozen=True)
class Point:
    """A batch of centres and every node's value there.

    Attributes:
        x: [B, *] float64, examples that are not finite replaced by 0.
        values: every node's value at ``x``, float64.
        predicted: [B] int64, the deployed model's class.
        deployed: [B, C] float64, the deployed model's logits.
        top: [B] int64, the float64 twin's class.
        claimable: [B], False where nothing may be claimed: input or logits are not finite, or the two classes differ.
    """

    x: Tensor
    values: dict[str, Tensor]
    predicted: Tensor
    deployed: Tensor
    top: Tensor
    claimable: Tensor

    def take(self, rows: Tensor) -> Point:
        """The examples at the indices ``rows``."""
        values = {name: v[rows] for name, v in self.values.items()}
        parts = (t[rows] for t in (self.predicted, self.deployed, self.top, self.claimable))
        return Point(self.x[rows], values, *parts)


class Subject:
    """A model in evaluation mode, and its twin in float64 with the same stored weights. The model is not changed.

    Args:
        model: the deployed model.
        dtype: in which a model that holds no tensor of its own computes.

    Attributes:
        graph: the twin, traced.
        deployed: dtype of the deployed arithmetic.

    Raises:
        UnsoundCertificate: a submodule is in training mode, a layer is not the function that is deployed, or autocast
            is on.
        NoRuleError, MixesExamplesError: see :func:`dplip.bounds.trace`.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        training = [name or "model" for name, m in model.named_modules() if m.training]
        if training:
            raise UnsoundCertificate(
                f"certify: expected evaluation mode, got {training[0]!r} in training mode; call model.eval() first"
            )
        self.model = model
        for kind in {t.device.type for t in (*model.parameters(), *model.buffers())} | {"cpu"}:
            if torch.is_autocast_enabled(kind):
                raise UnsoundCertificate(
                    f"certify: expected the deployed arithmetic, got autocast to {torch.get_autocast_dtype(kind)} on "
                    f"{kind}; certify outside torch.autocast"
                )
        owned = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
        self.deployed = owned[0].dtype if owned else dtype
        self.device = owned[0].device if owned else None
        mixed = {t.dtype for t in owned}
        if len(mixed) > 1:
            raise UnsoundCertificate(
                f"certify: expected parameters and buffers of one dtype, got {sorted(map(str, mixed))}; "
                "call model.to(dtype)"
            )
        self.graph: Graph = trace(copy.deepcopy(model).double().requires_grad_(False))
        for layer in self.graph.layers():
            reason = layer.refuses_certificate()
            if reason is not None:
                raise UnsoundCertificate(f"certify: {type(layer).__name__}: {reason}")

    @torch.no_grad()
    def at(self, x: Tensor) -> Point:
        """Evaluate the model and its twin at ``x`` [B, *], which is first rounded to the model's dtype.

        Raises:
            UnsoundCertificate: the output is not [B, C] with C >= 2.
        """
        x = x.detach().to(device=self.device, dtype=self.deployed)
        finite = torch.isfinite(x.flatten(1)).all(1) if x.ndim > 1 else torch.isfinite(x)
        x = torch.where(finite.view(-1, *[1] * (x.ndim - 1)), x, torch.zeros((), dtype=x.dtype, device=x.device))
        values = self.graph.evaluate(x.double())
        logits = values[self.graph.output]
        if logits.ndim != 2 or logits.shape[1] < 2 or len(logits) != len(x):
            raise UnsoundCertificate(
                f"certify: expected logits [B, C] with C >= 2, got {tuple(logits.shape)}; "
                "return one logit per class (two for a binary decision)"
            )
        deployed = self.model(x).detach()
        predicted, top = deployed.argmax(1), logits.argmax(1)
        sane = torch.isfinite(deployed).all(1) & torch.isfinite(logits).all(1)
        return Point(x.double(), values, predicted, deployed.double(), top, finite & sane & (predicted == top))
