# SPDX-License-Identifier: Apache-2.0
"""Independent standard normals in float64 from the AES block cipher, block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from torch import Tensor

__all__ = ["KEY_BITS", "Normals"]

KEY_BITS = 128

# torch splits an elementwise operation in pieces of 32768 entries, so a block this long keeps two threads busy while
# its 1.5 MiB stay in their caches.
_PAIRS = 65536
_SMALL = 2.0**-20  # below it, a uniform number gets further bits
_RADIUS, _ANGLE, _FURTHER = range(3)


class Normals:
    """A key and a counter of draws; draw ``c`` of a key is a fixed sequence, and no two draws share a random bit.

    Pair ``i`` of a draw is ``r cos(a), r sin(a)`` with ``r = sqrt(-2 ln u)`` (Box and Muller, Annals of Mathematical
    Statistics 1958); ``u`` and ``a`` are made from one 64-bit word each. The words are AES-128 in counter mode (NIST SP
    800-38A), under a counter block of (draw, purpose, position): whoever cannot break AES sees true randomness, and the
    sequence does not depend on the number of threads or on the block length.

    Every operation is float64. ``u`` is rounded to a multiple of 2^-54; in the one case in a million where it is below
    2^-20 another word supplies the bits beneath, so normals reach 12 standard deviations.

    Args:
        key: an integer of :data:`KEY_BITS` bits.
    """

    def __init__(self, key: int) -> None:
        self._key = key.to_bytes(KEY_BITS // 8, "big")
        self._draws = 0

    def _words(self, draw: int, purpose: int) -> CipherContext:
        counter = draw.to_bytes(6, "big") + purpose.to_bytes(2, "big") + bytes(8)
        return Cipher(algorithms.AES(self._key), modes.CTR(counter)).encryptor()

    def blocks(self, n: int) -> Iterator[tuple[int, Tensor]]:
        """The next draw: ``n`` normals as pairs (offset, block), which together cover ``0 .. n - 1`` once.

        A block may be overwritten by its reader and is only valid until the next one. A draw that is not read to its
        end is never taken up again.
        """
        draw, self._draws = self._draws, self._draws + 1  # counted before anything leaves
        half = (n + 1) // 2
        if n == 0:
            return
        radius, angle, further = (self._words(draw, purpose) for purpose in (_RADIUS, _ANGLE, _FURTHER))
        length = min(half, _PAIRS)
        words = torch.empty(2, length, dtype=torch.int64, device="cpu")
        cosines = torch.empty(length, dtype=torch.float64, device="cpu")
        middle = torch.tensor(0.5, dtype=torch.float64, device="cpu")
        for start in range(0, half, length):
            size = min(length, half - start)
            integers = words[:, :size]
            _fill(radius, integers[0])
            _fill(angle, integers[1])
            r, a = integers[0].view(torch.float64), integers[1].view(torch.float64)
            c = cosines[:size]
            r.copy_(integers[0])  # signed 64-bit integers become numbers, in place
            torch.add(middle, r, alpha=2.0**-64, out=r)
            if float(r.amin()) < _SMALL:
                _extend(r, further)
            r.log_().mul_(-2).sqrt_()
            a.copy_(integers[1]).mul_(math.pi * 2.0**-63)
            torch.cos(a, out=c)
            a.sin_().mul_(r)
            r.mul_(c)
            yield start, r
            yield half + start, a[: n - half - start]

    def fill_(self, tensor: Tensor) -> Tensor:
        """Fill a flat float64 tensor on the CPU; returns it."""
        for start, block in self.blocks(tensor.numel()):
            tensor[start : start + block.numel()] = block
        return tensor


def _fill(cipher: CipherContext, words: Tensor) -> None:
    """The next ``len(words)`` words of the key stream: the cipher is added to zeros."""
    words.zero_()
    raw = memoryview(words.numpy()).cast("B")
    cipher.update_into(raw, raw)


def _extend(u: Tensor, further: CipherContext) -> None:
    """Undo the rounding of every ``u < 2^-20``: a uniform number of (-2^-55, 2^-55) is added, 0 being reflected."""
    small = u < _SMALL
    words = torch.empty(int(small.sum()), dtype=torch.int64, device="cpu")
    _fill(further, words)
    # An odd multiple of 2^-108, never 0: the logarithm is finite.
    u[small] = (u[small] + ((words >> 11).double() + 0.5) * 2.0**-107).abs()
