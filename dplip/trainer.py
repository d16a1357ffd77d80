# SPDX-License-Identifier: Apache-2.0
"""From a configuration to a trained, private, certified and reported model."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dplip.bounds import INPUT_NORMS
from dplip.certify import certify
from dplip.checkpoint import load_checkpoint, save_checkpoint
from dplip.config import RunConfig, load_config
from dplip.data import Dataset
from dplip.errors import CheckpointError, ConfigError
from dplip.layers import LipschitzLayer, advance_masks
from dplip.privacy import PrivacyPlan
from dplip.report import Report, privacy_section, robustness_section, versions
from dplip.session import Session, make_model, prepare

__all__ = ["Observer", "certify_run", "deploy", "evaluate", "load_model", "train"]

CHECKPOINT, MODEL, CONFIG, HISTORY = "checkpoint.pt", "model.safetensors", "config.json", "history.jsonl"


class Observer(Protocol):
    """Is told about a run while it happens: a progress bar, an MLflow logger."""

    def start(self, config: RunConfig, plan: PrivacyPlan, first_step: int) -> None: ...
    def step(self, steps_taken: int) -> None: ...
    def epoch(self, metrics: dict[str, float]) -> None: ...
    def finish(self, report: Report, out: Path) -> None: ...


def train(
    config: RunConfig,
    data: Dataset,
    out: Path,
    observers: Sequence[Observer] = (),
    *,
    resume: bool = False,
) -> Report:
    """Train under the plan, certify on the test set, and write everything to ``out``.

    At the end of every epoch the checkpoint, with the ledger, is on disk before anything about that epoch is shown or
    logged: what left the process is always covered by a ledger that survives it. A resumed run continues from the
    checkpoint with fresh noise and fresh batches; steps after it were never released and are not counted.

    Files: ``checkpoint.pt``, ``config.json``, ``history.jsonl``, and at the end ``model.safetensors``, ``report.json``,
    ``report.md``, ``report.png``.

    Raises:
        ConfigError: ``out`` already holds a run and ``resume`` is not set.
        CheckpointError: the checkpoint is damaged or belongs to another configuration.
    """
    session = prepare(config, data)
    _claim(out, config, resume)
    if resume and (out / CHECKPOINT).exists():
        _restore(session, out / CHECKPOINT)
    (out / CONFIG).write_text(json.dumps(config.to_dict(), indent=1) + "\n")
    for observer in observers:
        observer.start(config, session.plan, session.optimizer.steps_taken)
    while session.optimizer.steps_taken < session.plan.steps:
        metrics = _epoch(session, data, observers)
        _save(session, out)
        for observer in observers:
            observer.epoch(metrics)
    save_file(_tensors(session.released), out / MODEL)
    report = make_report(session, data)
    report.write(out)
    for observer in observers:
        observer.finish(report, out)
    return report


def _claim(out: Path, config: RunConfig, resume: bool) -> None:
    """Make ``out`` ours without overwriting another run."""
    if (out / CHECKPOINT).exists() or (out / MODEL).exists():
        if not resume:
            raise ConfigError(f"{out}: expected an empty folder, got a run; pass --resume, or another --out")
        saved = json.loads((out / CONFIG).read_text()) if (out / CONFIG).exists() else None
        if saved is not None and saved != json.loads(json.dumps(config.to_dict())):
            changed = sorted(k for k in {*saved, *config.to_dict()} if saved.get(k) != _jsoned(config).get(k))
            raise CheckpointError(
                f"{out}: expected the configuration the run was started with, got changes in {changed}; "
                "restore them or start a new run"
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out}: expected a folder that can be written, got {error}; choose another --out") from error


def _jsoned(config: RunConfig) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    return values


def _epoch(session: Session, data: Dataset, observers: Sequence[Observer]) -> dict[str, float]:
    started = time.perf_counter()
    session.model.train()
    for x, y in session.loader:
        if session.optimizer.steps_taken >= session.plan.steps:
            break
        session.optimizer.zero_grad()
        session.loss(session.model(x), y).backward()
        session.optimizer.step()
        advance_masks(session.model)  # public masks are fixed within a step, bounds included
        session.schedule.step()
        if session.averaged is not None:
            session.averaged.update_parameters(session.model)
        for observer in observers:
            observer.step(session.optimizer.steps_taken)
    for layer in session.released.modules():  # an average of iterates may leave a set that is not convex in float
        if isinstance(layer, LipschitzLayer):
            layer.project_()
    session.seconds += time.perf_counter() - started
    metrics = {
        "steps": float(session.optimizer.steps_taken),
        "epsilon": session.engine.get_epsilon(),
        "test_accuracy": accuracy(session.released, data.test.x, data.test.y),
        "seconds": session.seconds,
    }
    session.history.append(metrics)
    return metrics


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 2000) -> float:
    """Share of examples whose largest logit is the true one's."""
    was_training = model.training
    model.eval()
    right = sum(
        int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(batch_size), y.split(batch_size), strict=True)
    )
    model.train(was_training)
    return right / len(y)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().contiguous() for name, t in model.state_dict().items()}


