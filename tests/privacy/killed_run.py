# SPDX-License-Identifier: Apache-2.0
"""A small private run that may be killed at any moment; test_resume.py starts and kills it.

Writes one line of JSON per step to ``trace.jsonl`` (what somebody inside the process would see) and a checkpoint every
``EVERY`` steps. The noise is read off the released gradient: ``(released * divisor - clean) / sigma``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from dplip.losses import CrossEntropy
from dplip.privacy import ClipFreeEngine, ExponentialNoise, PrivacyPlan
from tests.privacy.toy import DOMAIN, data, net

STEPS, EVERY = 60, 3


def plan() -> PrivacyPlan:
    return PrivacyPlan(
        population=60,
        sampling_prob=0.2,
        steps=STEPS,
        delta=1e-5,
        noise_multiplier=1.0,
        noise_schedule=ExponentialNoise(0.5, every=25),  # type: ignore[arg-type]
    )


def run(folder: Path, stop_after: int | None = None) -> ClipFreeEngine:
    """Go on from the folder's checkpoint to the end of the plan, or for ``stop_after`` steps."""
    torch.manual_seed(0)
    module, dataset, loss = net().double(), data(), CrossEntropy()
    dataset.tensors = (dataset.tensors[0].double(), dataset.tensors[1])
    engine = ClipFreeEngine()
    _, optimizer, loader = engine.attach(
        module, SGD(module.parameters(), 0.05, momentum=0.9), dataset, loss, plan(), DOMAIN
    )
    schedule = StepLR(optimizer, 20, 0.5)
    history: list[Any] = []
    if (folder / "run.pt").exists():
        history = engine.load_checkpoint(folder / "run.pt", lr_scheduler=schedule)
    done = 0
    with (folder / "trace.jsonl").open("a", buffering=1) as trace:
        while optimizer.steps_taken < STEPS and done != stop_after:
            index = loader.sampler.draw()
            x, y = loader.batch(index)
            optimizer.zero_grad()
            loss(module(x), y).backward()
            clean = torch.cat([p.grad.flatten() for p in module.parameters()])
            optimizer.step()
            released = torch.cat([p.grad.flatten() for p in module.parameters()]) * optimizer.expected_batch_size
            sigma = torch.cat(
                [torch.full_like(p, optimizer.released_sigma[n]).flatten() for n, p in module.named_parameters()]
            )
            schedule.step()
            noise = [round(v, 6) for v in ((released - clean) / sigma).tolist()[:6]]
            entry = {"step": optimizer.steps_taken, "noise": noise, "batch": index.tolist()}
            history.append(entry)
            trace.write(json.dumps(entry) + "\n")
            if optimizer.steps_taken % EVERY == 0 or optimizer.steps_taken == STEPS:
                engine.save_checkpoint(folder / "run.pt", lr_scheduler=schedule, extra=history)
            done += 1
    return engine
