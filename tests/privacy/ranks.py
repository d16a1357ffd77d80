# SPDX-License-Identifier: Apache-2.0
"""Runs a function on several processes that form a gloo group, and brings back what each returned or raised."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WAIT = 150.0  # seconds for a whole run, on a loaded machine
TIMEOUT = timedelta(seconds=60)  # of one collective

_context = multiprocessing.get_context("forkserver")
# The server imports these once, seconds of it; every rank is a fork of it.
_context.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "tests.privacy.toy"])


class Died(Exception):
    """A rank ended without an answer; its argument is the exit code."""


def _entry(
    rank: int, world: int, store: str, backend: str, answer: Connection, function: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform.startswith("linux") else "lo0"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world, timeout=TIMEOUT)
    try:
        value: Any = function(rank, *args)
    except Exception as error:
        traceback.print_exc()
        value = error
    answer.send_bytes(pickle.dumps(value))
    answer.close()
    if not isinstance(value, Exception):
        dist.destroy_process_group()


def run(function: Callable[..., Any], *args: Any, world: int = 2, backend: str = "gloo") -> list[Any]:
    """``function(rank, *args)`` on every rank; what each returned, raised, or :class:`Died`."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes, ends = [], []
        for rank in range(world):
            mine, theirs = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_entry, args=(rank, world, store, backend, theirs, function, args), daemon=True
            )
            process.start()
            theirs.close()
            processes.append(process)
            ends.append(mine)
        deadline = time.monotonic() + WAIT
        answers = []
        try:
            for process, end in zip(processes, ends, strict=True):
                try:
                    if not end.poll(max(0.0, deadline - time.monotonic())):
                        raise TimeoutError(f"{function.__name__}: no answer within {WAIT:g} s")
                    answers.append(pickle.loads(end.recv_bytes()))
                except EOFError:
                    process.join(10)
                    answers.append(Died(process.exitcode))
        finally:
            for process in processes:
                process.join(10)
                if process.is_alive():
                    process.kill()
                    process.join()
            for end in ends:
                end.close()
    return answers


def values(function: Callable[..., Any], *args: Any, world: int = 2, backend: str = "gloo") -> list[Any]:
    """:func:`run` where every rank is expected to return."""
    answers = run(function, *args, world=world, backend=backend)
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers
