# SPDX-License-Identifier: Apache-2.0
"""The figure of local_lipschitz.py: constants and certified accuracy over the radius."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw"]

_METHODS = {
    "margin": ("#777777", "global constant"),
    "best": ("#d9731a", "global constant and intervals"),
    "local": ("#1f5fa8", "local constant"),
}


def draw(path: Path, found: Mapping[str, Sequence[Any]]) -> None:
    """Three panels: the mean ratio of the constants, certified accuracy without and with the local loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    styles = (
        ("plain", "#1f5fa8", "784-128-128-10"),
        ("pooled", "#777777", "pooled, plain loss"),
        ("local", "#2a8a57", "pooled, local loss"),
    )
    for name, color, label in styles:
        ratios = [f.ratio for f in found[name]]
        eps = list(ratios[0])
        left.plot(eps, [sum(r[e] for r in ratios) / len(ratios) for e in eps], "o-", color=color, label=label)
    left.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    left.set(xlabel="l_2 radius of the ball", ylabel="local / global Lipschitz constant", ylim=(0, 1.05))
    for method, (color, label) in _METHODS.items():
        _curve(middle, [f.radii[method] for f in found["plain"]], 0.6, color, "-", label)
        if method == "best":  # indistinguishable from the global constant there
            continue
        for name, line in (("pooled", "--"), ("local", "-")):
            end = "plain loss" if name == "pooled" else "local loss"
            _curve(right, [f.radii[method] for f in found[name]], 1.5, color, line, f"{end}, {label}")
    middle.set_title("784-128-128-10, plain loss", fontsize=10)
    right.set_title("pooled network", fontsize=10)
    for axes in (middle, right):
        axes.set(xlabel="l_2 radius", ylabel="certified accuracy, %", ylim=(0, 100))
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": "dplip"})


def _curve(axes: Any, radii: Sequence[Any], end: float, color: str, line: str, label: str) -> None:
    """Mean certified accuracy over the networks."""
    grid = [end * k / 200 for k in range(201)]
    values = [100 * sum(float((r > eps).double().mean()) for r in radii) / len(radii) for eps in grid]
    axes.plot(grid, values, line, color=color, label=label)
