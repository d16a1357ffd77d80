# SPDX-License-Identifier: Apache-2.0
"""Runs in MLflow: parameters, epsilon against accuracy per epoch, and the joint report."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dplip.config import RunConfig
from dplip.errors import ConfigError
from dplip.privacy import PrivacyPlan
from dplip.report import Report

__all__ = ["MlflowObserver", "report_metrics"]


def report_metrics(report: Report) -> dict[str, float]:
    """The report's numbers under flat names: ``epsilon``, ``clean_accuracy``, ``certified_linf_0.1``, ..."""
    robustness = report.robustness
    metrics = {
        "clean_accuracy": robustness["clean_accuracy"],
        "lipschitz_linf": robustness["lipschitz"]["linf"],
        "lipschitz_l2": robustness["lipschitz"]["l2"],
        "sensitivity_total": report.privacy["sensitivity"]["total"],
        "seconds": report.seconds,
    }
    if report.privacy["epsilon"] is not None:
        metrics["epsilon"] = report.privacy["epsilon"]
    for norm, row in robustness["certified_accuracy"].items():
        metrics |= {f"certified_{norm}_{eps}": value for eps, value in row.items()}
    return metrics


class MlflowObserver:
    """Logs one run. Per-epoch metrics are indexed by the number of noisy steps.

    Args:
        tracking_uri: where to log; by default ``MLFLOW_TRACKING_URI``, else an sqlite file ``mlflow.db`` in ``store``.
        store: folder of the default store; artifacts go beside it.
        experiment: MLflow experiment.

    Raises:
        ConfigError: the tracking store cannot be reached.
    """

    def __init__(self, store: Path, tracking_uri: str | None = None, experiment: str = "dplip") -> None:
        import mlflow

        # MLflow migrates a fresh sqlite store step by step and reports each one.
        for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking.fluent"):
            logging.getLogger(name).setLevel(logging.WARNING)
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        try:
            if uri is None:
                store = store.resolve()
                store.mkdir(parents=True, exist_ok=True)
                uri = f"sqlite:///{store / 'mlflow.db'}"
            mlflow.set_tracking_uri(uri)
            if mlflow.get_experiment_by_name(experiment) is None:
                local = uri.startswith("sqlite:")
                location = (store / "mlartifacts").as_uri() if local else None
                mlflow.create_experiment(experiment, artifact_location=location)
            mlflow.set_experiment(experiment)
        except (OSError, mlflow.exceptions.MlflowException) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"mlflow: expected a reachable store at {uri}, got {reason}; use --no-mlflow") from error
        self._mlflow, self.uri = mlflow, uri

    def start(self, config: RunConfig, plan: PrivacyPlan, first_step: int) -> None:
        """Open a run and log configuration and plan."""
        self._mlflow.start_run(run_name=config.name)
        self._mlflow.log_params(_flat(config.to_dict()) | _flat({"plan": plan.to_dict()}))
        self._mlflow.set_tags({"dplip.plan_digest": plan.digest(), "dplip.resumed_at": str(first_step)})

    def step(self, steps_taken: int) -> None:
        """Nothing: epochs are logged."""

    def epoch(self, metrics: dict[str, float]) -> None:
        """Log one epoch's epsilon and accuracy."""
        self._mlflow.log_metrics({k: v for k, v in metrics.items() if k != "steps"}, step=int(metrics["steps"]))

    def finish(self, report: Report, out: Path) -> None:
        """Log the joint report and close the run."""
        self._mlflow.log_metrics(report_metrics(report), step=report.privacy["steps"])
        for name in ("report.json", "report.md", "report.png", "config.json", "model.safetensors"):
            self._mlflow.log_artifact(str(out / name))
        self._mlflow.end_run()

    def abort(self) -> None:
        """Close an open run as failed."""
        if self._mlflow.active_run() is not None:
            self._mlflow.end_run("FAILED")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
