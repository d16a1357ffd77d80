# SPDX-License-Identifier: Apache-2.0
"""Train configurations over several seeds and print one table: mean and standard deviation of every number.

    python experiments/seeds.py experiments/configs/mnist_l2.toml --seeds 3 --data-dir D --out runs/seeds

Noise and batches are seeded by the operating system, so a repetition varies within the spread shown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from dplip.config import load_config
from dplip.data import load
from dplip.errors import DplipError
from dplip.interop.mlflow import report_metrics
from dplip.progress import ProgressObserver
from dplip.report import Report
from dplip.trainer import train


def run(config_path: Path, seeds: int, data_dir: Path | None, out: Path) -> list[Report]:
    """One finished report per seed; seeds that are finished in ``out`` already are read, not trained again."""
    reports = []
    for seed in range(seeds):
        config = load_config(config_path, [f"seed={seed}"])
        folder = out / f"{config.name}-seed{seed}"
        if (folder / "report.json").is_file():
            reports.append(Report.read(folder / "report.json"))
            continue
        data = load(config.data.name, data_dir)
        reports.append(train(config, data, folder, [ProgressObserver()], resume=folder.exists()))
    return reports


def summary(reports: list[Report]) -> dict[str, tuple[float, float]]:
    """Mean and sample standard deviation of every number of the reports."""
    rows = [report_metrics(report) for report in reports]
    return {
        key: (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
        for key in rows[0]
        for values in [[row[key] for row in rows]]
    }


def table(name: str, stats: dict[str, tuple[float, float]]) -> str:
    """Two Markdown rows; accuracies in percent."""
    shown = {"epsilon": "epsilon", "clean_accuracy": "clean"} | {
        key: key.removeprefix("certified_").replace("_", " ") for key in stats if key.startswith("certified_")
    }
    cells = [
        f"{mean:.3f}" if key == "epsilon" else f"{100 * mean:.2f} +- {100 * spread:.2f}"
        for key in shown
        for mean, spread in [stats[key]]
    ]
    head = ["configuration", *shown.values(), "training, s"]
    body = [name, *cells, f"{stats['seconds'][0]:.0f}"]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), body))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--json", type=Path, help="also write {configuration: {number: [mean, standard deviation]}}")
    args = parser.parse_args()
    results = {}
    try:
        for path in args.configs:
            results[path.stem] = summary(run(path, args.seeds, args.data_dir, args.out))
            print(table(path.stem, results[path.stem]), flush=True)
    except DplipError as error:
        print(f"seeds: {error}", file=sys.stderr)
        return 2
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