def _save(session: Session, out: Path) -> None:
    state = {
        "engine": session.engine.state_dict(),
        "model": session.model.state_dict(),
        "optimizer": session.optimizer.state_dict(),
        "schedule": {"last_epoch": session.schedule.last_epoch},
        "averaged": None if session.averaged is None else session.averaged.state_dict(),
        "history": session.history,
        "seconds": session.seconds,
    }
    save_checkpoint(out / CHECKPOINT, state)
    lines = [json.dumps(m) for m in session.history]
    (out / HISTORY).write_text("\n".join(lines) + "\n")


def _restore(session: Session, path: Path) -> None:
    state = load_checkpoint(path)
    try:
        session.engine.load_state_dict(state["engine"])
        session.model.load_state_dict(state["model"])
        session.optimizer.load_state_dict(state["optimizer"])
        if session.averaged is not None:
            session.averaged.load_state_dict(state["averaged"])
        session.history, session.seconds = list(state["history"]), float(state["seconds"])
        session.schedule.last_epoch = int(state["schedule"]["last_epoch"])
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: expected a checkpoint of this run, got a damaged one ({reason}); restart"
        ) from error


def make_report(session: Session, data: Dataset) -> Report:
    """The joint report of privacy and robustness for the session as it stands."""
    config = session.config
    return Report(
        name=config.name,
        privacy=privacy_section(session.engine, session.loss),
        robustness=evaluate(session.released, config, data),
        model={"kind": config.model.kind, **config.model.options, "parameters": _count(session.model)},
        data={"name": data.name, "n_train": len(data.train.y), "reference": config.data.reference},
        seed=config.seed,
        seconds=round(session.seconds, 2),
        versions=versions(),
        history=session.history,
    )


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def deploy(model: nn.Module, config: RunConfig) -> nn.Module:
    """The function that certificates are about: a copy in evaluation mode that computes in ``config.certify.dtype``."""
    return copy.deepcopy(model).eval().to(getattr(torch, config.certify.dtype))


def evaluate(model: nn.Module, config: RunConfig, data: Dataset) -> dict[str, Any]:
    """The robustness section for a trained model on the test set."""
    deployed = deploy(model, config)
    count = config.certify.examples or len(data.test.y)
    x, y = data.test.x[:count].to(getattr(torch, config.certify.dtype)), data.test.y[:count]
    method = config.certify.method
    certificates = {norm: certify(deployed, x, norm, method=method, domain=data.domain) for norm in INPUT_NORMS}
    radii = {"linf": config.certify.linf, "l2": config.certify.l2}
    return robustness_section(deployed, x, y, certificates, radii) | {"deployed_dtype": config.certify.dtype}


def load_model(run: Path, schema_of: Any) -> tuple[RunConfig, nn.Module]:
    """Configuration and trained model of a finished run, in evaluation mode.

    Args:
        run: the folder that :func:`train` wrote.
        schema_of: maps a data set's name to its :class:`dplip.data.Schema`.

    Raises:
        CheckpointError: the folder holds no finished run, or a damaged one.
    """
    if not (run / CONFIG).is_file() or not (run / MODEL).is_file():
        raise CheckpointError(f"{run}: expected a finished run ({CONFIG}, {MODEL}), got none; finish it with --resume")
    config = load_config(run / CONFIG)
    model = make_model(config, schema_of(config.data.name))
    try:
        model.load_state_dict(load_file(run / MODEL))
    except Exception as error:  # safetensors raises its own, unexported type
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{run / MODEL}: expected the run's weights, got a damaged file ({reason}); retrain"
        ) from error
    return config, model.eval()


def certify_run(run: Path, data: Dataset, schema_of: Any) -> dict[str, Any]:
    """The robustness section recomputed from a run's files."""
    config, model = load_model(run, schema_of)
    return evaluate(model, config, data)
