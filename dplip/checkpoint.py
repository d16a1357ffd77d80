# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or absent."""

from __future__ import annotations

import os
import pickle
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from dplip.errors import CheckpointError

__all__ = ["load_checkpoint", "save_checkpoint"]


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings, containers) in one atomic step, flushed to disk.

    Whatever kills the process, ``path`` holds the old file or the new one, whole.

    Raises:
        CheckpointError: the folder or the file cannot be written.
    """
    partial = None
    try:
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except BaseException as error:
        if partial is not None and os.path.exists(partial):
            os.unlink(partial)
        if isinstance(error, OSError):
            raise CheckpointError(
                f"{path}: expected a file that can be written, got {error}; choose another path"
            ) from error
        raise


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself survive a power cut, where the system lets a folder be flushed."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote; runs no code from the file.

    Raises:
        CheckpointError: the file is absent, damaged, or holds anything but plain data.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: expected a checkpoint, got {reason}; restart or restore a backup") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected a checkpoint, got {type(state).__name__}; restart or restore a backup")
    return state
