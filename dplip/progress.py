# SPDX-License-Identifier: Apache-2.0
"""A run's progress on the terminal, on stderr so that stdout stays the result."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from dplip.config import RunConfig
from dplip.privacy import PrivacyPlan
from dplip.report import Report

__all__ = ["ProgressObserver"]


_LINES = 20  # of a whole run, where there is no terminal to draw a bar on


class ProgressObserver:
    """A bar on a terminal; about twenty lines where there is none."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._total, self._shown = 0, 0

    def start(self, config: RunConfig, plan: PrivacyPlan, first_step: int) -> None:
        self._total, self._shown = plan.steps, first_step
        self._console.print(
            f"{config.name}: {plan.steps} steps, q = {plan.sampling_prob:.5g}, "
            f"noise multiplier {plan.noise_multiplier:.4f}, starting at step {first_step}"
        )
        if self._console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("", total=plan.steps, completed=first_step)
            self._bar.start()

    def step(self, steps_taken: int) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=steps_taken)

    def epoch(self, metrics: dict[str, float]) -> None:
        text = f"epsilon {metrics['epsilon']:.3f}, test accuracy {100 * metrics['test_accuracy']:.2f} %"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=text)
        elif metrics["steps"] - self._shown >= self._total / _LINES or metrics["steps"] >= self._total:
            self._shown = int(metrics["steps"])
            self._console.print(f"step {self._shown}/{self._total}: {text}, {metrics['seconds']:.0f} s")
        if metrics["steps"] >= self._total:
            self.stop()
            self._console.print("certifying the test set ...")

    def finish(self, report: Report, out: Path) -> None:
        self.stop()
        self._console.print(f"written to {out}")

    def stop(self) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
