# SPDX-License-Identifier: Apache-2.0
"""The picture of the monotone networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tabular import Tabular
from torch import Tensor, nn

from dplip.certify.monotone import slope_bounds

__all__ = ["draw"]

_BLUE, _ORANGE, _GREY = "#1f5fa8", "#d9731a", "#777777"
_NAMES = ("prior\noffences", "juvenile\nfelonies", "juvenile\nmisdem.", "juvenile\nother")


def draw(
    path: Path,
    curves: list[tuple[Tabular, Tensor, Tensor]],
    models: tuple[nn.Module, nn.Module],
    x: Tensor,
    epsilon: float,
) -> None:
    """The log fit of the seed whose unconstrained network falls most, and the proved slopes of the private models.

    Args:
        path: of the PNG.
        curves: per seed the data, the monotone and the unconstrained network's values on the grid.
        models: the private monotone network and the one without the ramp.
        x: inputs [N, 13] at which slopes are measured.
        epsilon: the private models' budget.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    data, ours, plain = max(curves, key=lambda c: float((c[2].cummax(0)[0] - c[2]).max()))
    grid = data.x_test.flatten()
    left.plot(data.x_train.flatten(), data.y_train.flatten(), "o", color=_GREY, ms=4, label="noisy points")
    left.plot(grid, data.y_test.flatten(), "--", color="black", lw=1, label="log(0.5 + 9.5 x)")
    left.plot(grid, plain.flatten(), color=_ORANGE, label="unconstrained")
    left.plot(grid, ours.flatten(), color=_BLUE, label="monotone, certified")
    left.set(title="Fit of a noisy logarithm", xlabel="x", ylabel="y")
    for model, color, offset, label in zip(
        models, (_BLUE, _ORANGE), (-0.17, 0.17), ("monotone", "without ramp"), strict=True
    ):
        _slopes(right, model, x, color, offset, label)
    right.axhline(0, color="black", lw=0.8)
    right.set_xticks(range(4), _NAMES)
    right.set_ylim(top=1.3 * right.get_ylim()[1])  # room for the legend
    right.set(title=f"COMPAS at epsilon {epsilon:g}: slopes", ylabel="slope of the logit")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8, ncols=2 if axes is right else 1)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": "dplip"})


def _slopes(axes: Any, model: nn.Module, x: Tensor, color: str, offset: float, label: str) -> None:
    """Bars for the proved intervals, dots for gradients at ``x``."""
    low, high = (bound[0, :4] for bound in slope_bounds(model, x.shape[1]))
    at = torch.arange(4) + offset
    axes.bar(at, high - low, 0.3, bottom=low, color=color, alpha=0.3, label=f"{label}: proved")
    inputs = x.clone().requires_grad_()
    gradient = torch.autograd.grad(model(inputs).sum(), inputs)[0][:, :4]
    shake = 0.2 * (torch.rand(len(x), 1, generator=torch.Generator().manual_seed(0)) - 0.5)
    axes.plot((at + shake).flatten(), gradient.flatten(), ".", color=color, ms=3, label=f"{label}: measured")
