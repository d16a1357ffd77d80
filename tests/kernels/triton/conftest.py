# SPDX-License-Identifier: Apache-2.0
"""Kernels run on the GPU where there is one, else in Triton's interpreter; unwritten memory shows."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch leaves uninitialised holds NaN, or -7."""

    def spoil(t: Tensor) -> Tensor:
        return t.fill_(float("nan") if t.is_floating_point() else -7)

    def poison(owner: object, name: str) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: spoil(original(*a, **k)))

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        poison(owner, name)
