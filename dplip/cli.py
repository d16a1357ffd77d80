# SPDX-License-Identifier: Apache-2.0
"""The command line: ``dplip train | plan | certify | audit | report | epsilon | calibrate``."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accountants import Neighbors
from dplip import __version__
from dplip.errors import ConfigError, DplipError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a refusal is one line on stderr and exit code 2."""
    args = _parser().parse_args(argv)
    try:
        code: int | None = args.run(args)
    except DplipError as error:
        print(f"dplip {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"dplip {args.command}: interrupted; continue a training run with --resume", file=sys.stderr)
        return 130
    return code or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dplip", description="Train private, certifiably robust networks.")
    parser.add_argument("--version", action="version", version=f"dplip {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train, certify and report")
    _config_options(train)
    train.add_argument("--data-dir", type=Path, help="folder of the data sets (default: DPLIP_DATA, then a cache)")
    train.add_argument("--out", type=Path, help="folder of the run (default: runs/NAME-TIME)")
    train.add_argument("--resume", action="store_true", help="continue the run in --out")
    train.add_argument("--no-mlflow", action="store_true", help="do not log to MLflow")
    train.add_argument("--mlflow-uri", help="tracking store (default: MLFLOW_TRACKING_URI, then sqlite beside --out)")
    train.set_defaults(run=_train)

    plan = commands.add_parser("plan", help="what a configuration would spend and release; reads no data")
    _config_options(plan)
    plan.add_argument("--format", choices=("md", "json"), default="md")
    plan.set_defaults(run=_plan)

    certify = commands.add_parser("certify", help="recompute a run's certified accuracies from its files")
    certify.add_argument("--run", dest="folder", type=Path, required=True, help="folder of the run")
    certify.add_argument("--data-dir", type=Path, help="folder of the data sets")
    certify.set_defaults(run=_certify)

    audit = commands.add_parser("audit", help="attack a run's certificates and sensitivities; exit code 1 if refuted")
    audit.add_argument("--run", dest="folder", type=Path, required=True, help="folder of the run")
    audit.add_argument("--data-dir", type=Path, help="folder of the data sets")
    audit.add_argument("--points", type=int, default=500, help="certified test examples to attack, per norm")
    audit.add_argument("--restarts", type=int, default=10)
    audit.add_argument("--steps", type=int, default=40, help="gradient steps per restart")
    audit.add_argument("--fraction", type=float, default=0.999, help="of each certified radius")
    audit.set_defaults(run=_audit)

    report = commands.add_parser("report", help="print a run's joint report")
    report.add_argument("--run", dest="folder", type=Path, required=True, help="folder of the run")
    report.add_argument("--format", choices=("md", "json"), default="md")
    report.set_defaults(run=_report)

    epsilon = commands.add_parser("epsilon", help="epsilon of Poisson-sampled Gaussian steps")
    epsilon.add_argument("--noise-multiplier", type=float, required=True)
    epsilon.set_defaults(run=_epsilon)
    calibrate = commands.add_parser("calibrate", help="least noise multiplier for a budget")
    calibrate.add_argument("--epsilon", type=float, required=True)
    calibrate.set_defaults(run=_calibrate)
    for command in (epsilon, calibrate):
        command.add_argument("--sampling-prob", type=float, required=True)
        command.add_argument("--steps", type=int, required=True)
        command.add_argument("--delta", type=float, required=True)
        command.add_argument("--accountant", default="pld", help="pld (default) or rdp")
        command.add_argument(
            "--neighbors", default=Neighbors.ADD_OR_REMOVE_ONE.value, help="add_or_remove_one or replace_one"
        )
    return parser


def _config_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", type=Path, required=True, help="TOML file")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override, e.g. privacy.epsilon=1",
    )
    command.add_argument("--seed", type=int, help="seed of the initial weights")


def _load_config(args: argparse.Namespace) -> Any:
    from dplip.config import load_config

    seed = [] if args.seed is None else [f"seed={args.seed}"]
    return load_config(args.config, [*args.overrides, *seed])


