# SPDX-License-Identifier: Apache-2.0
"""The figure of splines.py: fits, learned activations and a critic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from splines_nets import splines
from torch import Tensor, nn

__all__ = ["draw"]


@torch.no_grad()
def draw(
    models: dict[str, nn.Module],
    functions: dict[str, Callable[[Tensor], Tensor]],
    samples: tuple[Tensor, Tensor],
    path: Path,
) -> None:
    """Two fits, nine learned splines and the critic's contours, in one row, written to ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    x = torch.linspace(-1, 1, 1000)
    for ax, (name, function) in zip(axes, functions.items(), strict=False):
        ax.plot(x, function(x), color="black", linewidth=2.5, label="target")
        for activation, colour in (("relu", "tab:gray"), ("groupsort", "tab:orange"), ("spline", "tab:blue")):
            fitted = models[f"{name} {activation}"](x[:, None])[:, 0]
            ax.plot(x, fitted, color=colour, linewidth=1.2, label=activation)
        ax.set_title(f"{name}, 1-Lipschitz fits")
        ax.legend(fontsize=8)
    layer = splines(models["f3 spline"])[1]
    wide = torch.linspace(-1.3, 1.3, 400)
    axes[2].plot(wide, layer(wide[:, None].expand(-1, layer.channels)), linewidth=1)
    axes[2].set_title(f"f3: learned splines of a layer\n(pieces: {layer.linear_regions(0.01).tolist()})", fontsize=10)
    grid = torch.linspace(-2.8, 2.8, 120)
    points = torch.cartesian_prod(grid, grid)
    level = models["w1 spline"](points)[:, 0].view(120, 120).T
    axes[3].contourf(grid, grid, level, 20, cmap="viridis")
    for sample, colour in zip(samples, ("white", "tab:red"), strict=True):
        axes[3].scatter(*sample.T, s=3, color=colour)
    axes[3].set_title("W1: critic of splines, P white, Q red")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)
