# SPDX-License-Identifier: Apache-2.0
"""How much of each released gradient is signal: read off what was released, so it costs nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dplip.privacy.optimizer import ClipFreeOptimizer

__all__ = ["GradientToNoise", "TensorSignal"]


@dataclass(frozen=True)
class TensorSignal:
    """Of one tensor's released gradient, in units of the mean gradient (after the public divisor).

    Attributes:
        released: its l_2 norm.
        noise: root mean square norm of the noise in it, ``sigma sqrt(d) / (q N)``.
        signal: ``sqrt(max(0, mean of released^2 - noise^2))``, the estimate of the true gradient's norm.
    """

    released: float
    noise: float
    signal: float

    @property
    def ratio(self) -> float:
        """``signal / noise``; infinite without noise."""
        return self.signal / self.noise if self.noise > 0 else math.inf


class GradientToNoise:
    """Watches a :class:`ClipFreeOptimizer` and estimates the gradient-to-noise ratio of every tensor.

    For a released ``v = g + n`` with Gaussian ``n`` independent of ``g``, ``E ||v||^2 = ||g||^2 + d sigma^2``. The
    squares are averaged over steps with weight ``decay``, since one step's estimate has a standard deviation of order
    ``sigma^2 sqrt(2 d)``. Uses the noisy gradient and public noise scales only: post-processing, no privacy cost.

    Args:
        optimizer: the optimizer to watch; an optimizer that rewrites ``p.grad`` in its step would falsify the reading.
        decay: weight of the past in the running means, in [0, 1).
    """

    def __init__(self, optimizer: ClipFreeOptimizer, decay: float = 0.9) -> None:
        self.decay = decay
        self._squares: dict[str, tuple[float, float, float]] = {}
        optimizer.attach_step_hook(self._watch)

    @torch.no_grad()
    def _watch(self, optimizer: ClipFreeOptimizer) -> None:
        for name, p in optimizer.sensitivity.trainable.items():
            if p.grad is None:
                continue
            sharded = getattr(p.grad, "full_tensor", None)  # its norm is a collective, as the step was
            gradient = p.grad if sharded is None else sharded()
            released = float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2
            noise = optimizer.released_sigma[name] ** 2 * p.numel() / optimizer.expected_batch_size**2
            weight, r, n = self._squares.get(name, (0.0, 0.0, 0.0))
            d = self.decay
            self._squares[name] = (d * weight + 1 - d, d * r + (1 - d) * released, d * n + (1 - d) * noise)

    def tensors(self) -> dict[str, TensorSignal]:
        """The reading per tensor; empty before the first step."""
        found = {}
        for name, (weight, r, n) in self._squares.items():
            found[name] = TensorSignal(
                math.sqrt(r / weight), math.sqrt(n / weight), math.sqrt(max(0.0, r - n) / weight)
            )
        return found

    def metrics(self) -> dict[str, float]:
        """``{"gradient_to_noise/<tensor>": ratio}``, for a logger."""
        return {f"gradient_to_noise/{name}": t.ratio for name, t in self.tensors().items()}