def _train(args: argparse.Namespace) -> None:
    import torch

    from dplip.data import load
    from dplip.interop.mlflow import MlflowObserver
    from dplip.progress import ProgressObserver
    from dplip.session import prepare
    from dplip.trainer import train

    config = _load_config(args)
    if config.threads:
        torch.set_num_threads(config.threads)
    if args.resume and args.out is None:
        raise ConfigError("--resume: expected --out with the folder of the run, got none; name it")
    data = load(config.data.name, args.data_dir)
    prepare(config, data)  # every refusal comes before anything is written or logged
    out = args.out or Path("runs") / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    progress = ProgressObserver()
    mlflow = None if args.no_mlflow else MlflowObserver(out.parent, args.mlflow_uri)
    try:
        report = train(config, data, out, [progress] if mlflow is None else [progress, mlflow], resume=args.resume)
    finally:
        progress.stop()
        if mlflow is not None:
            mlflow.abort()
    print(report.to_markdown())
    if mlflow is not None:
        print(f"MLflow: mlflow ui --backend-store-uri {mlflow.uri}", file=sys.stderr)


def _plan(args: argparse.Namespace) -> None:
    from dplip.planning import plan_table

    table = plan_table(_load_config(args))
    print(json.dumps(table.to_dict(), indent=1) if args.format == "json" else table.to_markdown())


def _certify(args: argparse.Namespace) -> None:
    from dplip.data import load, schema
    from dplip.report import Report
    from dplip.trainer import evaluate, load_model

    config, model = load_model(args.folder, schema)
    section = evaluate(model, config, load(config.data.name, args.data_dir))
    print(json.dumps(section, indent=1))
    if (args.folder / "report.json").is_file():
        same = Report.read(args.folder / "report.json").robustness == section
        print("matches report.json" if same else "DIFFERS from report.json", file=sys.stderr)


def _audit(args: argparse.Namespace) -> int:
    from dplip.auditing import audit_run
    from dplip.data import load, schema
    from dplip.trainer import load_model

    config, _ = load_model(args.folder, schema)
    data = load(config.data.name, args.data_dir)
    options = {"points": args.points, "restarts": args.restarts, "steps": args.steps, "fraction": args.fraction}
    audit = audit_run(args.folder, data, schema, **options)
    print(json.dumps(audit.to_dict(), indent=1))
    return int(audit.refuted)


def _report(args: argparse.Namespace) -> None:
    from dplip.report import Report

    report = Report.read(args.folder / "report.json")
    print(json.dumps(report.to_dict(), indent=1) if args.format == "json" else report.to_markdown())


def _event_plan(args: argparse.Namespace, **noise: Any) -> Any:
    from dplip.privacy import PrivacyPlan

    make = PrivacyPlan.calibrated if "target_epsilon" in noise else PrivacyPlan
    return make(
        population=1,  # enters no formula of Poisson sampling
        sampling_prob=args.sampling_prob,
        steps=args.steps,
        delta=args.delta,
        accountant=args.accountant,
        neighbors=args.neighbors,
        **noise,
    )


def _epsilon(args: argparse.Namespace) -> None:
    plan = _event_plan(args, noise_multiplier=args.noise_multiplier)
    epsilon = plan.epsilon()
    print(f"{epsilon:.6f}" if math.isfinite(epsilon) else "inf", f"at delta {plan.delta:g}, {_terms(plan)}")


def _calibrate(args: argparse.Namespace) -> None:
    plan = _event_plan(args, target_epsilon=args.epsilon)
    print(
        f"{_rounded_up(plan.noise_multiplier)} gives epsilon {plan.epsilon():.6f} at delta {plan.delta:g}, "
        f"{_terms(plan)}"
    )


def _terms(plan: Any) -> str:
    return (
        f"q = {plan.sampling_prob:g}, {plan.steps} steps, {plan.neighbors}, accountant {plan.accountant} (upper bound)"
    )


def _rounded_up(value: float) -> str:
    """Six decimals, never below ``value``: less noise than shown would break the promise."""
    return f"{math.ceil(value * 1e6) / 1e6:.6f}"


if __name__ == "__main__":
    sys.exit(main())
