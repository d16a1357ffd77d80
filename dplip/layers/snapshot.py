# SPDX-License-Identifier: Apache-2.0
"""Whether a tensor still holds the values for which something was computed."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import secrets
from collections.abc import Iterator

import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from torch import Tensor

__all__ = ["Snapshot", "unchanged"]

_LONGEST = 2**31 - 1  # bytes that one authentication may cover
_evaluation: contextvars.ContextVar[object | None] = contextvars.ContextVar("evaluation", default=None)


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """Inside, the caller changes no tensor, so each snapshot looks once."""
    token = _evaluation.set(object())
    try:
        yield
    finally:
        _evaluation.reset(token)


class Snapshot:
    """Recognises the values, type and place that ``tensor`` has now.

    By value, not by version counter: a write through ``.data`` must not leave a stale bound behind. On the CPU no copy
    is kept but a 128-bit authentication code of the bytes (GMAC, NIST SP 800-38D) under a random key of this process;
    two different tensors have the same one with probability at most ``bytes / 2^131``, whoever wrote them. Elsewhere a
    copy is compared.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._kind = _kind(tensor)
        self._content: bytes | Tensor = _code(tensor) if _has_code(tensor) else tensor.detach().clone()
        self._seen = self._now(tensor)

    def holds(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is what the snapshot was taken of."""
        if self._kind != _kind(tensor):
            return False
        now = self._now(tensor)
        if now is not None and self._seen == now:
            return True
        content = self._content
        same = _code(tensor) == content if isinstance(content, bytes) else torch.equal(content, tensor.detach())
        if same:
            self._seen = now
        return same

    def same(self, other: Snapshot) -> bool:
        """Whether both were taken of the same values."""
        if self._kind != other._kind or type(self._content) is not type(other._content):
            return False
        mine, theirs = self._content, other._content
        return mine == theirs if isinstance(mine, bytes) else torch.equal(mine, theirs)  # type: ignore[arg-type]

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_seen": None}

    @staticmethod
    def _now(tensor: Tensor) -> tuple[object, int] | None:
        evaluation = _evaluation.get()
        return None if evaluation is None else (evaluation, tensor.data_ptr())


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _has_code(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.numel() * tensor.element_size() <= _LONGEST


@functools.cache
def _cipher() -> AESGCM:
    return AESGCM(secrets.token_bytes(16))


def _code(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if flat.numel() == 0:
        return b""
    # The codes never leave the process, so that one nonce serves them all: their key is a secret, random polynomial.
    return _cipher().encrypt(bytes(12), b"", flat.numpy())
