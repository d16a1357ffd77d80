# SPDX-License-Identifier: Apache-2.0
"""Checks, while training, that what the sensitivity was proved for is what runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dplip.bounds import InputDomain
from dplip.bounds.rounding import FLOOR
from dplip.errors import BoundViolation, PlanError
from dplip.norms import Norms
from dplip.privacy.arithmetic import Arithmetic

__all__ = ["Guard", "Part"]


@dataclass(eq=False)
class Part:
    """The batch that the next backward pass may use: a whole Poisson draw, or one of its disjoint parts.

    Attributes:
        step: number of the step it was handed out in.
        draw: number of the draw it is a part of.
        index: its place among the draw's parts.
        last: whether no other part of the draw follows.
        rows: how many examples it holds; None where that is not known.
        passes: backward passes seen.
    """

    step: int = 0
    draw: int = 0
    index: int = 0
    last: bool = True
    rows: int | None = None
    passes: int = 0


class Guard:
    """Hooks on the private module and its parameters; each failure is raised before any noise is spent on the step.

    * Inputs of a training forward pass must lie in the public domain, finite.
    * Float32 must mean float32 (:class:`Arithmetic`).
    * The gradient that arrives at the logits must respect the loss's bounds, example by example: catches another
      loss than the one declared, a weighted one, a sum over several calls. The tolerance is a tenth of
      :data:`dplip.bounds.rounding.FLOOR`, the slack that every sensitivity carries.
    * One backward pass per step: a second one would add an example's gradient twice. A step may be spread over the
      disjoint parts of one Poisson draw (:meth:`open`): one backward pass for each, none from another draw.
    * No gradient from anywhere else: a backward pass through the module in evaluation mode, or through a part of
      it alone, reaches the parameters without passing the checks above.

    The hooks stay outside compiled code. Code compiled before they were there passes them by; its gradients then arrive
    unchecked and are refused.

    A deep copy of the module carries hooks that do nothing: its gradients are not the ones that are released.

    Args:
        module: the private module.
        domain: where its inputs must lie.
        cotangent: bounds on one row's logit gradient.
        copies: rows of the module's input that belong to one example.
        arithmetic: refuses low precision.
        on_forward: called at every checked forward pass.
    """

    def __init__(
        self,
        module: nn.Module,
        domain: InputDomain,
        cotangent: Norms,
        on_forward: Callable[[], None] | None = None,
        *,
        copies: int = 1,
        arithmetic: Arithmetic | None = None,
    ) -> None:
        self.domain, self.cotangent, self.on_forward = domain, cotangent, on_forward
        self.copies, self.arithmetic = copies, arithmetic
        self.active = True
        self._step = self._draw = 0
        self.start_step()
        self._handles = [
            module.register_forward_pre_hook(self._check_input, with_kwargs=True),
            module.register_forward_hook(self._watch_output),
            *(p.register_post_accumulate_grad_hook(self._arrived) for p in module.parameters() if p.requires_grad),
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> Guard:
        inert = object.__new__(Guard)
        inert.active = False
        return inert

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def start_step(self) -> None:
        """Begin the next step, on a whole draw until :meth:`open`; only after gradients were released or dropped."""
        self._step += 1
        self._draw += 1
        self.part = Part(self._step, self._draw)
        self._opened = False
        self._used: list[Part] = []
        self.forget()

    def forget(self) -> None:
        """Forget the backward passes since the last step; only after their gradients were zeroed."""
        for part in self._used:
            part.passes = 0
        self._used = []
        self._checked: set[int] = set()  # numbers of backward calls
        self._arrivals: dict[int, set[int]] = {}  # by parameter, those that reached it

    @property
    def backward_passes(self) -> int:
        """Backward passes through the module since the last step."""
        return sum(part.passes for part in self._used)

    def open(self, *, last: bool, rows: int | None = None) -> Part:
        """The next batch is a part of a Poisson draw, disjoint from the draw's other parts.

        It belongs to the draw of the part before it unless that one was the last.

        Args:
            last: whether the draw ends with it.
            rows: how many examples it holds.

        Raises:
            PlanError: the part before it went without a backward pass. A loader that fetches ahead would let examples
                of two draws meet in one step.
        """
        if self._opened and self.part.passes == 0:
            raise PlanError(
                "step: expected a backward pass on every part of a draw before the next is fetched, got none on "
                f"part {self.part.index}; do not skip parts or fetch ahead, or call optimizer.discard()"
            )
        index = self.part.index + 1 if self._opened and not self.part.last else 0
        if index == 0:
            self._draw += 1
        self.part = Part(self._step, self._draw, index, last, rows)
        self._opened = True
        return self.part

    def require_one_backward(self) -> None:
        """Raise :class:`PlanError` if examples may have contributed more than once or unchecked since the last step."""
        most = max((part.passes for part in self._used), default=0)
        if most > 1:
            raise PlanError(
                f"step: expected at most one backward pass through the model per step, got {most}; "
                "call optimizer.step() and optimizer.zero_grad() after each, so no example counts twice "
                "(dplip.privacy.virtual_batches spreads a step over several)"
            )
        if any(part.step != self._step for part in self._used):
            raise PlanError(
                "step: expected gradients of this step's weights, got a backward pass of a forward pass made before "
                "the last step; call zero_grad() and start with module(x)"
            )
        draws = {part.draw for part in self._used}
        if len(draws) > 1:
            raise PlanError(
                f"step: expected the parts of one Poisson draw, got backward passes on {len(draws)} draws; "
                "an example in two of them would count twice, call zero_grad() before each draw"
            )
        unchecked = len(set().union(*self._arrivals.values()) - self._checked)
        if unchecked:
            raise PlanError(
                "step: expected gradients from one call of the private module in training mode, "
                f"got {unchecked} unchecked; call module.train() and module(x), then zero_grad()"
            )

    @torch._disable_dynamo  # type: ignore[untyped-decorator]
    def _check_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (self.active and module.training and torch.is_grad_enabled()):
            return
        for x in (*args, *kwargs.values()):
            self.domain.check(x, "training input")
            if self.part.rows is not None and len(x) > self.part.rows * self.copies:
                raise PlanError(
                    f"training input: expected the {self.part.rows} examples that the loader handed out, got "
                    f"{len(x)} rows; train on each part as it comes"
                )
            if self.arithmetic is not None:
                self.active = False  # it runs the layers, perhaps this module itself
                try:
                    self.arithmetic.check(x)
                finally:
                    self.active = True
        if self.on_forward is not None:
            self.on_forward()

    @torch._disable_dynamo  # type: ignore[untyped-decorator]
    def _watch_output(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.active and module.training and output.requires_grad:
            output.register_hook(functools.partial(self._check_cotangent, self.part))

    def _arrived(self, p: Tensor) -> None:
        if self.active:
            self._arrivals.setdefault(id(p), set()).add(torch._C._current_graph_task_id())

    @torch.no_grad()
    def _check_cotangent(self, part: Part, g: Tensor) -> None:
        part.passes += 1
        if not any(part is used for used in self._used):
            self._used.append(part)
        self._checked.add(torch._C._current_graph_task_id())
        if g.numel() == 0:
            return
        rows, tolerance = g.flatten(1), FLOOR.get(g.dtype, 0.0) / 10
        for name, p in (("l1", 1.0), ("l2", 2.0), ("linf", float("inf"))):
            worst, allowed = float(torch.linalg.vector_norm(rows, p, dim=1).amax()), getattr(self.cotangent, name)
            if not worst <= allowed * (1 + tolerance):  # also catches NaN
                raise BoundViolation(
                    f"loss: expected one example's logit gradient to have {name} norm <= {allowed:g}, got {worst:g}; "
                    "train with the loss given to make_private, summed over the batch, without weights"
                )
