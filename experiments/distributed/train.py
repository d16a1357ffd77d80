# SPDX-License-Identifier: Apache-2.0
"""The embedded digits, trained privately by any number of processes; one process is the same run.

    python experiments/distributed/train.py --seeds 5 --json runs/one.json
    torchrun --nproc-per-node 2 experiments/distributed/train.py --seeds 5 --against runs/one.json

``--layout`` spreads the model: plain (replicas, summed in the step), ddp (replicas, summed in backward) or fsdp2
(shards). With ``--out`` every epoch ends in a checkpoint and a restart (torchrun's ``--max-restarts``) goes on from it:
the steps after it were lost with the processes, and are taken again with fresh batches and fresh noise.
Noise and batches are seeded by the operating system; ``--seeds`` repeats with other initial weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from scipy.stats import ks_2samp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from dplip import CrossEntropy, DistributedClipFreeEngine, InputDomain, PrivacyPlan
from dplip.data import digits
from dplip.errors import DplipError
from dplip.layers import BallClip, Flatten, MaxMin, NormalizedLinear, Shift

LAYOUTS = ("plain", "ddp", "fsdp2")
RATE, Z = 0.2, 3.555


def network(seed: int, layout: str, device: str) -> nn.Module:
    """64-64-10, 1-Lipschitz in l_2, on this rank as ``layout`` has it."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        Flatten(),
        Shift(0.3),
        BallClip(3.0),
        NormalizedLinear(64, 64, bias=False, orthogonalize=2),
        MaxMin(),
        NormalizedLinear(64, 10, bias=False),
    ).to(device)
    if not dist.is_initialized() or layout == "plain":
        return model
    if layout == "ddp":
        return DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh(device.split(":")[0], (dist.get_world_size(),)))


def train(seed: int, args: argparse.Namespace, device: str) -> dict[str, Any]:
    """One private run; every rank returns the same."""
    data, loss = digits(), CrossEntropy(temperature=4.0)
    model = network(seed, args.layout, device)
    engine = DistributedClipFreeEngine()
    optimizer = SGD(model.parameters(), lr=RATE, momentum=0.9)
    model, private, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(*data.train), batch_size=400),  # the expected batch of all ranks together
        loss=loss,
        noise_multiplier=args.noise_multiplier,
        epochs=args.epochs,
        delta=1e-4,
        population=1437,
        domain=InputDomain((1, 8, 8), lower=0.0, upper=1.0, reference=0.3),
    )
    path = None if args.out is None else args.out / f"seed{seed}.pt"
    if path is not None and path.exists():
        engine.load_checkpoint(path)
    while private.steps_taken < private.plan.steps:
        for x, y in loader:
            for group in optimizer.param_groups:
                group["lr"] = RATE * (1 - private.steps_taken / private.plan.steps)
            private.zero_grad()
            loss(model(x.to(device)), y.to(device)).backward()
            private.step()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            engine.save_checkpoint(path)  # before anything of the epoch is shown
    model.eval()
    with torch.no_grad():
        logits = model(data.test.x.to(device)).cpu()
    right = (logits.argmax(1) == data.test.y).double().mean().item()
    test_loss = float(loss(logits, data.test.y)) / len(data.test.y)
    return {"accuracy": right, "loss": test_loss, "steps": private.steps_taken, "plan": private.plan.to_dict()}


def summary(runs: list[dict[str, Any]]) -> str:
    """One line on runs that share a plan."""
    epsilon = PrivacyPlan.from_dict(runs[0]["plan"]).epsilon(runs[0]["steps"])

    def over_runs(key: str, scale: float = 1.0) -> str:
        found = [scale * r[key] for r in runs]
        digits = 2 if scale > 1 else 4
        return f"{statistics.mean(found):.{digits}f} +- {statistics.stdev(found) if len(found) > 1 else 0.0:.{digits}f}"

    return (
        f"accuracy {over_runs('accuracy', 100)} %, loss {over_runs('loss')}, epsilon {epsilon:.6f}, "
        f"{runs[0]['steps']} steps, {len(runs)} seeds"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=LAYOUTS, default="plain")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--noise-multiplier", type=float, default=Z, help=f"{Z} is epsilon 3 after 25 epochs")
    parser.add_argument("--json", type=Path, help="write the runs here")
    parser.add_argument("--against", type=Path, help="compare with the runs written there")
    parser.add_argument("--out", type=Path, help="folder of checkpoints")
    args = parser.parse_args(argv)
    device = "cpu"
    if "RANK" in os.environ:
        if torch.cuda.is_available():
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device != "cpu" else "gloo")
    runs = [train(seed, args, device) for seed in range(args.seeds)]
    world = dist.get_world_size() if dist.is_initialized() else 1
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"{world} x {args.layout}: {summary(runs)}")
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps({"world": world, "layout": args.layout, "runs": runs}, indent=1) + "\n")
        if args.against is not None:
            other = json.loads(args.against.read_text())
            print(f"{other['world']} x {other['layout']}: {summary(other['runs'])}")
            for key in ("accuracy", "loss"):
                test = ks_2samp([r[key] for r in runs], [r[key] for r in other["runs"]])
                print(f"same distribution of {key}: Kolmogorov-Smirnov D {test.statistic:.3f}, p {test.pvalue:.3f}")
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DplipError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
