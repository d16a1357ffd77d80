# SPDX-License-Identifier: Apache-2.0
"""The joint report: what was spent, and what is certified."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dplip.bounds import lipschitz, trace
from dplip.certify import Certificate
from dplip.errors import CheckpointError
from dplip.losses import BoundedLoss
from dplip.privacy import ClipFreeEngine, ForeignModule, StepSensitivity

__all__ = ["SCHEMA", "Report", "privacy_section", "robustness_section", "versions"]

SCHEMA = 1
_REQUIRED = ("schema", "privacy", "robustness", "model", "data", "seed", "seconds", "versions")


@dataclass(frozen=True)
class Report:
    """One run's report; ``to_dict`` is ``report.json``. Accuracies are fractions, epsilon is None without noise."""

    name: str
    privacy: dict[str, Any]
    robustness: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    seed: int
    seconds: float
    versions: dict[str, str]
    history: Sequence[Mapping[str, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form, schema 1."""
        return {
            "schema": SCHEMA,
            "name": self.name,
            "privacy": self.privacy,
            "robustness": self.robustness,
            "model": self.model,
            "data": self.data,
            "seed": self.seed,
            "seconds": self.seconds,
            "versions": self.versions,
            "history": [{k: _finite(v) for k, v in m.items()} for m in self.history],
        }

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read ``report.json``; raises :class:`CheckpointError` where it is absent, damaged or of another schema."""
        try:
            values = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path}: expected a report, got {error}; finish the run first") from error
        if not isinstance(values, dict) or values.get("schema") != SCHEMA or any(k not in values for k in _REQUIRED):
            raise CheckpointError(f"{path}: expected a report of schema {SCHEMA}, got another file; rerun the training")
        del values["schema"]
        return cls(**({"name": "run", "history": []} | values))

    def write(self, folder: Path) -> None:
        """Write ``report.json``, ``report.md`` and ``report.png``."""
        (folder / "report.json").write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        (folder / "report.md").write_text(self.to_markdown())
        from dplip.plots import plot_report  # matplotlib is slow to import

        plot_report(self, folder / "report.png")

    def to_markdown(self) -> str:
        """The report for people."""
        p, r = self.privacy, self.robustness
        epsilon = "none (no noise)" if p["epsilon"] is None else f"{p['epsilon']:.4f}"
        clipping = "nothing is clipped" if p["logit_clipping"] is None else f"clipped: {p['logit_clipping']}"
        lines = [
            f"# {self.name}: private and certified",
            "",
            "| epsilon | delta | clean accuracy | "
            + " | ".join(f"certified {norm} {eps}" for norm, row in r["certified_accuracy"].items() for eps in row)
            + " |",
            "|" + "---|" * (3 + sum(len(row) for row in r["certified_accuracy"].values())),
            f"| {epsilon} | {p['delta']:g} | {_percent(r['clean_accuracy'])} | "
            + " | ".join(_percent(v) for row in r["certified_accuracy"].values() for v in row.values())
            + " |",
            "",
            "## Privacy",
            "",
            f"({epsilon}, {p['delta']:g})-differentially private under {p['neighbors']}, accountant {p['accountant']}; "
            f"{p['sampling']} sampling with q = {p['sampling_prob']:.6g}, {p['steps']} steps, "
            f"expected batch {p['expected_batch_size']:g}, noise multiplier {p['noise_multiplier']:.4f}"
            + (" times the plan's noise schedule. " if p["plan"].get("noise_schedule") else ". ")
            + f"Sensitivity is analytic; logit gradients: {clipping}."
            + "".join(f" Gradients of `{n}` are clipped per example to {c:g}." for n, c in _foreign(p).items()),
        ]
        if p.get("insecure_seed") is not None:
            lines += ["", f"**Noise came from the fixed seed {p['insecure_seed']}: not private against who knows it.**"]
        lines += ["", "| tensor | entries | bound | noise sigma | sigma / bound |", "|---|---|---|---|---|"]
        for name, t in p["sensitivity"]["tensors"].items():
            ratio = f"{t['sigma'] / t['bound']:.3f}" if t["bound"] else "-"
            lines.append(f"| {name} | {t['dim']} | {t['bound']:.5g} | {t['sigma']:.5g} | {ratio} |")
        lines += [
            "",
            f"Joint sensitivity {p['sensitivity']['total']:.5g}, of the sum of per-example gradients under adding or "
            "removing one example.",
            "",
            "## Robustness",
            "",
            f"{r['n_test']} test examples, clean accuracy {_percent(r['clean_accuracy'])}; Lipschitz constants "
            f"l_inf {r['lipschitz']['linf']:.6g}, l_2 {r['lipschitz']['l2']:.6g}; methods {', '.join(r['methods'])}. "
            f"Certificates are deterministic and hold for the model evaluated in {r['deployed_dtype']}, its rounding "
            "included; a radius counts only when the prediction is right and the bound is strict.",
            "",
            f"Model `{json.dumps(self.model)}`, data `{json.dumps(self.data)}`, seed {self.seed}, {self.seconds:.1f} s "
            "of training. " + ", ".join(f"{k} {v}" for k, v in self.versions.items()) + ".",
        ]
        return "\n".join(lines) + "\n"


def _foreign(privacy: Mapping[str, Any]) -> Mapping[str, float]:
    """Submodules without a bound and what their per-example gradients are clipped to; absent in older reports."""
    found: Mapping[str, float] = privacy.get("foreign_clipping") or {}
    return found


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def privacy_section(engine: ClipFreeEngine, loss: BoundedLoss) -> dict[str, Any]:
    """What was released so far, from the engine's plan and ledger; bounds are those of the current weights."""
    plan, optimizer = engine.plan, engine.optimizer
    if plan is None or optimizer is None:
        raise CheckpointError("report: expected an engine with a plan, got none; call make_private first")
    tensors = optimizer.tensors()
    return {
        "epsilon": _finite(engine.get_epsilon()),
        "delta": plan.delta,
        "neighbors": plan.neighbors,
        "accountant": plan.accountant,
        "noise_multiplier": plan.noise_multiplier,
        "sampling": plan.sampling,
        "sampling_prob": plan.sampling_prob,
        "steps": optimizer.steps_taken,
        "expected_batch_size": plan.expected_batch_size,
        "logit_clipping": loss.clipping,
        "foreign_clipping": {
            name: m.max_grad_norm
            for name, m in optimizer.sensitivity.model.named_modules()
            if isinstance(m, ForeignModule)
        },
        "sensitivity": {
            "total": StepSensitivity.total({n: t for n, (t, _) in tensors.items()}),
            "tensors": {n: {"bound": t.bound, "sigma": sigma, "dim": t.dim} for n, (t, sigma) in tensors.items()},
            "numerical_slack": optimizer.sensitivity.numerical_slack,
        },
        "insecure_seed": engine.insecure_seed,
        "plan": plan.to_dict(),
        "plan_digest": plan.digest(),
    }


def robustness_section(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    certificates: Mapping[str, Certificate],
    radii: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """Clean and certified accuracy as fractions, from certificates of the examples ``x`` with labels ``y``."""
    graph = trace(model)
    with torch.no_grad():
        constants = lipschitz(graph, graph.evaluate(x[:1]))
    first = next(iter(certificates.values()))
    return {
        "n_test": len(y),
        "clean_accuracy": (first.predicted == y).double().mean().item(),
        "certified_accuracy": {
            norm: {f"{eps:g}": c.certified_accuracy(y, eps) for eps in radii[norm]} for norm, c in certificates.items()
        },
        "lipschitz": {"linf": constants.linf, "l2": constants.l2},
        "methods": sorted({c.method for c in certificates.values()}),
    }


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("dplip", "torch", "numpy", "scipy", "dp-accounting"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
