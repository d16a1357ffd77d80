# SPDX-License-Identifier: Apache-2.0
"""A snapshot sees every change of a value and nothing else."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from dplip.layers import snapshot
from dplip.layers.snapshot import Snapshot, unchanged


@pytest.fixture(params=["code", "copy"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "copy":
        monkeypatch.setattr(snapshot, "_LONGEST", 0)
    return request.param


def flip(x: Tensor, index: int, bit: int) -> None:
    x.view(-1).view(torch.uint8)[index] ^= 1 << bit


def test_every_bit_counts(kind: str) -> None:
    x = torch.randn(3, 5)
    seen = Snapshot(x)
    for index in range(60):
        for bit in (0, 7):
            flip(x, index, bit)
            assert not seen.holds(x)
            flip(x, index, bit)
    assert seen.holds(x)


def test_order_signs_and_zeros_count(kind: str) -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, -3.0]])
    seen = Snapshot(x)
    for other in (x.T, x.flip(0), x.abs(), -x, x.roll(1, 1)):
        assert not seen.holds(other)
    assert seen.holds(x.T.contiguous().T)


def test_two_snapshots_compare(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 5)
    seen = Snapshot(x)
    assert seen.same(Snapshot(x.clone()))
    for other in (x + 1, -x, x.T, x.double(), torch.cat([x, x])):
        assert not seen.same(Snapshot(other))
    monkeypatch.setattr(snapshot, "_LONGEST", 0 if kind == "code" else 2**31 - 1)
    assert not seen.same(Snapshot(x)), "unlike kinds are not compared"


def test_type_shape_and_writes_of_every_kind(kind: str) -> None:
    x = torch.nn.Parameter(torch.ones(4, 2))
    seen = Snapshot(x)
    assert seen.holds(x) and seen.holds(torch.ones(4, 2))
    for other in (torch.ones(2, 4), torch.ones(4, 2, dtype=torch.float64), torch.ones(8), torch.ones(4, 2).int()):
        assert not seen.holds(other)
    x.data.mul_(2)
    assert not seen.holds(x)
    x.data = torch.ones(4, 2)
    assert seen.holds(x)


@pytest.mark.parametrize("shape", [(0,), (3, 0), ()])
def test_small_shapes(kind: str, shape: tuple[int, ...]) -> None:
    assert Snapshot(torch.ones(shape)).holds(torch.ones(shape))


def test_a_promise_lasts_as_long_as_its_block(kind: str) -> None:
    x = torch.ones(3)
    seen = Snapshot(x)
    with unchanged():
        assert seen.holds(x)
        x.data.add_(1)  # the promise is broken, and believed
        assert seen.holds(x)
        assert not seen.holds(x.clone())
    assert not seen.holds(x)
    with unchanged():
        assert not seen.holds(x)
        fresh = Snapshot(x)
    x.data.add_(1)
    with unchanged():
        assert not fresh.holds(x)


def test_promise_ends_with_an_exception() -> None:
    x = torch.ones(3)
    seen = Snapshot(x)
    with pytest.raises(KeyError), unchanged():
        assert seen.holds(x)
        raise KeyError
    x.data.add_(1)
    assert not seen.holds(x)


def test_copies_still_see(kind: str) -> None:
    x = torch.ones(3)
    for clone in (copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))):
        with unchanged():
            other = clone(Snapshot(x))
        assert other.holds(x) and not other.holds(x + 1)


def test_no_copy_is_kept_on_the_cpu() -> None:
    assert isinstance(Snapshot(torch.ones(1000))._content, bytes)
