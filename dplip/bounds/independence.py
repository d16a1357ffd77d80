# SPDX-License-Identifier: Apache-2.0
"""A run-time check that a model treats every example by itself, and that its trace is the model.

Rules are promises; this looks. It runs the model, in the mode it will train in, on public random inputs and compares
each example's output alone with its output in company, the buffers before with those after, and the traced graph's
output with the module's own.
"""

from __future__ import annotations

import torch
from torch import nn

from dplip.bounds.domain import InputDomain
from dplip.bounds.graph import Graph
from dplip.bounds.propagate import input_like
from dplip.bounds.rules import MIXES_EXAMPLES
from dplip.errors import MixesExamplesError, NoRuleError

__all__ = ["check_independence"]


@torch.no_grad()
def check_independence(model: nn.Module, graph: Graph, domain: InputDomain) -> None:
    """Compare the model with its rules and with its own trace; restores any buffer that was written.

    A pass is no proof; it catches batch statistics, masks by batch position and running averages inside layers whose
    rules deny them, and branches, hooks or aliases that the trace did not see.

    Raises:
        MixesExamplesError: examples influence one another, ``forward`` writes to a buffer, or the model holds a
            module that
            mixes examples in training mode, whatever mode it is in now.
        NoRuleError: the traced graph computes something else than the model.
    """
    for name, module in model.named_modules():
        for kind, remedy in MIXES_EXAMPLES.items():
            if isinstance(module, kind):
                raise MixesExamplesError(
                    f"bounds: node '{name or 'model'}' ({type(module).__name__}) mixes examples when it trains, "
                    f"and what it keeps for evaluation is not private; {remedy}"
                )
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    reference = input_like(model, domain)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(3, *domain.shape, generator=generator, dtype=torch.float64).to(reference)
    low = domain.lower if domain.lower > -1e6 else domain.reference - 1
    high = domain.upper if domain.upper < 1e6 else domain.reference + 1
    batch = low + (high - low) * noise
    together = model(batch)
    alone = torch.cat([model(batch[i : i + 1]) for i in range(len(batch))])
    written = [name for name, b in model.named_buffers() if not torch.equal(b, buffers[name])]
    for name, b in model.named_buffers():
        b.copy_(buffers[name])
    if written:
        raise MixesExamplesError(
            f"bounds: forward writes to buffers {written}, which carries data from one batch to the next; "
            "use dplip.layers.ReferenceShift or freeze them (model.eval())"
        )
    if together.shape != alone.shape or not torch.allclose(together, alone, rtol=1e-4, atol=1e-4):
        raise MixesExamplesError(
            "bounds: an example's output changes with the other examples of its batch (or is random), so no "
            "per-example sensitivity exists; remove batch statistics and position-dependent masks"
        )
    traced = graph.evaluate(batch)[graph.output]
    if traced.shape != together.shape or not torch.allclose(traced, together, rtol=1e-4, atol=1e-4):
        raise NoRuleError(
            "bounds: the traced graph and the model disagree on a random input, so bounds would be those of another "
            "function; remove branches on self.training, hooks that change values and in-place operations"
        )
