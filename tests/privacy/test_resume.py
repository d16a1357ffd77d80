# SPDX-License-Identifier: Apache-2.0
"""Killed ten times and resumed, a run's ledger counts the steps behind its weights and no noise is drawn twice."""

import json
import multiprocessing
import random
import signal
import time
from pathlib import Path

import pytest

from dplip.checkpoint import load_checkpoint
from dplip.privacy import ClipFreeEngine
from tests.privacy.killed_run import EVERY, STEPS, plan, run
from tests.privacy.toy import attach, net

ROOT = Path(__file__).parents[2]
KILLS = 10


def check(folder: Path, kills: int) -> None:
    """Ledger, steps, weights' history and every noise vector ever drawn, after the run has ended."""
    state = load_checkpoint(folder / "run.pt")
    engine, history = state["engine"], state["extra"]
    assert engine["steps_taken"] == STEPS == engine["accountant"]["steps"] == len(history)
    fresh = plan().make_accountant()
    fresh.load_state_dict(engine["accountant"])
    assert fresh.ledger == plan().ledger(STEPS)  # hence the same epsilon, a function of it
    assert [entry["step"] for entry in history] == list(range(1, STEPS + 1))
    assert state["lr_schedulers"][0]["last_epoch"] == STEPS
    lines = (folder / "trace.jsonl").read_text().splitlines()
    trace = [json.loads(line) for line in lines if line.endswith("}")]  # a kill may cut a line
    assert len(trace) >= STEPS and len(trace) <= STEPS + kills * (EVERY + 1)
    drawn = [tuple(entry["noise"]) for entry in trace]
    assert len(set(drawn)) == len(drawn)  # steps that were lost included
    flat = [v for noise in drawn for v in noise]
    assert len(set(flat)) > 0.99 * len(flat) and abs(sum(flat)) / len(flat) < 0.3
    assert {tuple(entry["noise"]) for entry in history} <= set(drawn)
    batches = [tuple(entry["batch"]) for entry in trace if len(entry["batch"]) > 4]
    assert len(set(batches)) == len(batches)


def test_stopped_and_resumed_in_one_process(tmp_path: Path) -> None:
    rng = random.Random(1)
    for _ in range(KILLS):
        run(tmp_path, stop_after=rng.randrange(1, 2 * EVERY + 2))
    engine = run(tmp_path)
    assert engine.optimizer is not None and engine.optimizer.steps_taken == STEPS
    check(tmp_path, KILLS)


@pytest.mark.slow
def test_killed_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL at a random moment, in the middle of a step or of a save as it comes."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "tests.privacy.killed_run"])  # imported once: seconds
    rng, trace, kills = random.Random(2), tmp_path / "trace.jsonl", 0
    for _ in range(KILLS):
        before = trace.stat().st_size if trace.exists() else 0
        child = context.Process(target=run, args=(tmp_path,))
        child.start()
        try:
            wanted = before + rng.randrange(1, 500)  # bytes: a step is about 120
            while child.is_alive() and (trace.stat().st_size if trace.exists() else 0) < wanted:
                time.sleep(0.001)
            time.sleep(rng.random() * 0.01)
        finally:
            child.kill()
            child.join()
        kills += child.exitcode == -signal.SIGKILL
        if (tmp_path / "run.pt").exists():
            state = load_checkpoint(tmp_path / "run.pt")  # whole, whatever the moment
            assert len(state["extra"]) == state["engine"]["steps_taken"] == state["engine"]["accountant"]["steps"]
    assert kills == KILLS
    child = context.Process(target=run, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == 0
    check(tmp_path, KILLS)


def test_resuming_the_same_checkpoint_twice_draws_different_noise() -> None:
    drawn = set()
    engine, optimizer = attach(net(), seed=None)
    optimizer.step()
    state = engine.state_dict()
    for _ in range(3):
        module = net()
        again, optimizer = attach(module, seed=None)
        again.load_state_dict(state)
        assert isinstance(again, ClipFreeEngine)
        optimizer.step()
        drawn.add(tuple(v for p in module.parameters() for v in p.grad.flatten().tolist()))
    assert len(drawn) == 3
