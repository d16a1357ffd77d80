# SPDX-License-Identifier: Apache-2.0
"""Recording a model's forward pass with torch.fx, without its two silent traps: in-place updates and side effects."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from dplip.bounds.rules import MIXES_EXAMPLES, has_rule
from dplip.errors import DplipError, MixesExamplesError, NoRuleError

__all__ = ["record"]


class _Proxy(fx.Proxy):
    """fx records ``y += x`` as ``y = y + x``, which loses that every other name of ``y`` changes too."""

    def _in_place(self, *_: Any) -> Any:
        raise fx.proxy.TraceError(
            "an in-place operation (+=, -=, *=, /=) overwrites a bounded activation; write y = y + x"
        )

    __iadd__ = __isub__ = __imul__ = __itruediv__ = __imatmul__ = __ipow__ = _in_place


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return has_rule(m) or isinstance(m, tuple(MIXES_EXAMPLES)) or super().is_leaf_module(m, module_qualified_name)


def record(model: nn.Module) -> fx.Graph:
    """The fx graph of ``model``, whose modules with a rule (or a refusal) are leaves. The model is left as it was.

    Raises:
        NoRuleError: ``forward`` cannot be recorded, or works in place.
        MixesExamplesError: ``forward`` writes to a buffer.
    """
    before = {name: (b, b.clone()) for name, b in model.named_buffers() if not is_lazy(b)}
    try:
        graph = _Tracer().trace(model)
    except DplipError:
        raise
    except Exception as error:  # foreign code met stand-ins for tensors, which fail in many ways
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NoRuleError(
            f"bounds: expected {type(model).__name__}.forward to be traceable by torch.fx, got: {reason}; "
            "remove control flow that depends on values, or make it a LipschitzLayer with its own bounds"
        ) from error
    finally:
        written = _restore(model, before)
    if written:
        raise MixesExamplesError(
            f"bounds: forward writes to buffers {written}, which carries data from one batch to the next; "
            "use dplip.layers.ReferenceShift or freeze them (model.eval())"
        )
    return graph


@torch.no_grad()
def _restore(model: nn.Module, before: dict[str, tuple[Tensor, Tensor]]) -> list[str]:
    """Put every buffer back, and name those that were written to or replaced."""
    written = []
    for name, (buffer, value) in before.items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        if owner._buffers.get(leaf) is not buffer or not torch.equal(buffer, value):
            written.append(name)
            owner._buffers[leaf] = buffer
            buffer.copy_(value)
    return written
