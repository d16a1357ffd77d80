# SPDX-License-Identifier: Apache-2.0
"""Distance, sort, interval and l_p operators against torch.cdist, the naive broadcast and the CUDA original.

    python experiments/benchmarks/kernels.py --device cpu  [--json FILE]
    python experiments/benchmarks/kernels.py --device cuda [--json FILE] [--peer PATH] [--tune FILE]

All backends run in one process, interleaved; a row is the median over rounds, with peak memory beyond the operands.
``--peer`` names the folder of a local build of SortNet's extension ``norm_dist_cuda`` (github.com/zbh2047/SortNet,
``python setup.py build_ext --inplace``), which is not part of this project. The floor is the time that the arithmetic
alone takes on the device's lanes: 1.75 instructions per element for a distance, 1 for float16, 4 for an interval, at
128 lanes per clock and multiprocessor. ``--tune`` measures launch tiles instead and writes what ``DPLIP_TILES`` reads.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from clock import once
from rich.console import Console
from rich.table import Table
from tiles import tune
from torch import Tensor

from dplip.kernels.order_statistic import order_statistic
from dplip.kernels.order_statistic_interval import order_statistic_interval
from dplip.kernels.power_mean import power_mean
from dplip.report import versions

Run = Callable[[], Any]
SHAPES = {"cuda": [(512, 5120, 5120), (4096, 1024, 1024), (512, 784, 1024)], "cpu": [(512, 784, 256), (4096, 784, 64)]}
INSTRUCTIONS = {"linf": 1.75, "linf index": 1.75, "linf half": 1.0, "interval": 4.0}  # per element
NAIVE_BYTES = 24 << 30  # the broadcast is skipped where its intermediate would be larger
K, KEEP, RADIUS = 10, 0.7, 0.1


def naive(x: Tensor, w: Tensor, c: Tensor) -> Tensor:
    """The formula by one broadcast."""
    t = (x[:, None] - w).abs()
    return t.amax(-1) if len(c) == 1 else t.topk(len(c), dim=-1)[0] @ c


def naive_mean(x: Tensor, w: Tensor, p: float) -> Tensor:
    return (x[:, None] - w).abs().pow(p).mean(-1).pow(1 / p)


def backward(forward: Callable[..., Tensor], x: Tensor, w: Tensor, *rest: Any) -> Run:
    """Forward and backward, with a fixed cotangent."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    dy = torch.randn(len(x), len(w), device=x.device, dtype=torch.float32)

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(x, w, *rest), (x, w), dy)

    return run


def runs(shape: tuple[int, int, int], device: str) -> dict[str, dict[str, Run]]:
    """Operator -> backend -> what to time."""
    b, i, o = shape
    x, w = torch.randn(b, i, device=device), torch.randn(o, i, device=device)
    one = torch.ones(1, device=device)
    c = KEEP * (1 - KEEP) ** torch.arange(K, device=device)
    c = c / c.sum()
    low, high = x - RADIUS, x + RADIUS
    found: dict[str, dict[str, Run]] = {
        "linf": {"dplip": lambda: order_statistic(x, w, one), "cdist": lambda: torch.cdist(x, w, p=float("inf"))},
        "linf forward+backward": {
            "dplip": backward(order_statistic, x, w, one),
            "cdist": backward(torch.cdist, x, w, float("inf")),
        },
        "top-10": {"dplip": lambda: order_statistic(x, w, c)},
        "top-10 forward+backward": {"dplip": backward(order_statistic, x, w, c)},
        "interval": {"dplip": lambda: order_statistic_interval(low, high, w, one)},
    }
    for p in (8.0, 64.0):
        found[f"l_p {p:g} forward+backward"] = {
            "dplip": backward(power_mean, x, w, p),
            "cdist": backward(torch.cdist, x, w, p),
        }
    if device == "cuda":
        half_x, half_w = x.half(), w.half()
        found["linf half"] = {"dplip": lambda: order_statistic(half_x, half_w, one)}
        from dplip.kernels.triton.largest import largest_with_index

        found["linf index"] = {"dplip": lambda: largest_with_index(x, w, one)}
    if 4 * b * i * o <= (NAIVE_BYTES if device == "cuda" else 1 << 30):
        found["linf"]["naive"] = lambda: naive(x, w, one)
        found["linf forward+backward"]["naive"] = backward(naive, x, w, one)
        found["top-10"]["naive"] = lambda: naive(x, w, c)
        found["l_p 8 forward+backward"]["naive"] = backward(naive_mean, x, w, 8.0)
    return found


