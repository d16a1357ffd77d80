# SPDX-License-Identifier: Apache-2.0
"""What a run leaves in MLflow's embedded store."""

import warnings

import pytest

from dplip.config import load_config
from dplip.data import load
from dplip.errors import ConfigError
from dplip.trainer import train

TOML = """
name = "logged"
[data]
name = "digits"
[model]
kind = "sort_mlp"
widths = [8]
top_k = 4
[privacy]
population = 1437
batch_size = 360
delta = 1e-4
steps = 8
noise_multiplier = 1.5
[certify]
linf = [0.01]
l2 = [0.1]
method = "margin"
examples = 40
"""


@pytest.mark.filterwarnings("ignore")  # MLflow and its stores warn about themselves
def test_run_is_logged(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    mlflow = pytest.importorskip("mlflow")
    from dplip.interop.mlflow import MlflowObserver

    path = tmp_path / "c.toml"
    path.write_text(TOML)
    observer = MlflowObserver(tmp_path / "runs")
    report = train(load_config(path), load("digits"), tmp_path / "runs" / "one", [observer])
    assert observer.uri.startswith("sqlite:///") and (tmp_path / "runs" / "mlflow.db").is_file()
    client = mlflow.MlflowClient(observer.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("dplip").experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "logged"
    assert run.data.params["privacy.noise_multiplier"] == "1.5" and run.data.params["plan.steps"] == "8"
    assert run.data.metrics["epsilon"] == pytest.approx(report.privacy["epsilon"])
    assert run.data.metrics["certified_linf_0.01"] == report.robustness["certified_accuracy"]["linf"]["0.01"]
    epsilons = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "epsilon")]
    assert sorted({step for step, _ in epsilons}) == [4, 8] and epsilons[0][1] < epsilons[-1][1]
    assert len(client.get_metric_history(run.info.run_id, "test_accuracy")) == 2
    artifacts = {f.path for f in client.list_artifacts(run.info.run_id)}
    assert {"report.json", "report.md", "report.png", "config.json", "model.safetensors"} <= artifacts


@pytest.mark.filterwarnings("ignore")
def test_unreachable_store(tmp_path):
    from dplip.interop.mlflow import MlflowObserver

    with warnings.catch_warnings(), pytest.raises(ConfigError, match="--no-mlflow"):
        MlflowObserver(tmp_path, "sqlite:////proc/nowhere/mlflow.db")
