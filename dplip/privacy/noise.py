# SPDX-License-Identifier: Apache-2.0
"""Gaussian noise from streams of its own."""

from __future__ import annotations

import hashlib
import itertools
import os
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dplip.errors import PlanError
from dplip.privacy.normals import KEY_BITS, Normals

__all__ = ["NoiseSource", "derived_seed", "fresh_seed", "host_stream"]

_CUDA_BLOCK = 1 << 22


def fresh_seed() -> int:
    """A 128-bit seed from the operating system."""
    return secrets.randbits(KEY_BITS)


def derived_seed(seed: int, *path: int | str) -> int:
    """A 128-bit seed for an independent stream, from a fixed one and a path of names and numbers."""
    digest = hashlib.sha256(repr((seed, *path)).encode()).digest()
    return int.from_bytes(digest[: KEY_BITS // 8], "big")


def host_stream(insecure_seed: int | None, *path: int | str) -> np.random.Generator:
    """A Philox stream keyed by 128 bits: of the operating system, or of ``insecure_seed`` and ``path``.

    torch's own CPU generator is not used because it keeps 32 bits of a seed, few enough to try them all.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(_seed(insecure_seed, *path))))


def _seed(insecure_seed: int | None, *path: int | str) -> int:
    return fresh_seed() if insecure_seed is None else derived_seed(insecure_seed, *path)


class NoiseSource:
    """Draws the noise of all steps; never touches torch's or numpy's global generator.

    Noise is drawn in float64 and the noisy sum rounded once: a float32 normal never leaves +-5.8 standard deviations
    (Box-Muller on a 24-bit uniform), so one value just outside would prove that an example took part, and its low bits
    would show through wherever a sum cancels. On the CPU the random bits come from AES under a 128-bit key
    (:class:`Normals`); on a GPU from the device's Philox generator, which keeps 63 bits of its seed.

    Noise is drawn when it is needed and in blocks that stay in the cache: nothing is drawn ahead, so an exception, a
    fork or a resumed run leaves no buffer behind that could be released twice. A forked process, a copy and an
    unpickled source start new streams, as does a resumed run.

    Args:
        device: where noise is drawn.
        insecure_seed: fixes the noise for tests and reproducible experiments, whatever the number of threads. The
            result is then *not* private against anyone who knows the seed, and reports record it; forks and copies
            repeat it. By default the operating system seeds.
    """

    def __init__(self, device: torch.device | str = "cpu", insecure_seed: int | None = None) -> None:
        self.device, self.insecure_seed = torch.device(device), insecure_seed
        self.continue_from(0)

    def continue_from(self, steps: int) -> None:
        """Start a stream that no earlier step has used; a run resumes with it."""
        self._steps, self._process = steps, os.getpid()
        self._normals = Normals(_seed(self.insecure_seed, "noise", steps))
        self._cuda: torch.Generator | None = None
        if self.device.type == "cuda":
            self._cuda = torch.Generator(self.device)
            self._cuda.manual_seed(_seed(self.insecure_seed, "noise on the device", steps) >> (KEY_BITS - 63))

    def __getstate__(self) -> dict[str, Any]:
        return {"device": self.device, "insecure_seed": self.insecure_seed, "steps": self._steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.device, self.insecure_seed = state["device"], state["insecure_seed"]
        self.continue_from(state["steps"])

    def _draw(self, n: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """Blocks (offset, normals) of one draw of ``n``; a reader may overwrite a block."""
        if os.getpid() != self._process and self.insecure_seed is None:
            self.continue_from(self._steps)  # the parent goes on with the old streams
        if self._cuda is None or device.type != "cuda":
            yield from self._normals.blocks(n)
            return
        for start in range(0, n, _CUDA_BLOCK):
            block = torch.empty(min(_CUDA_BLOCK, n - start), dtype=torch.float64, device=device)
            yield start, block.normal_(generator=self._cuda)

    def add_(self, tensor: Tensor, sigma: float) -> Tensor:
        """Add N(0, sigma^2) to every entry of ``tensor``, in place.

        Raises:
            PlanError: ``tensor`` has less precision than float32, in which noise loses its low bits.
        """
        self.release_([tensor], [sigma])
        return tensor

    @torch.no_grad()
    def release_(self, sums: Sequence[Tensor], sigmas: Sequence[float], divisor: float = 1.0) -> None:
        """``(sum + N(0, sigma^2)) / divisor`` in every entry, in place, computed in float64 and rounded once.

        Raises:
            PlanError: a tensor has less precision than float32, in which noise loses its low bits; none is changed.
        """
        for tensor in sums:
            if tensor.dtype not in (torch.float32, torch.float64):
                raise PlanError(
                    f"noise: expected float32 or float64 gradients, got {tensor.dtype}; keep parameters in float32"
                )
        noisy: dict[torch.device, list[tuple[Tensor, float]]] = {}
        for tensor, sigma in zip(sums, sigmas, strict=True):
            if sigma > 0:
                noisy.setdefault(tensor.device, []).append((tensor, sigma))
            elif divisor != 1:
                tensor.div_(divisor)
        for device, pairs in noisy.items():
            self._add_to_all_(device, pairs, divisor)

    def _add_to_all_(self, device: torch.device, pairs: list[tuple[Tensor, float]], divisor: float) -> None:
        # One draw for all tensors, laid end to end, so that many small ones cost no more than one large one.
        flat = [tensor.reshape(-1) for tensor, _ in pairs]  # a copy where the layout asks for one
        ends = list(itertools.accumulate(f.numel() for f in flat))
        scratch = torch.empty(0, dtype=torch.float64, device=device)
        for offset, block in self._draw(ends[-1], device):
            normals = block.to(device)
            first = next(k for k, end in enumerate(ends) if end > offset) if normals.numel() else len(ends)
            done = 0
            for k in range(first, len(ends)):
                if done == normals.numel():
                    break
                part = flat[k][offset + done - (ends[k] - flat[k].numel()) :][: normals.numel() - done]
                noise = normals[done : done + part.numel()].mul_(pairs[k][1] / divisor)
                if part.dtype == torch.float64:
                    part.copy_(noise.add_(part, alpha=1 / divisor))
                else:
                    if scratch.numel() < part.numel():
                        scratch = torch.empty(part.numel(), dtype=torch.float64, device=device)
                    wide = scratch[: part.numel()].copy_(part)
                    part.copy_(noise.add_(wide, alpha=1 / divisor))
                done += part.numel()
        for (tensor, _), f in zip(pairs, flat, strict=True):
            if f.data_ptr() != tensor.data_ptr():
                tensor.copy_(f.view(tensor.shape))
