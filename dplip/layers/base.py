# SPDX-License-Identifier: Apache-2.0
"""The contract every Lipschitz layer signs."""

from __future__ import annotations

import abc
import math
from typing import NamedTuple

from torch import Tensor, nn

from dplip.errors import NoRuleError
from dplip.norms import Norms, OperatorNorms

__all__ = ["LipschitzLayer", "Shapes", "Size"]

Size = tuple[int, ...]


class Shapes(NamedTuple):
    """Shapes of one example (no batch axis) at a layer's input and output."""

    input: Size
    output: Size

    @property
    def in_dim(self) -> int:
        return math.prod(self.input)

    @property
    def out_dim(self) -> int:
        return math.prod(self.output)


class LipschitzLayer(nn.Module, abc.ABC):
    """A layer ``y = f(x; theta)`` that acts on each example by itself and knows its own bounds.

    Tensors carry the batch first; ``shapes`` never does. A layer must not mix examples, must not update
    state in ``forward`` and must accept an empty batch. Let ``J`` range over the Jacobians of ``f`` in
    ``x`` for the current parameters. Then the five rules below hold for every input, and
    :class:`dplip.testing.LayerContract` tests each of them with random and with extreme values.

    Only :meth:`operator_norms` is mandatory for a layer without parameters; one with parameters adds
    :meth:`param_sensitivity` and :meth:`per_sample_grad`, and :meth:`project_` if they live in a set.
    """

    @abc.abstractmethod
    def operator_norms(self, shapes: Shapes) -> OperatorNorms:
        """Upper bounds on ``||J||`` in the five operator norms, for the current parameters."""

    def range_bound(self, shapes: Shapes) -> Norms | None:
        """Bounds on ``||f(x)||`` over *all* inputs, or None where the output is unbounded."""
        return None

    def output_bound(self, x: Norms, shapes: Shapes) -> Norms:
        """Bounds on ``||f(x) - f(c)||`` where ``x`` bounds ``||x - c||``."""
        norms = self.operator_norms(shapes).closed(shapes.in_dim, shapes.out_dim)
        return norms.push(x, shapes.out_dim)

    def cotangent_bound(self, g: Norms, shapes: Shapes) -> Norms:
        """Bounds on one example's ``||dL/dx||`` where ``g`` bounds its ``||dL/dy||``."""
        norms = self.operator_norms(shapes).closed(shapes.in_dim, shapes.out_dim)
        return norms.pull(g, shapes.in_dim)

    def param_sensitivity(self, x: Norms, g: Norms, shapes: Shapes) -> dict[str, float]:
        """For each parameter, a bound on the l_2 norm of one example's gradient.

        Args:
            x: bounds on ``||x||`` (the activation itself, not its distance to the reference).
            g: bounds on the example's cotangent ``||dL/dy||``.
            shapes: one example's input and output shape.

        Returns:
            ``{name: bound}`` with exactly the names of :meth:`torch.nn.Module.named_parameters`.
        """
        self._require_no_parameters("param_sensitivity")
        return {}

    def per_sample_grad(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        """Per-example gradients ``{name: [B, *parameter.shape]}`` for input ``x`` and cotangent ``g``."""
        self._require_no_parameters("per_sample_grad")
        return {}

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Elementwise bounds on ``f`` over the box ``lower <= x <= upper``.

        Raises:
            NoRuleError: the layer has no interval rule.
        """
        raise NoRuleError(
            f"{type(self).__name__}.interval: expected an interval rule, got none; "
            "override interval(lower, upper) or use method='margin'"
        )

    def project_(self) -> None:
        """Put the parameters back into their constraint set, in place. Post-processing: costs no privacy."""

    def refuses_certificate(self) -> str | None:
        """Why this layer, as it stands, is not the function to certify; None where it is."""
        return None

    def fan_in(self, shapes: Shapes) -> int:
        """How many rounded additions enter one output; 0 where ``f`` only selects or copies values."""
        return 0

    def _require_no_parameters(self, rule: str) -> None:
        if any(True for _ in self.parameters()):
            raise NoRuleError(
                f"{type(self).__name__}.{rule}: expected a rule for "
                f"{[n for n, _ in self.named_parameters()]}, got none; override {rule}"
            )
