# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one mode, in a process of its own: what training needs beyond the loaded libraries."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

STEPS = 3


def peak_mib(model: str, batch: int, mode: str, device: str, threads: int) -> float:
    """Runs this file; see :func:`main`."""
    command = [sys.executable, __file__, model, str(batch), mode, device, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"peak: expected a measurement of {mode}, got: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.split()[-1])


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"peak: expected {field} in /proc/self/status, got none; run on Linux")


def main() -> None:
    """Loads code and kernels with a batch of 8, forgets that, then takes steps and prints the rise in MiB."""
    import torch
    from modes import build

    model, batch, mode, device, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    step = build(model, 8, mode, device, float("inf"))
    step()
    del step
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        before = _status("VmRSS")
    step = build(model, int(batch), mode, device, float("inf"))
    for _ in range(STEPS):
        step()
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else _status("VmHWM")
    print(peak - before)


if __name__ == "__main__":
    main()
