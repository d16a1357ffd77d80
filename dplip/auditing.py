# SPDX-License-Identifier: Apache-2.0
"""Attacks on a finished run's own claims: its certificates and its sensitivities."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dplip.audit.robustness import flips
from dplip.audit.sensitivity import search
from dplip.bounds import INPUT_NORMS
from dplip.certify import Certificate, certify
from dplip.config import RunConfig
from dplip.data import Dataset, Schema
from dplip.errors import ConfigError
from dplip.session import make_domain, make_loss
from dplip.trainer import deploy, load_model

__all__ = ["Audit", "audit_run"]

_TOLERANCE = 1e-6  # relative, of a float64 gradient norm against its bound


@dataclass(frozen=True)
class Audit:
    """What the attacks found.

    Attributes:
        flips: per norm, (certified examples attacked, how many changed class within ``fraction`` of their radius).
        gradients: per parameter, (largest gradient norm of one example found, its bound).
    """

    fraction: float
    flips: dict[str, tuple[int, int]]
    gradients: dict[str, tuple[float, float]]

    @property
    def refuted(self) -> bool:
        """Whether any claim was shown to be false."""
        over = any(found > bound * (1 + _TOLERANCE) for found, bound in self.gradients.values())
        return over or any(flipped for _, flipped in self.flips.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form."""
        return {
            "refuted": self.refuted,
            "fraction": self.fraction,
            "certificates": {norm: {"attacked": n, "flipped": k} for norm, (n, k) in self.flips.items()},
            "gradients": {
                name: {"found": found, "bound": bound, "ratio": found / bound if bound else 0.0}
                for name, (found, bound) in self.gradients.items()
            },
        }


def audit_run(
    run: Path,
    data: Dataset,
    schema_of: Any,
    *,
    points: int = 500,
    restarts: int = 10,
    steps: int = 40,
    fraction: float = 0.999,
) -> Audit:
    """Attack ``points`` certified test examples per norm, and search for a gradient above its bound.

    Failing to refute proves nothing; succeeding is a bug in dplip.

    Raises:
        ConfigError: ``points`` is not positive.
        CheckpointError: ``run`` is not a finished run.
    """
    if points < 1:
        raise ConfigError(f"audit: expected points >= 1, got {points}; attack at least one example")
    config, trained = load_model(run, schema_of)
    model = deploy(trained, config)
    found = {}
    for norm in INPUT_NORMS:
        x, certificate = _certified(model, config, data, norm, points)
        options = {"restarts": restarts, "steps": steps, "domain": data.domain}
        found[norm] = (len(x), flips(model, x, certificate, fraction=fraction, **options))
    domain = make_domain(config, Schema(data.input_shape, data.num_classes, data.domain))
    gradients = search(model, domain, make_loss(config.loss), inputs=data.test.x[:8], restarts=8)
    return Audit(fraction, found, gradients)


def _certified(
    model: torch.nn.Module, config: RunConfig, data: Dataset, norm: str, points: int
) -> tuple[torch.Tensor, Certificate]:
    """The first ``points`` test examples with a positive certified radius."""
    xs: list[torch.Tensor] = []
    parts: list[Certificate] = []
    for x in data.test.x.to(next(model.parameters()).dtype).split(points):
        certificate = certify(model, x, norm, method=config.certify.method, domain=data.domain)
        rows = certificate.radius > 0
        xs.append(x[rows])
        parts.append(Certificate(certificate.predicted[rows], certificate.radius[rows], norm, certificate.method))
        if sum(len(part) for part in xs) >= points:
            break
    chosen, whole = torch.cat(xs)[:points], Certificate.concat(parts)
    return chosen, Certificate(whole.predicted[:points], whole.radius[:points], norm, whole.method)
