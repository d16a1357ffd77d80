# SPDX-License-Identifier: Apache-2.0
"""The public set in which inputs live, and the public reference point at its centre."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dplip.errors import ConfigError, DataError
from dplip.norms import Norms

__all__ = ["InputDomain"]


@dataclass(frozen=True)
class InputDomain:
    """Inputs ``x`` of one ``shape`` with ``lower <= x <= upper`` and ``||x - reference||_2 <= l2_radius``.

    All of it is configuration, never measured on private data. Sensitivities hold for inputs in the domain only, so the
    engine checks every batch against it. Infinite bounds are allowed; layers whose gradient grows with the
    input then raise :class:`dplip.errors.UnboundedInputError`.

    Attributes:
        shape: shape of one example.
        lower, upper: bounds on every entry.
        reference: the point at which activations are centred; by default 0.
        l2_radius: bound on the l_2 distance to the reference.
    """

    shape: tuple[int, ...]
    lower: float = -math.inf
    upper: float = math.inf
    reference: float = 0.0
    l2_radius: float = math.inf

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        if not self.shape or min(self.shape) < 1:
            raise ConfigError(f"InputDomain: expected a shape of positive sizes, got {self.shape}; fix it")
        if not self.lower <= self.upper or not math.isfinite(self.reference) or not self.l2_radius >= 0:
            raise ConfigError(
                "InputDomain: expected lower <= upper, a finite reference and l2_radius >= 0, "
                f"got {self.lower}, {self.upper}, {self.reference}, {self.l2_radius}; fix them"
            )

    @property
    def dim(self) -> int:
        """Number of entries of one example."""
        return math.prod(self.shape)

    def centre(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The reference as a batch of one."""
        return torch.full((1, *self.shape), self.reference, dtype=dtype, device=device)

    def radius(self) -> Norms:
        """Bounds on ``||x - reference||`` over the domain."""
        reach = max(abs(self.upper - self.reference), abs(self.lower - self.reference))
        return Norms(self.dim, linf=reach, l2=self.l2_radius)

    def magnitude(self) -> Norms:
        """Bounds on ``||x||`` over the domain."""
        largest = Norms(self.dim, linf=max(abs(self.upper), abs(self.lower)))
        return (Norms(self.dim, linf=abs(self.reference)) + self.radius()).meet(largest)

    def check(self, x: Tensor, where: str) -> None:
        """Raise :class:`DataError` unless every example of the batch ``x`` is finite and in the domain."""
        if tuple(x.shape[1:]) != self.shape:
            raise DataError(f"{where}: expected examples of shape {self.shape}, got {tuple(x.shape[1:])}; reshape them")
        if x.numel() == 0:
            return
        low, high = torch.aminmax(x.detach())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise DataError(f"{where}: expected finite inputs, got NaN or infinity; clean the data before training")
        # A few roundings of x's own dtype, so that public rescaling may land next to the bound but not beyond it.
        unit = 16 * torch.finfo(x.dtype).eps
        slack = unit * max((abs(v) for v in (self.lower, self.upper) if math.isfinite(v)), default=0.0)
        if low < self.lower - slack or high > self.upper + slack:
            raise DataError(
                f"{where}: expected inputs in [{self.lower:g}, {self.upper:g}], got [{float(low):g}, {float(high):g}]; "
                "rescale them by public constants, or start the model with dplip.layers.Clamp"
            )
        if math.isfinite(self.l2_radius):
            farthest = float(torch.linalg.vector_norm((x.detach() - self.reference).flatten(1), dim=1).amax())
            if farthest > self.l2_radius * (1 + 4 * unit):
                raise DataError(
                    f"{where}: expected inputs within l_2 distance {self.l2_radius:g} of the reference, "
                    f"got {farthest:g}; start the model with dplip.layers.BallClip"
                )
