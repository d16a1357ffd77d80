# SPDX-License-Identifier: Apache-2.0
"""Gaussian noise from streams of its own."""

from __future__ import annotations

import hashlib
import secrets

import numpy as np
import torch
from torch import Tensor

from dplip.errors import PlanError

__all__ = ["NoiseSource", "derived_seed", "fresh_seed", "host_stream"]


def fresh_seed() -> int:
    """A 128-bit seed from the operating system."""
    return secrets.randbits(128)


def derived_seed(seed: int, *path: int | str) -> int:
    """A 128-bit seed for an independent stream, from a fixed one and a path of names and numbers."""
    digest = hashlib.sha256(repr((seed, *path)).encode()).digest()
    return int.from_bytes(digest[:16], "big")


def host_stream(insecure_seed: int | None, *path: int | str) -> np.random.Generator:
    """A Philox stream keyed by 128 bits: of the operating system, or of ``insecure_seed`` and ``path``.

    torch's own CPU generator is not used because it keeps 32 bits of a seed, few enough to try them all.
    """
    seed = fresh_seed() if insecure_seed is None else derived_seed(insecure_seed, *path)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))


class NoiseSource:
    """Draws the noise of all steps; never touches torch's or numpy's global generator.

    Noise is drawn in float64 and the noisy sum rounded once: a float32 normal never leaves +-5.8 standard deviations
    (Box-Muller on a 24-bit uniform), so one value just outside would prove that an example took part.

    Args:
        device: where noise is drawn.
        insecure_seed: fixes the noise for tests and reproducible experiments. The result is then *not* private
            against anyone who knows the seed, and reports record it. By default the operating system seeds.

    A resumed run seeds anew, so no released noise is ever drawn twice for different data.
    """

    def __init__(self, device: torch.device | str = "cpu", insecure_seed: int | None = None) -> None:
        self.device, self.insecure_seed = torch.device(device), insecure_seed
        self.continue_from(0)

    def continue_from(self, steps: int) -> None:
        """Start a stream that no earlier step has used; a run resumes with it."""
        self._host = host_stream(self.insecure_seed, "noise", steps)
        self._cuda: torch.Generator | None = None
        if self.device.type == "cuda":
            self._cuda = torch.Generator(self.device)
            self._cuda.manual_seed(int(self._host.integers(2**63)))

    def _normal(self, tensor: Tensor) -> Tensor:
        if self._cuda is not None and tensor.is_cuda:
            empty = torch.empty(tensor.shape, dtype=torch.float64, device=tensor.device)
            return empty.normal_(generator=self._cuda)
        return torch.as_tensor(self._host.standard_normal(tuple(tensor.shape))).to(tensor.device)

    @torch.no_grad()
    def add_(self, tensor: Tensor, sigma: float) -> Tensor:
        """Add N(0, sigma^2) to every entry of ``tensor``, in place.

        Raises:
            PlanError: ``tensor`` has less precision than float32, in which noise loses its low bits.
        """
        if tensor.dtype not in (torch.float32, torch.float64):
            raise PlanError(
                f"noise: expected float32 or float64 gradients, got {tensor.dtype}; keep parameters in float32"
            )
        if sigma > 0:
            tensor.copy_(self._normal(tensor).mul_(sigma).add_(tensor))
        return tensor
