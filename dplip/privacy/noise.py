# SPDX-License-Identifier: Apache-2.0
"""Gaussian noise from a generator of its own."""

from __future__ import annotations

import hashlib
import secrets

import torch
from torch import Tensor

from dplip.errors import PlanError

__all__ = ["NoiseSource", "derived_seed", "fresh_seed"]


def fresh_seed() -> int:
    """A 63-bit seed from the operating system."""
    return secrets.randbits(63)


def derived_seed(seed: int, *path: int) -> int:
    """A seed for an independent stream, from a fixed one and a path of numbers."""
    digest = hashlib.sha256(repr((seed, *path)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class NoiseSource:
    """Draws the noise of all steps; never touches torch's global generator.

    Args:
        device: where noise is drawn.
        insecure_seed: fixes the noise for tests and reproducible experiments. The result is then *not* private
            against anyone who knows the seed, and reports record it. By default the operating system seeds.

    A resumed run seeds anew, so no released noise is ever drawn twice for different data.
    """

    def __init__(self, device: torch.device | str = "cpu", insecure_seed: int | None = None) -> None:
        self.insecure_seed = insecure_seed
        self._generator = torch.Generator(device)
        self._generator.manual_seed(fresh_seed() if insecure_seed is None else insecure_seed)

    def continue_from(self, steps: int) -> None:
        """Start a stream that no earlier step has used; a run resumes with it."""
        seed = fresh_seed() if self.insecure_seed is None else derived_seed(self.insecure_seed, steps)
        self._generator.manual_seed(seed)

    def add_(self, tensor: Tensor, sigma: float) -> Tensor:
        """Add N(0, sigma^2) to every entry of ``tensor``, in place.

        Raises:
            PlanError: ``tensor`` has less precision than float32, in which noise loses its low bits.
        """
        if tensor.dtype not in (torch.float32, torch.float64):
            raise PlanError(f"noise: expected float32 or float64 gradients, got {tensor.dtype}; keep parameters in float32")
        if sigma > 0:
            noise = torch.empty_like(tensor, memory_format=torch.contiguous_format)
            tensor.add_(noise.normal_(0.0, 1.0, generator=self._generator), alpha=sigma)
        return tensor
