# SPDX-License-Identifier: Apache-2.0
"""Pictures of results, drawn off screen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dplip.report import Report

__all__ = ["plot_report"]

_BLUE, _ORANGE, _GREY = "#1f5fa8", "#d9731a", "#777777"


def plot_report(report: Report, path: Path) -> None:
    """Accuracy and epsilon over the steps beside certified accuracy over the radius, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    training, certified = figure.subplots(1, 2)
    _training(training, report)
    _certified(certified, report)
    epsilon = report.privacy["epsilon"]
    budget = "no privacy" if epsilon is None else f"epsilon {epsilon:.3g}, delta {report.privacy['delta']:g}"
    figure.suptitle(f"{report.name}: {budget}", fontsize=11)
    figure.savefig(path, dpi=130, metadata={"Software": "dplip"})


def _training(axes: Any, report: Report) -> None:
    steps = [m["steps"] for m in report.history]
    axes.plot(steps, [100 * m["test_accuracy"] for m in report.history], color=_BLUE, marker=".", label="test accuracy")
    axes.set(xlabel="noisy steps", ylabel="test accuracy, %", ylim=(0, 100))
    axes.grid(alpha=0.3)
    if report.privacy["epsilon"] is not None:
        twin = axes.twinx()
        twin.plot(steps, [m["epsilon"] for m in report.history], color=_ORANGE, linestyle="--", label="epsilon")
        twin.set_ylabel("proven epsilon")
        twin.set_ylim(bottom=0)
        lines = [*axes.lines, *twin.lines]
        axes.legend(lines, [line.get_label() for line in lines], loc="lower right", fontsize=8)


def _certified(axes: Any, report: Report) -> None:
    clean = 100 * report.robustness["clean_accuracy"]
    for (norm, row), color in zip(report.robustness["certified_accuracy"].items(), (_BLUE, _ORANGE), strict=False):
        radii = [0.0, *map(float, row)]
        values = [clean, *(100 * v for v in row.values())]
        label = {"linf": "l_inf", "l2": "l_2"}.get(norm, norm)
        axes.plot(radii, values, color=color, marker="o", markersize=4, label=label)
    axes.axhline(clean, color=_GREY, linewidth=0.8, linestyle=":")
    axes.set(xlabel="radius", ylabel="certified accuracy, %", ylim=(0, 100), xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
