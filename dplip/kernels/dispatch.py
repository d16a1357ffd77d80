# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an operator runs.

Every operator has a ``reference`` implementation in torch, which is also its CPU path. Faster ones register
beside it under their own name for the device types they support. ``DPLIP_KERNELS`` (``auto``, the default,
or a backend's name) chooses among them; a backend that was asked for by name and cannot run is an error,
because only speed may fall back and only silently under ``auto``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from dplip.errors import ConfigError

__all__ = ["backends", "register", "select"]

_TABLE: dict[str, dict[str, tuple[Callable[..., Any], frozenset[str] | None]]] = {}


def register(
    operator: str, backend: str, devices: frozenset[str] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: ``backend``'s implementation of ``operator`` for ``devices`` (None: every device)."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        _TABLE.setdefault(operator, {})[backend] = (function, devices)
        return function

    return add


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
    wanted, fit = os.environ.get("DPLIP_KERNELS", "auto"), backends(operator, device)
    if wanted == "auto" and fit:
        return _TABLE[operator][fit[0]][0]
    if wanted in fit:
        return _TABLE[operator][wanted][0]
    raise ConfigError(
        f"kernels: expected DPLIP_KERNELS to be auto or one of {fit} for {operator} on {device}, "
        f"got {wanted!r}; unset it or install that backend"
    )
