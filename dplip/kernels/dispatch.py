# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an operator runs.

Every operator has a ``reference`` implementation in torch. Faster ones register under their own name for the device
types they support; those of :mod:`dplip.kernels.triton` are imported when first chosen, so importing dplip loads no
Triton. ``DPLIP_KERNELS`` (``auto``, the default, or a backend's name) chooses among them; a backend that was asked for
by name and cannot run is an error, because only speed may fall back and only silently under ``auto``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dplip.errors import ConfigError

__all__ = ["backends", "interpreted", "register", "register_triton", "select"]

_TABLE: dict[str, dict[str, tuple[Callable[..., Any], frozenset[str] | None]]] = {}


def register(
    operator: str, backend: str, devices: frozenset[str] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: ``backend``'s implementation of ``operator`` for ``devices`` (None: every device)."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        _TABLE.setdefault(operator, {})[backend] = (function, devices)
        return function

    return add


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def register_triton(operator: str, module: str, name: str) -> None:
    """``operator`` has a Triton backend: the function ``name`` of ``dplip.kernels.triton.<module>``.

    It runs on CUDA devices, and on the CPU where ``TRITON_INTERPRET=1`` and ``DPLIP_KERNELS=triton`` ask for the
    interpreter. Without Triton installed there is no such backend. Its kernels compute in float32; float64 operands,
    which they would round, take the reference.
    """

    def load(*args: Any) -> Any:
        if any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args):
            return _TABLE[operator]["reference"][0](*args)
        return getattr(importlib.import_module(f"dplip.kernels.triton.{module}"), name)(*args)

    if _has_triton():
        register(operator, "triton", frozenset({"cuda", "interpreter"}))(load)


def backends(operator: str, device: str) -> list[str]:
    """Names of the backends of ``operator`` that run on ``device``, the fastest first."""
    table = _TABLE.get(operator, {})
    fit = [name for name, (_, devices) in table.items() if devices is None or device in devices]
    return sorted(fit, key=lambda name: name == "reference")


def select(operator: str, device: str) -> Callable[..., Any]:
    """The implementation of ``operator`` to run on ``device``.

    Raises:
        ConfigError: ``DPLIP_KERNELS`` names a backend that ``operator`` does not have on ``device``.
    """
    wanted = os.environ.get("DPLIP_KERNELS", "auto")
    if device == "cpu" and wanted == "triton" and interpreted():
        device = "interpreter"
    fit = backends(operator, device)
    if wanted == "auto" and fit:
        return _TABLE[operator][fit[0]][0]
    if wanted in fit:
        return _TABLE[operator][wanted][0]
    raise ConfigError(
        f"kernels: expected DPLIP_KERNELS to be auto or one of {fit} for {operator} on {device}, "
        f"got {wanted!r}; unset it or install that backend"
    )
