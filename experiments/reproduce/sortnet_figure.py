# SPDX-License-Identifier: Apache-2.0
"""The picture of the Boolean demonstrations: margins on OR against the limit of standard networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["draw"]

_STYLES = {
    "relu": ("#777777", "s", "ReLU"),
    "abs": ("#aaaaaa", "x", "absolute value"),
    "maxmin": ("#1f5fa8", "o", "MaxMin"),
    "linf-dist": ("#d9731a", "^", "l_inf-distance"),
    "sortnet": ("#2a8a57", "v", "sort, learned weights"),
}


def draw(path: Path, margins: Mapping[str, Sequence[float]], dimensions: Sequence[int]) -> None:
    """One line per network over the dimension; the limit 1/(2d) is shaded, the ideal 1/2 dotted."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    fine = [dimensions[0] + k * (dimensions[-1] - dimensions[0]) / 100 for k in range(101)]
    limit = [1 / (2 * d) for d in fine]
    axes.fill_between(fine, limit, color="#777777", alpha=0.15, label="proved limit 1/(2d) of ReLU and |.|")
    axes.axhline(0.5, color="black", linewidth=0.8, linestyle=":", label="ideal 1/2")
    for kind, values in margins.items():
        color, marker, label = _STYLES[kind]
        axes.plot(dimensions, values, color=color, marker=marker, markersize=5, label=label)
    axes.set(xlabel="inputs d of OR", ylabel="margin, l_inf constant 1", ylim=(0, 0.55), xticks=list(dimensions))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": "dplip"})
