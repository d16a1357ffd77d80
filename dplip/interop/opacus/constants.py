# SPDX-License-Identifier: Apache-2.0
"""Buffers of a prepared model must be constants of a forward pass: what a pass leaves in them is released unnoised.

Opacus refuses buffers beside trained parameters and overlooks all others. A prepared model may hold both, and every
training pass checks them.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dplip.errors import IncompatibleModelError

__all__ = ["watch"]

_Seen = dict[str, tuple[Tensor, int, Tensor | None]]  # itself, its version and, in the first pass, its value

_BEFORE: WeakKeyDictionary[nn.Module, _Seen] = WeakKeyDictionary()
_PASSED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def watch(model: nn.Module) -> None:
    """Raise :class:`IncompatibleModelError` at the first training pass of any module of ``model`` that changes its
    buffers in ``forward``: by value in its first pass, by torch's version counter in all (a write through ``.data``
    escapes the counter)."""
    for module in model.modules():
        if module._buffers and _before not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_before)
            module.register_forward_hook(_after)


def _look(module: nn.Module, values: bool) -> _Seen:
    held = {name: b for name, b in module._buffers.items() if b is not None}
    return {name: (b, b._version, b.detach().clone() if values else None) for name, b in held.items()}


def _is_training(module: nn.Module) -> bool:
    return module.training and torch.is_grad_enabled() and not torch._C._functorch.peek_interpreter_stack()


def _before(module: nn.Module, args: Any) -> None:
    if _is_training(module):
        _BEFORE[module] = _look(module, module not in _PASSED)


def _after(module: nn.Module, args: Any, output: Any) -> None:
    before = _BEFORE.pop(module, None)
    if before is None:
        return
    after = _look(module, module not in _PASSED)
    _PASSED[module] = True
    changed = [name for name, seen in before.items() if not _same(seen, after.get(name))]
    if changed or set(after) - set(before):
        raise IncompatibleModelError(
            f"{type(module).__name__}: expected buffers that a forward pass leaves alone, got changes in "
            f"{sorted(changed) or sorted(set(after) - set(before))}, which are private data without noise; "
            "compute them from public data outside forward"
        )


def _same(a: tuple[Tensor, int, Tensor | None], b: tuple[Tensor, int, Tensor | None] | None) -> bool:
    if b is None or a[0] is not b[0] or a[1] != b[1]:
        return False
    return a[2] is None or b[2] is None or torch.equal(a[2].nan_to_num(), b[2].nan_to_num())
