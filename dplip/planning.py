# SPDX-License-Identifier: Apache-2.0
"""What a configuration would spend and release, before any data is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dplip.config import RunConfig
from dplip.data import schema
from dplip.privacy import PrivacyPlan, StepSensitivity, allocate, noise_weights
from dplip.session import make_domain, make_loss, make_model, make_optimizer, make_plan

__all__ = ["PlanTable", "plan_table"]


@dataclass(frozen=True)
class PlanTable:
    """The plan with per-tensor bounds, noise and signal-to-noise at the initial weights, in the first step.

    ``signal_to_noise`` is the largest possible norm of the summed gradient, expected batch size times bound, over the
    expected norm of the noise, sigma sqrt(dim): an upper limit, reached when all examples agree.
    """

    plan: PrivacyPlan
    epsilon: float
    total: float
    numerical_slack: float
    tensors: dict[str, dict[str, float]]
    logit_clipping: dict[str, float | str] | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form."""
        return {
            "epsilon": self.epsilon if math.isfinite(self.epsilon) else None,
            "plan": self.plan.to_dict(),
            "expected_batch_size": self.plan.expected_batch_size,
            "logit_clipping": self.logit_clipping,
            "sensitivity": {
                "total": self.total,
                "numerical_slack": self.numerical_slack,
                "tensors": self.tensors,
            },
        }

    def to_markdown(self) -> str:
        """The table for people."""
        p = self.plan
        lines = [
            f"epsilon {self.epsilon:.6f} at delta {p.delta:g} ({p.neighbors}, accountant {p.accountant})",
            f"noise multiplier {p.noise_multiplier:.6f}{_moves(p)}, {p.sampling} sampling q = {p.sampling_prob:.6g}, "
            f"{p.steps} steps, expected batch {p.expected_batch_size:g}, allocation {p.allocation}, "
            f"logit clipping {self.logit_clipping}",
            f"joint sensitivity {self.total:.6g} (rounding slack {self.numerical_slack:.2g} included)",
            "",
            "| tensor | entries | bound | noise sigma | largest signal-to-noise |",
            "|---|---|---|---|---|",
        ]
        for name, t in self.tensors.items():
            lines.append(f"| {name} | {t['dim']} | {t['bound']:.6g} | {t['sigma']:.6g} | {t['signal_to_noise']:.3g} |")
        return "\n".join(lines)


def _moves(plan: PrivacyPlan) -> str:
    """How a schedule moves the noise, for people."""
    if plan.noise_schedule is None:
        return ""
    first, last = plan.noise_schedule[0][0], plan.noise_schedule[-1][0]
    return f" times {first:g} to {last:g} over the run"


def plan_table(config: RunConfig) -> PlanTable:
    """Build the model and its bounds from public configuration alone.

    Raises:
        DplipError: whatever :func:`dplip.trainer.prepare` would refuse, except about the data itself.
    """
    described = schema(config.data.name)
    plan, loss, model = make_plan(config.privacy), make_loss(config.loss), make_model(config, described)
    sensitivity = StepSensitivity(model.train(), make_domain(config, described), loss)
    weights = noise_weights(make_optimizer(config.optimizer, model).param_groups, sensitivity.trainable)
    bounds = {name: t._replace(weight=weights[name]) for name, t in sensitivity.tensors().items()}
    sigma = allocate(plan.allocation, bounds, plan.multiplier(0))
    rows = {}
    for name, t in bounds.items():
        noise = sigma[name] * math.sqrt(t.dim)
        ratio = plan.expected_batch_size * t.bound / noise if noise > 0 else math.inf
        rows[name] = {"bound": t.bound, "sigma": sigma[name], "dim": t.dim, "signal_to_noise": ratio}
    return PlanTable(
        plan, plan.epsilon(), StepSensitivity.total(bounds), sensitivity.numerical_slack, rows, loss.clipping
    )
