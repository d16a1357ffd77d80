# SPDX-License-Identifier: Apache-2.0
"""What one training step costs: plain SGD, clip-free, and the ways that form or bound per-example gradients.

    python experiments/benchmarks/step.py --json step.json --figure step.png

Modes, all on the same network of Lipschitz layers, the same batch and the same loss, with ``torch.optim.SGD``:

* ``plain``: forward, backward, step. No privacy, and no projection, so the network loses its certificate.
* ``projected``: plain, then every layer's ``project_()``: the same certified network without privacy.
* ``clip_free``: :class:`dplip.ClipFreeEngine`; noise, checks, bounds and the projection included.
* ``opacus_hooks``, ``opacus_ghost``: Opacus on the same layers (:func:`dplip.interop.opacus.prepare`); no projection.
* ``vmap``: per-example gradients by ``torch.func``, clipped, summed, noised; no projection.

Times are medians over rounds in which every mode takes one step in turn, in one process; ``ratio_to_plain`` and
``ratio_to_projected`` are medians of the ratios within a round; ``cpu_...`` are the same of processor time, which
neighbours on a busy machine disturb less. ``peak_mib`` is how far the resident set of a process
of its own rises above what it was before the model was built and after one step of the same mode on a batch of 8 (on a
GPU: the allocator's peak).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from modes import MODELS, MODES, Skipped, build
from peak import peak_mib
from rich.console import Console
from rich.table import Table

SLOW = 3.0  # seconds of one step after which a mode takes few steps


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(step: Callable[[], None], device: str) -> tuple[float, float]:
    """Milliseconds on the clock, and of this process's processor time."""
    synchronize(device)
    start, cpu = time.perf_counter(), time.process_time()
    step()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - cpu)


def rounds(
    steps: dict[str, Callable[[], None]], device: str, seconds: float, most: int
) -> dict[str, list[tuple[float, float]]]:
    """Times of each mode, round by round; slow modes sit out most rounds."""
    times: dict[str, list[tuple[float, float]]] = {mode: [] for mode in steps}
    cost = {mode: min(timed(step, device)[0] for _ in range(2)) for mode, step in steps.items()}  # warm-up
    slow = {mode for mode, ms in cost.items() if ms > 1e3 * SLOW or ms > 20 * cost["plain"]}
    start, k = time.perf_counter(), 0
    while k < 3 or (k < most and time.perf_counter() - start < seconds):
        order = list(steps)[k % len(steps) :] + list(steps)[: k % len(steps)]  # nobody always follows the same mode
        for mode in order:
            if mode not in slow or k < 3:
                times[mode].append(timed(steps[mode], device))
        k += 1
    return times


def measure(model: str, batch: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per mode."""
    steps: dict[str, Callable[[], None]] = {}
    skipped: dict[str, str] = {}
    for mode in options.modes:
        try:
            steps[mode] = build(model, batch, mode, options.device, options.memory)
        except Skipped as reason:
            skipped[mode] = str(reason)
    times = rounds(steps, options.device, options.seconds, options.rounds)
    steps.clear()
    rows = []
    for mode in options.modes:
        row: dict[str, Any] = {"model": model, "batch": batch, "mode": mode}
        if mode in skipped:
            rows.append(row | {"skipped": skipped[mode]})
            continue
        ms, cpu = ([pair[k] for pair in times[mode]] for k in range(2))
        row |= {"ms": statistics.median(ms), "ms_quartiles": statistics.quantiles(ms, n=4)[::2], "rounds": len(ms)}
        row["cpu_ms"] = statistics.median(cpu)
        for base in ("plain", "projected"):
            if base in times:
                pairs = list(zip(times[mode], times[base], strict=False))
                row[f"ratio_to_{base}"] = statistics.median(a[0] / b[0] for a, b in pairs)
                row[f"cpu_ratio_to_{base}"] = statistics.median(a[1] / b[1] for a, b in pairs)
        at = (model, batch, mode, options.device, options.threads)
        row["peak_mib"] = peak_mib(*at) if mode in options.peak_modes else None
        rows.append(row)
    return rows


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(
        "mode",
        "ms",
        "quartiles",
        "x plain",
        "x projected",
        "peak MiB",
        title=f"{rows[0]['model']}, batch {rows[0]['batch']}",
    )
    for row in rows:
        if "skipped" in row:
            table.add_row(row["mode"], "skipped", row["skipped"])
            continue
        low, high = row["ms_quartiles"]
        ratios = [f"{row[key]:.2f}" if key in row else "" for key in ("ratio_to_plain", "ratio_to_projected")]
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        table.add_row(row["mode"], f"{row['ms']:.2f}", f"{low:.2f} - {high:.2f}", *ratios, peak)
    console.print(table)


def draw(rows: list[dict[str, Any]], path: Path, processor: bool = False) -> None:
    """Time over plain SGD against the batch, one panel per model."""
    ratio = "cpu_ratio_to_plain" if processor else "ratio_to_plain"
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = plt.subplots(1, len(models), figsize=(4 * len(models), 3.6), sharey=True, squeeze=False)
    for panel, model in zip(panels[0], models, strict=True):
        for mode in MODES:
            points = [r for r in rows if r["model"] == model and r["mode"] == mode and "ms" in r]
            if points and mode != "plain":
                style = {"linewidth": 2.5, "zorder": 3} if mode == "clip_free" else {"linewidth": 1.2}
                panel.plot([r["batch"] for r in points], [r[ratio] for r in points], "o-", label=mode, **style)
        panel.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
        panel.set(title=model, xlabel="batch", xscale="log", yscale="log")
        batches = sorted({r["batch"] for r in rows if r["model"] == model})
        panel.set_xticks(batches, [str(b) for b in batches])
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel(f"{'processor ' if processor else ''}time of a step / plain SGD")
    handles = {label: h for panel in panels[0] for h, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 256, 1024, 8192])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.add_argument("--seconds", type=float, default=15.0, help="per model and batch")
    parser.add_argument("--rounds", type=int, default=100, help="at most, per model and batch")
    parser.add_argument("--memory", type=float, default=4.0, help="GiB that per-example gradients may take")
    parser.add_argument("--peak-modes", nargs="*", choices=MODES, default=list(MODES), help="whose memory to measure")
    parser.add_argument("--json", type=Path, help="where rows go")
    parser.add_argument("--figure", type=Path, help="where the plot goes")
    parser.add_argument("--processor", action="store_true", help="plot processor time instead of the clock")
    parser.add_argument("--saved", nargs="+", type=Path, help="plot the rows of these files instead of measuring")
    options = parser.parse_args(arguments)
    if options.saved:
        if not options.figure:
            parser.error("--saved: expected --figure beside it, got none; say where the plot goes")
        draw([row for file in options.saved for row in json.loads(file.read_text())], options.figure, options.processor)
        return 0
    if "plain" not in options.modes:
        parser.error("--modes: expected plain among them, got none to compare with; add it")
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = False  # bounds are for float32, and every mode computes the same
    console, rows = Console(), []
    for model in options.models:
        for batch in options.batches:
            console.print(f"{model}, batch {batch} ...")
            rows += measure(model, batch, options)
            show(console, [row for row in rows if (row["model"], row["batch"]) == (model, batch)])
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.figure:
        draw(rows, options.figure, options.processor)
    return 0


if __name__ == "__main__":
    sys.exit(main())
