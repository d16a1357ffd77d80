# SPDX-License-Identifier: Apache-2.0
"""The distributed script: under torchrun, and killed and restarted in every layout."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dplip.checkpoint import load_checkpoint
from dplip.privacy.distributed_optimizer import DistributedOptimizer
from tests.privacy.ranks import Died, run, values

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments" / "distributed" / "train.py"
PER_EPOCH = 4  # steps: 1437 examples in expected batches of 400


def train(rank: int, folder: Path, layout: str, kill_after: int | None) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("distributed_train", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    if rank == 1 and kill_after is not None:
        step = DistributedOptimizer.step

        def deadly(self: DistributedOptimizer, closure: Any = None) -> Any:
            if self.steps_taken == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, closure)

        DistributedOptimizer.step = deadly  # type: ignore[method-assign]
    args = argparse.Namespace(layout=layout, epochs=3, noise_multiplier=1.5, out=folder)
    result: dict[str, Any] = script.train(0, args, "cpu")
    return result


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    layout = "fsdp2"
    survivor, victim = run(train, tmp_path, layout, PER_EPOCH + 2)
    assert isinstance(victim, Died) and isinstance(survivor, Exception)
    saved = load_checkpoint(tmp_path / "seed0.pt")["engine"]
    assert saved["steps_taken"] == PER_EPOCH
    first, second = values(train, tmp_path, layout, None)
    assert first == second and first["steps"] == 3 * PER_EPOCH
    assert first["accuracy"] > 0.4
    assert load_checkpoint(tmp_path / "seed0.pt")["engine"]["steps_taken"] == 3 * PER_EPOCH


@pytest.mark.slow
def test_torchrun_starts_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    options = ["--epochs", "2", "--layout", "ddp", "--json", str(tmp_path / "two.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command + options, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "two.json").read_text())
    assert written["world"] == 2 and written["runs"][0]["steps"] == 2 * PER_EPOCH
    assert "2 x ddp: accuracy" in done.stdout