def peer_runs(peer: Any, shape: tuple[int, int, int]) -> dict[str, Run]:
    """The CUDA original on the same shape; its arrays have a trailing axis of positions."""
    b, i, o = shape
    x, w = torch.randn(b, i, 1, device="cuda"), torch.randn(o, i, device="cuda")
    y, low, high = (torch.empty(b, o, 1, device="cuda") for _ in range(3))
    at = torch.empty(b, o, 1, dtype=torch.int32, device="cuda")
    at_k = torch.empty(K, b, o, 1, dtype=torch.int32, device="cuda")
    dy, dx, dw = torch.randn_like(y), torch.empty_like(x), torch.empty_like(w)
    below, above = x - RADIUS, x + RADIUS

    def linf() -> None:
        peer.inf_dist_forward(x, w, y, at, 1)
        peer.inf_dist_backward_input_weight(dy, at, dx, dw, 1)

    def sort() -> None:
        peer.sort_neuron_forward(x, w, y, at_k, 1, KEEP, K)
        peer.sort_neuron_backward_input_weight(dy, at_k, dx, dw, 1, KEEP, K)

    def power(p: float) -> None:
        peer.norm_dist_forward(x, w, y, 1, p)
        peer.norm_dist_backward_input_weight(dy, x, w, y, dx, dw, 1, p)

    def forward() -> None:
        peer.inf_dist_forward_nograd(x, w, y, 1)

    return {
        "linf": forward,
        "linf half": forward,  # it has no narrower path
        "linf index": lambda: peer.inf_dist_forward(x, w, y, at, 1),
        "linf forward+backward": linf,
        "top-10": lambda: peer.sort_neuron_forward_nograd(x, w, y, 1, KEEP, K),
        "top-10 forward+backward": sort,
        "interval": lambda: peer.bound_inf_dist_forward_nograd(below, above, w, low, high, 1),
        "l_p 8 forward+backward": lambda: power(8.0),
        "l_p 64 forward+backward": lambda: power(64.0),
    }


def peak(run: Run, device: str) -> float | None:
    """MiB allocated by a call beyond what there was; not measured on the CPU."""
    if device == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def floor(op: str, shape: tuple[int, int, int], device: str) -> float | None:
    """Milliseconds that the arithmetic takes at full rate."""
    if device == "cpu" or op not in INSTRUCTIONS:
        return None
    properties = torch.cuda.get_device_properties(0)
    clock = getattr(properties, "clock_rate", 1_980_000) * 1e3
    per_element = INSTRUCTIONS[op] / (2 if op == "linf half" else 1)
    return 1e3 * shape[0] * shape[1] * shape[2] * per_element / (128 * properties.multi_processor_count * clock)


def rows(device: str, rounds: int, peer: Any, console: Console) -> list[dict[str, Any]]:
    """Everything timed, shape by shape."""
    found = []
    for shape in SHAPES[device]:
        table = runs(shape, device)
        if peer is not None:
            for op, run in peer_runs(peer, shape).items():
                table[op]["peer"] = run
        for op, backends in table.items():
            memory = {name: peak(run, device) for name, run in backends.items()}  # warms up too
            for run in backends.values():
                run()
            times: dict[str, list[float]] = {name: [] for name in backends}
            for _ in range(rounds):
                for name, run in backends.items():
                    times[name].append(once(run, device))
            medians = {name: statistics.median(t) for name, t in times.items()}
            least = floor(op, shape, device)
            for name, ms in medians.items():
                ratio = {other: round(t / ms, 3) for other, t in medians.items() if other != name}
                if least is not None:
                    ratio["floor"] = round(ms / least, 3)
                row = {"op": op, "shape": list(shape), "backend": name, "ms": round(ms, 4)}
                found.append(row | {"peak_mib": memory[name], "ratio_to": ratio})
            console.print(f"{shape} {op}: " + ", ".join(f"{n} {t:.3f} ms" for n, t in medians.items()))
    return found


def show(found: list[dict[str, Any]], console: Console) -> None:
    table = Table("operator", "(B, I, O)", "backend", "ms", "peak MiB", "faster than it, times / over the floor")
    for row in found:
        ratios = "  ".join(f"{name} {value:.2f}" for name, value in row["ratio_to"].items())
        peak_mib = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        table.add_row(row["op"], str(tuple(row["shape"])), row["backend"], f"{row['ms']:.3f}", peak_mib, ratios)
    console.print(table)


def load_peer(path: Path | None) -> Any:
    if path is None:
        return None
    sys.path.insert(0, str(path if path.is_dir() else path.parent))
    return importlib.import_module("norm_dist_cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(SHAPES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU path")
    parser.add_argument("--peer", type=Path, help="folder of a build of norm_dist_cuda")
    parser.add_argument("--tune", type=Path, help="measure tiles and write this table instead")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    if (arguments.tune or arguments.peer) and arguments.device != "cuda":
        parser.error("--tune and --peer: expected --device cuda, got cpu; run them on a machine with a GPU")
    console = Console(width=160)
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    if arguments.tune:
        arguments.tune.write_text(json.dumps(tune(SHAPES["cuda"], console), indent=1) + "\n")
        return
    found = rows(arguments.device, arguments.rounds, load_peer(arguments.peer), console)
    show(found, console)
    if arguments.json:
        name = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {arguments.threads} threads"
        result = {"device": name, "versions": versions(), "rounds": arguments.rounds, "rows": found}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
